"""An attached prefix: which token is where in which segment, and the reads that bring chunks into a buffer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .store.entries import SegmentSpan, StoredPrefix
from .store.format import KVGeometry
from .store.reader import Read
from .store.segment import Segment


@dataclass(frozen=True, slots=True)
class Run:
    """Chunks that lie next to each other in one segment.

    Attributes:
        segment: the file.
        first: position of the first of them in the segment.
        count: how many.
        position: place of the first of them in the list that was asked for.
    """

    segment: Segment
    first: int
    count: int
    position: int


class ExtentChecks(Sequence[tuple[int, int, int]]):
    """The checksums of a run of extents, looked up when a reader thread compares them.

    A whole layer of a segment is compared as a whole: hashing megabytes at once costs a tenth of hashing them in
    kilobytes.
    """

    __slots__ = ("_count", "_first", "_layer", "_segment", "_size")

    def __init__(self, segment: Segment, layer: int, first: int, count: int, size: int) -> None:
        self._segment = segment
        self._layer = layer
        self._first = first
        self._count = count
        self._size = size

    def _resolved(self) -> list[tuple[int, int, int]]:
        size = self._size
        if self._count == self._segment.num_chunks and self._count > 1:
            whole = self._segment.layer_checksum(self._layer)
            if whole is not None:
                return [(0, self._count * size, whole)]
        sums = self._segment.run_checksums(self._layer, self._first, self._count)
        return [(position * size, size, checksum) for position, checksum in enumerate(sums)]

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        if self._count == 1:
            return iter(((0, self._size, self._segment.run_checksums(self._layer, self._first, 1)[0]),))
        return iter(self._resolved())

    def __getitem__(self, item: Any) -> Any:
        return self._resolved()[item]


@dataclass(frozen=True)
class AttachedPrefix:
    """The first `tokens` tokens of a stored prefix.

    Attributes:
        tokens: prefix length in tokens; may end inside a stored chunk.
        spans: where the chunks are, in order; chunk `j` covers tokens `[j * c, (j + 1) * c)`.
        geometry: shapes and dtype of the stored KV.
    """

    tokens: int
    spans: tuple[SegmentSpan, ...]
    geometry: KVGeometry

    @classmethod
    def of(cls, stored: StoredPrefix, tokens: int) -> AttachedPrefix:
        """The first `tokens` tokens of `stored`."""
        return cls(stored.tokens, stored.spans, stored.spans[0].segment.geometry).truncated(tokens)

    def truncated(self, tokens: int) -> AttachedPrefix:
        """The same prefix, ending after `tokens` tokens; spans behind its end are left out."""
        chunks = -(-tokens // self.geometry.chunk_size)
        spans = tuple(
            replace(span, chunks=min(span.chunks, chunks - span.first_chunk))
            for span in self.spans
            if span.first_chunk < chunks
        )
        return AttachedPrefix(tokens, spans, self.geometry)

    @property
    def whole_chunks(self) -> int:
        """Chunks that are candidates for selection."""
        return self.tokens // self.geometry.chunk_size

    @property
    def tail_tokens(self) -> int:
        """Tokens in the partial last chunk (0: there is none). Its chunk index is `whole_chunks`."""
        return self.tokens % self.geometry.chunk_size

    @property
    def chunks(self) -> int:
        """All chunks, the partial last one included."""
        return self.whole_chunks + (1 if self.tail_tokens else 0)

    def runs(self, chunks: Sequence[int]) -> list[Run]:
        """Neighbours on disk among `chunks` (ascending); they are the same for every layer."""
        found: list[Run] = []
        spans = iter(self.spans)
        span = next(spans)
        position, count = 0, len(chunks)
        while position < count:
            chunk = chunks[position]
            while chunk >= span.first_chunk + span.chunks:
                span = next(spans)
            limit = min(count, position + span.first_chunk + span.chunks - chunk)
            end = position + 1
            while end < limit and chunks[end] == chunk + end - position:
                end += 1
            found.append(Run(span.segment, span.offset + chunk - span.first_chunk, end - position, position))
            position = end
        return found

    def payload_reads(self, layer: int, runs: Sequence[Run], into: memoryview, verify: bool) -> list[Read]:
        """Reads that bring `runs` of one layer into `into`, extent after extent."""
        size = self.geometry.extent_bytes
        reads: list[Read] = []
        for run in runs:
            segment, first, count, position = run.segment, run.first, run.count, run.position
            offset, _ = segment.payload_extent(layer, first)
            if segment.geometry.layers_per_group == 1 or count == 1:
                part = into[position * size : (position + count) * size]
                checks = ExtentChecks(segment, layer, first, count, size) if verify else ()
                reads.append(Read(segment, offset, count * size, part, checks))
                continue
            # Layers that share a group lie between each other's chunks: every chunk is a read of its own.
            for number in range(count):
                single = replace(run, first=first + number, count=1, position=position + number)
                reads += self.payload_reads(layer, [single], into, verify)
        return reads

    def kv_view(self, data: torch.Tensor, chunks: int) -> torch.Tensor:
        """Bytes that `payload_reads` filled, as `(chunks, 2 (K, V), kv_heads, c, head_dim)` in the stored dtype."""
        g = self.geometry
        return data[: chunks * g.extent_bytes].view(g.dtype).view(chunks, 2, g.kv_heads, g.chunk_size, g.head_dim)

    def token_bytes(self) -> int:
        """Bytes of K and V of one token in one layer."""
        return self.geometry.extent_bytes // self.geometry.chunk_size
