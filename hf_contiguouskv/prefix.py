"""An attached prefix: which token is where in which segment, and the reads that bring chunks into a buffer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
        return cls(tokens, stored.spans, stored.spans[0].segment.geometry)

    def truncated(self, tokens: int) -> AttachedPrefix:
        """The same prefix, ending after `tokens` tokens."""
        return AttachedPrefix(tokens, self.spans, self.geometry)

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

    def locate(self, chunk: int) -> tuple[Segment, int]:
        """The segment that holds a chunk, and its position there."""
        for span in self.spans:
            if chunk < span.first_chunk + span.chunks:
                return span.segment, span.offset + chunk - span.first_chunk
        raise IndexError(f"chunk {chunk} is beyond the stored prefix of {self.tokens} tokens")

    def payload_reads(self, layer: int, chunks: Sequence[int], into: memoryview, verify: bool) -> list[Read]:
        """Reads that bring `chunks` (ascending) of one layer into `into`, extent after extent.

        Chunks that are neighbours on disk become one read.
        """
        size = self.geometry.extent_bytes
        reads: list[Read] = []
        run_segment: Segment | None = None
        run_start = run_end = slot_start = 0
        checks: list[tuple[int, int, int]] = []

        def finish(slot_end: int) -> None:
            if run_segment is not None:
                part = into[slot_start * size : slot_end * size]
                reads.append(Read(run_segment, run_start, run_end - run_start, part, tuple(checks)))

        for slot, chunk in enumerate(chunks):
            segment, position = self.locate(chunk)
            offset, nbytes = segment.payload_extent(layer, position)
            if segment is not run_segment or offset != run_end:
                finish(slot)
                run_segment, run_start, slot_start, checks = segment, offset, slot, []
            if verify:
                checks.append((offset - run_start, nbytes, segment.payload_checksum(layer, position)))
            run_end = offset + nbytes
        finish(len(chunks))
        return reads

    def kv_view(self, data: torch.Tensor, chunks: int) -> torch.Tensor:
        """Bytes that `payload_reads` filled, as `(chunks, 2 (K, V), kv_heads, c, head_dim)` in the stored dtype."""
        g = self.geometry
        return data[: chunks * g.extent_bytes].view(g.dtype).view(chunks, 2, g.kv_heads, g.chunk_size, g.head_dim)

    def token_bytes(self) -> int:
        """Bytes of K and V of one token in one layer."""
        return self.geometry.extent_bytes // self.geometry.chunk_size
