"""An attached prefix: which token is where in which segment, and the reads that bring chunks into a buffer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from .store.entries import SegmentSpan, StoredPrefix
from .store.format import KVGeometry
from .store.reader import Read
from .store.segment import Segment


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

    def runs(self, chunks: Sequence[int]) -> Iterator[tuple[Segment, int, int, int]]:
        """Neighbours on disk among `chunks` (ascending): `(segment, first chunk in it, how many, position of the run)`."""
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
            yield span.segment, span.offset + chunk - span.first_chunk, end - position, position
            position = end

    def payload_reads(self, layer: int, chunks: Sequence[int], into: memoryview, verify: bool) -> list[Read]:
        """Reads that bring `chunks` (ascending) of one layer into `into`, extent after extent.

        Chunks that are neighbours on disk become one read; a whole layer of a segment is checked as a whole.
        """
        size = self.geometry.extent_bytes
        reads: list[Read] = []
        for segment, first, count, position in self.runs(chunks):
            offset, _ = segment.payload_extent(layer, first)
            stride = segment.payload_stride(layer)
            whole = segment.layer_checksum(layer) if verify and count == segment.num_chunks else None
            sums = segment.run_checksums(layer, first, count) if verify and whole is None else []
            # Layers that share a group lie between each other's chunks: then every chunk is a read of its own.
            step = count if stride == size else 1
            for start in range(0, count, step):
                checks = [(i * size, size, checksum) for i, checksum in enumerate(sums[start : start + step])]
                if whole is not None:
                    checks = [(0, count * size, whole)]
                part = into[(position + start) * size : (position + start + step) * size]
                reads.append(Read(segment, offset + start * stride, step * size, part, checks))
        return reads

    def kv_view(self, data: torch.Tensor, chunks: int) -> torch.Tensor:
        """Bytes that `payload_reads` filled, as `(chunks, 2 (K, V), kv_heads, c, head_dim)` in the stored dtype."""
        g = self.geometry
        return data[: chunks * g.extent_bytes].view(g.dtype).view(chunks, 2, g.kv_heads, g.chunk_size, g.head_dim)

    def token_bytes(self) -> int:
        """Bytes of K and V of one token in one layer."""
        return self.geometry.extent_bytes // self.geometry.chunk_size
