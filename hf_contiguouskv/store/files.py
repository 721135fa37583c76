"""A file of a segment that is open for reading, and positioned reads of it past the operating system's page cache."""

from __future__ import annotations

import contextlib
import errno
import itertools
import mmap
import os
import threading
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from pathlib import Path

from ..errors import UntrustedOwnerError
from ..hardware.aligned_memory import PAGE
from .backend import Extent
from .descriptors import Descriptors, new_number, note_closed, note_open, now, with_room
from .directory import Directory

SUFFIX = ".safetensors"
# What says that another file, or none, lies where one was: none at all, a link, a folder, no ordinary file.
_GONE = (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EINVAL)
# A file with more holes than that is taken for one that has too many.
_MOST_HOLES = 100_000
# Where a file system cannot say what of a file takes up storage.
_CANNOT_TELL = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)
MAX_PART = 2**20
BOUNCE_BYTES = MAX_PART + 2 * PAGE
# What the system says where it cannot read straight into this memory: it is not aligned as the device wants it, or its
# pages (registered with a GPU's driver, say) cannot be handed to the device. Ordinary memory of this process can.
NOT_DIRECTLY = (errno.EINVAL, errno.EFAULT)

_of_thread = threading.local()


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


def read_range(direct: int | None, buffered: int, offset: int, into: memoryview) -> int:
    """Fill `into` from `offset` of a file; return the bytes that storage was asked for, page rounding included.

    Args:
        direct: descriptor with `O_DIRECT`, if there is one.
        buffered: ordinary descriptor of the same file.
        offset: in bytes.
        into: writable bytes.

    Raises:
        EOFError: the file ends before.
        OSError: what the system says.
    """
    nbytes = into.nbytes
    if nbytes == 0:
        return 0
    if direct is None:
        _read_buffered(buffered, offset, into)
        return -(-(offset + nbytes) // PAGE) * PAGE - offset // PAGE * PAGE
    physical = 0
    whole_pages = nbytes & -PAGE
    if whole_pages and not offset & (PAGE - 1):
        # The kernel refuses a misaligned address at once, which is cheaper than asking for the address here.
        try:
            got = os.preadv(direct, (into if whole_pages == nbytes else into[:whole_pages],), offset)
        except OSError as error:
            if error.errno not in NOT_DIRECTLY:
                raise
            got = 0
        physical = got & -PAGE
        if physical == nbytes:
            return physical
    while physical < nbytes:
        physical += _read_bounced(direct, buffered, offset + physical, into[physical:])
    return -(-(offset + nbytes) // PAGE) * PAGE - offset // PAGE * PAGE


def read_scattered(direct: int | None, buffered: int, extents: Sequence[tuple[int, memoryview]]) -> int:
    """As `read_range`, for ranges of a file that follow each other without a gap: one read into several buffers.

    Where that is not possible they are read one by one.
    """
    offset, parts = extents[0][0], [into for _, into in extents]
    nbytes = sum(part.nbytes for part in parts)
    if direct is not None and not offset & (PAGE - 1) and not nbytes & (PAGE - 1):
        try:
            if os.preadv(direct, parts, offset) == nbytes:
                return nbytes
        except OSError as error:
            if error.errno not in NOT_DIRECTLY:
                raise
    # Misaligned, or the storage delivered less at once: reading one by one also finds out what is wrong.
    return read_each(direct, buffered, extents)


def read_joined(direct: int | None, buffered: int, extents: Sequence[tuple[int, memoryview]]) -> int:
    """As `read_range`, for ranges of a file that lie close together (ascending): one read, with what is between them.

    Where that is not possible they are read one by one.
    """
    extents = [extent for extent in extents if extent[1].nbytes]
    if not extents:
        return 0
    begin, end = extents[0][0] & -PAGE, extents[-1][0] + extents[-1][1].nbytes
    span = -(-end // PAGE) * PAGE - begin
    if direct is not None and span <= BOUNCE_BYTES:
        with memoryview(_bounce_buffer()) as aligned:
            try:
                got = os.preadv(direct, (aligned[:span],), begin)
            except OSError as error:
                if error.errno not in NOT_DIRECTLY:
                    raise
                got = 0
            if begin + got >= end:
                for offset, into in extents:
                    into[:] = aligned[offset - begin : offset - begin + into.nbytes]
                return span
    return read_each(direct, buffered, extents)


def read_each(direct: int | None, buffered: int, extents: Sequence[tuple[int, memoryview]]) -> int:
    """As `read_range`, for several ranges of a file, one after another."""
    return sum(read_range(direct, buffered, offset, into) for offset, into in extents)


def _bounce_buffer() -> mmap.mmap:
    """Page-aligned memory of this thread that holds any read of up to `MAX_PART` bytes, wherever it begins."""
    bounce: mmap.mmap | None = getattr(_of_thread, "bounce", None)
    if bounce is None:
        bounce = _of_thread.bounce = mmap.mmap(-1, BOUNCE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return bounce


def _read_bounced(direct: int, buffered: int, offset: int, into: memoryview) -> int:
    """Read some bytes from `offset` through the aligned buffer and copy them; return how many."""
    begin = offset & -PAGE
    skip = offset - begin
    span = min(-(-(skip + into.nbytes) // PAGE) * PAGE, BOUNCE_BYTES)
    with memoryview(_bounce_buffer()) as aligned:
        try:
            got = os.preadv(direct, (aligned[:span],), begin)
        except OSError as error:
            if error.errno not in NOT_DIRECTLY:
                raise
            # The file system let the file be opened for direct reads but does not serve them like this.
            _read_buffered(buffered, offset, into)
            return into.nbytes
        useful = min(got - skip, into.nbytes)
        if useful <= 0:
            raise EOFError(f"the file ends before offset {offset}")
        into[:useful] = aligned[skip : skip + useful]
    return useful


def _read_buffered(fd: int, offset: int, into: memoryview) -> None:
    done = 0
    while done < into.nbytes:
        got = os.preadv(fd, (into[done:],), offset + done)
        if got == 0:
            raise EOFError(f"the file ends before offset {offset + done}")
        done += got
