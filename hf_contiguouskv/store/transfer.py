"""Copying a segment from elsewhere: what it claims without proof is left out, and its checksums are this store's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from .backend import BlobWriter, SegmentBackend
from .format import SegmentHeader
from .key import NO_MAC, StoreKey
from .output import SegmentOutput
from .segment import Segment

_BLOCK = 4 * 2**20


def copy_segment(
    segment: Segment, backend: SegmentBackend, key: StoreKey | None, on_block: Callable[[bytearray], None]
) -> tuple[SegmentHeader, BlobWriter]:
    """Copy an open segment into a new blob, with checksums as `key` makes them.

    Nobody can check how long its computation took, so the copy says that this is unknown.

    Args:
        segment: whose bytes have been verified.
        backend: where the copy goes.
        key: of the store that it goes to, if that has one.
        on_block: called with each block of the original, from its first byte on. What it raises ends the copy.

    Returns:
        the header of the copy, and its blob: sealed, not published.

    Raises:
        SegmentCorruptError, SegmentReadError: the original cannot be read to its end.
        OSError: the storage of the copy failed.
    """
    header = replace(segment.header, compute_ms=0, mac=NO_MAC)
    writer = backend.create(header.key, header.nbytes)
    # A header may hold more than this library writes (fields that it ignores), so the data may begin elsewhere.
    begin, to = segment.nbytes - header.data_bytes, header.nbytes - header.data_bytes
    try:
        for start in range(0, segment.nbytes, _BLOCK):
            octets = segment.read_bytes(start, min(_BLOCK, segment.nbytes - start))
            on_block(octets)
            data = memoryview(octets)[max(0, begin - start) :]
            if data.nbytes:
                writer.write(max(start, begin) - begin + to, data)
        output = SegmentOutput(header, segment.token_ids, writer, key)
        output.adopt()
        output.finish(0.0)
    except BaseException:
        writer.discard()
        raise
    return output.header, writer
