"""AttentionStore as it deserves: the whole prefix KV loaded layer by layer, every read overlapped with compute.

Same files, same layout, same reader and threads as the library. All layers are asked for at once, in order; a layer's
attention waits for that layer alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from hf_contiguouskv.prefetch import PayloadReads
from hf_contiguouskv.prefix import AttachedPrefix
from hf_contiguouskv.slots import copy_in_order
from hf_contiguouskv.stats import RequestStats
from hf_contiguouskv.store import PrefixStore
from hf_contiguouskv.store.fingerprint import model_fingerprint

ROOM = 256


class _LoadedLayer(DynamicLayer):
    """A layer whose prefix is on its way from disk until the first update."""

    def __init__(self, layer: int, prefix: AttachedPrefix, reads: PayloadReads) -> None:
        super().__init__()
        self._layer = layer
        self._prefix = prefix
        self._reads: PayloadReads | None = reads
        self._buffers: list[torch.Tensor] = []
        self._length = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._reads is not None:
            self._load(key_states)
        end = self._length + key_states.shape[2]
        if end > self._buffers[0].shape[2]:
            self._buffers = [torch.cat([b, torch.empty_like(b)], dim=2) for b in self._buffers]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, self._length : end] = states
        self._length = end
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
        return self.keys, self.values

    def _load(self, key_states: torch.Tensor) -> None:
        assert self._reads is not None
        self.lazy_initialization(key_states, key_states)
        g = self._prefix.geometry
        count = self._prefix.chunks
        # One copy, from the chunks' order on disk to the order that attention wants.
        both = key_states.new_empty(2, 1, g.kv_heads, count * g.chunk_size + ROOM, g.head_dim)
        chunks = both[:, 0, :, : count * g.chunk_size].unflatten(2, (count, g.chunk_size))
        for batch in self._reads.take(self._layer):
            copy_in_order(self._prefix, batch, 0, chunks)
        self._buffers = [both[0], both[1]]
        self._reads = None
        self._length = self._prefix.tokens

    def get_seq_length(self) -> int:
        return self._prefix.tokens if self._reads is not None else self._length


def overlapped_full_load(model: Any, prefix_ids: torch.Tensor, store: PrefixStore, stats: RequestStats) -> DynamicCache:
    """A `DynamicCache` that holds a stored prefix, all of whose reads are under way.

    Args:
        model: the causal language model whose KV is stored.
        prefix_ids: int64 `(n,)`, stored in full.
        store: where.
        stats: receives `bytes_read` and `io_wait_s`.
    """
    ids = prefix_ids.numpy().astype(np.int64)
    stored = store.lookup(model_fingerprint(model), ids, 16)
    if stored is None or stored.tokens < len(ids):
        raise ValueError("the prefix is not stored")
    prefix = AttachedPrefix.of(stored, len(ids))
    reads = PayloadReads(prefix, store.reader, store.memory, stats, verify=True)
    cache = DynamicCache()
    cache.layers = [_LoadedLayer(layer, prefix, reads) for layer in range(prefix.geometry.num_layers)]
    cache.layer_class_to_replicate = None
    for layer in range(prefix.geometry.num_layers):
        reads.ask([layer], np.arange(prefix.chunks), torch.device("cpu"))
    return cache
