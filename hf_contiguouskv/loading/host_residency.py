"""Chunks on their way to attention on a CPU.

Reads land in the slots in which chunks stay afterwards, and attention's buffer is filled from there: there is no copy
in between.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..hardware.aligned_memory import as_memoryview
from ..memory import MemoryTiers
from ..memory.tier import Tier
from ..store.attached_prefix import AttachedPrefix, Chunks
from ..store.reader import ExtentReader, Read, Ticket
from .prefix_tables import PrefixTables
from .residency import PIECE_BYTES, LoadedChunks

# Fewer slots than this, and fewer than are missing, are not worth a round of reads.
_FEW_SLOTS = 16


class ChunksInHostSlots:
    """Chunks in slots of the host's tier: resident, or being read into them.

    It has many attributes because it carries what booking the chunks needs when they are released.
    """

    def __init__(
        self,
        layer: int,
        chunks: Chunks,
        slots: Chunks,
        tier: Tier,
        tables: PrefixTables,
        slot_bytes: int,
        speculative: bool,
        shared: bool,
    ) -> None:
        self.chunks = chunks
        self.speculative = speculative
        self.ticket: Ticket | None = None
        self.from_disk, self.from_host = 0, len(chunks)
        self._layer = layer
        self._slots = slots
        self._tier = tier
        self._tables = tables
        self._slot_bytes = slot_bytes
        self._shared = shared

    def read_by(self, ticket: Ticket) -> None:
        """The chunks are not resident: `ticket` reads them into their slots."""
        self.ticket = ticket
        self.from_disk, self.from_host = len(self.chunks), 0

    def extents(self, take: Chunks | None) -> torch.Tensor:
        return self._tier.blocks(self._slot_bytes).select(self._slots if take is None else self._slots[take])

    def release(self) -> None:
        if self._shared and self.ticket is not None and self.ticket.succeeded:
            mass = self._tables.importance(self._layer, self.chunks)
            for table, part, places in self._tables.split(self._layer, self.chunks):
                if table is not None:
                    found = None if mass is None else mass[part]
                    self._tier.keep(table, places, self._slots[part], self._slot_bytes, importance=found)
        self._tier.release(self._slots, self._slot_bytes)


class ChunksInBuffer:
    """Chunks in a buffer that is used once, because the tiers had no room for them."""

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
        """Memory of `count` neighbouring chunks, from position `first` on."""
        return self._octets[first * self._size : (first + count) * self._size]

    def extents(self, take: Chunks | None) -> torch.Tensor:
        count = len(self.chunks)
        rows = self._buffer.data[: count * self._size].view(count, self._size)
        return rows if take is None else rows.index_select(0, torch.from_numpy(take))

    def release(self) -> None:
        self._tier.give_back(self._buffer)


class HostResidency:
    """`Residency` on a CPU: attention's buffers are filled from the host's slots."""

    def __init__(
        self, prefix: AttachedPrefix, memory: MemoryTiers, reader: ExtentReader, tables: PrefixTables, verify: bool
    ) -> None:
        self._prefix = prefix
        self._tier = memory.host
        self._reader = reader
        self._tables = tables
        self._verify = verify

    def find_or_read(
        self, layer: int, chunks: Chunks, *, speculative: bool = False, alone: bool = True
    ) -> tuple[list[LoadedChunks], Chunks]:
        parts, missing = self._found(layer, chunks, speculative)
        try:
            loading, reads, missing = self._room(layer, missing, speculative)
            parts += loading
            self._read(loading, reads, None if alone else 1)
        except BaseException:
            _release(parts)
            raise
        return parts, missing

    def find_or_read_together(
        self, asked: Sequence[tuple[int, Chunks]], *, speculative: bool
    ) -> list[tuple[list[LoadedChunks], Chunks]]:
        found: list[list[LoadedChunks]] = []
        left: list[Chunks] = []
        loading: list[ChunksInHostSlots] = []
        reads: list[Read] = []
        try:
            for layer, chunks in asked:
                parts, missing = self._found(layer, chunks, speculative)
                found.append(parts)
                own, some, rest = self._room(layer, missing, speculative)
                left.append(rest)
                parts += own
                loading += own
                reads += some
            self._read(loading, self._prefix.in_file_order(reads), None)
        except BaseException:
            for parts in found:
                _release(parts)
            raise
        return list(zip(found, left, strict=True))

    def _found(self, layer: int, chunks: Chunks, speculative: bool) -> tuple[list[LoadedChunks], Chunks]:
        """Those of `chunks` that memory has, and the others."""
        slots = self._tables.find(self._tier, layer, chunks)
        there = slots >= 0
        if not there.any():
            return [], chunks
        found = chunks if there.all() else chunks[there]
        return [self._in_slots(layer, found, slots[there], speculative)], chunks[~there]

    def _room(
        self, layer: int, missing: Chunks, speculative: bool
    ) -> tuple[list[ChunksInHostSlots], list[Read], Chunks]:
        """As many slots as the tier has room for, the reads that fill them, and the chunks that are left."""
        size = self._prefix.extent_bytes
        taken = self._tier.take(size, len(missing)) if len(missing) else missing
        if not len(taken):
            return [], [], missing
        try:
            if len(taken) < min(len(missing), _FEW_SLOTS):
                self._tier.release(taken, size)
                return [], [], missing
            now = missing[: len(taken)]
            blocks = self._tier.blocks(size)
            reads = self._prefix.reads(layer, now, taken, blocks.buffer, self._verify, blocks.slots_in_a_row)
        except BaseException:
            self._tier.release(taken, size)
            raise
        return [self._in_slots(layer, now, taken, speculative)], reads, missing[len(taken) :]

    def _read(self, loading: Sequence[ChunksInHostSlots], reads: Sequence[Read], threads: int | None) -> None:
        """Start the reads that fill the slots of `loading`."""
        if reads:
            joins = len(loading) > 1 or self._prefix.layers_per_group > 1
            ticket = self._reader.submit(reads, threads=threads, joins=joins)
            for part in loading:
                part.read_by(ticket)

    def _in_slots(self, layer: int, chunks: Chunks, slots: Chunks, speculative: bool) -> ChunksInHostSlots:
        size = self._prefix.extent_bytes
        return ChunksInHostSlots(layer, chunks, slots, self._tier, self._tables, size, speculative, self._verify)

    def read_piece(self, layer: int, chunks: Chunks) -> tuple[LoadedChunks, Chunks]:
        size = self._prefix.extent_bytes
        count = max(1, PIECE_BYTES // size)
        piece = ChunksInBuffer(chunks[:count], self._tier, size)
        slots = np.arange(len(piece.chunks))
        try:
            piece.ticket = self._reader.submit(self._prefix.reads(layer, piece.chunks, slots, piece.into, self._verify))
        except BaseException:
            piece.release()
            raise
        return piece, chunks[count:]

    def settle(self) -> None:
        pass  # Chunks were read into the slots in which they stay.


def _release(parts: Sequence[LoadedChunks]) -> None:
    for part in parts:
        part.release()
