"""What systems that choose tokens have in common: how they store a prefix, and how they make a request."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import DynamicCache

from hf_contiguouskv import ContiguousKVCache, ContiguousKVConfig
from hf_contiguouskv.memory.policies import EvictionPolicy
from hf_contiguouskv.model.served_model import ServedModel
from hf_contiguouskv.model.transformers_internals import cache_argument
from hf_contiguouskv.store.attached_prefix import AttachedPrefix
from hf_contiguouskv.store.hashing import TokenIds

from .base import SystemUnavailableError, key_of, require_states
from .bringing import Parts, UnitParts
from .in_memory import prefill
from .states import State, warm_states
from .stored import Stored
from .token_scores import column_sums
from .token_strategy import ScratchMemory, TokenMethod, TokenStrategy
from .units import Nodes, UnitLayout, find_nodes, write_nodes

# Tokens of a unit, as of IMPRESS's blocks.
UNIT_TOKENS = 64
# Last tokens of a prefix whose attention says which of its tokens matter, before there was any request.
OBSERVED = 64


@lru_cache(maxsize=1)
def _observed(model: weakref.ref[Any], ids: bytes) -> tuple[DynamicCache, list[torch.Tensor]]:
    return observed_importance(model(), torch.frombuffer(bytearray(ids), dtype=torch.int64))


def observed_importance(model: Any, prefix_ids: torch.Tensor) -> tuple[DynamicCache, list[torch.Tensor]]:
    """A prefilled cache, and per layer the attention that its tokens get from the last `OBSERVED` ones.

    Args:
        model: with `sdpa` attention.
        prefix_ids: int64 `(n,)`.

    Returns:
        the cache, and float32 `(n,)` per layer, summed over heads.
    """
    split = max(0, len(prefix_ids) - OBSERVED)
    cache = prefill(model, prefix_ids[:split]) if split else DynamicCache(config=model.config)
    queries: list[tuple[torch.Tensor, float]] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def watched(query: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        queries.append((query[0], options.get("scale") or query.shape[-1] ** -0.5))
        return attend(query, *arguments, **options)

    with torch.no_grad(), mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", watched):
        rest = prefix_ids[None, split:].to(model.device)
        model(input_ids=rest, use_cache=True, logits_to_keep=1, **{cache_argument(model): cache})
    importance = []
    for layer, (query, scaling) in zip(cache.layers, queries, strict=True):
        importance.append(_importance(query, layer.keys[0], split, scaling))
    return cache, importance


def random_importance(keys: torch.Tensor, heads: int, scaling: float) -> torch.Tensor:
    """As one layer's importance of `observed_importance`, for K that belong to no text: from random queries.

    They are always the same, standard normal numbers.

    Args:
        keys: `(kv_heads, n, head_dim)`.
        heads: query heads.
        scaling: factor on `q @ k`.
    """
    _, tokens, head_dim = keys.shape
    observed = min(OBSERVED, tokens)
    queries = torch.randn(heads, observed, head_dim, generator=torch.Generator().manual_seed(0))
    return _importance(queries.to(keys.device, keys.dtype), keys, tokens - observed, scaling)


def _importance(queries: torch.Tensor, keys: torch.Tensor, split: int, scaling: float) -> torch.Tensor:
    mass = column_sums(queries, keys[:, :split], keys[:, split:], scaling).sum(0)
    # Of the last tokens themselves nothing is known yet: they count as much as the best.
    return torch.cat([mass, mass.new_full((keys.shape[1] - split,), float("inf"))])


class TokenSystem(Stored):
    """A system that chooses tokens.

    Args:
        model: whose prefixes, with `sdpa` attention.
        folder: of the store.
        budget: share of tokens that attention uses.
        overlap: whether keys are read ahead of compute: as the system deserves, not as papers run it.
        store_options: of `Stored`.

    Raises:
        SystemUnavailableError: the model has layers with sliding windows.

    Attributes:
        published: name of the system as published, without options.
        named: options of its own, for its name.
        published_eviction: what stays in memory, as published.
        strategy: its kind of strategy.
        served: by what the last cache was served; `None`: there was none.
    """

    published: str
    named: tuple[str, ...] = ()
    published_eviction: str | EvictionPolicy
    strategy: type[TokenStrategy]
    served: TokenMethod | None = None

    def __init__(
        self,
        model: Any,
        folder: Path,
        budget: float,
        overlap: bool = False,
        timeline: bool = False,
        **store_options: Any,
    ) -> None:
        options = {"eviction": self.published_eviction} | store_options
        named = {"overlap": overlap, "lfu": options["eviction"] == "lfu"}
        name = "+".join((self.published, *sorted((*self.named, *(option for option, on in named.items() if on)))))
        super().__init__(
            name, model, folder, ContiguousKVConfig(budget=budget, payload="exact", timeline=timeline), **options
        )
        self._overlap = overlap
        self._scratch = ScratchMemory()
        served = ServedModel(model)
        if any(window is not None for window in served.windows):
            raise SystemUnavailableError(f"{name} chooses tokens, and the model has layers with sliding windows")
        geometry = served.geometry(self._config.chunk_size)
        apart = self.apart(served.query_heads, geometry.kv_heads)
        self.layout = UnitLayout(geometry, UNIT_TOKENS, apart)
        self._fingerprint = self.layout.fingerprint_of(served.fingerprint(), self.method)
        # Which prefixes were stored, and in which nodes: the prefix tree of such a system.
        self._nodes: dict[bytes, Nodes] = {}
        # What stands for a prefix in the store.
        self._ids: dict[tuple[bytes, tuple[int, ...]], TokenIds] = {}

    @property
    def method(self) -> str:
        """Tells prefixes apart that are arranged in different ways."""
        return self.published

    @abstractmethod
    def apart(self, heads: int, kv_heads: int) -> tuple[int, ...]:
        """KV heads whose keys every request needs, ascending, of a model with so many query and KV heads."""

    def order(self, importance: torch.Tensor) -> torch.Tensor:
        """In which order the tokens of a node are stored, int64 `(n,)`.

        Args:
            importance: float32 `(n,)`, see `observed_importance`.
        """
        return torch.arange(len(importance))

    def store(self, prefix_ids: torch.Tensor, states: DynamicCache | None = None) -> None:
        """See `System`. What is stored of it already stays as it is; the rest is a node of its own.

        With `states`, which belong to no text, the order of importance is that of `random_importance`.
        """
        key = key_of(prefix_ids)
        if key in self._nodes:
            return
        known = max((one for one in self._nodes if key.startswith(one)), key=len, default=b"")
        before = self._nodes[known].tokens if known else ()
        nodes = Nodes(self.layout, (*before, len(prefix_ids) - sum(before)))
        if states is None:
            # Several systems store the same prefix, one after the other.
            cache, importance = _observed(weakref.ref(self._model), key)
        else:
            require_states(states, len(prefix_ids), self.layout.geometry)
            cache, importance = states, None
        heads = ServedModel(self._model).query_heads

        def arranged(layer: int, tokens: slice) -> tuple[torch.Tensor, torch.Tensor]:
            if importance is not None:
                found = importance[layer]
            else:
                found = random_importance(cache.layers[layer].keys[0], heads, self.layout.geometry.head_dim**-0.5)
            order = self.order(found[tokens])
            keys, values = (
                states[0, :, tokens][:, order] for states in (cache.layers[layer].keys, cache.layers[layer].values)
            )
            return self.layout.arranged(keys, values)

        write_nodes(self.opened(), nodes, self._fingerprint, prefix_ids.numpy(), arranged)
        self._nodes[key] = nodes

    def _found(self, prefix_ids: torch.Tensor) -> tuple[Nodes, AttachedPrefix]:
        key = key_of(prefix_ids)
        nodes = self._nodes.get(key, Nodes(self.layout, (len(prefix_ids),)))
        ids = self._ids.get((key, nodes.tokens))
        if ids is None:
            # Once: a system with a file format of its own would look up the prefix itself.
            ids = self._ids[key, nodes.tokens] = nodes.ids(prefix_ids.numpy())
        return nodes, find_nodes(self.opened(), nodes, self._fingerprint, ids)

    def close_store(self) -> None:
        super().close_store()
        self._scratch.clear()

    @property
    def states(self) -> tuple[State, ...]:
        """See `System`. There are keys to choose by whatever the budget is."""
        return (State.COLD, State.OPEN, State.KEYS_RESIDENT, *warm_states(self._model.device))

    def parts(self, prefix_ids: torch.Tensor, on_host: bool) -> Parts:
        nodes, units = self._found(prefix_ids)
        plan = ServedModel(self._model).layers
        return UnitParts(units, plan.devices, nodes.keys_apart(), self.opened(), on_host)

    def cache(self, prefix_ids: torch.Tensor) -> Any:
        nodes, units = self._found(prefix_ids)
        self.served = TokenMethod(lambda context: self.strategy(context, units, nodes, self._overlap, self._scratch))
        return ContiguousKVCache(self._model, prefix_ids, store=self.opened(), config=self._config, method=self.served)
