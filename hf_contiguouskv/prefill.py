"""Computing KV exactly and writing it through to the store, while the model computes on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import DynamicCache

from .config import ContiguousKVConfig
from .device import SLABS, upload
from .prefetch import Lookahead, PayloadReads
from .prefix import AttachedPrefix
from .selection import build_key_index
from .stats import RequestStats
from .store import PrefixStore
from .store.entries import StoredPrefix
from .store.format import KVGeometry
from .store.writer import SegmentWriter
from .support import ModelSupport

# Prefilling more tokens than this shows a progress bar.
PROGRESS_TOKENS = 2048
LEADER_PERIOD = 8


def geometry_of(support: ModelSupport, chunk_size: int) -> KVGeometry:
    """How this model's KV is stored: an int8 index of every full layer, exact keys of every eighth (the paper's)."""
    full = support.plan.full_layers
    return KVGeometry(
        num_layers=len(support.plan.windows),
        kv_heads=support.kv_heads,
        head_dim=support.head_dim,
        dtype=support.dtype,
        chunk_size=chunk_size,
        leader_layers=tuple(full[::LEADER_PERIOD]),
        indexed_layers=tuple(full),
    )


class SegmentFeed:
    """Feeds the K/V of one token sequence to a segment writer, chunk by chunk, as they become known.

    Args:
        writer: a writer for the chunks from `first_chunk` on.
        geometry: of the segment.
        first_chunk: the first chunk that is written; K/V of earlier tokens are ignored.
        tokens: length of the whole sequence.
    """

    def __init__(self, writer: SegmentWriter, geometry: KVGeometry, first_chunk: int, tokens: int) -> None:
        self._writer = writer
        self._geometry = geometry
        self._first = first_chunk
        self._tokens = tokens
        self._written = [first_chunk] * geometry.num_layers

    def feed(self, layer: int, keys: torch.Tensor, values: torch.Tensor, start: int) -> None:
        """Write the chunks that are complete now.

        Args:
            layer: layer index.
            keys, values: `(kv_heads, t, head_dim)`: tokens `[start, start + t)`, `start` at or before the first
                chunk not written yet.
        """
        c = self._geometry.chunk_size
        end = start + keys.shape[1]
        first = self._written[layer]
        last = end // c if end < self._tokens else -(-end // c)
        if last > first:
            part = slice(first * c - start, min(last * c, end) - start)
            # Arranged here, on the thread that computed them: a queued view would keep all of the cache's tokens
            # alive, and on an accelerator another thread would have to know which stream they come from.
            self._writer.write_chunks(layer, first - self._first, _to_extents(keys[:, part], values[:, part], c))
            self._written[layer] = last
        if end == self._tokens and layer in self._geometry.indexed_layers:
            own = keys[:, self._first * c - start :]
            self._writer.write_index(layer, *build_key_index(own, c))


def _to_extents(keys: torch.Tensor, values: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """K and V `(kv_heads, t, head_dim)` as `(chunks, 2, kv_heads, c, head_dim)` on the CPU, padded with zeros."""
    kv_heads, tokens, head_dim = keys.shape
    chunks = -(-tokens // chunk_size)
    out = torch.empty(chunks, 2, kv_heads, chunk_size, head_dim, dtype=keys.dtype)
    whole = tokens // chunk_size
    for half, states in enumerate((keys, values)):
        full = states[:, : whole * chunk_size].unflatten(1, (whole, chunk_size)) if whole else None
        if full is not None:
            out[:whole, half].copy_(full.transpose(0, 1))
        if tokens % chunk_size:
            out[whole, half].zero_()
            out[whole, half, :, : tokens % chunk_size].copy_(states[:, whole * chunk_size :])
    return out


class _WriteThroughCache(DynamicCache):
    """Tells of each layer's K/V as soon as they are known, while the model goes on with the layers behind."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_done: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if self.layer_done is not None:
            self.layer_done(layer_idx, keys, values)
        return keys, values


