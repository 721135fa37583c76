"""Small tiers with known content, slow references, and the invariants of a tier, for the tests of memory."""

from __future__ import annotations

import heapq
import threading
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from hf_contiguouskv.hardware.aligned_memory import PAGE, aligned_buffer
from hf_contiguouskv.memory import Usage
from hf_contiguouskv.memory.arena import Arena
from hf_contiguouskv.memory.blocks import Blocks, PageableBlocks, Slots, TensorBlocks
from hf_contiguouskv.memory.entries import KeptKeys
from hf_contiguouskv.memory.history import Clock, Floats, SegmentTable, Uses
from hf_contiguouskv.memory.policies import EvictionPolicy
from hf_contiguouskv.memory.segments import CachedSegment
from hf_contiguouskv.memory.tier import Tier


class ByImportance:
    """A policy of the caller's own: tests set `table.importance` to say who goes first."""

    name = "by-importance"
    arrivals_compete = False

    def worth(self, uses: Uses) -> Floats:
        return uses.importance


class FourPerBlock(TensorBlocks):
    """Tensors on the CPU in blocks of four slots (the library's own are never below 4 MiB)."""

    def __init__(self, slot_bytes: int, max_bytes: int) -> None:
        super().__init__(slot_bytes, max_bytes, octets)
        self.slots_per_block = self.slots_in_a_row = 4
        self.max_blocks = max_bytes // (4 * slot_bytes)


def octets(count: int) -> torch.Tensor:
    return torch.empty(count, dtype=torch.uint8)


def new_tier(
    max_bytes: int,
    tables: Iterable[SegmentTable] = (),
    policy: EvictionPolicy | None = None,
    blocks: Any = PageableBlocks,
    clock: Clock | None = None,
) -> Tier:
    """A host's tier that knows `tables`."""
    known = {table.number: table for table in tables}
    lock = threading.RLock()
    return Tier("host", max_bytes, policy or ByImportance(), blocks, aligned_buffer, lock, known, clock or Clock())


def new_table(number: int, chunks: int = 16, slot_bytes: int = PAGE, layers: int = 1) -> SegmentTable:
    return SegmentTable(number, f"segment {number}", layers, chunks, slot_bytes)


