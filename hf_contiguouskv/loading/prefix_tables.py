"""Where each chunk of a prefix is in the tables of its segments."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ..memory import MemoryTiers
from ..memory.history import SegmentTable
from ..memory.tier import Tier
from ..store.attached_prefix import AttachedPrefix, Chunks


class PrefixTables:
    """The tables of a prefix's segments, and the place of each chunk in them.

    Attributes:
        mass: attention mass of the chunks, as the running request has found it, by layer: float32 `(whole_chunks,)`.
    """

    def __init__(self, prefix: AttachedPrefix, memory: MemoryTiers) -> None:
        self.mass: dict[int, npt.NDArray[np.float32]] = {}
        self._parts = [(span, memory.table(span.segment, prefix.form)) for span in prefix.spans]
        self._ends = np.array([span.first_chunk + span.chunks for span in prefix.spans], dtype=np.int64)

    @property
    def known(self) -> list[SegmentTable]:
        """The tables of segments that memory keeps chunks of."""
        return [table for _, table in self._parts if table is not None]

    def split(self, layer: int, chunks: Chunks) -> Iterator[tuple[SegmentTable | None, slice, Chunks]]:
        """Per segment: its table, the slice of `chunks` (ascending) that it holds, and their places in the table."""
        if len(self._parts) == 1:
            (span, table) = self._parts[0]
            positions = chunks + (span.offset + layer * (table.chunks if table else 0))
            yield table, slice(0, len(chunks)), positions
            return
        begin = 0
        for (span, table), end in zip(self._parts, np.searchsorted(chunks, self._ends).tolist(), strict=True):
            if end > begin:
                positions = chunks[begin:end] + (span.offset - span.first_chunk)
                yield table, slice(begin, end), positions + layer * (table.chunks if table else 0)
            begin = end

    def find(self, tier: Tier, layer: int, chunks: Chunks) -> Chunks:
        """Slots of `tier` that hold `chunks` (ascending), -1 where none does. Each slot found gets one more user."""
        slots = np.full(len(chunks), -1, dtype=np.int64)
        for table, part, places in self.split(layer, chunks):
            if table is not None:
                slots[part] = tier.find(table, places)
        return slots

    def resident(self, layer: int) -> int:
        """How many chunks of `layer` are in some tier."""
        count = 0
        for span, table in self._parts:
            if table is not None:
                begin = layer * table.chunks + span.offset
                there = np.zeros(span.chunks, dtype=bool)
                for slots in table.slots.values():
                    there |= slots[begin : begin + span.chunks] >= 0
                count += int(there.sum())
        return count

    def which_resident(self, layer: int, chunks: Chunks, tier: Tier | None = None) -> npt.NDArray[np.bool_]:
        """Which of `chunks` (ascending) are in `tier` (`None`: in some tier), bool `(n,)`."""
        there = np.zeros(len(chunks), dtype=bool)
        for table, part, places in self.split(layer, chunks):
            if table is not None:
                for name, slots in table.slots.items():
                    if tier is None or name == tier.name:
                        there[part] |= slots[places] >= 0
        return there

    def importance(self, layer: int, chunks: Chunks) -> npt.NDArray[np.float64] | None:
        """Attention mass that the running request has found for `chunks` in `layer`, float64 `(n,)`."""
        mass = self.mass.get(layer)
        if mass is None:
            return None
        found = np.zeros(len(chunks))
        whole = chunks < len(mass)  # A partial last chunk is never scored.
        found[whole] = mass[chunks[whole]]
        return found

    def places(self, layer: int, chunks: Chunks) -> list[tuple[SegmentTable, Chunks]]:
        """Per table, the places of `chunks` (ascending) in `layer`."""
        return [(table, places) for table, _, places in self.split(layer, chunks) if table is not None]

    def parts(self, mass: npt.NDArray[np.float32]) -> list[tuple[SegmentTable, int, npt.NDArray[np.float32]]]:
        """Per table, its first chunk and its part of `mass` `(whole_chunks,)`."""
        return [
            (table, span.offset, mass[span.first_chunk : span.first_chunk + span.chunks])
            for span, table in self._parts
            if table is not None
        ]
