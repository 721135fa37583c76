"""Chunks of one prefix on their way to attention: from the memory they are in, or from disk into memory.

A *batch* is what one layer asked for together and gets from one place. On a CPU, reads land in the very slots in which
chunks stay afterwards, and attention's buffer is filled from there: nothing is copied in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from ..hardware.aligned_memory import as_memoryview
from ..memory import MemoryTiers
from ..memory.history import SegmentTable
from ..memory.tier import Tier
from ..store.attached_prefix import AttachedPrefix, Chunks
from ..store.reader import ExtentReader, Ticket

# What is read at a time where the tiers have no room: small enough to be had beside every limit.
PIECE_BYTES = 4 * 2**20
# Fewer slots than this (and than what is missing) are not worth a round of reads.
_FEW_SLOTS = 16


class Batch(Protocol):
    """Chunks of one layer that come from one place. Used by one request.

    Attributes:
        chunks: int64 `(n,)`, each once; the order is that of `extents`.
        from_disk, from_host: how many of them were read, and how many were in the host's tier, when they were asked
            for. The others were on the device.
        speculative: asked for before they were selected.
        ticket: of the reads, if there are any.
    """

    chunks: Chunks
    from_disk: int
    from_host: int
    speculative: bool
    ticket: Ticket | None

    def extents(self, take: Chunks | None) -> torch.Tensor:
        """Bytes of the chunks at positions `take` (all: `None`), uint8 `(n, extent_bytes)`, where attention runs.

        Its ticket must have ended. Valid until `release`.
        """
        ...

    def release(self) -> None:
        """Attention's buffer was filled (or nobody needs these bytes): what is worth it stays in memory."""
        ...


class PrefixTables:
    """The tables of a prefix's segments, and which chunk is where in them."""

    def __init__(self, prefix: AttachedPrefix, memory: MemoryTiers) -> None:
        # What the running request has found of each chunk, by layer; float32 `(whole_chunks,)`.
        self.mass: dict[int, npt.NDArray[np.float32]] = {}
        self._parts = [(span, memory.table(span.segment, prefix.form)) for span in prefix.spans]
        self._ends = np.array([span.first_chunk + span.chunks for span in prefix.spans], dtype=np.int64)

    @property
    def known(self) -> list[SegmentTable]:
        """The tables that there are."""
        return [table for _, table in self._parts if table is not None]

    def split(self, layer: int, chunks: Chunks) -> Iterator[tuple[SegmentTable | None, slice, Chunks]]:
        """Per segment: its table, where in `chunks` (ascending) its own are, and their places."""
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
        """Slots of `tier` that hold `chunks` (ascending), each with one user more; -1 where there is none."""
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

    def importance(self, layer: int, chunks: Chunks) -> npt.NDArray[np.float64] | None:
        """What the running request has found of `chunks` in `layer`, float64 `(n,)`."""
        mass = self.mass.get(layer)
        if mass is None:
            return None
        found = np.zeros(len(chunks))
        whole = chunks < len(mass)  # Nobody looks at a partial last chunk.
        found[whole] = mass[chunks[whole]]
        return found

    def places(self, layer: int, chunks: Chunks) -> list[tuple[SegmentTable, Chunks]]:
        """Per table, the places of `chunks` (ascending) in `layer`."""
        return [(table, places) for table, _, places in self.split(layer, chunks) if table is not None]

    def parts(self, mass: npt.NDArray[np.float32]) -> list[tuple[SegmentTable, int, npt.NDArray[np.float32]]]:
        """Per table, the first chunk and what of `mass` `(whole_chunks,)` belongs to it."""
        return [
            (table, span.offset, mass[span.first_chunk : span.first_chunk + span.chunks])
            for span, table in self._parts
            if table is not None
        ]


class SlotBatch:
    """Chunks in slots of the host's tier, on a CPU: resident, or being read into them."""

    def __init__(
        self,
        layer: int,
        chunks: Chunks,
        slots: Chunks,
        tier: Tier,
        tables: PrefixTables,
        slot_bytes: int,
        ticket: Ticket | None,
        speculative: bool,
        shared: bool,
    ) -> None:
        self.chunks = chunks
        self.speculative = speculative
        self.ticket = ticket
        self.from_disk = len(chunks) if ticket is not None else 0
        self.from_host = len(chunks) - self.from_disk
        self._layer = layer
        self._slots = slots
        self._tier = tier
        self._tables = tables
        self._slot_bytes = slot_bytes
        self._shared = shared

    def extents(self, take: Chunks | None) -> torch.Tensor:
        """See `Batch`."""
        return self._tier.blocks(self._slot_bytes).select(self._slots if take is None else self._slots[take])

    def release(self) -> None:
        """See `Batch`."""
        if self._shared and self.ticket is not None and self.ticket.succeeded:
            mass = self._tables.importance(self._layer, self.chunks)
            for table, part, places in self._tables.split(self._layer, self.chunks):
                if table is not None:
                    found = None if mass is None else mass[part]
                    self._tier.keep(table, places, self._slots[part], self._slot_bytes, importance=found)
        self._tier.release(self._slots, self._slot_bytes)


