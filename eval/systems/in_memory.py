"""The whole cache kept in memory: the reference for quality, and for time where memory is no object."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from hf_contiguouskv import ContiguousKVConfig, RequestStats
from hf_contiguouskv.model.served_model import ServedModel
from hf_contiguouskv.model.transformers_internals import cache_argument

from .attention import GroupedAttention, grouped_cache
from .base import NotStoredError, key_of, require_states
from .states import State, on_accelerator, require_state


def prefill(model: Any, prefix_ids: torch.Tensor, cache: DynamicCache | None = None, block: int = 512) -> DynamicCache:
    """A `DynamicCache` of the prefix, computed block by block; `cache` holds its beginning, if there is one."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    with torch.no_grad():
        for part in prefix_ids[cache.get_seq_length() :].to(model.device).split(block):
            model(input_ids=part[None], use_cache=True, logits_to_keep=1, **{cache_argument(model): cache})
    return cache


def copied(model: Any, states: DynamicCache, tokens: int) -> DynamicCache:
    """A `DynamicCache` of its own with the K and V of `states`, where the model's layers are.

    Raises:
        ValueError: they are not those of `tokens` tokens in this model.
    """
    served = ServedModel(model)
    require_states(states, tokens, served.geometry(ContiguousKVConfig().chunk_size))
    cache = grouped_cache(model)
    for number, (layer, device) in enumerate(zip(states.layers, served.layers.devices, strict=True)):
        cache.update(layer.keys.to(device), layer.values.to(device), number)  # Which copies them.
    return cache


class InMemory:
    """A `DynamicCache` for every prefix. Requests use it in turn, and what they added is cropped away again: the next
    one pays nothing for a copy."""

    def __init__(self, model: Any, *, dynamic: bool = False) -> None:
        self.name = "in_memory+dynamic" if dynamic else "in_memory"
        self._model = model
        self._caches: dict[bytes, DynamicCache] = {}
        self._lengths: dict[int, int] = {}
        self._attention = GroupedAttention(model)

    @property
    def states(self) -> tuple[State, ...]:
        """See `System`: where the model is."""
        return (State.WARM_DEVICE if on_accelerator(self._model.device) else State.WARM_HOST,)

    def store(self, prefix_ids: torch.Tensor, states: DynamicCache | None = None) -> None:
        """See `System`. A prefix that grows (a chat) goes on in its cache; the shorter one is not kept besides."""
        key = key_of(prefix_ids)
        if key in self._caches:
            return
        before = max((one for one in self._caches if key.startswith(one)), key=len, default=b"")
        if states is None:
            known = self._caches.pop(before, None)
            cache = prefill(self._model, prefix_ids, grouped_cache(self._model) if known is None else known)
        else:
            self._caches.pop(before, None)
            cache = copied(self._model, states, len(prefix_ids))
        self._caches[key] = cache
        self._lengths[id(cache)] = len(prefix_ids)

    def files(self) -> list[Path]:
        return []

    def enter(self, state: State, prefix_ids: torch.Tensor, suffix_ids: torch.Tensor | None = None) -> None:
        """See `System`: it always is where it is."""
        require_state(self.name, state, self.states)
        self._kept(prefix_ids)

    def _kept(self, prefix_ids: torch.Tensor) -> DynamicCache:
        found = self._caches.get(key_of(prefix_ids))
        if found is None:
            raise NotStoredError(f"a prefix of {len(prefix_ids)} tokens was not stored")
        return found

    def cache(self, prefix_ids: torch.Tensor) -> Any:
        """See `System`.

        Raises:
            NotStoredError: the prefix was not stored.
        """
        found = self._kept(prefix_ids)
        self._attention.begin()
        return found

    def timeline(self, cache: Any) -> None:
        """See `System`."""

    def finish(self, cache: Any) -> RequestStats:
        self._attention.end()
        cache.crop(self._lengths[id(cache)] - cache.get_seq_length())  # A negative number: so many go.
        return RequestStats(hits={})

    def details(self) -> dict[str, Any]:
        """See `System`."""
        return {}

    def __enter__(self) -> InMemory:
        return self

    def __exit__(self, *exception: object) -> None:
        self._caches.clear()
