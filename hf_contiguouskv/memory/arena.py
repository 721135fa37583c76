"""Slots of one size: which are free, what each holds, how many users each has, and which to evict first."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from .blocks import Blocks, Slots, distinct

# Eviction candidates collected per search, because each search takes a pass over all slots.
_CANDIDATES = 512

Empty = np.zeros(0, dtype=np.int64)


class Arena:
    """Bookkeeping of the slots of `blocks`. Not thread-safe: its tier holds a lock.

    It is large because its arrays describe one thing, a slot, and must change together.

    A slot is *free*, *loading* (it has a user, but no table refers to it yet) or *resident* (it holds the chunk at one
    place of a table). Slots with users are never evicted.
    """

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks
        self.slot_bytes = blocks.slot_bytes
        self.block_bytes = blocks.slot_bytes * blocks.slots_per_block
        count = blocks.max_blocks * blocks.slots_per_block
        # The system allocates zeroed memory on the first write, so a large bound costs nothing here.
        self.users = np.zeros(count, dtype=np.int32)
        self.owner = np.zeros(count, dtype=np.int32)
        self.place = np.zeros(count, dtype=np.int64)
        self.worth = np.zeros(count, dtype=np.float64)
        self.held_blocks = 0
        self._free: list[int] = []
        self._top = 0
        self._returned: list[int] = []
        # The slots with the lowest worth at the last search: every other slot was worth `_limit` or more.
        self._queue = Empty
        self._limit = -np.inf
        self._recent: list[Slots] = []

    @property
    def held_bytes(self) -> int:
        """Bytes allocated from the system, used or not."""
        return self.held_blocks * self.block_bytes

    @property
    def free_slots(self) -> int:
        """Slots that can be taken without allocating memory."""
        return len(self._free)

    # -- taking and releasing slots -----------------------------------------------------------------------------------

    def grow(self, blocks: int) -> int:
        """Allocate up to `blocks` more blocks, or fewer if memory runs out; the number of slots added."""
        room = self.blocks.max_blocks - self._top + len(self._returned)
        numbers: list[int] = []
        try:
            for _ in range(min(blocks, room)):
                number = self._returned[-1] if self._returned else self._top
                try:
                    self.blocks.take(number)  # May raise, and then nothing has changed.
                except torch.OutOfMemoryError:
                    break  # The limit exceeds the memory that exists.
                if self._returned:
                    self._returned.pop()
                else:
                    self._top += 1
                numbers.append(number)
        finally:
            self.held_blocks += len(numbers)
            size = self.blocks.slots_per_block
            # `take` takes from the end of the list, so the lowest slots go last.
            for number in reversed(numbers):
                self._free.extend(range((number + 1) * size - 1, number * size - 1, -1))
        return len(numbers) * size

    def take(self, count: int) -> Slots:
        """Up to `count` free slots, ascending, each with one user."""
        if count <= 0 or not self._free:
            return Empty
        taken = self._free[-count:]
        del self._free[-count:]
        slots = np.array(taken, dtype=np.int64)
        slots.sort()
        self.users[slots] = 1
        return slots

    def release(self, slots: Slots) -> None:
        """Remove one user from each slot; a slot with no user and no owner becomes free."""
        self.users[slots] -= 1
        idle = slots[self.users[slots] == 0]
        owned = self.owner[idle] > 0
        kept, freed = idle[owned], idle[~owned]
        if len(kept) and self._limit > -np.inf:
            self._recent.append(kept)
            if len(self._recent) > _CANDIDATES:
                self._forget_order()
        if len(freed):
            self._free.extend(freed[::-1].tolist())

    def return_blocks(self, blocks: int) -> int:
        """Return up to `blocks` wholly free blocks to the system; the number returned."""
        if not self._free or blocks <= 0:
            return 0
        size = self.blocks.slots_per_block
        free = np.array(self._free, dtype=np.int64)
        numbers, counts = np.unique(free // size, return_counts=True)
        numbers = numbers[counts == size][::-1][:blocks]
        self._free = free[~np.isin(free // size, numbers)].tolist()
        self.blocks.drop(numbers.tolist())
        self._returned.extend(numbers.tolist())
        self.held_blocks -= len(numbers)
        return len(numbers)

    # -- which to evict first -----------------------------------------------------------------------------------------

    def set_worth(self, slots: Slots, worth: npt.NDArray[np.float64]) -> None:
        """Set the worth of resident slots."""
        self.worth[slots] = worth
        self._forget_order()

    def _forget_order(self) -> None:
        self._queue, self._recent, self._limit = Empty, [], -np.inf

    def lowest(self, count: int) -> Slots:
        """Up to `count` resident slots without users, lowest worth first.

        A min-heap of all slots would give the same slots in the same order; ties go to the lower slot. One pass finds
        several hundred candidates. Slots that became evictable since are compared with these.
        """
        if count <= 0:
            return Empty
        waiting = self._evictable(self._queue)
        # A queued slot may hold a more valuable chunk by now. Its worth then says nothing about slots not in the queue.
        if np.count_nonzero(self.worth[waiting] <= self._limit) < count and self._limit < np.inf:
            self._search(count)
            waiting = self._queue
        if self._recent:
            waiting = distinct(np.concatenate([waiting, self._evictable(np.concatenate(self._recent))]))
        order = np.lexsort((waiting, self.worth[waiting]))
        return waiting[order[:count]]

    def _evictable(self, slots: Slots) -> Slots:
        found: Slots = slots[(self.owner[slots] > 0) & (self.users[slots] == 0)]
        return found

    def _search(self, count: int) -> None:
        used = self._top * self.blocks.slots_per_block
        found = np.flatnonzero((self.owner[:used] > 0) & (self.users[:used] == 0))
        wanted = max(_CANDIDATES, count)
        self._limit = np.inf
        if len(found) > wanted:
            # Include every slot that ties with the last one: ties are broken by slot number.
            self._limit = float(np.partition(self.worth[found], wanted - 1)[wanted - 1])
            found = found[self.worth[found] <= self._limit]
        self._queue = found[np.lexsort((found, self.worth[found]))]
        self._recent = []

    def lowest_blocks(self) -> list[tuple[float, int]]:
        """Blocks with resident slots but no users, as (mean worth of their entries, block), lowest first."""
        size = self.blocks.slots_per_block
        used = self._top * size
        busy = (self.users[:used] > 0).reshape(-1, size).any(1)
        owned = (self.owner[:used] > 0).reshape(-1, size)
        worth = np.where(owned, self.worth[:used].reshape(-1, size), 0.0).sum(1) / np.maximum(1, owned.sum(1))
        blocks = np.flatnonzero(~busy & owned.any(1))
        blocks = blocks[np.argsort(worth[blocks], kind="stable")]
        return list(zip(worth[blocks].tolist(), blocks.tolist(), strict=True))

    def in_block(self, block: int) -> Slots:
        """The resident slots of a block."""
        size = self.blocks.slots_per_block
        slots = np.arange(block * size, (block + 1) * size)
        return slots[self.owner[slots] > 0]

    def vacate(self, slots: Slots) -> None:
        """Free resident slots that have no users."""
        self.owner[slots] = 0
        self._free.extend(slots[::-1].tolist())

    @property
    def evictable_bytes(self) -> int:
        """Bytes that would be free if every slot without users were evicted."""
        used = self._top * self.blocks.slots_per_block
        busy = int(np.count_nonzero(self.users[:used]))
        return self.held_bytes - busy * self.slot_bytes if self.blocks.slots_per_block == 1 else self._idle_blocks()

    def _idle_blocks(self) -> int:
        size = self.blocks.slots_per_block
        busy = (self.users[: self._top * size] > 0).reshape(-1, size).any(1)
        return self.held_bytes - int(busy.sum()) * self.block_bytes

    def held(self) -> list[int]:
        """Numbers of the blocks that are allocated."""
        returned = set(self._returned)
        return [block for block in range(self._top) if block not in returned]

    def resident(self) -> Slots:
        """All slots that belong to a table."""
        return np.flatnonzero(self.owner[: self._top * self.blocks.slots_per_block] > 0)
