"""Files of segments: one that is open for reading, and one that is being written."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import secrets
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from pathlib import Path

from ..errors import UntrustedOwnerError
from ..hardware.aligned_memory import PAGE
from .backend import Extent
from .descriptors import Descriptors, new_number, note_closed, note_open, now, with_room
from .directory import Directory
from .pread import read_each, read_joined, read_scattered

SUFFIX = ".safetensors"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What says that another file, or none, lies where one was: none at all, a link, a folder, no ordinary file.
_GONE = (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EINVAL)
# A file with more holes than that is taken for one that has too many.
_MOST_HOLES = 100_000
# Where a file system cannot say what of a file takes up storage.
_CANNOT_TELL = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)


class FileBlob:
    """A `backend.Blob` that is a file, open for reading.

    It has many attributes because it must know its file again after its descriptors were given back.

    Where very many are open in this process, one that was not read for long gives its descriptors back. It is opened
    again when it is read; if another file lies there by then, or none, it is lost, and that read fails.

    Args:
        path: where it lies.
        direct: read past the page cache where the file system can.
        folder: opens the folder that it lies in, at each call; default: what lies at the path of that folder.

    Attributes:
        held: its descriptors, unless they were given back or it is closed.
    """

    extents_per_read = 1

    def __init__(self, path: Path, *, direct: bool = True, folder: Callable[[], Directory] | None = None) -> None:
        self.path = path
        self.name = str(path)
        self.held: Descriptors | None = None
        self._number = new_number()
        self._folder = folder or partial(Directory.open, path.parent, follow=True, trust_owner=True)
        self._want_direct = direct and hasattr(os, "O_DIRECT")
        self._closed = False
        self.held, status = with_room(self._open)
        self.nbytes = status.st_size
        self.stored_bytes = status.st_blocks * 512
        self.identity: Hashable = identity_of(status)
        self.created = status.st_mtime
        self._changed = status.st_mtime_ns
        note_open(self._number, self)

    @property
    def fd_direct(self) -> int | None:
        """Descriptor with `O_DIRECT`, or `None` where the file system refuses it."""
        return (self.held or self._open_again()).direct

    @property
    def fd_buffered(self) -> int:
        """Ordinary descriptor."""
        return (self.held or self._open_again()).buffered

    def read_into(self, extents: Sequence[Extent]) -> int:
        # (A reference: as long as there is one, nobody closes these descriptors.)
        held = self.held or self._open_again()
        held.used = next(now)
        direct, buffered = held.direct, held.buffered
        if len(extents) > 1:
            gaps = [two[0] - one[0] - one[1].nbytes for one, two in itertools.pairwise(extents)]
            pages = all(offset % PAGE == into.nbytes % PAGE == 0 for offset, into in extents)
            if pages and not any(gaps):
                return read_scattered(direct, buffered, extents)
            if min(gaps) >= 0:
                return read_joined(direct, buffered, extents)
        return read_each(direct, buffered, extents)

    def is_backed(self, offset: int, nbytes: int) -> bool:
        if offset < 0 or offset + nbytes > self.nbytes:
            return False
        if not nbytes or not hasattr(os, "SEEK_HOLE"):
            return True
        held = self.held or self._open_again()
        try:
            return _half_is_data(held.buffered, offset, offset + nbytes)
        except OSError as error:
            if error.errno == errno.ENXIO:  # It was cut.
                return False
            if error.errno in _CANNOT_TELL:
                return True
            raise

    def close(self) -> None:
        self._closed = True
        self.held = None
        note_closed(self._number)

    def __del__(self) -> None:
        if hasattr(self, "_number") and note_closed is not None:
            note_closed(self._number)

    def _open(self) -> tuple[Descriptors, os.stat_result]:
        name = self.path.name
        with self._folder() as folder:
            buffered, status = folder.open_checked(name)
            held = Descriptors(buffered, None)
            if self._want_direct:
                # tmpfs of older kernels, some network and overlay file systems refuse: reads go through the page cache.
                with contextlib.suppress(OSError, UntrustedOwnerError):
                    direct, same = folder.open_checked(name, os.O_RDONLY | os.O_DIRECT)
                    if identity_of(same) == identity_of(status):
                        held.direct = direct
                    else:
                        # Replaced between the two calls: the descriptors must mean the same file.
                        os.close(direct)
        return held, status

    def _open_again(self) -> Descriptors:
        if self._closed:
            raise OSError(errno.EBADF, "it is closed", self.name)
        try:
            held, status = with_room(self._open)
        except UntrustedOwnerError as error:
            raise self._lost() from error
        except OSError as error:
            if error.errno in _GONE:
                raise self._lost() from error
            raise  # It may be there, and be read later.
        # A file that takes the place of a deleted one may get its inode, and have its length.
        if (identity_of(status), status.st_mtime_ns) != (self.identity, self._changed):
            raise self._lost()
        self.held = held
        note_open(self._number, self)
        if self._closed:
            self.close()
        return held

    def _lost(self) -> OSError:
        # What lies there now is not this file: nobody may take the one for the other.
        self.identity = ("lost", self._number)
        return OSError(errno.EIO, "it was replaced or deleted after its descriptors had been given back", self.name)


def identity_of(status: os.stat_result) -> Hashable:
    """Tells files under one name apart."""
    # An inode is used again only when nobody has the file open any more, so a comparison finds the right one.
    return status.st_dev, status.st_ino, status.st_size


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


def _half_is_data(fd: int, begin: int, end: int) -> bool:
    """Whether holes are at most a half of a range of a file.

    Raises:
        OSError: `ENXIO` where the file ends before; others where the file system cannot tell.
    """
    allowed = (end - begin) // 2
    for _ in range(_MOST_HOLES):
        hole = os.lseek(fd, begin, os.SEEK_HOLE)
        if hole >= end:
            return True
        try:
            begin = min(end, os.lseek(fd, hole, os.SEEK_DATA))
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            begin = end  # There is nothing but a hole up to the end of the file.
        allowed -= begin - hole
        if allowed < 0:
            return False
        if begin == end:
            return True
    return False
