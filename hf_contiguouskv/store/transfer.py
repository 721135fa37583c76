"""Copying a segment from elsewhere: what it claims without proof is left out, and its checksums are this store's."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

from ..errors import SegmentCorruptError
from .backend import BlobWriter, Extent, SegmentBackend
from .derived import derived_problems
from .format import SegmentHeader
from .key import NO_MAC, StoreKey
from .output import SegmentOutput
from .segment import Segment

_BLOCK = 4 * 2**20


def copy_segment(
    segment: Segment,
    backend: SegmentBackend,
    key: StoreKey | None,
    on_block: Callable[[bytearray], None],
    *,
    compare: bool = False,
) -> tuple[SegmentHeader, BlobWriter]:
    """Copy an open segment into a new blob, with checksums as `key` makes them.

    Nobody can check how long its computation took, so the copy says that this is unknown. What the original holds may
    change while it is read, so it is the copy that is verified: what approximates in it is made again.

    Args:
        segment: the original.
        backend: where the copy goes.
        key: of the store that it goes to, if that has one.
        compare: compare what was copied with the checksums of the original, which must have been made with `key`. (They
            are made again from what was copied, so nobody would notice the difference later.)
        on_block: called with each block of the original, from its first byte on. What it raises ends the copy.

    Returns:
        the header of the copy, and its blob: sealed, not published.

    Raises:
        SegmentCorruptError, SegmentReadError: the original cannot be read to its end, or the copy is not sound.
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
        if compare:
            for name, checksum in zip(header.checked_tensors, output.whole_checksums, strict=True):
                if segment.tensor_checksum(name) != checksum:
                    raise SegmentCorruptError(
                        f"{segment.name}: the bytes of {name} do not match their checksum", segment
                    )
        _require_sound(Segment(_WrittenBlob(writer, segment.name), key))
    except BaseException:
        writer.discard()
        raise
    return output.header, writer


def _require_sound(copy: Segment) -> None:
    problems = list(derived_problems(copy))
    if copy.header.hashes(copy.token_ids)[-1].hex() != copy.key:
        problems.append("token ids do not match the key")
    if problems:
        raise SegmentCorruptError(f"{copy.name}: {problems[0]}, although it was sound before: it changed meanwhile")


class _WrittenBlob:
    """A `backend.Blob` of what was written to a blob, read before that is published."""

    extents_per_read = 1

    def __init__(self, writer: BlobWriter, name: str) -> None:
        self._writer = writer
        self.name = name
        self.nbytes = writer.nbytes
        self.stored_bytes = writer.stored_bytes
        self.identity: Hashable = None
        self.created = 0.0

    def read_into(self, extents: Sequence[Extent]) -> int:
        total = 0
        for offset, into in extents:
            done = 0
            while done < into.nbytes:
                octets = self._writer.read(offset + done, into.nbytes - done)
                if not octets:
                    raise EOFError(f"ends after {offset + done} bytes")
                into[done : done + len(octets)] = octets
                done += len(octets)
            total += done
        return total

    def is_backed(self, offset: int, nbytes: int) -> bool:
        return offset + nbytes <= self.nbytes

    def close(self) -> None:
        """The writer stays."""