class PieceBatch:
    """Chunks in a buffer that is used once: the tiers had no room for them."""

    def __init__(self, chunks: Chunks, tier: Tier, extent_bytes: int) -> None:
        self.chunks = chunks
        self.speculative = False
        self.ticket: Ticket | None = None
        self.from_disk, self.from_host = len(chunks), 0
        self._tier = tier
        self._size = extent_bytes
        buffer = tier.lease(len(chunks) * extent_bytes)
        assert buffer is not None
        self._buffer = buffer
        self._octets = as_memoryview(buffer.data)

    def into(self, first: int, count: int) -> memoryview:
        """Memory of neighbouring chunks of the piece."""
        return self._octets[first * self._size : (first + count) * self._size]

    def extents(self, take: Chunks | None) -> torch.Tensor:
        """See `Batch`."""
        count = len(self.chunks)
        rows = self._buffer.data[: count * self._size].view(count, self._size)
        return rows if take is None else rows.index_select(0, torch.from_numpy(take))

    def release(self) -> None:
        """See `Batch`."""
        self._tier.give_back(self._buffer)


class Residency(Protocol):
    """Brings chunks of one prefix to where attention of one device finds them."""

    def bring(
        self, layer: int, chunks: Chunks, *, speculative: bool = False, alone: bool = True
    ) -> tuple[list[Batch], Chunks]:
        """Find or start reading `chunks` (int64, ascending) of `layer`.

        Args:
            layer: layer index.
            chunks: of the prefix.
            speculative: nobody has selected them yet.
            alone: no other layer is asked for at the same time (all reader threads may share its reads).

        Returns:
            the batches, and those chunks that memory has no room for now.
        """
        ...

    def bring_piece(self, layer: int, chunks: Chunks) -> tuple[Batch, Chunks]:
        """Start reading the first few of `chunks` beside the limits; what is left of them."""
        ...

    def settle(self) -> None:
        """The first token is out, or the request is over: do what could wait for that."""
        ...


class HostResidency:
    """Where attention runs on the CPU: the host's slots are what it reads."""

    def __init__(
        self, prefix: AttachedPrefix, memory: MemoryTiers, reader: ExtentReader, tables: PrefixTables, verify: bool
    ) -> None:
        self._prefix = prefix
        self._tier = memory.host
        self._reader = reader
        self._tables = tables
        self._verify = verify

    def bring(
        self, layer: int, chunks: Chunks, *, speculative: bool = False, alone: bool = True
    ) -> tuple[list[Batch], Chunks]:
        """See `Residency`."""
        slots = self._tables.find(self._tier, layer, chunks)
        there = slots >= 0
        batches: list[Batch] = []
        if there.any():
            found = chunks if there.all() else chunks[there]
            batches.append(self._batch(layer, found, slots[there], None, speculative))
        missing = chunks[~there]
        if len(missing):
            try:
                loading, missing = self._load(layer, missing, speculative, alone)
            except BaseException:
                for batch in batches:
                    batch.release()
                raise
            batches += loading
        return batches, missing

    def _load(self, layer: int, missing: Chunks, speculative: bool, alone: bool) -> tuple[list[Batch], Chunks]:
        """Start reading into as many slots as there are."""
        size = self._prefix.extent_bytes
        taken = self._tier.take(size, len(missing))
        if not len(taken):
            return [], missing
        try:
            if len(taken) < min(len(missing), _FEW_SLOTS):
                self._tier.release(taken, size)
                return [], missing
            now = missing[: len(taken)]
            blocks = self._tier.blocks(size)
            reads = self._prefix.reads(layer, now, taken, blocks.buffer, self._verify, blocks.slots_in_a_row)
            ticket = self._reader.submit(reads, threads=None if alone else 1)
        except BaseException:
            self._tier.release(taken, size)
            raise
        return [self._batch(layer, now, taken, ticket, speculative)], missing[len(taken) :]

    def _batch(self, layer: int, chunks: Chunks, slots: Chunks, ticket: Ticket | None, speculative: bool) -> SlotBatch:
        size = self._prefix.extent_bytes
        return SlotBatch(layer, chunks, slots, self._tier, self._tables, size, ticket, speculative, self._verify)

    def bring_piece(self, layer: int, chunks: Chunks) -> tuple[Batch, Chunks]:
        """See `Residency`."""
        size = self._prefix.extent_bytes
        count = max(1, PIECE_BYTES // size)
        piece = PieceBatch(chunks[:count], self._tier, size)
        slots = np.arange(len(piece.chunks))
        try:
            piece.ticket = self._reader.submit(self._prefix.reads(layer, piece.chunks, slots, piece.into, self._verify))
        except BaseException:
            piece.release()
            raise
        return piece, chunks[count:]

    def settle(self) -> None:
        """See `Residency`: chunks were read into the slots in which they stay."""


def residency_for(
    device: torch.device,
    prefix: AttachedPrefix,
    memory: MemoryTiers,
    reader: ExtentReader,
    tables: PrefixTables,
    verify: bool,
) -> Residency:
    """How chunks of `prefix` get to attention on `device`."""
    tier = memory.on(device)
    if tier is None:
        return HostResidency(prefix, memory, reader, tables, verify)
    from .device_residency import DeviceResidency

    return DeviceResidency(prefix, memory, tier, reader, tables, verify)
