"""Puts what a store keeps of a prefix where a state wants it, without running the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from hf_contiguouskv import ContiguousKVConfig, PrefixStore, RequestStats
from hf_contiguouskv.loading.payload_reads import PayloadReads
from hf_contiguouskv.memory import MemoryTiers
from hf_contiguouskv.memory.tier import Tier
from hf_contiguouskv.model.layer_plan import LayerPlan
from hf_contiguouskv.planning.read_plan import ReadPlan
from hf_contiguouskv.request.prefix_request import PrefixRequest
from hf_contiguouskv.store.attached_prefix import AttachedPrefix, Chunks

from .states import State, StateError

# Chunks by stored layer, int64 ascending.
Named = Mapping[int, Chunks]
# Reads for this device land in the host's slots and stay there.
HOST = torch.device("cpu")
_NONE = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Payload:
    """Chunks of one stored layer that requests may ask for.

    Attributes:
        reads: bring them.
        device: where to.
        chunks: all of them, int64 ascending.
    """

    reads: PayloadReads
    device: torch.device
    chunks: Chunks


class Parts(Protocol):
    """What is stored of one prefix, as the requests of one kind of system read it."""

    def payload(self) -> Mapping[int, Payload]:
        """Chunks, by stored layer."""
        ...

    def bring_keys(self) -> None:
        """Have in memory what tells which tokens matter."""
        ...

    def lacks_keys(self) -> bool:
        """Whether some of that is not in the tier of its device."""
        ...

    def close(self) -> None:
        """Give back what is in use."""
        ...


def bring(parts: Parts, memory: MemoryTiers, named: Named | None) -> None:
    """Read chunks (the named ones, or all), or find them; what is read stays in the tier of its device."""
    for layer, payload in parts.payload().items():
        chunks = _wanted(payload, layer, named)
        if len(chunks):
            payload.reads.ask([layer], chunks, payload.device)
            with closing(payload.reads.take(layer)) as arriving:
                for batch in arriving:
                    if memory.on(payload.device) is not None and batch.from_disk + batch.from_host:
                        batch.extents(None)  # Only what was waited for stays on a device. (A view: nothing is copied.)
    for reads in {payload.reads for payload in parts.payload().values()}:
        reads.close()  # Whatever arrived is in its place afterwards.
    memory.catch_up()


def resident(parts: Parts) -> Named:
    """Chunks that are in some tier."""
    return {layer: _resident(layer, payload, None) for layer, payload in parts.payload().items()}


def lacking(parts: Parts, memory: MemoryTiers, named: Named | None) -> int:
    """How many chunks (of the named ones, or all) are not in the tier of their device."""
    return sum(
        len(np.setdiff1d(_wanted(payload, layer, named), _resident(layer, payload, _tier(memory, payload.device))))
        for layer, payload in parts.payload().items()
    )


def leave_devices(parts: Parts, memory: MemoryTiers) -> None:
    """Have neither chunks nor keys of the prefix on an accelerator."""
    for payload in parts.payload().values():
        for table in payload.reads.tables.known:
            for tier in memory.devices.values():
                tier.forget(table)


def move_to(state: State, parts: Parts, memory: MemoryTiers, named: Named | None) -> None:
    """Have in memory what a state says, and see that it is there.

    Args:
        state: not `COLD`.
        parts: of the prefix; `WARM_HOST`: all on the device `HOST`.
        memory: of the store.
        named: the chunks that requests are going to use; `None`: all.

    Raises:
        StateError: memory has no room for it.
    """
    if state is State.KEYS_RESIDENT:
        memory.drop_chunks()
    elif state is State.WARM_HOST:
        leave_devices(parts, memory)
    parts.bring_keys()
    if parts.lacks_keys():
        raise StateError(f"{state}: there is no room for all keys in {_sizes(memory)}")
    if state is not State.KEYS_RESIDENT:
        bring(parts, memory, named)
        missing = lacking(parts, memory, named)
        if missing:
            raise StateError(f"{state}: there is no room for {missing} chunks in {_sizes(memory)}")


def _wanted(payload: Payload, layer: int, named: Named | None) -> Chunks:
    return payload.chunks if named is None else named.get(layer, _NONE)


def _tier(memory: MemoryTiers, device: torch.device) -> Tier:
    return memory.on(device) or memory.host


def _resident(layer: int, payload: Payload, tier: Tier | None) -> Chunks:
    there = np.zeros(len(payload.chunks), dtype=bool)
    for table, part, places in payload.reads.tables.split(layer, payload.chunks):
        if table is not None:
            for name, slots in table.slots.items():
                if tier is None or tier.name == name:
                    there[part] |= slots[places] >= 0
    return payload.chunks[there]


def _sizes(memory: MemoryTiers) -> str:
    return ", ".join(f"{tier.name} ({tier.max_bytes:,} bytes)" for tier in memory.tiers)


class ChunkParts(PrefixRequest):
    """Chunks and keys, as our requests, the published method's and AttentionStore's read them.

    Args:
        prefix, config, plan, store: see `PrefixRequest`.
        on_host: bring everything to the host's tier, whatever the layers' devices are.
    """

    def __init__(
        self, prefix: AttachedPrefix, config: ContiguousKVConfig, plan: LayerPlan, store: PrefixStore, on_host: bool
    ) -> None:
        for device in plan.devices:
            store.memory.on(device)  # From then on host memory is pinned.
        places = replace(plan, devices=(HOST,) * len(plan.devices)) if on_host else plan
        super().__init__(ReadPlan.of(prefix, config, places), store, RequestStats())

    def payload(self) -> Mapping[int, Payload]:
        """See `Parts`."""
        found = {}
        for layer, (window, device) in enumerate(zip(self.plan.layers.windows, self.plan.layers.devices, strict=True)):
            if window is None:
                found[layer] = Payload(self._payload, device, np.arange(self.prefix.chunks))
            else:
                found[layer] = Payload(self._tails.payload, device, self._tails.chunks(window))
        return found

    def _key_layers(self) -> Sequence[int]:
        if self.keeps_all:
            return ()
        leaders = [layer for layer in self._full if self.plan.packed or self._is_leader(layer)]
        return [layer for layer in leaders if not self._keys.reads_payload(layer)]

    def bring_keys(self) -> None:
        """See `Parts`."""
        for layer in self._key_layers():
            device = self.plan.layers.devices[layer]
            self._keys.ask(layer, device)
            self._keys.scorer(layer, device)
            self._keys.used(layer, device)
        self._store.memory.catch_up()

    def lacks_keys(self) -> bool:
        """See `Parts`."""
        return any(not self._has_keys(layer) for layer in self._key_layers())

    def _has_keys(self, layer: int) -> bool:
        tier = _tier(self._store.memory, self.plan.layers.devices[layer])
        keys = self._keys
        return all(
            tier.has_keys(keys._key(span, name)) for span in self.plan.served.spans for name in keys._tensors(layer)
        )


class UnitParts:
    """Units, as systems that choose tokens read them.

    Args:
        units: the prefix.
        devices: of the model's layers.
        keys: units of the keys that every request loads, of each layer, int64 ascending.
        store: of the units.
        on_host: see `ChunkParts`.
    """

    def __init__(
        self, units: AttachedPrefix, devices: Sequence[torch.device], keys: Chunks, store: PrefixStore, on_host: bool
    ) -> None:
        self._memory = store.memory
        for device in devices:
            store.memory.on(device)
        self._reads = PayloadReads(units, store.reader, store.memory, RequestStats(), verify=True)
        places = [HOST] * len(devices) if on_host else devices
        # Two stored layers for each of the model's: keys, values.
        self._payload = {
            2 * layer + half: Payload(self._reads, device, np.arange(units.chunks))
            for layer, device in enumerate(places)
            for half in (0, 1)
        }
        self._keys = {2 * layer: keys for layer in range(len(devices))} | {
            2 * layer + 1: _NONE for layer in range(len(devices))
        }

    def payload(self) -> Mapping[int, Payload]:
        """See `Parts`."""
        return self._payload

    def bring_keys(self) -> None:
        """See `Parts`."""
        bring(self, self._memory, self._keys)

    def lacks_keys(self) -> bool:
        """See `Parts`."""
        return lacking(self, self._memory, self._keys) > 0

    def close(self) -> None:
        """See `Parts`."""
        self._reads.close()
