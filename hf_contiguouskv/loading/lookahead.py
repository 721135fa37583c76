"""Starts reads ahead of compute, in order, within a limit of bytes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

# Starts a read, and returns whether it did. Called with `False`, it starts the read only if memory has room for it.
Start = Callable[[bool], bool]


class Lookahead:
    """Starts reads in order while at most `limit` bytes are under way or unused. At least one read always is started.

    Args:
        limit: bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._waiting: deque[tuple[int, int, Start]] = deque()
        self._open: dict[int, int] = {}

    def add(self, key: int, nbytes: int, start: Start) -> None:
        """Queue a read of `nbytes` for `key` (a layer index)."""
        self._waiting.append((key, nbytes, start))

    def pump(self) -> None:
        """Start the reads that fit."""
        while self._waiting:
            key, nbytes, start = self._waiting[0]
            if self._open and sum(self._open.values()) + nbytes > self.limit:
                return
            if not start(False):
                return
            self._waiting.popleft()
            self._open[key] = self._open.get(key, 0) + nbytes

    def need(self, key: int) -> None:
        """Start the reads for `key` now, whatever the limit is (layers may run in any order)."""
        mine = [entry for entry in self._waiting if entry[0] == key]
        for entry in mine:
            self._waiting.remove(entry)
            _, nbytes, start = entry
            self._open[key] = self._open.get(key, 0) + nbytes
            start(True)

    def used(self, key: int) -> None:
        """The bytes of `key` have been used: start the reads that fit now."""
        self._open.pop(key, None)
        self.pump()
