"""Slots of one size: which are free, who is in them, who uses them now, and which would go first."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from .blocks import Blocks, Slots, distinct

# Candidates that are looked for at once: finding the lowest few of all takes a pass over everything.
_CANDIDATES = 512

Empty = np.zeros(0, dtype=np.int64)


class Arena:
    """Bookkeeping of the slots of `blocks`. Not thread-safe: its tier holds a lock.

    A slot is *free*, *loading* (somebody's, but nothing is registered) or *resident* (it belongs to a place of a
    table). Slots with users are never taken away.
    """

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks
        self.slot_bytes = blocks.slot_bytes
        self.block_bytes = blocks.slot_bytes * blocks.slots_per_block
        count = blocks.max_blocks * blocks.slots_per_block
        # Memory of zeros is not there until it is written to, however large the bound is.
        self.users = np.zeros(count, dtype=np.int32)
        self.owner = np.zeros(count, dtype=np.int32)
        self.place = np.zeros(count, dtype=np.int64)
        self.worth = np.zeros(count, dtype=np.float64)
        self.held_blocks = 0
        self._free: list[int] = []
        self._top = 0
        self._returned: list[int] = []
        # The least worth of all when they were last looked for: everything else was worth `_limit` or more.
        self._queue = Empty
        self._limit = -np.inf
        self._recent: list[Slots] = []

    @property
    def held_bytes(self) -> int:
        """What the system gave, used or not."""
        return self.held_blocks * self.block_bytes

    @property
    def free_slots(self) -> int:
        """Slots that can be had without asking the system."""
        return len(self._free)

    # -- having and giving slots --------------------------------------------------------------------------------------

    def grow(self, blocks: int) -> int:
        """Have up to `blocks` more blocks, as far as there is memory for them; how many slots that made."""
        room = self.blocks.max_blocks - self._top + len(self._returned)
        numbers: list[int] = []
        try:
            for _ in range(min(blocks, room)):
                number = self._returned[-1] if self._returned else self._top
                try:
                    self.blocks.take(number)  # May raise, and then nothing has changed.
                except torch.OutOfMemoryError:
                    break  # The limit was more than there is.
                if self._returned:
                    self._returned.pop()
                else:
                    self._top += 1
                numbers.append(number)
        finally:
            self.held_blocks += len(numbers)
            size = self.blocks.slots_per_block
            # The last of the list is given first: neighbours in order.
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
        """One user less for each; what nobody uses and nobody owns is free."""
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
        """Give up to `blocks` wholly free blocks back to the system; how many there were."""
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

    # -- who goes first -----------------------------------------------------------------------------------------------

    def set_worth(self, slots: Slots, worth: npt.NDArray[np.float64]) -> None:
        """Judge resident slots anew."""
        self.worth[slots] = worth
        self._forget_order()

    def _forget_order(self) -> None:
        self._queue, self._recent, self._limit = Empty, [], -np.inf

    def lowest(self, count: int) -> Slots:
        """The (at most) `count` resident slots without users that are worth least, the least first.

        The same slots, in the same order, as a min-heap of all of them would give; ties go to the lower slot. One pass
        finds several hundred candidates; what became evictable since is compared with these.
        """
        if count <= 0:
            return Empty
        waiting = self._evictable(self._queue)
        # A slot of the queue may have been given to something worth more meanwhile: it says nothing of the others.
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
            # Whoever is worth as much as the last one is in as well: which of them is a question of slots.
            self._limit = float(np.partition(self.worth[found], wanted - 1)[wanted - 1])
            found = found[self.worth[found] <= self._limit]
        self._queue = found[np.lexsort((found, self.worth[found]))]
        self._recent = []

    def lowest_blocks(self) -> list[tuple[float, int]]:
        """Blocks that nobody uses and that are not wholly free, with the mean worth of their entries; least first."""
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
        """Resident slots without users become free."""
        self.owner[slots] = 0
        self._free.extend(slots[::-1].tolist())

    @property
    def evictable_bytes(self) -> int:
        """What would be free if everything went that nobody uses."""
        used = self._top * self.blocks.slots_per_block
        busy = int(np.count_nonzero(self.users[:used]))
        return self.held_bytes - busy * self.slot_bytes if self.blocks.slots_per_block == 1 else self._idle_blocks()

    def _idle_blocks(self) -> int:
        size = self.blocks.slots_per_block
        busy = (self.users[: self._top * size] > 0).reshape(-1, size).any(1)
        return self.held_bytes - int(busy.sum()) * self.block_bytes

    def held(self) -> list[int]:
        """Blocks that the system gave."""
        returned = set(self._returned)
        return [block for block in range(self._top) if block not in returned]

    def resident(self) -> Slots:
        """All slots that belong to a table."""
        return np.flatnonzero(self.owner[: self._top * self.blocks.slots_per_block] > 0)
