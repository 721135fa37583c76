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
from collections import OrderedDict
from collections.abc import Callable
from itertools import count
from typing import Protocol, TypeVar

# Files of this library that a process keeps open at most, and the part of its descriptors (two a file) that it leaves
# to everything else: a half.
_MAX_FILES = 512
_FILES_PER_DESCRIPTOR = 4
_FEW = 4
_NONE_LEFT = (errno.EMFILE, errno.ENFILE)

Result = TypeVar("Result")


class Descriptors:
    """The descriptors of one file, closed with the last reference: whoever reads holds one meanwhile.

    Attributes:
        buffered: an ordinary one.
        direct: one with `O_DIRECT`, or `None`.
        used: whether it was read since somebody last looked for files to close.
    """

    __slots__ = ("buffered", "direct", "used")

    def __init__(self, buffered: int, direct: int | None) -> None:
        self.buffered, self.direct = buffered, direct
        self.used = True

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
    """The files of this process that are open, in the order in which they were opened or found in use."""

    def __init__(self) -> None:
        self._numbers = count()
        self._holders: OrderedDict[int, weakref.ref[Holder]] = OrderedDict()
        self.after_fork()

    def after_fork(self) -> None:
        # Who held it when this process was forked is not here to give it back.
        self._lock = threading.Lock()

    def number(self) -> int:
        return next(self._numbers)

    def add(self, number: int, holder: Holder) -> None:
        self._holders[number] = weakref.ref(holder)
        if len(self._holders) > _FEW:
            self.shrink(max_files())

    def forget(self, number: int) -> None:
        # One step, without the lock: it may be called in the middle of anything, when an object goes.
        self._holders.pop(number, None)

    def shrink(self, most: int) -> None:
        with self._lock:
            # Twice around at most: the first time round finds out what is in use.
            for _ in range(2 * len(self._holders)):
                if len(self._holders) <= most:
                    return
                try:
                    number, reference = self._holders.popitem(last=False)
                except KeyError:
                    return
                holder = reference()
                held = None if holder is None else holder.held
                if holder is None or held is None:
                    continue
                if held.used:
                    held.used = False
                    self._holders[number] = reference
                else:
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
    _pool.forget(number)


def with_room(open_it: Callable[[], Result]) -> Result:
    """What `open_it` gives; where the process has no descriptor left, half of the open files are closed first."""
    try:
        return open_it()
    except OSError as error:
        if error.errno not in _NONE_LEFT or not len(_pool):
            raise
    _pool.shrink(len(_pool) // 2)
    return open_it()