def content_of(number: int, places: Slots, slot_bytes: int) -> torch.Tensor:
    """What chunks of table `number` hold, uint8 `(n, slot_bytes)`: different for every table and place."""
    words = np.empty((len(places), slot_bytes // 4), dtype="<u4")
    words[:] = (number * 1_000_003 + np.asarray(places) + 1)[:, None]
    words[:, ::7] ^= np.arange(words.shape[1], dtype="<u4")[::7]
    return torch.from_numpy(words.view(np.uint8))


def places(*numbers: int) -> Slots:
    return np.array(numbers, dtype=np.int64)


class Joined:
    """Tables of a prefix whose segments follow each other, used from their first chunk to their last."""

    def __init__(self, *tables: SegmentTable) -> None:
        self.known = list(tables)
        self._ends = np.cumsum([table.chunks for table in tables])

    def places(self, layer: int, chunks: Slots) -> list[tuple[SegmentTable, Slots]]:
        found = []
        for table, end in zip(self.known, self._ends, strict=True):
            mine = chunks[(chunks >= end - table.chunks) & (chunks < end)]
            if len(mine):
                found.append((table, mine - (end - table.chunks) + layer * table.chunks))
        return found

    def parts(self, mass: npt.NDArray[np.float32]) -> list[tuple[SegmentTable, int, npt.NDArray[np.float32]]]:
        split = zip(self.known, self._ends, strict=True)
        return [(table, 0, mass[end - table.chunks : end]) for table, end in split]


def usage(
    tables: Joined,
    *used: int,
    layer: int = 0,
    mass: Iterable[float] | None = None,
    loaded_bytes: int = 0,
) -> Usage:
    """What a request tells that used these chunks of one layer, and found `mass` `(chunks,)` in it."""
    told = Usage(loaded_bytes=loaded_bytes)
    told.used(tables, layer, places(*used))
    if mass is not None:
        told.mass.append(([layer], np.array(mass, dtype=np.float32)))
    return told


def load(
    tier: Tier,
    table: SegmentTable,
    wanted: Slots,
    worth: Iterable[float] | None = None,
    importance: Floats | None = None,
) -> int:
    """Load chunks that are not there as a request does; how many could be kept.

    `worth`: for `ByImportance`. `importance`: what the request has found of them, `(n,)`.
    """
    if worth is not None:
        table.importance[wanted] = list(worth)
    size = table.slot_bytes
    slots = tier.take(size, len(wanted))
    if len(slots):
        got = wanted[: len(slots)]
        tier.blocks(size).write(slots, content_of(table.number, got, size))
        tier.keep(table, got, slots, size, importance=None if importance is None else importance[: len(got)])
        tier.release(slots, size)
    return len(slots)


def here(tier: Tier, table: SegmentTable) -> list[int]:
    """Places whose chunks are in the tier."""
    return np.flatnonzero(table.slots_in(tier.name) >= 0).tolist()


def read(tier: Tier, table: SegmentTable, wanted: Slots) -> torch.Tensor:
    """Bytes of chunks that must all be there."""
    slots = tier.find(table, wanted)
    assert (slots >= 0).all()
    found = tier.blocks(table.slot_bytes).select(slots).clone()
    tier.release(slots, table.slot_bytes)
    return found


def heap_victims(arena: Arena, count: int) -> list[int]:
    """What a min-heap of all resident slots without users gives, slot by slot."""
    heap = [
        (float(arena.worth[slot]), slot)
        for slot in range(len(arena.owner))
        if arena.owner[slot] > 0 and arena.users[slot] == 0
    ]
    heapq.heapify(heap)
    return [heapq.heappop(heap)[1] for _ in range(min(count, len(heap)))]


def check_tier(tier: Tier, leased: int | None = None, forgotten: int = 0) -> None:
    """Everything that must hold of a tier between any two calls.

    `leased`: counted bytes that callers have now (`None`: any); of keys, those `forgotten` while callers hold them.
    """
    assert tier.held_bytes <= tier.max_bytes
    assert tier.held_bytes <= tier.peak_bytes <= tier.max_bytes
    kept = sum(keys.buffer.counted for keys in tier._keys.values())
    if leased is not None:
        assert tier._buffer_bytes == leased
        assert tier._keys.held_bytes == kept + forgotten
    assert tier._keys.held_bytes >= kept
    idle = sum(keys.buffer.counted for keys in tier._keys.values() if not keys.users)
    assert tier._keys.held_bytes - tier._keys.busy_bytes == idle
    if tier._keys._in_order is not None:
        assert {id(keys) for keys in tier._keys.values()} <= {id(keys) for keys in tier._keys._in_order}
        assert [keys.worth for keys in tier._keys._in_order] == sorted(keys.worth for keys in tier._keys._in_order)
    assert tier._idle_bytes == sum(buffer.counted for kept in tier._idle.values() for buffer in kept)
    assert sum(tier.bytes_by_use.values()) == tier.held_bytes
    resident = dict.fromkeys(tier._tables, 0)
    for size, arena in tier._arenas.items():
        check_arena(arena)
        for slot in arena.resident().tolist():
            table = tier._tables[int(arena.owner[slot])]
            assert table.slot_bytes == size
            assert table.slots[tier.name][arena.place[slot]] == slot
            resident[table.number] += 1
    for keys in tier._keys.values():
        resident[keys.table.number] += 1
    for number, table in tier._tables.items():
        known = table.slots_in(tier.name)
        kept = [keys for keys in tier._keys.values() if keys.table is table]
        assert (known >= 0).sum() == resident[number] - len(kept)
        assert table.resident == resident[number]


def check_arena(arena: Arena) -> None:
    """A slot is free, loading, or used: never two of them, and none is lost."""
    size = arena.blocks.slots_per_block
    free = arena._free
    assert len(set(free)) == len(free)
    assert (arena.users >= 0).all()
    assert not arena.users[free].any()
    assert not arena.owner[free].any()
    taken = np.flatnonzero((arena.users > 0) | (arena.owner > 0))
    assert len(free) + len(taken) == arena.held_blocks * size
    assert arena.held_bytes == arena.held_blocks * size * arena.slot_bytes
    returned = {slot for block in arena._returned for slot in range(block * size, (block + 1) * size)}
    assert not returned & {*free, *taken.tolist()}


def fake_segment(
    key: str, chunks: int = 16, layers: int = 1, extent_bytes: int = PAGE, in_memory: bool = False
) -> CachedSegment:
    """What `MemoryTiers.table` asks of a segment."""
    found = SimpleNamespace(
        key=key,
        first_chunk=0,
        identity=(1, 2),
        num_layers=layers,
        num_chunks=chunks,
        in_memory=in_memory,
        extent_bytes=lambda form: extent_bytes,
        retired=False,
    )
    return cast(CachedSegment, found)


def pageable(slot_bytes: int, max_bytes: int) -> Blocks:
    return PageableBlocks(slot_bytes, max_bytes)


def hold_new_keys(tier: Tier, name: str, table: SegmentTable, pages: int = 1, which: int = 0) -> KeptKeys:
    """Keys of so many pages under `name`, with one user."""
    buffer = tier.lease(pages * PAGE, exact=True)
    assert buffer is not None
    keys = tier.keep_keys(name, which, buffer, table)
    assert keys is not None
    assert keys.buffer is buffer
    return keys


def keys_in(tier: Tier, name: str, table: SegmentTable, pages: int = 1, which: int = 0) -> None:
    """Keys of so many pages under `name`, which nobody uses."""
    tier.let_go(hold_new_keys(tier, name, table, pages, which))
