"""What the library itself asks of an open store."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ..errors import StoreClosedError
from .finding import Finder
from .parts import StoreParts
from .publishing import Publisher
from .room import Room

Result = TypeVar("Result")


class StoreInner:
    """The inside of one `PrefixStore`, for this library alone; it may change in any release.

    Args:
        path: of the store, for messages.
        parts: what it is made of.
        max_disk_bytes: bound on what the tenant's segments take up; `None`: no bound.
        ttl_s: seconds after which an unused segment expires; `None`: never.

    Attributes:
        parts: what the store is made of; `index`, `tenant`, `key`, `opener` are among them.
        finder: finds and proves the longest stored beginning of a prompt.
        room: evicts and expires segments.
        publisher: begins segments and puts them into service.
        is_closed: whether the store was closed.
    """

    def __init__(self, path: Path, parts: StoreParts, *, max_disk_bytes: int | None, ttl_s: float | None) -> None:
        self._path = path
        self.parts = parts
        self.index, self.tenant, self.key, self.opener = parts.index, parts.tenant, parts.key, parts.opener
        self.finder = Finder(parts, ttl_s)
        self.room = Room(parts, max_disk_bytes=max_disk_bytes, ttl_s=ttl_s)
        self.publisher = Publisher(parts, self.finder, self.room)
        self.is_closed = False

    def require_open(self) -> None:
        """Refuse to go on when the store was closed.

        Raises:
            StoreClosedError: it was.
        """
        if self.is_closed:
            raise StoreClosedError(f"{self._path}: the store is closed")

    def read(self, query: Callable[[sqlite3.Connection], Result]) -> Result:
        """Run `query`, which only reads, on one state of the index.

        Raises:
            StoreClosedError: the store was closed.
            StoreError: the index cannot be read.
        """
        self.require_open()
        return self.index.read(query)

    def write(self, change: Callable[[sqlite3.Connection], Result]) -> Result:
        """Run `change` as one transaction of the index that excludes all other writers.

        Raises:
            StoreClosedError: the store was closed.
            StoreError: the index cannot be written.
        """
        self.require_open()
        return self.index.write(change)
