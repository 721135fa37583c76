"""Only the tokens that `contiguouskv` selects, in memory: the least time that a system that chooses can take."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from hf_contiguouskv import ContiguousKVCache, ContiguousKVConfig, RequestStats
from hf_contiguouskv.model.transformers_internals import cache_argument

from ..metrics.fidelity import agreement, divergence
from .attention import ROOM, GroupedAttention, PrunedLayer
from .base import NotStoredError, SystemUnavailableError, key_of
from .contiguouskv import ContiguousKV
from .in_memory import buffered_cache
from .states import State, StateError, require_state, state_of_model

# In bfloat16 another order of summation gives other logits.
_AGREEMENT, _DIVERGENCE = 0.9, 0.01


class KeptTokens:
    """K and V of the selected tokens in one piece: nothing is looked up, chosen, read or gathered.

    What it holds belongs to one request, and is selected when that request is about to be made.

    Args:
        model: whose prefixes.
        folder: of a store, which `contiguouskv` may share.
        budget: share of the chunks that are selected.
        store_options: of `ContiguousKV`.

    Raises:
        SystemUnavailableError: the library or its attention does not serve the model.
    """

    name = "kept_tokens"

    def __init__(self, model: Any, folder: Path, budget: float, **store_options: Any) -> None:
        self._model = model
        self._attention = GroupedAttention(model)
        if self._attention.note is not None:
            raise SystemUnavailableError(f"{self.name} needs the library's attention: {self._attention.note}")
        self._ours = ContiguousKV(self.name, model, folder, ContiguousKVConfig(budget=budget), **store_options)
        self._stored: set[bytes] = set()
        # Ids of the prefix and of the suffix that the cache was selected for.
        self._asked: tuple[bytes, bytes] | None = None
        self._cache: DynamicCache | None = None
        self._prefix_tokens = 0

    @property
    def states(self) -> tuple[State, ...]:
        """See `System`: where the model is."""
        return (state_of_model(self._model.device),)

    def store(self, prefix_ids: torch.Tensor, states: DynamicCache | None = None) -> None:
        """See `System`."""
        self._ours.store(prefix_ids, states)
        self._stored.add(key_of(prefix_ids))

    def files(self) -> list[Path]:
        """See `System`: requests read none."""
        return []

    def enter(self, state: State, prefix_ids: torch.Tensor, suffix_ids: torch.Tensor | None = None) -> None:
        """See `System`. Another request than the one before is selected for, and checked.

        Raises:
            ValueError: there is no suffix to select by.
            StateError: the selected tokens alone answer otherwise than `contiguouskv`.
        """
        require_state(self.name, state, self.states)
        if suffix_ids is None:
            raise ValueError(f"{self.name} holds what one request selects, so it needs the suffix")
        if key_of(prefix_ids) not in self._stored:
            raise NotStoredError(f"a prefix of {len(prefix_ids)} tokens was not stored")
        asked = key_of(prefix_ids), key_of(suffix_ids)
        if asked != self._asked:
            self._asked = self._cache = None  # Memory for two may be missing.
            self._cache = self._selected(prefix_ids, suffix_ids)
            self._asked, self._prefix_tokens = asked, len(prefix_ids)

    def _selected(self, prefix_ids: torch.Tensor, suffix_ids: torch.Tensor) -> DynamicCache:
        with self._ours, closing(self._ours.cache(prefix_ids)) as cache:
            expected = self._logits(suffix_ids, cache)
            kept = _kept_tokens_of(self._model, cache, len(prefix_ids))
        self._attention.begin()
        try:
            found = self._logits(suffix_ids, kept)
        finally:
            self._attention.end()
        kept.crop(-len(suffix_ids))
        _require_same(found, expected)
        return kept

    def _logits(self, suffix_ids: torch.Tensor, cache: Any) -> torch.Tensor:
        """The logits after each token of the suffix, `(q, vocabulary)` float32."""
        called = cache_argument(self._model)
        with torch.no_grad():
            output = self._model(input_ids=suffix_ids[None].to(self._model.device), use_cache=True, **{called: cache})
        logits: torch.Tensor = output.logits[0].float()
        return logits

    def cache(self, prefix_ids: torch.Tensor) -> Any:
        """See `System`.

        Raises:
            NotStoredError: this prefix was not entered last.
        """
        if self._asked is None or self._asked[0] != key_of(prefix_ids):
            raise NotStoredError(f"{self.name} holds no tokens of this prefix: enter a state with the suffix first")
        self._attention.begin()
        return self._cache

    def timeline(self, cache: Any) -> None:
        """See `System`."""

    def finish(self, cache: Any) -> RequestStats:
        """See `System`."""
        self._attention.end()
        added = cache.get_seq_length() - self._prefix_tokens
        if added:
            cache.crop(-added)
        tier = "device" if self.states[0] is State.WARM_DEVICE else "host"
        return RequestStats(hits={"device": 0, "host": 0, "disk": 0} | {tier: len(cache.layers)})

    def details(self) -> dict[str, Any]:
        """See `System`."""
        return {}

    def __enter__(self) -> KeptTokens:
        return self

    def __exit__(self, *exception: object) -> None:
        self._attention.end()
        self._asked = self._cache = None


def _kept_tokens_of(model: Any, cache: ContiguousKVCache, prefix_tokens: int) -> DynamicCache:
    """A cache of the prefix tokens that each layer of `cache` attends to; `cache` has seen its suffix."""
    kept = cache.layers[0].attached.request.kept_tokens
    found = buffered_cache(model, kept + ROOM, PrunedLayer)
    for layer, own in zip(found.layers, cache.layers, strict=True):
        # The prefix is loaded: no query is needed any more.
        keys, values = (states[:, :, :kept] for states in own.visible_kv(own.keys, None, {}))
        layer.update(keys, values)
        layer.missing = prefix_tokens - kept
    return found


def _require_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Raise if logits `(q, vocabulary)` are not those of the same request.

    Raises:
        StateError: they are not.
    """
    agree, apart = agreement(expected, found).mean().item(), divergence(expected, found).mean().item()
    if agree < _AGREEMENT or not apart <= _DIVERGENCE:
        raise StateError(f"kept_tokens answers otherwise: {agree:.0%} of tokens agree, KL {apart:.4f} nats")
