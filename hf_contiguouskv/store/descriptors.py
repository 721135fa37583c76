"""The descriptors of open files, of which a process has few: those that were not used for long are given back.

A prefix may be made of thousands of segments, and each of their files takes two descriptors. Those of the files that
were read last stay open; another file is opened again when it is read.
"""

from __future__ import annotations

import errno
import os
import resource
import threading
import weakref
from collections.abc import Callable
from itertools import count
from typing import Protocol, TypeVar

# Files of this library that a process keeps open at most, and the part of its descriptors (two a file) that it leaves
# to everything else: a half.
_MAX_FILES = 512
_FILES_PER_DESCRIPTOR = 4
_FEW = 4
_NONE_LEFT = (errno.EMFILE, errno.ENFILE)

# Files that are closed at once, where there are too many: one of so many of them.
_CLOSED_TOGETHER = 8

Result = TypeVar("Result")

now = count()
"""What `Descriptors.used` is set to at each read: `next(now)`."""


class Descriptors:
    """The descriptors of one file, closed with the last reference: each reader holds one meanwhile.

    Attributes:
        buffered: an ordinary one.
        direct: one with `O_DIRECT`, or `None`.
        used: grows with time; from when it was read last.
    """

    __slots__ = ("buffered", "direct", "used")

    def __init__(self, buffered: int, direct: int | None) -> None:
        self.buffered, self.direct = buffered, direct
        self.used = next(now)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.buffered)
        if self.direct is not None:
            close(self.direct)


class Holder(Protocol):
    """A file that can be opened again.

    Attributes:
        held: its descriptors; `None` while it has none.
    """

    held: Descriptors | None


class _Pool:
    """The files of this process that are open."""

    def __init__(self) -> None:
        self._numbers = count()
        self._holders: dict[int, weakref.ref[Holder]] = {}
        self.after_fork()

    def after_fork(self) -> None:
        # Who held it when this process was forked is not here to give it back.
        self._lock = threading.Lock()

    def number(self) -> int:
        return next(self._numbers)

    def add(self, number: int, holder: Holder) -> None:
        self._holders[number] = weakref.ref(holder)
        most = max_files() if len(self._holders) > _FEW else _FEW
        if len(self._holders) > most:
            self.shrink(most - most // _CLOSED_TOGETHER)

    def forget(self, number: int) -> None:
        # One step, without the lock: it may be called in the middle of anything, when an object goes.
        self._holders.pop(number, None)

    def shrink(self, most: int) -> None:
        """Close those files that were not read for longest, until there are so few."""
        with self._lock:
            found = []
            for number, reference in list(self._holders.items()):
                holder = reference()
                held = None if holder is None else holder.held
                if holder is None or held is None:
                    self._holders.pop(number, None)
                else:
                    found.append((held.used, number, holder))
            found.sort(key=lambda one: one[0])
            for _, number, holder in found[: max(0, len(found) - most)]:
                self._holders.pop(number, None)
                holder.held = None

    def __len__(self) -> int:
        return len(self._holders)


_pool = _Pool()
os.register_at_fork(after_in_child=_pool.after_fork)


def max_files() -> int:
    """How many files this process keeps open at most: 512, or a quarter of its descriptors where these are fewer."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MAX_FILES if soft == resource.RLIM_INFINITY else max(_FEW, min(_MAX_FILES, soft // _FILES_PER_DESCRIPTOR))


def open_files() -> int:
    """How many files this process keeps open now."""
    return len(_pool)


def new_number() -> int:
    """A number for a file, to call `note_open` and `note_closed` with."""
    return _pool.number()


def note_open(number: int, holder: Holder) -> None:
    """Say that `holder` has descriptors now; others may lose theirs for it."""
    _pool.add(number, holder)


def note_closed(number: int) -> None:
    """Say that this file will not be read any more."""
    if _pool is not None:  # (At the end of the interpreter, modules go before the last objects.)
        _pool.forget(number)


def with_room(open_it: Callable[[], Result]) -> Result:
    """What `open_it` gives; where the process has no descriptor left, half of the open files are closed, and so on."""
    while True:
        try:
            return open_it()
        except OSError as error:
            if error.errno not in _NONE_LEFT or not len(_pool):
                raise
        _pool.shrink(len(_pool) // 2)
