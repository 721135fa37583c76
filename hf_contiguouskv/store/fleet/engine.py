"""The protocol between a fleet's store and the engine that holds its objects.

An engine keeps objects under names, for many machines at once. It differs from a disk: an object may vanish while it is
read, a call may never come back, and nothing can be renamed. So the protocol asks for little: objects are written once
and whole, and every answer is either right, missing or an error. Nothing above this protocol knows which engine it
is.

How a name is found differs, so it is no part of what all engines do. A `ListingEngine` lists what lies below a folder;
a `KeyValueEngine` cannot, but says of many names at once which of them exist. An engine is one of the two.

Errors: `FileNotFoundError` for an object that is not there, or not any more; `EngineUnavailableError` for an engine
that does not answer, or not in time; `PermissionError` for credentials that are missing or not enough; `EOFError` for
an object that ends too early; `OSError` for everything else that it refuses. No message holds credentials.

Time: reads and listings end by the deadline of the context (`deadline.seconds_left`), with `DeadlineError` where they
are not done by then.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

# Where in an object, and the writable memory that is filled from there.
Range = tuple[int, memoryview]


class EngineUnavailableError(OSError):
    """The engine does not answer, not in time, or is not asked because it did not lately; the objects may be sound."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.ETIMEDOUT, message)


class DeadlineError(EngineUnavailableError):
    """The look-up's time is over. That says nothing of the engine."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """What `SharedEngine.read_ranges` brought.

    Attributes:
        nbytes: bytes that were asked of the engine, with what lies between ranges that were read together.
        version: tells this content of the object from another one under its name; `None` if the engine cannot.
        size: length of the object in bytes.
    """

    nbytes: int
    version: str | None
    size: int


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object.

    Attributes:
        name: its name below the root of the store.
        nbytes: its length in bytes.
        modified: when it was written, seconds since the epoch, by the clock of the engine.
    """

    name: str
    nbytes: int
    modified: float


@runtime_checkable
class SharedEngine(Protocol):
    """A place for objects that many machines share. Its methods are called by several threads at once.

    Attributes:
        name: of the store, for messages: its URL without credentials.
        is_volatile: whether an object may vanish at any moment, because the engine needs room or has forgotten all.
            Then the engine evicts what nobody uses by itself, and what vanished is sent again.
        requests: how many requests of each kind that is charged for it has sent: `gets`, `lists` and `puts`, to which
            an object store counts each page of a listing and each part of an upload. Requests that a library below
            sent again by itself are not counted. Empty where nothing is charged for.
    """

    name: str
    is_volatile: bool
    requests: Mapping[str, int]

    def create(self, name: str, octets: bytes) -> bool:
        """Write a small object unless there is one of this name, atomically.

        Returns:
            whether this call wrote it. False: another one was faster, and its object stays.
        """
        ...

    def put(self, name: str, octets: bytes) -> None:
        """Write a small object, whole or not at all; it replaces one of this name."""
        ...

    def put_many(self, names: Sequence[str]) -> None:
        """Write empty objects of these names, in any order."""
        ...

    def upload(self, name: str, path: Path) -> None:
        """Write a large object from an open file's path, whole or not at all. Nobody sees a part of it."""
        ...

    def get(self, name: str, max_bytes: int) -> bytes:
        """A small object, whole.

        Raises:
            FileNotFoundError: there is none.
            OSError: it has more than `max_bytes` (`EFBIG`).
        """
        ...

    def read_ranges(self, name: str, ranges: Sequence[Range], version: str | None = None) -> Fetched:
        """Fill each buffer from its offset of the object `name`.

        No buffer is written after this call has returned or raised, whatever is still under way in the engine.

        Args:
            name: of the object.
            ranges: offsets and buffers.
            version: as an earlier call returned it: another content is refused.

        Raises:
            FileNotFoundError: it is not there any more, or has another content.
            EOFError: it ends before a range does.
        """
        ...

    def walk(self, folder: str) -> Iterator[ObjectInfo]:
        """All that lies below a folder, at whatever price.

        Raises:
            OSError: this engine cannot tell (`EOPNOTSUPP`); the message says what it needs.
        """
        ...

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects; those that are not there are left out."""
        ...

    def close(self) -> None:
        """Let go of connections and threads. May be called more than once."""
        ...


@runtime_checkable
class ListingEngine(SharedEngine, Protocol):
    """An engine that lists what lies below a folder."""

    def list_each(self, folders: Sequence[str], limit: int) -> list[list[ObjectInfo]]:
        """What lies below each of these folders, at most `limit` of each: one round trip for all of them.

        A folder that is not there holds nothing.
        """
        ...


@runtime_checkable
class KeyValueEngine(SharedEngine, Protocol):
    """An engine that has no folders, and answers for many names at once."""

    def which_exist(self, names: Sequence[str]) -> list[bool]:
        """Which of these objects exist: one round trip for every thousand of them, whatever the store's size.

        Of a large object, this says that it was written; parts of it may have vanished since.
        """
        ...

    def get_each(self, names: Sequence[str], max_bytes: int) -> list[bytes | None]:
        """Small objects, whole; `None` for those that are not there, or have more than `max_bytes`."""
        ...

    def put_each(self, objects: Mapping[str, bytes], *, replace: bool) -> None:
        """Write small objects, in any order.

        Args:
            objects: their contents by name.
            replace: whether they replace those of their names. Otherwise these stay.
        """
        ...
