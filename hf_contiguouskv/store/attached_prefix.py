"""An attached prefix: which token is where in which segment, and the reads that bring chunks into a buffer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from .entries import SegmentSpan, StoredPrefix
from .extents import Form
from .format import KVGeometry
from .reads import Read
from .segment import Segment

Chunks = npt.NDArray[np.int64]
# Gives the memory of `count` neighbouring slots, from the first one on, as writable bytes.
SlotMemory = Callable[[int, int], memoryview]


# Forms in few bits, in the order in which they are preferred, and which list of the geometry says that a layer has it.
_IN_FEW_BITS: tuple[tuple[Form, str], ...] = (("compact", "compact_layers"), ("packed", "packed_layers"))


class ExtentChecks(Sequence[tuple[int, int, int]]):
    """The checksums of a run of extents, looked up when a reader thread compares them.

    A whole layer of a segment is compared as a whole: hashing megabytes at once costs a tenth of hashing them in
    kilobytes.
    """

    __slots__ = ("_count", "_first", "_form", "_layer", "_segment", "_size")

    def __init__(self, segment: Segment, form: Form, layer: int, first: int, count: int) -> None:
        self._segment = segment
        self._form = form
        self._layer = layer
        self._first = first
        self._count = count
        self._size = segment.extents(form).nbytes

    def _resolved(self) -> list[tuple[int, int, int]]:
        size = self._size
        if self._count == self._segment.num_chunks and self._count > 1:
            whole = self._segment.layer_checksum(self._layer, self._form)
            if whole is not None:
                return [(0, self._count * size, whole)]
        sums = self._segment.run_checksums(self._layer, self._first, self._count, self._form)
        return [(position * size, size, checksum) for position, checksum in enumerate(sums)]

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        if self._count == 1:
            (only,) = self._segment.run_checksums(self._layer, self._first, 1, self._form)
            return iter(((0, self._size, only),))
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
        form: in which chunks are read for attention.
    """

    tokens: int
    spans: tuple[SegmentSpan, ...]
    geometry: KVGeometry
    form: Form = "exact"

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
        return AttachedPrefix(tokens, spans, self.geometry, self.form)

    def in_few_bits(self, layers: Collection[int]) -> AttachedPrefix:
        """The same prefix, read in a form in few bits that every segment has of all these layers; if none, exactly."""
        for form, kind in _IN_FEW_BITS:
            # (Most chains are long and of one form: the first segment answers for the other one.)
            if all(set(layers).issubset(getattr(span.segment.geometry, kind)) for span in self.spans):
                return replace(self, form=form)
        return self

    def layers_with(self, *kinds: str) -> frozenset[int]:
        """Layers in one of these lists of every segment's geometry (`leader_layers`, say)."""
        return frozenset.intersection(
            *(frozenset().union(*(getattr(span.segment.geometry, kind) for kind in kinds)) for span in self.spans)
        )

    @cached_property
    def layers_per_group(self) -> int:
        """So many consecutive layers have their chunks side by side, in the form in which they are read; where segments
        differ, in the longest one."""
        if self.form != "exact":
            return 1
        return max(self.spans, key=lambda span: span.chunks).segment.geometry.layers_per_group

    def group_of(self, layer: int) -> int:
        """The number of the group that a layer lies in."""
        return layer // self.layers_per_group

    def in_file_order(self, reads: list[Read]) -> list[Read]:
        """Reads of several layers, so that neighbours in a file follow each other. (Of layers that lie apart they are
        left as they are.)"""
        if self.layers_per_group == 1:
            return reads
        order = {id(span.segment): place for place, span in enumerate(self.spans)}
        return sorted(reads, key=lambda read: (order[id(read.segment)], read.offset))

    @property
    def extent_bytes(self) -> int:
        """Bytes of one chunk of one layer, as it is read."""
        g = self.geometry
        return {"exact": g.extent_bytes, "packed": g.packed_bytes, "compact": g.compact_bytes}[self.form]

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

    def reads(
        self,
        layer: int,
        chunks: Chunks,
        slots: Chunks,
        memory: SlotMemory,
        verify: bool,
        in_a_row: int | None = None,
    ) -> list[Read]:
        """Reads that bring `chunks` (ascending) of one layer into `slots` (one each). Neighbours are read together.

        Args:
            layer: layer index.
            chunks, slots: int64 `(n,)`.
            memory: where slots lie.
            verify: compare checksums.
            in_a_row: neighbouring slots are neighbours in memory within so many; `None`: all are.
        """
        size = self.extent_bytes
        found: list[Read] = []
        ends = [span.first_chunk + span.chunks for span in self.spans]
        begin = 0
        for span, end in zip(self.spans, np.searchsorted(chunks, ends).tolist(), strict=True):
            if end == begin:
                continue
            segment, extents = span.segment, span.segment.extents(self.form)
            positions, own = chunks[begin:end] + (span.offset - span.first_chunk), slots[begin:end]
            cuts = (np.diff(positions) != 1) | (np.diff(own) != 1)
            if in_a_row is not None:
                cuts |= own[1:] % in_a_row == 0
            if not extents.contiguous:
                cuts[:] = True  # Layers that share a group lie between each other's chunks.
            starts = [0, *(np.flatnonzero(cuts) + 1).tolist()]
            stops = [*starts[1:], end - begin]
            begin = end
            for first, slot, start, stop in zip(
                positions[starts].tolist(), own[starts].tolist(), starts, stops, strict=True
            ):
                count = stop - start
                checks = ExtentChecks(segment, self.form, layer, first, count) if verify else ()
                into = memory(slot, count)
                found.append(Read(segment, extents.offset(layer, first), count * size, into, checks))
        return found

    def token_bytes(self) -> int:
        """Bytes of one token in one layer, as it is read."""
        return self.extent_bytes // self.geometry.chunk_size
