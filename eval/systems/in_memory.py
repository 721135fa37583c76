"""The whole cache kept in memory: the reference for quality, and for time where memory is no object."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from hf_contiguouskv import ContiguousKVConfig, RequestStats
from hf_contiguouskv.hardware.aligned_memory import aligned_buffer
from hf_contiguouskv.model.served_model import ServedModel
from hf_contiguouskv.model.transformers_internals import cache_argument

from .attention import ROOM, BufferedLayer, GroupedAttention, cache_of, grouped_cache
from .base import NotStoredError, key_of, require_states
from .states import State, require_state, state_of_model


def prefill(model: Any, prefix_ids: torch.Tensor, cache: DynamicCache | None = None, block: int = 512) -> DynamicCache:
    """A `DynamicCache` of the prefix, computed block by block; `cache` holds its beginning, if there is one."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    with torch.no_grad():
        for part in prefix_ids[cache.get_seq_length() :].to(model.device).split(block):
            model(input_ids=part[None], use_cache=True, logits_to_keep=1, **{cache_argument(model): cache})
    return cache


def buffered_cache(model: Any, capacity: int, kind: type[BufferedLayer] = BufferedLayer) -> DynamicCache:
    """An empty cache of such layers with room for `capacity` tokens, where the model's layers are."""
    served = ServedModel(model)
    g = served.geometry(ContiguousKVConfig().chunk_size)
    shape = (2, 1, g.kv_heads, capacity, g.head_dim)
    octets = 2 * g.kv_heads * capacity * g.head_dim * g.itemsize

    def buffer(device: torch.device) -> torch.Tensor:
        if device.type != "cpu":
            return torch.empty(shape, dtype=g.dtype, device=device)
        return aligned_buffer(octets).view(g.dtype).view(shape)

    return cache_of([kind(buffer(device)) for device in served.layers.devices])


@dataclass
class _Kept:
    """One prefix.

    Attributes:
        cache: holds it.
        tokens: of the prefix.
        layers: what the layers' objects hold when nothing was added, for layers that make new tensors.
    """

    cache: DynamicCache
    tokens: int
    layers: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.layers = [dict(vars(layer)) for layer in self.cache.layers]

    def go_back(self) -> None:
        """Forget what a request has added."""
        for layer, before in zip(self.cache.layers, self.layers, strict=True):
            # Only layers with a buffer write in place, and never into the prefix: its tensors are as they were.
            vars(layer).update(before)


class InMemory:
    """A cache for every prefix, which requests use in turn. What they add is forgotten when they are over.

    K and V of a prefix lie in memory that has room for what a request adds, so that nothing is copied.

    Args:
        model: whose prefixes.
        dynamic: do as `DynamicCache` does: each layer of a request copies K and V of the prefix to append to them.
    """

    def __init__(self, model: Any, *, dynamic: bool = False) -> None:
        self.name = "in_memory+dynamic" if dynamic else "in_memory"
        self._model = model
        self._kept: dict[bytes, _Kept] = {}
        self._attention = GroupedAttention(model)
        self._buffered = not dynamic and self._attention.note is None

    @property
    def _tier(self) -> State:
        return state_of_model(self._model.device)

    @property
    def states(self) -> tuple[State, ...]:
        """See `System`: where the model is."""
        return (self._tier,)

    def store(self, prefix_ids: torch.Tensor, states: DynamicCache | None = None) -> None:
        """See `System`. A prefix that grows (a chat) goes on in its cache; the shorter one is not kept besides."""
        key, tokens = key_of(prefix_ids), len(prefix_ids)
        if key in self._kept:
            return
        before = max((one for one in self._kept if key.startswith(one)), key=len, default=b"")
        if states is not None:
            served = ServedModel(self._model)
            require_states(states, tokens, served.geometry(ContiguousKVConfig().chunk_size))
        known = self._kept.pop(before, None)
        cache = self._empty(tokens) if known is None or states is not None else known.cache
        for layer in cache.layers:
            if isinstance(layer, BufferedLayer):
                layer.reserve(tokens + ROOM)
        if states is None:
            prefill(self._model, prefix_ids, cache)
        else:
            for number, (layer, device) in enumerate(zip(states.layers, served.layers.devices, strict=True)):
                cache.update(layer.keys.to(device), layer.values.to(device), number)  # Which copies them.
        self._kept[key] = _Kept(cache, tokens)

    def _empty(self, tokens: int) -> DynamicCache:
        return buffered_cache(self._model, tokens + ROOM) if self._buffered else grouped_cache(self._model)

    def files(self) -> list[Path]:
        return []

    def enter(self, state: State, prefix_ids: torch.Tensor, suffix_ids: torch.Tensor | None = None) -> None:
        """See `System`: it always is where it is."""
        require_state(self.name, state, self.states)
        self._found(prefix_ids)

    def _found(self, prefix_ids: torch.Tensor) -> _Kept:
        found = self._kept.get(key_of(prefix_ids))
        if found is None:
            raise NotStoredError(f"a prefix of {len(prefix_ids)} tokens was not stored")
        return found

    def cache(self, prefix_ids: torch.Tensor) -> Any:
        """See `System`.

        Raises:
            NotStoredError: the prefix was not stored.
        """
        found = self._found(prefix_ids)
        self._attention.begin()
        return found.cache

    def timeline(self, cache: Any) -> None:
        """See `System`."""

    def finish(self, cache: Any) -> RequestStats:
        self._attention.end()
        found = next(kept for kept in self._kept.values() if kept.cache is cache)
        found.go_back()
        tier = "device" if self._tier is State.WARM_DEVICE else "host"
        return RequestStats(hits={"device": 0, "host": 0, "disk": 0} | {tier: len(cache.layers)})

    def details(self) -> dict[str, Any]:
        """See `System`."""
        return self._attention.details()

    def __enter__(self) -> InMemory:
        return self

    def __exit__(self, *exception: object) -> None:
        self._attention.end()
        self._kept.clear()
