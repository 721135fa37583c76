"""How fast this model computes and this store reads, measured here and now: what `budget="auto"` goes by."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from .prefix import AttachedPrefix
from .selection import IndexedKeys, SelectionInput, build_key_index
from .store import PrefixStore
from .store.pread import aligned_buffer, as_memoryview
from .store.reader import Read
from .support import ModelSupport, decoder_config, input_device

# What is measured: a short suffix behind a prefix of some tokens, a choice among many, a read of at most so many bytes.
SUFFIX_TOKENS, USED_TOKENS, CONSIDERED_TOKENS, READ_BYTES = 32, 1024, 8192, 16 * 2**20
# Each is repeated so often, or for so long if it is slow; but once in any case: first calls are slow.
REPEATS, SECONDS = 3, 2.0


@dataclass(frozen=True)
class ComputeSpeeds:
    """Seconds of compute on a request with a suffix of `SUFFIX_TOKENS`, over all layers.

    Attributes:
        forward_s: without any prefix: the floor.
        used_s: more for each prefix token that attention uses: putting it in its place, and attending to it.
        considered_s: more for each prefix token that is considered in a selection.
    """

    forward_s: float
    used_s: float
    considered_s: float


_known: weakref.WeakKeyDictionary[nn.Module, ComputeSpeeds] = weakref.WeakKeyDictionary()
_disks: weakref.WeakKeyDictionary[PrefixStore, float] = weakref.WeakKeyDictionary()


def compute_speeds(model: nn.Module, support: ModelSupport) -> ComputeSpeeds:
    """Those of `model` on its devices: measured once in its life, with a handful of forwards."""
    found = _known.get(model)
    if found is None:
        device = input_device(model)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            alone = _shortest(lambda: _forward(model, DynamicCache()))
            behind = _shortest(lambda: _forward(model, _cache_of_noise(support)))
            noise = _shortest(lambda: _wait(_cache_of_noise(support).layers[-1].keys))
            copied = _shortest(lambda: _copy(support))
            chosen = _shortest(_chooser(model, support))
        used = max(0.0, behind - noise - alone) + copied
        layers = len(support.plan.full_layers)
        found = _known[model] = ComputeSpeeds(alone, used / USED_TOKENS, layers * chosen / CONSIDERED_TOKENS)
    return found


def read_speed(store: PrefixStore, prefix: AttachedPrefix) -> float:
    """Bytes per second that `store` delivers, by a read of the prefix's longest segment: measured once per store."""
    found = _disks.get(store)
    if found is None:
        segment = max(prefix.spans, key=lambda span: span.segment.num_chunks).segment
        nbytes = min(READ_BYTES, segment.num_chunks * prefix.geometry.extent_bytes)
        buffer = aligned_buffer(nbytes)
        buffer.zero_()  # Its pages are there before the clock runs, as those of a tier in use are.
        offset, octets = segment.extents("exact").offset(0, 0), as_memoryview(buffer)
        first = min(nbytes, prefix.geometry.extent_bytes)
        store.reader.submit([Read(segment, offset, first, octets[:first])]).wait()  # Threads and files are there now.
        began = time.perf_counter()
        store.reader.submit([Read(segment, offset, nbytes, octets)]).wait()
        found = _disks[store] = nbytes / max(time.perf_counter() - began, 1e-9)
    return found


def _shortest(action: Callable[[], None]) -> float:
    """Seconds of the shortest of several calls, after one that is not counted."""
    action()
    times: list[float] = []
    while not times or (len(times) < REPEATS and sum(times) < SECONDS):
        began = time.perf_counter()
        action()
        times.append(time.perf_counter() - began)
    return min(times)


def _wait(tensor: torch.Tensor) -> None:
    tensor.flatten()[-1].item()  # Where a device computes, its results are waited for.


def _forward(model: Any, cache: DynamicCache) -> None:
    ids = torch.arange(SUFFIX_TOKENS, device=input_device(model))[None] % decoder_config(model).vocab_size
    _wait(model(input_ids=ids, past_key_values=cache, use_cache=True).logits)


def _cache_of_noise(support: ModelSupport) -> DynamicCache:
    cache = DynamicCache()
    for layer, device in enumerate(support.plan.devices):
        shape = (1, support.kv_heads, USED_TOKENS, support.head_dim)
        states = torch.full(shape, 0.01, dtype=support.dtype, device=device)
        cache.update(states, states.clone(), layer)
    return cache


def _copy(support: ModelSupport) -> None:
    """Chunks from anywhere in memory, put together, for all layers."""
    chunk = 16
    count = USED_TOKENS // chunk
    for device in support.plan.devices:
        shape = (2 * count, 2, support.kv_heads, chunk, support.head_dim)
        source = torch.zeros(shape, dtype=support.dtype, device=device)
        every_other = torch.arange(0, 2 * count, 2, device=device)
        target = source.new_empty(2, support.kv_heads, count, chunk, support.head_dim)
        target.copy_(source.index_select(0, every_other).permute(1, 2, 0, 3, 4))
    _wait(target)


def _chooser(model: nn.Module, support: ModelSupport) -> Callable[[], None]:
    """Makes one selection among the chunks of one layer."""
    device = support.plan.devices[0]
    heads = int(decoder_config(model).num_attention_heads)
    keys = torch.linspace(-1, 1, CONSIDERED_TOKENS).expand(support.kv_heads, support.head_dim, -1).transpose(1, 2)
    index, scale = build_key_index(keys, 16)
    queries = torch.ones(1, heads, SUFFIX_TOKENS, support.head_dim, dtype=support.dtype, device=device)
    voters = torch.arange(SUFFIX_TOKENS - 8, SUFFIX_TOKENS, device=device)
    visible = torch.ones(1, SUFFIX_TOKENS, dtype=torch.bool, device=device)
    inputs = SelectionInput(queries, queries[:, : support.kv_heads], [voters], visible, support.head_dim**-0.5)
    scorer = IndexedKeys([(index.to(device), scale.to(device))], CONSIDERED_TOKENS // 16, 2.0)
    return lambda: _wait(scorer(inputs).importance)
