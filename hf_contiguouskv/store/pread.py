"""Positioned reads of a file past the operating system's page cache."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Sequence

from ..hardware.aligned_memory import PAGE

MAX_PART = 2**20
BOUNCE_BYTES = MAX_PART + 2 * PAGE
# What the system says where it cannot read straight into this memory: it is not aligned as the device wants it, or its
# pages (registered with a GPU's driver, say) cannot be handed to the device. Ordinary memory of this process can.
NOT_DIRECTLY = (errno.EINVAL, errno.EFAULT)

_of_thread = threading.local()


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
