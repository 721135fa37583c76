"""Prefixes that nobody has stored: their sizes, for those who want to know before."""

from __future__ import annotations

from functools import lru_cache
from typing import cast

from ..store.attached_prefix import AttachedPrefix
from ..store.entries import SegmentSpan
from ..store.format import KVGeometry, SegmentHeader
from ..store.segment import Segment

_NO_HASH = "0" * 32


@lru_cache(maxsize=256)
def unwritten_header(geometry: KVGeometry, tokens: int) -> SegmentHeader:
    """The header that the segment of such a prefix would have; its `nbytes` are those of the file.

    Args:
        geometry: of the model's KV.
        tokens: of the prefix, stored in one piece.
    """
    return SegmentHeader(geometry, _NO_HASH, _NO_HASH, "", _NO_HASH, 0, tokens, beginning=_NO_HASH)


class _UnwrittenSegment:
    """A segment, as far as `ReadPlan` asks for sizes."""

    def __init__(self, header: SegmentHeader) -> None:
        self._header = header
        self.geometry, self.num_chunks = header.geometry, header.num_chunks

    def tensor_extent(self, name: str) -> tuple[int, int]:
        """See `Segment`; places count from the beginning of the data."""
        place = self._header.places[name]
        return place.start, place.nbytes


def unwritten_prefix(geometry: KVGeometry, tokens: int) -> AttachedPrefix:
    """The prefix that a request would find. It answers for sizes; it cannot be read.

    Args:
        geometry: of the model's KV.
        tokens: of the prefix, stored in one piece.
    """
    header = unwritten_header(geometry, tokens)
    segment = cast(Segment, _UnwrittenSegment(header))
    return AttachedPrefix(tokens, (SegmentSpan(segment, 0, header.num_chunks, 0),), geometry)
