"""All memory that a store uses above the disk: the host's tier, and one for each accelerator."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from ..device import Device, device_of, pinned_buffer
from ..store.pread import aligned_buffer
from ..store.segment import Segment
from .blocks import Blocks, PageableBlocks, Slots, TensorBlocks
from .device_tier import DeviceTier
from .history import Clock, SegmentTable
from .policies import EvictionPolicy, policy_named
from .tier import Tier

# Segments whose history is remembered, and what share of the host's limit that may take.
_MAX_TABLES = 4096
_TABLE_SHARE = 16
# Where arrivals compete, room is made for as much as requests have lately loaded, at most this share of the limit.
_RESERVE_SHARE = 8
_SMOOTHING = 0.1


@dataclass
class Usage:
    """What one request used of the stored segments, for the books.

    Attributes:
        places: chunks that attention used, per layer: the segment's table and places in it.
        importance: chunk importance `A_j`: table, the layers it applies to, first chunk, float32 `(chunks,)`.
        tables: segments that the request was about.
        loaded_bytes: read into slots.
    """

    tables: list[SegmentTable] = field(default_factory=list)
    places: list[tuple[SegmentTable, Slots]] = field(default_factory=list)
    importance: list[tuple[SegmentTable, list[int], int, npt.NDArray[np.float32]]] = field(default_factory=list)
    loaded_bytes: int = 0


class MemoryTiers:
    """The tiers above the disk of one store, with hard limits over all its prefixes and requests. Thread-safe.

    On a machine without an accelerator, device and host are one tier: the host's.

    Args:
        host_bytes: limit of the host's tier; 0: chunks are read from disk each time.
        device_bytes: limit of all accelerators' tiers together; they get equal shares.
        eviction: a policy, or its name.

    Raises:
        ConfigError: a limit is negative, or there is no policy of that name.
    """

    def __init__(self, host_bytes: int, device_bytes: int, eviction: str | EvictionPolicy) -> None:
        self.policy = policy_named(eviction)
        self.clock = Clock()
        self.device_bytes = device_bytes
        self.lock = threading.RLock()
        self._tables: dict[int, SegmentTable] = {}
        self._by_identity: OrderedDict[Hashable, SegmentTable] = OrderedDict()
        self._last_number = 0
        self._reserve = 0.0
        self._deferred: deque[Callable[[], None]] = deque()
        self._pinned = False
        self.host = Tier("host", host_bytes, self.policy, self._host_blocks, self._host_buffer, self.lock, self._tables)
        self.devices: dict[torch.device, DeviceTier] = {}

    def _host_blocks(self, slot_bytes: int, max_bytes: int) -> Blocks:
        if self._pinned:
            return TensorBlocks(slot_bytes, max_bytes, pinned_buffer)
        return PageableBlocks(slot_bytes, max_bytes)

    def _host_buffer(self, nbytes: int) -> torch.Tensor:
        return pinned_buffer(nbytes) if self._pinned else aligned_buffer(nbytes)

    # -- tiers --------------------------------------------------------------------------------------------------------

    def on(self, device: torch.device) -> DeviceTier | None:
        """The tier of an accelerator; `None` for the CPU, whose tier is `host`."""
        tier = self.devices.get(device)
        if tier is not None:
            return tier
        opened = device_of(device)
        return None if opened is None else self._add_device(device, opened)

    def _add_device(self, device: torch.device, opened: Device) -> DeviceTier:
        with self.lock:
            if device not in self.devices:
                self._pinned = True
                share = self.device_bytes // (len(self.devices) + 1)
                for tier in self.devices.values():
                    tier.limit(share)
                self.devices[device] = DeviceTier(
                    str(device), share, self.policy, opened, self.host, self.lock, self._tables
                )
            return self.devices[device]

    @property
    def tiers(self) -> list[Tier]:
        """All tiers, the fastest first."""
        return [*self.devices.values(), self.host]

    # -- segments -----------------------------------------------------------------------------------------------------

    def table(self, segment: Segment) -> SegmentTable | None:
        """The table of a segment; `None` where there is no memory to keep its chunks in."""
        identity = (segment.key, segment.first_chunk, segment.identity)
        geometry = segment.geometry
        if getattr(segment.blob, "in_memory", False):
            return None  # It is in memory already.
        if max(self.host.max_bytes, self.device_bytes if self.devices else 0) < geometry.extent_bytes:
            return None
        with self.lock:
            table = self._by_identity.get(identity)
            if table is None:
                self._last_number += 1
                chunks = segment.num_chunks
                table = SegmentTable(self._last_number, identity, geometry.num_layers, chunks, geometry.extent_bytes)
                self._tables[table.number] = self._by_identity[identity] = table
                self._count_tables()
                self._drop_tables()
                if table.number not in self._tables:
                    return None
            self._by_identity.move_to_end(identity)
            return table

    def _count_tables(self) -> None:
        nbytes = sum(table.nbytes for table in self._tables.values())
        self.host.table_bytes = nbytes if self.host.max_bytes else 0

    def _drop_tables(self) -> None:
        """Forget the history of segments that nobody asked for the longest, of which nothing is in memory."""
        for resident_too in (False, True):
            for identity, table in list(self._by_identity.items()):
                if self._few_enough():
                    break
                if not table.resident or resident_too:
                    self._drop(identity, table)
        # What is left of them takes its room from what is resident.
        self.host.make_room(0)

    def _few_enough(self) -> bool:
        limit = self.host.max_bytes + (self.device_bytes if self.devices else 0)
        return len(self._tables) <= _MAX_TABLES and self.host.table_bytes * _TABLE_SHARE <= limit

    def _drop(self, identity: Hashable, table: SegmentTable) -> None:
        for tier in (self.host, *self.devices.values()):
            tier.forget(table)
        del self._by_identity[identity], self._tables[table.number]
        self._count_tables()

    def forget(self, keys: Iterable[str]) -> None:
        """Segments with these keys are gone: so is what memory holds of them."""
        gone = set(keys)
        with self.lock:
            for identity, table in list(self._by_identity.items()):
                if isinstance(identity, tuple) and identity[0] in gone:
                    self._drop(identity, table)

    # -- after a request ----------------------------------------------------------------------------------------------

    def finished(self, usage: Usage) -> None:
        """A request is over: `usage` is counted at the next `catch_up`. May be called by a finalizer."""
        if usage.tables:
            self.defer(partial(self._count, usage))

    def defer(self, function: Callable[[], None]) -> None:
        """Have `catch_up` call `function`. Takes no lock: a finalizer may run in the middle of anything."""
        self._deferred.append(function)

    @property
    def behind(self) -> bool:
        """Whether something was deferred."""
        return bool(self._deferred)

    def catch_up(self) -> None:
        """Do what was deferred. Called when the first token of a request is out: nothing waits for it."""
        while self._deferred:
            try:
                function = self._deferred.popleft()
            except IndexError:
                return
            function()

    def _count(self, usage: Usage) -> None:
        with self.lock:
            tables = [table for table in usage.tables if table.number in self._tables]
            for table in tables:
                table.begin_request(self.clock)
            for table, places in usage.places:
                table.count(places, self.clock)
            for table, layers, first, mass in usage.importance:
                table.add_importance(layers, first, mass)
            if self.clock.tick():
                factor = self.clock.rescale()
                for table in self._tables.values():
                    table.rescale(factor)
                tables = list(self._tables.values())
            for table in tables:
                for tier in (self.host, *self.devices.values()):
                    tier.judge(table)
            self._reserve += _SMOOTHING * (usage.loaded_bytes - self._reserve)
            if self.policy.arrivals_compete and tables:
                for tier in (self.host, *self.devices.values()):
                    room = min(int(self._reserve), tier.max_bytes // _RESERVE_SHARE)
                    tier.trim(tables[0].slot_bytes, room)
            for device_tier in self.devices.values():
                device_tier.drain()

    @property
    def bytes_by_tier(self) -> dict[str, int]:
        """Bytes held now, `device` and `host`."""
        with self.lock:
            return {
                "device": sum(tier.held_bytes for tier in self.devices.values()),
                "host": self.host.held_bytes,
            }

    def clear(self) -> None:
        """Let go of everything (nothing may be in use)."""
        with self.lock:
            for tier in self.devices.values():
                tier.clear()
            self.host.clear()
            self._by_identity.clear()
            self._tables.clear()
