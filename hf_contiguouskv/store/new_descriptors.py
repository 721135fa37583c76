"""Which file a library has opened that takes a path and does not tell its descriptor."""

from __future__ import annotations

import os
import stat


class NewDescriptors:
    """Which descriptors of this process were opened since then. (SQLite does not tell its own.)

    Args:
        some: any open descriptor.
    """

    def __init__(self, some: int) -> None:
        self._before = _open_descriptors()
        # The list was read through a descriptor, whose number would be given to SQLite next: it is taken.
        self._taken = os.dup(some)

    def may_hold(self, identity: tuple[int, int]) -> bool:
        """Whether one of them is this file; true where the system does not say which there are."""
        if self._before is None:
            return True
        after = _open_descriptors() or set()
        found = [_fstat(int(number)) for number in after - self._before]
        if any(status is not None and (status.st_dev, status.st_ino) == identity for status in found):
            return True
        # A descriptor that SQLite could not close is used again: a lock of another connection was on that file.
        if any(status is not None and stat.S_ISREG(status.st_mode) for status in found):
            return False
        old = (_fstat(int(number)) for number in self._before)
        return any(status is not None and (status.st_dev, status.st_ino) == identity for status in old)

    def __enter__(self) -> NewDescriptors:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._taken)


def _open_descriptors() -> set[str] | None:
    try:
        return set(os.listdir("/proc/self/fd"))
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None


def _fstat(descriptor: int) -> os.stat_result | None:
    try:
        return os.fstat(descriptor)
    except OSError:
        return None  # It is closed again.
