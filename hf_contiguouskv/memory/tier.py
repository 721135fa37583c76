"""One kind of memory with a hard limit: chunks in slots, keys for selection, and buffers for running reads."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import torch

from ..errors import ConfigError, StoreClosedError
from .arena import Arena, Empty
from .blocks import Blocks, Slots, distinct
from .entries import Buffer, KeptKeys
from .history import Clock, Floats, SegmentTable
from .key_room import KeyRoom
from .lending import Lender
from .policies import EvictionPolicy
from .victims import choose_victims

# Called with an arena and the slots about to be evicted from it.
Spill = Callable[[Arena, Slots], None]


class Tier(Lender):
    """Memory of one kind. Thread-safe; no method waits for a read or a copy.

    It is large because slots, keys and buffers share one limit and one lock.

    Args:
        name: shown in statistics: "host", or the device.
        max_bytes: hard limit on everything held here, including kept buffers and tables.
        policy: decides what to evict first.
        make_blocks: makes the memory for slots, given the slot size and a bound in bytes.
        make_buffer: allocates the memory of a buffer.
        lock: shared by all tiers of a store, because they share tables.
        tables: the store's tables, by number.
        clock: counts requests.

    Raises:
        ConfigError: `max_bytes` is negative.
    """

    def __init__(
        self,
        name: str,
        max_bytes: int,
        policy: EvictionPolicy,
        make_blocks: Callable[[int, int], Blocks],
        make_buffer: Callable[[int], torch.Tensor],
        lock: threading.RLock,
        tables: dict[int, SegmentTable],
        clock: Clock,
    ) -> None:
        if max_bytes < 0:
            raise ConfigError(f"the bound of the {name} tier must be 0 or more, got {max_bytes}")
        super().__init__(max_bytes, make_buffer, lock)
        self.name = name
        self.policy = policy
        self.spill: Spill | None = None
        self._make_blocks = make_blocks
        self._tables = tables
        self._clock = clock
        self._arenas: dict[int, Arena] = {}
        self._keys = KeyRoom()
        # Bytes of the history tables, set by their owner.
        self.table_bytes = 0
        self.evicted = 0
        self.peak_bytes = 0

    # -- bytes --------------------------------------------------------------------------------------------------------

    @property
    def held_bytes(self) -> int:
        """Bytes that count towards the limit: slots (free ones included), keys, buffers, workspace, tables."""
        arenas = sum(arena.held_bytes for arena in tuple(self._arenas.values()))
        buffers = self._buffer_bytes + self._idle_bytes + self._workspace.held_bytes
        return arenas + self._keys.held_bytes + buffers + self.table_bytes

    @property
    def bytes_by_use(self) -> dict[str, int]:
        """`chunks` (resident slots), `keys`, `buffers` (in use, kept, free slots, attention's workspace), `tables`."""
        with self._lock:
            chunks = sum(len(arena.resident()) * arena.slot_bytes for arena in self._arenas.values())
            slots = sum(arena.held_bytes for arena in self._arenas.values())
            buffers = self._buffer_bytes + self._idle_bytes + self._workspace.held_bytes + slots - chunks
            return {"chunks": chunks, "keys": self._keys.held_bytes, "buffers": buffers, "tables": self.table_bytes}

    def count_tables(self, nbytes: int) -> None:
        """Set the bytes that the tables take up."""
        self.table_bytes = nbytes
        self._note_peak()

    def _note_peak(self) -> None:
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)

    # -- chunks -------------------------------------------------------------------------------------------------------

    def find(self, table: SegmentTable, places: Slots) -> Slots:
        """Slots of the chunks at `places`, -1 where absent. Each slot found gets one more user."""
        with self._lock:
            known = table.slots.get(self.name)
            if known is None or self._closed:
                return np.full(len(places), -1, dtype=np.int64)
            slots = known[places]
            found = slots[slots >= 0]
            if len(found):
                # All chunks of a table have one size.
                self._arena_of(table).users[found] += 1
            return slots

    def take(self, slot_bytes: int, count: int) -> Slots:
        """Up to `count` slots to load into, each with one user; fewer if the limit and slots in use leave less room."""
        with self._lock:
            arena = self._arena(slot_bytes)
            if arena is None or count <= 0:
                return Empty
            short = count - arena.free_slots
            if short > 0:
                short -= self._grow(arena, short)
            if short > 0:
                self._make_slots(arena, short)
            self._note_peak()
            return arena.take(count)

    def keep(
        self,
        table: SegmentTable,
        places: Slots,
        slots: Slots,
        slot_bytes: int,
        *,
        loaded: bool = True,
        arriving: bool = True,
        importance: Floats | None = None,
    ) -> None:
        """Register that `slots` (from `take`) now hold the chunks at `places`; chunks already resident stay where they
        are.

        Chunks of a running request are judged as if the request were already over.

        Args:
            table, places: which chunks.
            slots: the slots that hold them.
            slot_bytes: size of a slot.
            loaded: whether they come from disk, which counts in `F_j`.
            arriving: whether a running request loaded them.
            importance: the attention mass that this request measured for each, `(n,)`.
        """
        with self._lock:
            if table.number not in self._tables or self._closed:
                return  # The table was forgotten in the meantime.
            known = table.slots_in(self.name)
            new = known[places] < 0
            places, slots = places[new], slots[new]
            importance = None if importance is None else importance[new]
            if not len(slots):
                return
            arena = self._arenas[slot_bytes]
            known[places] = slots
            table.resident += len(slots)
            table.loads[places] += int(loaded)
            arena.owner[slots] = table.number
            arena.place[slots] = places
            uses = table.uses_on_arrival(places, self._clock, importance) if arriving else table.uses_of(places)
            arena.worth[slots] = self.policy.worth(uses)

    def release(self, slots: Slots, slot_bytes: int) -> None:
        """Remove one user from each slot (see `find` and `take`)."""
        with self._lock:
            if not self._closed:
                self._arenas[slot_bytes].release(slots)
                if not self._fits(0):  # The limit was lowered while they were in use.
                    self.make_room(0)

    def would_keep(self, worth: Floats, slot_bytes: int) -> int:
        """How many chunks with these worths, best first, would be kept: as many as fit, and then each chunk that
        outscores the one it would replace."""
        with self._lock:
            arena = self._arena(slot_bytes)
            if arena is None or not len(worth):
                return 0
            free = max(0, self.max_bytes - self.held_bytes + self._idle_bytes) // arena.block_bytes
            room = arena.free_slots + free * arena.blocks.slots_per_block
            if room >= len(worth):
                return len(worth)
            least = arena.worth[arena.lowest(len(worth) - room)]
            better = worth[room : room + len(least)] > least
            return room + (len(better) if better.all() else int(np.argmin(better)))

    def blocks(self, slot_bytes: int) -> Blocks:
        """The memory that holds slots of this size.

        Raises:
            StoreClosedError: the tier is closed.
        """
        if self._closed:
            raise StoreClosedError("the store was closed while a request was using its memory")
        return self._arenas[slot_bytes].blocks

    def judge(self, table: SegmentTable) -> None:
        """Update the worth of a table's chunks and keys after its history has changed."""
        with self._lock:
            known = table.slots.get(self.name)
            if known is not None and table.resident:
                places = np.flatnonzero(known >= 0)
                if len(places):
                    self._arena_of(table).set_worth(known[places], self.policy.worth(table.uses_of(places)))
            self._keys.judge(table, self.policy.worth)

    def _arena_of(self, table: SegmentTable) -> Arena:
        return self._arenas[table.slot_bytes]

    def _arena(self, slot_bytes: int) -> Arena | None:
        arena = self._arenas.get(slot_bytes)
        if arena is None:
            if self.max_bytes < slot_bytes:
                return None
            blocks = self._make_blocks(slot_bytes, self.max_bytes)
            if blocks.max_blocks < 1:
                return None
            arena = self._arenas[slot_bytes] = Arena(blocks)
        return arena

    def _grow(self, arena: Arena, slots: int) -> int:
        """Allocate memory for up to `slots` more slots within the limit, without evicting; the number added."""
        wanted = -(-slots // arena.blocks.slots_per_block)
        missing = wanted * arena.block_bytes - (self.max_bytes - self.held_bytes)
        if missing > 0 and self._idle_bytes:
            self.drop_idle()
        room = (self.max_bytes - self.held_bytes) // arena.block_bytes
        return arena.grow(max(0, min(wanted, room)))

    def _make_slots(self, arena: Arena, count: int) -> None:
        """Make room for `count` more slots of `arena` by evicting the entries with the lowest worth."""
        # Return free slots of other sizes before evicting anything.
        for other in self._arenas.values():
            if other is not arena and other.free_slots and count > 0:
                other.return_blocks(other.free_slots)
                count -= self._grow(arena, count)
        if count > 0:
            target = arena.free_slots + count
            self._reclaim(count * arena.slot_bytes, arena)
            self._grow(arena, target - arena.free_slots)
            if arena.free_slots < target:
                self._workspace.drop((target - arena.free_slots) * arena.slot_bytes)
                self._grow(arena, target - arena.free_slots)

    def make_room(self, nbytes: int) -> bool:
        """Evict entries, lowest worth first, until `nbytes` more fit; whether they fit."""
        with self._lock:
            if nbytes > self.max_bytes:
                return False
            if not self._fits(nbytes):
                if nbytes and not self.could_fit(nbytes):
                    return False  # Evict nothing in vain.
                self.drop_idle()
            for arena in self._arenas.values():
                if not self._fits(nbytes) and arena.free_slots:
                    arena.return_blocks(-(-self._missing(nbytes) // arena.block_bytes))
            if not self._fits(nbytes):
                self._reclaim(self._missing(nbytes), None)
            if not self._fits(nbytes):
                self._workspace.drop(self._missing(nbytes))
            return self._fits(nbytes)

    def give_way(self, nbytes: int) -> None:
        """Return `nbytes` that are not in use to the system, whatever the limit is."""
        with self._lock:
            before = self.held_bytes
            self.drop_idle()
            self._workspace.drop(nbytes)
            for arena in self._arenas.values():
                arena.return_blocks(-(-nbytes // arena.block_bytes))
            missing = nbytes - (before - self.held_bytes)
            if missing > 0:
                self._reclaim(missing, None)

    def could_fit(self, nbytes: int) -> bool:
        """Whether `nbytes` more would fit if everything unused were evicted."""
        with self._lock:
            evictable = self._idle_bytes + self._workspace.free_bytes + self._keys.idle_bytes
            evictable += sum(arena.evictable_bytes for arena in self._arenas.values())
            return self._missing(nbytes) <= evictable

    def _fits(self, nbytes: int) -> bool:
        return self._missing(nbytes) <= 0

    def _missing(self, nbytes: int) -> int:
        return self.held_bytes + nbytes - self.max_bytes

    def _reclaim(self, nbytes: int, into: Arena | None) -> None:
        """Evict entries, lowest worth first, until `nbytes` are freed. `into` keeps its freed slots for itself; all
        other memory is returned to the system."""
        keys, slots_of = choose_victims(nbytes, self._arenas.values(), self._keys.in_order, into)
        for one in keys:
            self._keys.forget(one)
        self.evicted += len(keys)
        for arena, slots in slots_of.items():
            self._evict(arena, slots)
            if arena is not into:
                arena.return_blocks(len(distinct(slots // arena.blocks.slots_per_block)))

    def _evict(self, arena: Arena, slots: Slots) -> None:
        if not len(slots):
            return
        if self.spill is not None:
            self.spill(arena, slots)
        self.evicted += len(slots)
        self._vacate(arena, slots)

    def _vacate(self, arena: Arena, slots: Slots) -> None:
        owners = arena.owner[slots]
        for number in distinct(owners):
            table = self._tables[int(number)]
            mine = slots[owners == number]
            table.slots[self.name][arena.place[mine]] = -1
            table.resident -= len(mine)
        arena.vacate(slots)

    def trim(self, slot_bytes: int, nbytes: int) -> None:
        """Evict now, so that `nbytes` can later be loaded into slots without eviction."""
        with self._lock:
            arena = self._arenas.get(slot_bytes)
            if arena is None:
                return
            blocks = max(0, self.max_bytes - self.held_bytes + self._idle_bytes) // arena.block_bytes
            room = blocks * arena.blocks.slots_per_block
            short = nbytes // slot_bytes - arena.free_slots - room
            if short > 0:
                self._reclaim(short * slot_bytes, arena)

    def forget(self, table: SegmentTable) -> None:
        """Drop all chunks and keys of a table; those in use are freed when they are released."""
        with self._lock:
            for keys in self._keys.of(table):
                self._keys.forget(keys)
            self.forget_chunks(table)

    def forget_chunks(self, table: SegmentTable) -> None:
        """Drop a table's chunks, as `forget` does, but keep its keys."""
        with self._lock:
            known = table.slots.get(self.name)
            if known is None:
                return
            slots = known[known >= 0]
            if not len(slots):
                return
            arena = self._arena_of(table)
            idle = arena.users[slots] == 0
            self._vacate(arena, slots[idle])
            busy = slots[~idle]
            # Slots in use lose their owner, so `release` frees them.
            known[arena.place[busy]] = -1
            table.resident -= len(busy)
            arena.owner[busy] = 0

    def hold_keys(self, name: str) -> KeptKeys | None:
        """The keys kept under `name`, which stay until `let_go`; `None` if there are none."""
        with self._lock:
            return self._keys.hold(name)

    def has_keys(self, name: str) -> bool:
        """Whether keys are kept here under `name`."""
        return name in self._keys

    def let_go(self, keys: KeptKeys) -> None:
        """Remove one user of `keys`."""
        with self._lock:
            if self._closed:
                keys.users -= 1  # A closed tier counts no bytes.
            else:
                self._keys.let_go(keys)

    def keep_keys(self, name: str, which: int, buffer: Buffer, table: SegmentTable | None) -> KeptKeys | None:
        """Keep a leased buffer under `name`, and hold it. `None` (no room, or `name` is taken): the caller still owns
        it.

        `which` is explained in `SegmentTable.uses_of_keys`.
        """
        with self._lock:
            if not buffer.counted or table is None or self._closed:
                return None
            if name in self._keys or table.number not in self._tables:
                return None
            table.key_loads[which] += 1
            worth = float(self.policy.worth(table.uses_of_keys([which], self._clock))[0])
            self._buffer_bytes -= buffer.counted
            return self._keys.add(name, which, buffer, table, worth)

    def close(self) -> None:
        """Let go of everything; from now on keep nothing."""
        with self._lock:
            self._closed = True
            self.max_bytes = 0
            self._arenas.clear()
            self._keys.clear()
            self.drop_idle()
            self._workspace.close()
            self._buffer_bytes = self.table_bytes = 0