def prefill_into_store(
    model: nn.Module,
    ids: torch.Tensor,
    known: StoredPrefix | None,
    store: PrefixStore,
    fingerprint: str,
    support: ModelSupport,
    config: ContiguousKVConfig,
) -> StoredPrefix:
    """Compute the KV of `ids` beyond what is stored, exactly, in blocks, and publish it.

    Args:
        model: the causal LM; runs under `torch.no_grad`.
        ids: int64 `(n,)`.
        known: the longest stored beginning, if any; it is loaded in full.
        store, fingerprint: where to, and as whose.

    Returns:
        The stored prefix, covering all of `ids`.
    """
    tokens = ids.shape[0]
    c = config.chunk_size
    # Without a config every layer keeps all tokens, so that sliding-window layers can be stored in full as well.
    cache = _WriteThroughCache()
    done = 0
    if known is not None:
        done = known.tokens
        load_exactly(AttachedPrefix.of(known, done), store, support, cache)
    geometry = geometry_of(support, c)
    first_chunk = done // c
    numbers = ids.cpu().numpy().astype(np.int64)
    writer = store.begin_segment(fingerprint, geometry, numbers, first_chunk)
    try:
        feed = SegmentFeed(writer, geometry, first_chunk, tokens)
        starts = range(done, tokens, config.prefill_block)
        device = getattr(model, "device", torch.device("cpu"))
        steps = len(starts) * geometry.num_layers
        with tqdm(
            total=steps, desc="prefill", unit="layer", disable=tokens - done < PROGRESS_TOKENS, leave=False
        ) as bar:

            def layer_done(layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
                feed.feed(layer, keys[0], values[0], 0)
                bar.update()

            cache.layer_done = layer_done
            for start in starts:
                block = ids[start : start + config.prefill_block][None].to(device)
                with torch.no_grad():
                    model(input_ids=block, past_key_values=cache, use_cache=True, **_last_logit_only(model))
        writer.commit()
    except BaseException:
        writer.abort()
        raise
    stored = store.lookup(fingerprint, numbers, c)
    if stored is None or stored.tokens != tokens:
        raise RuntimeError(f"a prefix of {tokens} tokens was published, but only {stored} is found again")
    return stored


def _last_logit_only(model: nn.Module) -> dict[str, Any]:
    accepted = inspect.signature(model.forward).parameters
    return {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}


def load_exactly(prefix: AttachedPrefix, store: PrefixStore, support: ModelSupport, cache: DynamicCache) -> None:
    """Put all tokens of all layers of a stored prefix into an empty `DynamicCache`."""
    stats = RequestStats()
    payload = PayloadReads(prefix, store.reader, SLABS, stats, verify=True)
    ahead = Lookahead(ContiguousKVConfig().lookahead_bytes)
    chunks = list(range(prefix.chunks))
    for layer, device in enumerate(support.plan.devices):
        ahead.add(
            layer,
            len(chunks) * prefix.geometry.extent_bytes,
            partial(payload.ask, [layer], chunks, device),
        )
    ahead.pump()
    try:
        for layer, device in enumerate(support.plan.devices):
            ahead.need(layer)
            (batch,) = payload.take(layer)
            kv = upload(prefix.kv_view(batch.slab.data, len(chunks)), device, batch.slab)
            states = kv.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, None, :, : prefix.tokens]
            cache.update(states[0].clone(), states[1].clone(), layer)
            payload.give_back([batch])
            ahead.used(layer)
    finally:
        payload.close()


def persist_rows(
    rows: Sequence[tuple[np.ndarray, Sequence[tuple[torch.Tensor, torch.Tensor, int]]]],
    store: PrefixStore,
    fingerprint: str,
    geometry: KVGeometry,
) -> None:
    """Publish prompts whose KV was computed exactly by somebody else's forward.

    Args:
        rows: per prompt its ids, int64 `(n,)`, and per layer `(keys, values, start)`: `(kv_heads, n - start,
            head_dim)` of tokens `[start, n)`. Tokens before `start` must be stored already, or the prompt is skipped.
    """
    c = geometry.chunk_size
    for ids, layers in rows:
        known = store.lookup(fingerprint, ids, c)
        done = 0 if known is None else known.tokens
        first_chunk = done // c
        exact = all(keys.dtype == values.dtype == geometry.dtype for keys, values, _ in layers)
        if done == len(ids) or not exact or any(start > first_chunk * c for _, _, start in layers):
            continue
        writer = store.begin_segment(fingerprint, geometry, ids, first_chunk)
        try:
            feed = SegmentFeed(writer, geometry, first_chunk, len(ids))
            for layer, (keys, values, start) in enumerate(layers):
                feed.feed(layer, keys, values, start)
            writer.commit()
        except BaseException:
            writer.abort()
            raise
