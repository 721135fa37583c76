"""Puts what a store keeps of a prefix where a state wants it, without running the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch

from hf_contiguouskv import ContiguousKVConfig, PrefixStore, RequestStats
from hf_contiguouskv.config import ReadOptions
from hf_contiguouskv.loading.chunk_loader import ChunkLoader
from hf_contiguouskv.memory import MemoryTiers
from hf_contiguouskv.memory.tier import Tier
from hf_contiguouskv.model.layer_plan import LayerPlan
from hf_contiguouskv.planning.read_plan import ReadPlan
from hf_contiguouskv.store.attached_prefix import AttachedPrefix, Chunks

from .states import State, StateError

# Chunks by stored layer, int64 ascending.
Named = Mapping[int, Chunks]
# Reads for this device land in the host's slots and stay there.
HOST = torch.device("cpu")
_NONE = np.zeros(0, dtype=np.int64)


class Parts(Protocol):
    """What is stored of one prefix, as the requests of one kind of system read it.

    Attributes:
        loader: brings it.
        devices: where to, by stored layer.
        chunks: all chunks that requests may ask for, by stored layer.
    """

    loader: ChunkLoader
    devices: Sequence[torch.device]
    chunks: Named

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
    for layer in parts.chunks:
        chunks = _wanted(parts, layer, named)
        if len(chunks):
            parts.loader.want([layer], chunks)
            with closing(parts.loader.take(layer)) as arriving:
                for part in arriving:
                    if memory.on(parts.devices[layer]) is not None and part.from_disk + part.from_host:
                        part.extents(None)  # Only what was waited for stays on a device. (A view: nothing is copied.)
    parts.loader.close()  # Whatever arrived is in its place afterwards.


def resident(parts: Parts) -> Named:
    """Chunks that are in some tier."""
    return {layer: parts.loader.resident(layer, chunks) for layer, chunks in parts.chunks.items()}


def lacking(parts: Parts, memory: MemoryTiers, named: Named | None) -> int:
    """How many chunks (of the named ones, or all) are not in the tier of their device."""
    count = 0
    for layer, chunks in parts.chunks.items():
        there = parts.loader.resident(layer, chunks, _tier(memory, parts.devices[layer]))
        count += len(np.setdiff1d(_wanted(parts, layer, named), there))
    return count


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
        parts.loader.forget_on_devices()
    parts.bring_keys()
    if parts.lacks_keys():
        raise StateError(f"{state}: there is no room for all keys in {_sizes(memory)}")
    if state is not State.KEYS_RESIDENT:
        bring(parts, memory, named)
        missing = lacking(parts, memory, named)
        if missing:
            raise StateError(f"{state}: there is no room for {missing} chunks in {_sizes(memory)}")


def _wanted(parts: Parts, layer: int, named: Named | None) -> Chunks:
    return parts.chunks[layer] if named is None else named.get(layer, _NONE)


def _tier(memory: MemoryTiers, device: torch.device) -> Tier:
    return memory.on(device) or memory.host


def _sizes(memory: MemoryTiers) -> str:
    return ", ".join(f"{tier.name} ({tier.max_bytes:,} bytes)" for tier in memory.tiers)


class ChunkParts:
    """Chunks and keys, as our requests, the published method's and AttentionStore's read them.

    Args:
        prefix: attached.
        config: of the requests.
        layers: of the model.
        store: of the prefix.
        on_host: bring everything to the host's tier, whatever the layers' devices are.
    """

    def __init__(
        self, prefix: AttachedPrefix, config: ContiguousKVConfig, layers: LayerPlan, store: PrefixStore, on_host: bool
    ) -> None:
        for device in layers.devices:
            store.inner.memory.on(device)  # From then on host memory is pinned.
        places = replace(layers, devices=(HOST,) * len(layers.devices)) if on_host else layers
        self._memory = store.inner.memory
        self._plan = plan = ReadPlan.of(prefix, config, places)
        self.devices: Sequence[torch.device] = places.devices
        self.loader = ChunkLoader.of(plan, store.inner, RequestStats())
        self.chunks: Named = {
            layer: np.arange(prefix.chunks) if window is None else plan.tail_chunks(window)
            for layer, window in enumerate(places.windows)
        }
        self._key_layers = [layer for layer in plan.key_layers if not plan.scored_from_payload(layer)]

    def bring_keys(self) -> None:
        for layer in self._key_layers:
            self.loader.keys.want(layer)
            self.loader.keys.scorer(layer)
            self.loader.keys.release(layer)
            self.loader.read_on(layer)
        self._memory.catch_up()

    def lacks_keys(self) -> bool:
        return not all(self.loader.keys.resident(layer) for layer in self._key_layers)

    def close(self) -> None:
        self.loader.close()


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
        self._memory = store.inner.memory
        for device in devices:
            store.inner.memory.on(device)
        # Two stored layers for each of the model's: keys, values.
        self.devices: Sequence[torch.device] = [HOST if on_host else device for device in devices for _ in range(2)]
        layers = range(len(self.devices))
        self.loader = ChunkLoader(
            store.inner, [units for _ in layers], self.devices, lookahead_bytes=ReadOptions().lookahead_bytes
        )
        self.chunks: Named = {layer: np.arange(units.chunks) for layer in layers}
        self._keys = {layer: _NONE if layer % 2 else keys for layer in layers}

    def bring_keys(self) -> None:
        bring(self, self._memory, self._keys)

    def lacks_keys(self) -> bool:
        return lacking(self, self._memory, self._keys) > 0

    def close(self) -> None:
        self.loader.close()
