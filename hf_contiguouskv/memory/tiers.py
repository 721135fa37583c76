"""All memory that a store uses above the disk: the host tier, and one tier per accelerator."""

from __future__ import annotations

import logging
import math
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from ..errors import ConfigError
from ..hardware.accelerator import Device, device_of, pinned_buffer, release_pinned, reserve_pinned
from ..hardware.aligned_memory import aligned_buffer
from .blocks import Blocks, PageableBlocks, Slots, TensorBlocks
from .device_tier import DeviceTier
from .history import Clock, SegmentTable
from .policies import EvictionPolicy, policy_named
from .segments import CachedSegment, Form
from .tier import Tier

logger = logging.getLogger("hf_contiguouskv")

# At most this many segment histories are kept, in at most this fraction (1/16) of the tiers' limits.
_MAX_TABLES = 4096
_TABLE_SHARE = 16
# Where arrivals compete, room is made for as much as recent requests loaded, at most this fraction (1/8) of the limit.
_RESERVE_SHARE = 8
_SMOOTHING = 0.1
# A device tier gets this fraction (1/4) of the memory that is free when the device is first used, or this many bytes
# if the device does not report free memory.
FREE_SHARE, UNKNOWN_DEVICE_BYTES = 4, 2**30
# Rooms for attention in layers that are small are lent together, up to this size.
_LENT_TOGETHER_BYTES = 2 * 2**20


class Tables(Protocol):
    """The tables of a prefix's segments, and which chunk is where in them (`loading.prefix_tables.PrefixTables`)."""

    @property
    def known(self) -> list[SegmentTable]:
        """The tables that exist."""
        ...

    def places(self, layer: int, chunks: Slots) -> list[tuple[SegmentTable, Slots]]:
        """Per table, the places of `chunks` (ascending) in `layer`."""
        ...

    def parts(self, mass: npt.NDArray[np.float32]) -> list[tuple[SegmentTable, int, npt.NDArray[np.float32]]]:
        """Per table, its first chunk and its part of `mass` `(whole_chunks,)`."""
        ...


@dataclass
class Usage:
    """What one request used. It is noted while the request runs and counted after its first token.

    Attributes:
        tables: the tables of the request's prefix; `None` if it used nothing.
        chunks: chunks that attention used, int64 ascending, by layer.
        mass: attention mass `A_j`: the layers it applies to, and float32 `(whole_chunks,)`, summed over rows.
        loaded_bytes: bytes read into memory.
    """

    tables: Tables | None = None
    chunks: dict[int, Slots] = field(default_factory=dict)
    mass: list[tuple[list[int], npt.NDArray[np.float32]]] = field(default_factory=list)
    loaded_bytes: int = 0

    def used(self, tables: Tables, layer: int, chunks: Slots) -> None:
        """Note that attention in `layer` uses `chunks`."""
        self.tables = tables
        self.chunks[layer] = chunks


