"""The tier of one accelerator. Its victims move to the host tier if they outscore the host's lowest entries."""

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

# Bytes of victims that may be moving to the host at the same time.
_MOVING_BYTES = 4 * 2**20


@dataclass(eq=False)
class _Demotion:
    """Chunks that are being copied to the host."""

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
        """Allocate a block; the first write, on any stream, waits for the allocation."""
        with self._lock:
            self._order.before_write()
            self._blocks.take(block)
            self._order.after_write()

    def drop(self, blocks: Sequence[int]) -> None:
        with self._lock:
            self._order.before_write()
            for block in blocks:
                self._device.uses(self._blocks.tensor(block))
            self._blocks.drop(blocks)

    def select(self, slots: Slots) -> torch.Tensor:
        """A copy of the slots, so that other chunks may take these slots as soon as the copy is queued."""
        with self._lock:
            self._order.before_read()
            found = self._blocks.select(slots)
            if found._base is not None and neighbours(slots):
                found = found.clone()  # It was a view.
            self._order.after_read()
            return found

    def write(self, slots: Slots, content: torch.Tensor) -> None:
        with self._lock:
            self._order.before_write()
            self._blocks.write(slots, content)
            self._order.after_write()

    def buffer(self, first: int, count: int) -> memoryview:
        """Raise `TypeError`: the host cannot write to device memory."""
        raise TypeError("device memory has no buffer")


class DeviceTier(Tier):
    """A tier in an accelerator's memory. A side stream writes its buffers, the current stream its slots.

    Args:
        device: the accelerator.
        host: the tier that receives victims.
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
        """Return memory to torch, and make torch return its cached memory to the device."""
        super().give_way(nbytes)
        self.device.let_go()

    def limit(self, max_bytes: int) -> None:
        """Change the limit. Entries above it are evicted now, or on release if they are in use."""
        with self._lock:
            self.max_bytes = max_bytes
            self.make_room(0)

    # -- victims ------------------------------------------------------------------------------------------------------

    def _demote(self, arena: Arena, slots: Slots) -> None:
        """Start moving victims that outscore the host's lowest entries to the host; drop the other victims.

        Victims cross in a leased host buffer and evict nothing until they have arrived. At most `_MOVING_BYTES` move at
        a time; victims above that are dropped.
        """
        for number in np.unique(arena.owner[slots]):
            table = self._tables[int(number)]
            mine = slots[arena.owner[slots] == number]
            absent = table.slots_in(self._host.name)[arena.place[mine]] < 0
            mine = mine[absent]
            room = (_MOVING_BYTES - sum(one.buffer.data.numel() for one in self._demotions)) // arena.slot_bytes
            # Best first: they displace the host's lowest entries.
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
                return  # No memory even to gather the victims, so they are dropped.
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
                    failure = error  # Finish the other demotions before raising.
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
        with self._lock:
            self._demotions.clear()
            for arena in self._arenas.values():
                arena.blocks.drop(arena.held())  # Ordered after the work queued on any stream.
            super().close()
