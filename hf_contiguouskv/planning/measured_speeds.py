"""Measures how fast this model computes and this store reads, for `budget="auto"`."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from ..config import ContiguousKVConfig, IndexedKeys, Selection
from ..hardware.aligned_memory import PAGE, as_memoryview
from ..model.attention import attend
from ..model.served_model import ServedModel
from ..model.trial_forward import KVShape
from ..selection import (
    AttentionMassScorer,
    CoarseIndex,
    IndexedKeysScorer,
    KeyIndex,
    SelectionInput,
    voting_queries,
)
from ..store.attached_prefix import AttachedPrefix
from ..store.fleet.cached_blob import CachedBlob
from ..store.inner import StoreInner
from ..store.reader import Read
from ..store.segment import Segment

# Sizes for the measurements: a short suffix after some tokens, a choice among many tokens, a prefill block, a read.
SUFFIX_TOKENS, USED_TOKENS, CONSIDERED_TOKENS, PREFILL_TOKENS, READ_BYTES = 32, 1024, 8192, 256, 16 * 2**20
# A choice among so few tokens costs its calls, and hardly any arithmetic. With what surrounds it in a request (reads,
# books, placing), it takes so many times as long (measured: 0.5 ms per layer, of which the choice is 0.2).
FEW_TOKENS, STEPS = 256, 2.5
# A shorter read measures latency more than speed, so its result is replaced once a much longer read is possible.
TELLING_BYTES = 4 * 2**20
# Bytes per second of a disk that holds nothing to measure it by.
UNKNOWN_DISK = 1e9
# Each measurement is repeated this often, or for this many seconds if it is slow, but at least once, after a warm-up.
REPEATS, SECONDS = 3, 1.0


@dataclass(frozen=True)
class ComputeSpeeds:
    """Seconds of compute, over all layers.

    Attributes:
        forward_s: for a suffix of `SUFFIX_TOKENS` tokens without any prefix: the floor.
        used_s: for each prefix token that full attention uses: copying it into place, and attending to it.
        considered_s: for each prefix token that leader layers choose from, summed over all leader layers.
        choosing_s: for choosing at all, among however few tokens: calls, books, and placing what was chosen.
        prefill_s: for each computed token of a prefix (without attention over a long prefix).
    """

    forward_s: float
    used_s: float
    considered_s: float
    choosing_s: float
    prefill_s: float


# Bytes per second of each store's disk, and the size in bytes of the read that measured it.
_disks: weakref.WeakKeyDictionary[StoreInner, tuple[float, int]] = weakref.WeakKeyDictionary()
# Two simultaneous measurements would slow each other down.
_lock = threading.Lock()


def compute_speeds(model: ServedModel, config: ContiguousKVConfig) -> ComputeSpeeds:
    """The speeds of `model` for the selection of `config`, measured once with a few short forwards.

    Raises:
        Exception: any error of a model that cannot run these forwards.
    """
    rules: tuple[str, KVShape, Selection, int] = ("speeds", model.shape, config.selection, config.chunk_size)
    with _lock:
        found = model.measured.get(rules)
        if not isinstance(found, ComputeSpeeds):
            with torch.no_grad(), torch.autocast(model.input_device.type, enabled=False):
                found = model.measured[rules] = _measured(model, config)
        return found


def _measured(model: ServedModel, config: ContiguousKVConfig) -> ComputeSpeeds:
    full = model.layers.full_layers
    forward = _shortest(lambda: _forward(model, SUFFIX_TOKENS))
    # If a short forward is slow, arithmetic dominates, so its time is proportional to its tokens.
    quick = forward < SECONDS / 2
    prefill = _shortest(lambda: _forward(model, PREFILL_TOKENS)) / PREFILL_TOKENS if quick else forward / SUFFIX_TOKENS
    used = considered = choosing = 0.0
    if full:
        layer = full[0]
        long, short = (_shortest(_attend(model, layer, tokens)) for tokens in (USED_TOKENS, 0))
        copied = _shortest(_copy(model, layer))
        used = len(full) * (max(0.0, long - short) + copied) / USED_TOKENS
        leaders = len(full[:: config.selection.period])
        many, few = (_shortest(_choose(model, layer, config, tokens)) for tokens in (CONSIDERED_TOKENS, FEW_TOKENS))
        considered = leaders * max(0.0, many - few) / (CONSIDERED_TOKENS - FEW_TOKENS)
        choosing = leaders * STEPS * few
    return ComputeSpeeds(forward, used, considered, choosing, prefill)


def read_speed(store: StoreInner, prefix: AttachedPrefix) -> float:
    """Bytes per second that the disk of `store` delivers, measured by reading the prefix's longest segment there.

    The result is kept. After a short read, it is measured again once a prefix allows a read of twice the length.

    Raises:
        StoreError: the segment cannot be read.
    """
    with _lock:
        known, length = _disks.get(store, (0.0, 0))
        if length >= TELLING_BYTES:
            return known
        # (What lies in a shared store says nothing of the disk.)
        here = [span.segment for span in prefix.spans if not isinstance(span.segment.blob, CachedBlob)]
        if not here:
            return known or UNKNOWN_DISK
        segment = max(here, key=lambda one: one.num_chunks)
        begin = segment.extents("exact").offset(0, 0)
        nbytes = min(READ_BYTES, segment.nbytes - begin, max(store.memory.host.max_bytes // 4, 2**20))
        if nbytes >= 2 * length:
            _disks[store] = known, _ = _timed_read(store, segment, begin, nbytes), nbytes
        return known


def _timed_read(store: StoreInner, segment: Segment, begin: int, nbytes: int) -> float:
    """Bytes per second of one read, from byte `begin` of a segment."""
    host = store.memory.host
    buffer = host.lease(nbytes)
    assert buffer is not None
    try:
        octets = as_memoryview(buffer.data[:nbytes].zero_())  # Touch the pages, as in a tier that is in use.
        first = min(nbytes, PAGE)
        store.reader.submit([Read(segment, begin, first, octets[:first])]).wait()  # Start the reader threads.
        began = time.perf_counter()
        store.reader.submit([Read(segment, begin, nbytes, octets)]).wait()
        return nbytes / max(time.perf_counter() - began, 1e-9)
    finally:
        host.give_back(buffer)


def _shortest(action: Callable[[], Any]) -> float:
    """Seconds of the shortest of several calls, after a warm-up call."""
    action()
    times: list[float] = []
    while not times or (len(times) < REPEATS and sum(times) < SECONDS):
        began = time.perf_counter()
        action()
        times.append(time.perf_counter() - began)
    return min(times)


def _wait(tensor: torch.Tensor) -> None:
    tensor.flatten()[-1].item()  # Reading a value waits for the device.


def _forward(model: ServedModel, tokens: int) -> None:
    ids = torch.zeros(1, tokens, dtype=torch.long, device=model.input_device)
    _wait(model.run(ids, DynamicCache(config=model.lm.config), 0)[0])


def _attend(model: ServedModel, layer: int, tokens: int) -> Callable[[], None]:
    """An action that runs one layer's attention for a suffix after `tokens` tokens."""
    shape, heads, device = model.shape, model.query_heads, model.layers.devices[layer]
    numbers = torch.full((1, heads, SUFFIX_TOKENS, shape.head_dim), 0.1, dtype=shape.dtype, device=device)
    seen = numbers[:, : shape.kv_heads, :1].repeat(1, 1, tokens + SUFFIX_TOKENS, 1)
    mask = torch.ones(SUFFIX_TOKENS, tokens + SUFFIX_TOKENS, dtype=torch.bool, device=device).tril(tokens)[None, None]
    options = {"scaling": shape.head_dim**-0.5}
    plain = device.type != "cpu"
    return lambda: _wait(attend(numbers, seen, seen, mask, options, plain=plain))