class MemoryTiers:
    """The tiers above the disk of one store, with hard limits over all its prefixes and requests. Thread-safe.

    It is large because it is the one object that requests ask for memory of any kind.

    Without an accelerator, the host tier is the only tier.

    Args:
        host_bytes: limit of the host tier; with 0, chunks are read from disk each time.
        device_bytes: limit of all device tiers together, which get equal shares. `None`: a quarter (`FREE_SHARE`) of
            the memory that is free when each device is first used.
        eviction: a policy, or its name.

    Raises:
        ConfigError: a limit is negative, or no policy has that name.
    """

    def __init__(self, host_bytes: int, device_bytes: int | None, eviction: str | EvictionPolicy) -> None:
        if device_bytes is not None and device_bytes < 0:
            raise ConfigError(f"device_bytes must be 0 or more, got {device_bytes}")
        self.policy = policy_named(eviction)
        self.clock = Clock()
        self._device_limit = device_bytes
        self.lock = threading.RLock()
        self._tables: dict[int, SegmentTable] = {}
        self._by_identity: OrderedDict[Hashable, SegmentTable] = OrderedDict()
        self._last_number = 0
        self._table_bytes = 0
        self._reserve = 0.0
        self._deferred: deque[Callable[[], None]] = deque()
        self._pinned = False
        self._reserved = 0
        self.host = Tier(
            "host", host_bytes, self.policy, self._host_blocks, self._host_buffer, self.lock, self._tables, self.clock
        )
        self.devices: dict[torch.device, DeviceTier] = {}

    def _host_blocks(self, slot_bytes: int, max_bytes: int) -> Blocks:
        if self._pinned:
            return TensorBlocks(slot_bytes, max_bytes, pinned_buffer)
        return PageableBlocks(slot_bytes, max_bytes)

    def _host_buffer(self, nbytes: int) -> torch.Tensor:
        return pinned_buffer(nbytes) if self._pinned else aligned_buffer(nbytes)

    def workspace(self, nbytes: int) -> torch.Tensor | None:
        """See `Tier.workspace`. `None` if there are accelerators: the host tier is then pinned memory, which is
        scarce."""
        return None if self._pinned else self.host.workspace(nbytes)

    def for_attention(self, like: torch.Tensor, batch: int, tokens: int, most: int = 1) -> tuple[torch.Tensor, ...]:
        """Memory that attention reads K and V from, each `(2, batch, kv_heads, tokens, head_dim)`, with anything in it.

        On a CPU it is lent, where there is room; on an accelerator, room is made for it.

        Args:
            like: `(..., kv_heads, any, head_dim)`, of the dtype and on the device that are wanted.
            batch, tokens: of the shape.
            most: so many, where they are small and lent: lending costs as much time for one as for all.

        Returns:
            ordinary tensors even in inference mode, so that a cache may be continued outside of it.
        """
        shape = (2, batch, like.shape[-3], tokens, like.shape[-1])
        nbytes = math.prod(shape) * like.dtype.itemsize
        with torch.inference_mode(False):
            if like.device.type == "cpu":
                count = max(1, min(most, _LENT_TOGETHER_BYTES // max(1, nbytes)))
                octets = self.workspace(count * nbytes)
                if octets is not None:
                    return tuple(_part(octets, like.dtype, number * nbytes, shape) for number in range(count))
            tier = self.devices.get(like.device)
            if tier is None:
                return (like.new_empty(shape),)
            return (tier.where_it_fits(nbytes, lambda: like.new_empty(shape)),)

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
                if not self._pinned:
                    self._pinned = True
                    self._reserved = self.host.max_bytes
                    reserve_pinned(self._reserved)
                self.host.drop_idle()  # Idle buffers are not pinned.
                self.host.drop_workspace()
                if self._device_limit is None:
                    share = _share_of(opened)
                else:
                    share = self._device_limit // (len(self.devices) + 1)
                    for tier in self.devices.values():
                        tier.limit(share)
                self.devices[device] = DeviceTier(
                    str(device), share, self.policy, opened, self.host, self.lock, self._tables, self.clock
                )
                for table in self._tables.values():
                    table.slots_in(str(device))
                    self._count_table(table)
            return self.devices[device]

    @property
    def device_bytes(self) -> int:
        """Limit of all device tiers together."""
        return sum(tier.max_bytes for tier in self.devices.values())

    @property
    def tiers(self) -> list[Tier]:
        """All tiers, fastest first."""
        return [*self.devices.values(), self.host]

    # -- segments -----------------------------------------------------------------------------------------------------

    def table(self, segment: CachedSegment, form: Form = "exact") -> SegmentTable | None:
        """The table of a segment's chunks in one form; `None` if no tier can keep them."""
        identity = (segment.key, segment.first_chunk, segment.identity, form)
        extent_bytes = segment.extent_bytes(form)
        if segment.in_memory or segment.retired:
            return None  # It is in memory already, or no later request will use it.
        if max(self.host.max_bytes, self.device_bytes) < extent_bytes:
            return None
        with self.lock:
            table = self._by_identity.get(identity)
            if table is None:
                table = self._new_table(identity, segment, extent_bytes)
            if table is not None:
                self._by_identity.move_to_end(identity)
            return table

    def _new_table(self, identity: Hashable, segment: CachedSegment, extent_bytes: int) -> SegmentTable | None:
        """A table, if there is room for it; older ones go, first those of which nothing is in memory."""
        layers = segment.num_layers
        self._last_number += 1
        table = SegmentTable(self._last_number, identity, layers, segment.num_chunks, extent_bytes)
        for tier in self.tiers:
            if tier.max_bytes:
                table.slots_in(tier.name)
        limit = (self.host.max_bytes + self.device_bytes) // _TABLE_SHARE
        counted = table.nbytes if self.host.max_bytes else 0
        if table.nbytes > limit or not self.host.could_fit(counted):
            return None
        for resident_too in (False, True):
            for old_identity, old in list(self._by_identity.items()):
                if len(self._tables) < _MAX_TABLES and self._table_bytes + table.nbytes <= limit:
                    break
                if not old.resident or resident_too:
                    self._drop(old_identity, old)
        if self._table_bytes + table.nbytes > limit or not self.host.make_room(counted):
            return None
        self._tables[table.number] = self._by_identity[identity] = table
        self._count_table(table)
        return table

    def _count_table(self, table: SegmentTable, nbytes: int | None = None) -> None:
        counted = table.nbytes if nbytes is None else nbytes
        self._table_bytes += counted - table.counted
        table.counted = counted
        # Without a host tier, device memory needs the tables, and no limit counts them.
        self.host.count_tables(self._table_bytes if self.host.max_bytes else 0)

    def _drop(self, identity: Hashable, table: SegmentTable) -> None:
        for tier in self.tiers:
            tier.forget(table)
        del self._by_identity[identity], self._tables[table.number]
        self._count_table(table, 0)

    def forget(self, keys: Iterable[str]) -> None:
        """Drop all memory of the segments with these keys, which no longer exist."""
        gone = set(keys)
        with self.lock:
            for identity, table in list(self._by_identity.items()):
                if isinstance(identity, tuple) and identity[0] in gone:
                    self._drop(identity, table)

    def drop_chunks(self) -> None:
        """Drop all chunks that are not in use, and keep keys: for measuring cold chunks with resident keys."""
        self.catch_up()
        with self.lock:
            for table in self._tables.values():
                for tier in self.tiers:
                    tier.forget_chunks(table)

    # -- after a request ----------------------------------------------------------------------------------------------

    def finished(self, *usages: Usage) -> None:
        """Have the next `catch_up` count what a finished request used. A finalizer may call this."""
        for usage in usages:
            if usage.tables is not None:
                self.defer(partial(self._count, usage))

    def defer(self, function: Callable[[], None]) -> None:
        """Have `catch_up` call `function`. Takes no lock, because a finalizer may run at any point."""
        self._deferred.append(function)

    @property
    def behind(self) -> bool:
        """Whether calls are deferred."""
        return bool(self._deferred)

    def catch_up(self) -> None:
        """Run the deferred calls. Requests call this after their first token, when nothing waits for it."""
        while self._deferred:
            try:
                self._deferred.popleft()()
            except IndexError:
                return  # Another thread took the last one.
            except Exception:  # The deferred call belongs to another request than the calling one.
                logger.exception("memory is not accounted for as it should be")

    def _count(self, usage: Usage) -> None:
        assert usage.tables is not None
        with self.lock:
            tables = [table for table in usage.tables.known if table.number in self._tables]
            for table in tables:
                table.begin_request(self.clock)
            for layer, chunks in usage.chunks.items():
                for table, places in usage.tables.places(layer, chunks):
                    table.count(places, self.clock)
            for layers, mass in usage.mass:
                for table, first, part in usage.tables.parts(mass):
                    table.add_importance(layers, first, part)
            for layer in usage.chunks.keys() - {layer for layers, _ in usage.mass for layer in layers}:
                # No selection measured attention in this layer, so all chunks count alike.
                for table, places in usage.tables.places(layer, usage.chunks[layer]):
                    table.importance[places] += 1.0 / len(usage.chunks[layer])
            for table in tables:
                table.note_mass()
            if self.clock.tick():
                factor = self.clock.rescale()
                for table in self._tables.values():
                    table.rescale(factor)
                tables = list(self._tables.values())
            for table in tables:
                for tier in (self.host, *self.devices.values()):
                    tier.judge(table)
            self._reserve += _SMOOTHING * (usage.loaded_bytes - self._reserve)
            if self.policy.arrivals_compete and usage.tables.known:
                for tier in self.tiers:
                    room = min(int(self._reserve), tier.max_bytes // _RESERVE_SHARE)
                    tier.trim(usage.tables.known[0].slot_bytes, room)
            for device_tier in self.devices.values():
                device_tier.drain()

    @property
    def bytes_by_tier(self) -> dict[str, int]:
        """Bytes held now, under `device` and `host`."""
        with self.lock:
            return {
                "device": sum(tier.held_bytes for tier in self.devices.values()),
                "host": self.host.held_bytes,
            }

    def close(self) -> None:
        """Let go of everything; running requests go on without the tiers."""
        self.catch_up()
        with self.lock:
            self._device_limit = 0
            if self._reserved:
                release_pinned(self._reserved)
                self._reserved = 0
            for tier in self.tiers:
                tier.close()
            for table in self._tables.values():
                table.slots.clear()
                table.resident = 0
            self._by_identity.clear()
            self._tables.clear()


def _share_of(device: Device) -> int:
    free = device.free_bytes()
    return UNKNOWN_DEVICE_BYTES if free is None else free // FREE_SHARE


def _part(octets: torch.Tensor, dtype: torch.dtype, start: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Part of uint8 `octets` from byte `start` on, as a tensor of its own: autograd counts the edits of each apart."""
    first = octets.storage_offset() + start
    return torch.empty(0, dtype=dtype).set_(octets.untyped_storage(), first // dtype.itemsize, shape)  # type: ignore[call-overload, no-any-return]
