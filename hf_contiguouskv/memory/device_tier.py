"""The memory of one accelerator: what goes from it moves to the host's tier, if it is worth more than what is there."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..hardware.accelerator import Device, StreamOrder
from .arena import Arena
from .blocks import Blocks, Slots, TensorBlocks, neighbours
from .entries import Buffer
from .history import Clock, SegmentTable
from .policies import EvictionPolicy
from .tier import Tier

# Victims that are on their way to the host at the same time.
_MOVING_BYTES = 4 * 2**20


@dataclass(eq=False)
class _Demotion:
    """Chunks on their way to the host."""

    table: SegmentTable
    places: Slots
    buffer: Buffer
    copied: Any


class OrderedBlocks:
    """Device memory in blocks that several streams may use; see `TensorBlocks`."""

    def __init__(self, slot_bytes: int, max_bytes: int, device: Device) -> None:
        self._device = device
        self._blocks = TensorBlocks(slot_bytes, max_bytes, device.empty)
        self._order = StreamOrder(device)
        self._lock = threading.Lock()
        self.slot_bytes = slot_bytes
        self.slots_per_block = self._blocks.slots_per_block
        self.max_blocks = self._blocks.max_blocks
        self.slots_in_a_row = self._blocks.slots_in_a_row

    def take(self, block: int) -> None:
        """See `Blocks`; whoever writes first, on whatever stream, does so behind the allocation."""
        with self._lock:
            self._order.before_write()
            self._blocks.take(block)
            self._order.after_write()

    def drop(self, blocks: Sequence[int]) -> None:
        """See `Blocks`."""
        with self._lock:
            self._order.before_write()
            for block in blocks:
                self._device.uses(self._blocks.tensor(block))
            self._blocks.drop(blocks)

    def select(self, slots: Slots) -> torch.Tensor:
        """See `Blocks`; always a copy, so that the slots may be given to somebody else once this has been queued."""
        with self._lock:
            self._order.before_read()
            found = self._blocks.select(slots)
            if found._base is not None and neighbours(slots):
                found = found.clone()  # It was a view.
            self._order.after_read()
            return found

    def write(self, slots: Slots, content: torch.Tensor) -> None:
        """See `Blocks`."""
        with self._lock:
            self._order.before_write()
            self._blocks.write(slots, content)
            self._order.after_write()

    def buffer(self, first: int, count: int) -> memoryview:
        """See `Blocks`: the host cannot write here."""
        raise TypeError("device memory has no buffer")


class DeviceTier(Tier):
    """See `Tier`. Its buffers are written by copies on a side stream, its slots by the current stream.

    Args:
        device: the accelerator.
        host: where victims go.
    """

    def __init__(
        self,
        name: str,
        max_bytes: int,
        policy: EvictionPolicy,
        device: Device,
        host: Tier,
        lock: threading.RLock,
        tables: dict[int, SegmentTable],
        clock: Clock,
    ) -> None:
        super().__init__(name, max_bytes, policy, self._blocks_of, self._buffer_of, lock, tables, clock)
        self.device = device
        self.on_device = True
        self.spill = self._demote
        self._host = host
        self._demotions: list[_Demotion] = []

    def _blocks_of(self, slot_bytes: int, max_bytes: int) -> Blocks:
        return OrderedBlocks(slot_bytes, max_bytes, self.device)

    def _buffer_of(self, nbytes: int) -> torch.Tensor:
        return self.device.empty(nbytes, for_copies=True)

    def give_way(self, nbytes: int) -> None:
        """See `Lender`; torch, which keeps what is returned to it, returns that to the device."""
        super().give_way(nbytes)
        self.device.let_go()

    def limit(self, max_bytes: int) -> None:
        """Another limit from now on; what is too much goes now, what is in use when it is released."""
        with self._lock:
            self.max_bytes = max_bytes
            self.make_room(0)

    # -- victims ------------------------------------------------------------------------------------------------------

    def _demote(self, arena: Arena, slots: Slots) -> None:
        """Start moving the victims that outscore the host's least to the host; the others are dropped.

        They cross in a buffer beside the limits, so that room for them is made only where they are going to stay: a
        few at a time, and what is too many at once is dropped.
        """
        for number in np.unique(arena.owner[slots]):
            table = self._tables[int(number)]
            mine = slots[arena.owner[slots] == number]
            absent = table.slots_in(self._host.name)[arena.place[mine]] < 0
            mine = mine[absent]
            room = (_MOVING_BYTES - sum(one.buffer.data.numel() for one in self._demotions)) // arena.slot_bytes
            # The best first: they displace the host's least.
            mine = mine[np.argsort(-arena.worth[mine], kind="stable")][: max(0, room)]
            mine = mine[: self._host.would_keep(arena.worth[mine], arena.slot_bytes)]
            if len(mine):
                self._move(table, arena, np.sort(mine))

    def _move(self, table: SegmentTable, arena: Arena, slots: Slots) -> None:
        buffer = self._host.lease(len(slots) * arena.slot_bytes, exact=True, evict=False)
        assert buffer is not None
        try:
            content = arena.blocks.select(slots)
            copied = self.device.copy_out(content, buffer.data[: content.numel()].view_as(content))
        except BaseException as error:
            self._host.give_back(buffer)
            if isinstance(error, torch.OutOfMemoryError):
                return  # There is not even room to gather them: they are dropped.
            raise
        buffer.busy = copied
        self._demotions.append(_Demotion(table, arena.place[slots].copy(), buffer, copied))

    def drain(self) -> None:
        """Put demoted chunks whose copy has ended into the host's slots."""
        with self._lock:
            arrived = [one for one in self._demotions if one.copied.query()]
            self._demotions = [one for one in self._demotions if one not in arrived]
            failure: BaseException | None = None
            for demotion in arrived:
                try:
                    self._arrived(demotion)
                except BaseException as error:
                    failure = error  # The others have nothing to do with it.
            if failure is not None:
                raise failure

    def _arrived(self, demotion: _Demotion) -> None:
        table, host = demotion.table, self._host
        try:
            if table.number not in self._tables:
                return
            slots = host.take(table.slot_bytes, len(demotion.places))
            if len(slots):
                places = demotion.places[: len(slots)]
                size = table.slot_bytes
                try:
                    content = demotion.buffer.data[: len(slots) * size].view(len(slots), size)
                    host.blocks(size).write(slots, content)
                    host.keep(table, places, slots, size, loaded=False, arriving=False)
                finally:
                    host.release(slots, size)
        finally:
            host.give_back(demotion.buffer)

    def close(self) -> None:
        """See `Tier.close`."""
        with self._lock:
            self._demotions.clear()
            for arena in self._arenas.values():
                arena.blocks.drop(arena.held())  # Behind what is queued on any stream.
            super().close()
