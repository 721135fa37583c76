"""AttentionStore (ATC'24): the whole prefix KV loaded layer by layer.

Same files, same layout, same reader and threads as the library. With overlap (as it deserves) all layers are asked for
at once, in order (as far as memory has room for them), and a layer's attention waits for that layer alone; without (as
papers that compare with it run it) a layer is asked for when attention gets there.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from hf_contiguouskv import ContiguousKVConfig, RequestStats
from hf_contiguouskv.loading.chunk_accounts import Arrival
from hf_contiguouskv.loading.chunk_loader import ChunkLoader
from hf_contiguouskv.loading.placement import copy_in_order
from hf_contiguouskv.model.fingerprint import model_fingerprint
from hf_contiguouskv.model.served_model import ServedModel
from hf_contiguouskv.store import PrefixStore
from hf_contiguouskv.store.attached_prefix import AttachedPrefix
from hf_contiguouskv.timeline import Timeline

from .attention import GroupedAttention, GroupedLayer
from .base import NotStoredError
from .stored import Stored

ROOM = 256


@dataclass
class Loading:
    """What one request reads, and what it tells of that.

    Attributes:
        stats: receives `bytes_read`, `bytes_used`, `hits` and `io_wait_s`.
        timeline: receives reads, waits and copies.
        loader: of the request, to be closed with it.
    """

    stats: RequestStats = field(default_factory=RequestStats)
    timeline: Timeline = field(default_factory=Timeline)
    loader: ChunkLoader | None = None


class _LoadedLayer(GroupedLayer):
    """A layer whose prefix is on its way from disk until the first update.

    Args:
        layer: index.
        prefix, loader: of the prefix.
        loading: see `Loading`.
    """

    def __init__(self, layer: int, prefix: AttachedPrefix, loader: ChunkLoader, loading: Loading) -> None:
        super().__init__()
        self._layer = layer
        self._prefix = prefix
        self._loader: ChunkLoader | None = loader
        self._loading = loading
        self._buffers: list[torch.Tensor] = []
        self._length = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._loader is not None:
            self._load(key_states)
        end = self._length + key_states.shape[2]
        if end > self._buffers[0].shape[2]:
            self._buffers = [torch.cat([b, torch.empty_like(b)], dim=2) for b in self._buffers]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, self._length : end] = states
        self._length = end
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
        return self.shown()

    def _load(self, key_states: torch.Tensor) -> None:
        assert self._loader is not None
        self.lazy_initialization(key_states, key_states)
        g = self._prefix.geometry
        count = self._prefix.chunks
        loader, layer = self._loader, self._layer
        if not loader.asked(layer):
            loader.want([layer], np.arange(count))
        # One copy, from the chunks' order on disk to the order that attention wants.
        both = key_states.new_empty(2, 1, g.kv_heads, count * g.chunk_size + key_states.shape[2] + ROOM, g.head_dim)
        chunks = both[:, 0, :, : count * g.chunk_size].unflatten(2, (count, g.chunk_size))
        for part in loader.take(layer):
            began = time.perf_counter()
            copy_in_order(self._prefix, part, 0, chunks)
            self._loading.timeline.add("copy", layer, began, time.perf_counter())
            loader.accounts.count_hits(layer, Arrival.of(part))
        loader.accounts.note_used(layer, np.arange(count))
        self._buffers = [both[0], both[1]]
        self._loader = None
        self._length = self._prefix.tokens

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0 or self._loader is not None:
            raise ValueError("crop takes a negative number, once the prefix was used")
        self._length += tokens_to_remove
        self.keys, self.values = (buffer[:, :, : self._length] for buffer in self._buffers)

    def get_seq_length(self) -> int:
        return self._prefix.tokens if self._loader is not None else self._length


def full_load(
    model: Any,
    prefix_ids: torch.Tensor,
    store: PrefixStore,
    loading: Loading,
    overlap: bool = True,
) -> DynamicCache:
    """A `DynamicCache` that holds a stored prefix; with `overlap` all of its reads are under way.

    Args:
        model: the causal language model whose KV is stored.
        prefix_ids: int64 `(n,)`, stored in full.
        store: where.
        loading: receives what the request does.
        overlap: whether reads run ahead of compute.

    Raises:
        NotStoredError: the prefix is not stored.
    """
    ids = prefix_ids.numpy().astype(np.int64)
    stored = store.inner.lookup(model_fingerprint(model), ids, 16)
    if stored is None or stored.tokens < len(ids):
        raise NotStoredError(f"a prefix of {len(ids)} tokens is not stored in full")
    prefix = AttachedPrefix.of(stored, len(ids))
    devices = ServedModel(model).layers.devices
    loader = loading.loader = ChunkLoader(
        store.inner,
        [prefix] * len(devices),
        devices,
        loading.stats,
        # What is under way takes up memory in all tiers that it goes through, and what finds no room is read late.
        lookahead_bytes=min(tier.max_bytes for tier in store.inner.memory.tiers) // 2,
        timeline=loading.timeline,
    )
    cache = DynamicCache()
    layers = range(prefix.geometry.num_layers)
    cache.layers = [_LoadedLayer(layer, prefix, loader, loading) for layer in layers]
    cache.layer_class_to_replicate = None
    if overlap:
        for layer in layers:
            loader.want_later(layer, np.arange(prefix.chunks))
        loader.start_queued()
    loading.stats.bytes_used = len(layers) * prefix.tokens * prefix.token_bytes()
    return cache


class AttentionStore(Stored):
    """All KV of the prefix; chunks in memory are evicted by LRU, as published.

    Args:
        model: whose prefixes.
        folder: of the store.
        overlap: see `full_load`.
        store_options: of `PrefixStore`.
    """

    def __init__(self, model: Any, folder: Path, overlap: bool = False, **store_options: Any) -> None:
        name = "attentionstore+overlap" if overlap else "attentionstore"
        options = {"eviction": "lru"} | store_options
        super().__init__(name, model, folder, ContiguousKVConfig(budget=1.0), **options)
        self._overlap = overlap
        self._loading = Loading()
        self._attention = GroupedAttention(model)

    def cache(self, prefix_ids: torch.Tensor) -> Any:
        self._loading = Loading()
        self._attention.begin()
        return full_load(self._model, prefix_ids, self.opened(), self._loading, self._overlap)

    def timeline(self, cache: Any) -> Timeline:
        return self._loading.timeline

    def finish(self, cache: Any) -> RequestStats:
        self._attention.end()
        if self._loading.loader is not None:
            self._loading.loader.close()
        return self._loading.stats
