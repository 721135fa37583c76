"""A file of a segment that is being written."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets

from .directory import Directory
from .files import SUFFIX

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class FileBlobWriter:
    """A `backend.BlobWriter` of a partial file, which is locked while its writer lives.

    It has many attributes because it must undo a write from any point.

    Args:
        partial: folder of partial files.
        segments: folder of the folders of published ones.
        key: of the segment.
        nbytes: its length.
        drop_cached: leave nothing of it in the page cache.
    """

    def __init__(self, partial: Directory, segments: Directory, key: str, nbytes: int, *, drop_cached: bool) -> None:
        self.nbytes = nbytes
        self._partial, self._segments, self._key = partial, segments, key
        self._published = False
        self._drop_cached = drop_cached
        self._fd, self._file = _create_locked(partial, key)
        self.path = partial.path_of(self._file)
        self.name = str(self.path)
        try:
            _reserve(self._fd, nbytes)
        except BaseException:
            self.discard()
            raise
        self.stored_bytes = nbytes

    def write(self, offset: int, octets: memoryview) -> None:
        done = 0
        while done < octets.nbytes:
            done += os.pwrite(self._fd, octets[done:], offset + done)

    def read(self, offset: int, nbytes: int) -> bytes:
        return os.pread(self._fd, nbytes, offset)

    def seal(self) -> None:
        os.fsync(self._fd)
        self.stored_bytes = os.fstat(self._fd).st_blocks * 512

    def publish(self) -> None:
        """Rename, then make the folder durable."""
        name = f"{self._key}{SUFFIX}"
        with self._final_folder() as folder:
            try:
                self._partial.rename(self._file, folder, name)
            except IsADirectoryError:
                folder.make_free(name)
                self._partial.rename(self._file, folder, name)
            self._published = True
            self.path = folder.path_of(name)
            folder.sync()
        self._close()

    def _final_folder(self) -> Directory:
        name = self._key[:2]
        try:
            return self._segments.sub(name, create=True)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                raise
        # A link or a file in its place is none of ours. What it leads to is left alone.
        self._segments.make_free(name)
        return self._segments.sub(name, create=True)

    def discard(self) -> None:
        if self._fd >= 0 and not self._published:
            with contextlib.suppress(OSError):  # What cannot be removed now is collected later.
                self._partial.remove(self._file)
        self._close()

    def _close(self) -> None:
        if self._fd >= 0:
            if self._drop_cached and hasattr(os, "posix_fadvise"):
                with contextlib.suppress(OSError):
                    os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(self._fd)
            self._fd = -1


def _create_locked(folder: Directory, key: str) -> tuple[int, str]:
    """Create a locked partial file. The lock goes with the descriptor, so a crash frees it."""
    while True:
        name = f"{key}.{secrets.token_hex(4)}.partial"
        fd = folder.create_file(name)
        try:
            # Without locks on this file system, `collect` judges partial files by their age.
            with contextlib.suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_EX)
            # A `collect` that came between the two calls above has removed the file.
            if os.fstat(fd).st_nlink:
                return fd, name
        except BaseException:
            os.close(fd)
            folder.remove(name)
            raise
        os.close(fd)


def _reserve(fd: int, nbytes: int) -> None:
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        if error.errno in FULL:
            raise
        os.ftruncate(fd, nbytes)