def _copy(model: ServedModel, layer: int) -> Callable[[], None]:
    """An action that gathers scattered chunks of one layer."""
    chunk = 16
    count, shape, device = USED_TOKENS // chunk, model.shape, model.layers.devices[layer]
    stored = (2 * count, 2, shape.kv_heads, chunk, shape.head_dim)
    source = torch.zeros(stored, dtype=shape.dtype, device=device)
    every_other = torch.arange(0, 2 * count, 2, device=device)
    target = source.new_empty(2, shape.kv_heads, count, chunk, shape.head_dim)
    return lambda: _wait(target.copy_(source.index_select(0, every_other).permute(1, 2, 0, 3, 4)))


def _choose(model: ServedModel, layer: int, config: ContiguousKVConfig, tokens: int) -> Callable[[], None]:
    """An action that selects among the chunks of `tokens` tokens in one layer, by the method of `config`."""
    shape, device, c = model.shape, model.layers.devices[layer], config.chunk_size
    heads = model.query_heads
    keys = torch.linspace(-1, 1, tokens).expand(shape.kv_heads, shape.head_dim, -1).transpose(1, 2)
    queries = torch.full((1, heads, SUFFIX_TOKENS, shape.head_dim), 0.1, dtype=shape.dtype, device=device)
    visible = torch.ones(1, SUFFIX_TOKENS, dtype=torch.bool, device=device)
    voters = voting_queries(visible[0], config.selection.queries, config.selection.recent)
    inputs = SelectionInput(queries, queries[:, : shape.kv_heads], [voters], visible, shape.head_dim**-0.5)
    if isinstance(config.selection, IndexedKeys):
        part = (CoarseIndex if config.index_bits == 2 else KeyIndex).of(keys.to(device), c)
        indexed = IndexedKeysScorer([part], tokens // c, config.selection.concentration)
        return lambda: _wait(indexed(inputs).importance)
    exact = AttentionMassScorer(keys.to(device, shape.dtype), c, config.selection.concentration)
    return lambda: _wait(exact(inputs).importance)
