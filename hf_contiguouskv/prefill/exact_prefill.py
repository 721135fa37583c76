"""Computing KV exactly and writing it through to the store, while the model computes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import DynamicCache

from ..config import ContiguousKVConfig, ReadOptions
from ..errors import SegmentCorruptError, SegmentReadError, StoreClosedError, StoreError
from ..hardware import accelerator as hardware
from ..hardware.accelerator import Device
from ..loading.chunk_loader import ChunkLoader
from ..loading.placement import copy_in_order
from ..model.attention import Installation, tagged, uses_our_attention
from ..model.support import ModelSupport, decoder_config, input_device, run_forward
from ..selection import build_key_index
from ..store import PrefixStore
from ..store.attached_prefix import AttachedPrefix
from ..store.entries import StoredPrefix
from ..store.format import KVGeometry
from ..store.hashing import TokenIds
from ..store.packing import pack_values
from ..store.segment import Segment
from ..store.writer import SegmentWriter

# Prefilling more tokens than this shows a progress bar.
PROGRESS_TOKENS = 2048
LEADER_PERIOD = 8
# A prefix that loses more segments than this while it is read is computed without the store.
_MAX_LOST_SEGMENTS = 64
# What crosses together begins at multiples of so many bytes: any dtype can be read there.
_ALIGNED = 64

T = TypeVar("T")


def geometry_of(support: ModelSupport, chunk_size: int) -> KVGeometry:
    """How this model's KV is stored: K and V exactly, an int8 index and 4-bit values of every full layer, exact keys of
    every eighth (the paper's)."""
    full = support.plan.full_layers
    packable = support.head_dim % 2 == 0
    return KVGeometry(
        num_layers=len(support.plan.windows),
        kv_heads=support.kv_heads,
        head_dim=support.head_dim,
        dtype=support.dtype,
        chunk_size=chunk_size,
        leader_layers=tuple(full[::LEADER_PERIOD]),
        indexed_layers=tuple(full),
        packed_layers=tuple(full) if packable else (),
    )


class SegmentFeed:
    """Feeds the K/V of one token sequence to a segment writer, chunk by chunk, as they become known.

    What a segment needs is arranged, packed and indexed where K/V are. From an accelerator it crosses on a side stream
    to pinned memory, and only the writer's thread waits for that.

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
        there = hardware.device_of(keys.device)
        end = start + keys.shape[1]
        first = self._written[layer]
        last = end // c if end < self._tokens else -(-end // c)
        if last > first:
            part = slice(first * c - start, min(last * c, end) - start)
            # Arranged here, on the thread that computed them: a queued view would keep all of the cache's tokens
            # alive, and on an accelerator another thread would have to know which stream they come from.
            extents = _to_extents(keys[:, part], values[:, part], c)
            if there is None:
                self._writer.write_chunks(layer, first - self._first, extents)
            else:
                packs = layer in self._geometry.packed_layers
                found, ready = _leave(there, [extents, pack_values(extents[:, 1])] if packs else [extents])
                packed = found[1] if packs else None
                self._writer.write_chunks(layer, first - self._first, found[0], packed=packed, ready=ready)
            self._written[layer] = last
        if end == self._tokens and layer in self._geometry.indexed_layers:
            index = build_key_index(keys[:, self._first * c - start :], c)
            if there is None:
                self._writer.write_index(layer, *index)
            else:
                (numbers, scale), ready = _leave(there, index)
                self._writer.write_index(layer, numbers, scale, ready=ready)


def _leave(there: Device, tensors: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], Callable[[], None]]:
    """Start copying contiguous tensors of an accelerator to the host, in one piece; the copies, and what waits."""
    ends = list(accumulate(-(-tensor.nbytes // _ALIGNED) * _ALIGNED for tensor in tensors))
    source, target = there.empty(ends[-1]), hardware.pinned_buffer(ends[-1])
    found = []
    for tensor, begin in zip(tensors, [0, *ends], strict=False):
        source[begin : begin + tensor.nbytes].copy_(tensor.reshape(-1).view(torch.uint8))
        found.append(target[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
    copied = there.copy_out(source, target)
    return found, partial(there.finish, copied)


def _to_extents(keys: torch.Tensor, values: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """K and V `(kv_heads, t, head_dim)` as `(chunks, 2, kv_heads, c, head_dim)` where they are, padded with zeros."""
    kv_heads, tokens, head_dim = keys.shape
    chunks = -(-tokens // chunk_size)
    out = torch.empty(chunks, 2, kv_heads, chunk_size, head_dim, dtype=keys.dtype, device=keys.device)
    whole = tokens // chunk_size
    for half, states in enumerate((keys, values)):
        full = states[:, : whole * chunk_size].unflatten(1, (whole, chunk_size)) if whole else None
        if full is not None:
            out[:whole, half].copy_(full.transpose(0, 1))
        if tokens % chunk_size:
            out[whole, half].zero_()
            out[whole, half, :, : tokens % chunk_size].copy_(states[:, whole * chunk_size :])
    return out


@dataclass(frozen=True)
class _Everything:
    """K and V of a layer, all of which the tokens of a block see. See `attention.KVSource`."""

    keys: torch.Tensor
    values: torch.Tensor
    plain: bool = True

    def visible_kv(
        self, query: torch.Tensor, attention_mask: torch.Tensor | None, options: Mapping[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.keys, self.values


class _WriteThroughCache(DynamicCache):
    """Tells of each layer's K/V as soon as they are known, while the model goes on with the layers behind.

    Args:
        tagged_layers: those that attend through our function (`attention.attend`): behind the first block there is a
            mask, and on an accelerator that costs a copy of K and V for each query head, and the flash kernel.
    """

    def __init__(self, tagged_layers: frozenset[int] = frozenset()) -> None:
        super().__init__()
        self.layer_done: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None
        self._tagged_layers = tagged_layers

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if self.layer_done is not None:
            self.layer_done(layer_idx, keys, values)
        if layer_idx in self._tagged_layers:
            return tagged(keys, _Everything(keys, values)), values
        return keys, values


class Prefill:
    """Computes the KV of prompts exactly, and stores it.

    Whatever the storage does, a prompt ends up complete: what cannot be written is kept in memory, and what cannot be
    read is taken out of service and computed anew.

    Args:
        model: the causal LM; runs under `torch.no_grad`.
        store, fingerprint: where to, and as whose.
        support, config: of the model and the cache.
    """

    def __init__(
        self,
        model: nn.Module,
        store: PrefixStore,
        fingerprint: str,
        support: ModelSupport,
        config: ContiguousKVConfig,
    ) -> None:
        self._model = model
        self._store = store
        self._fingerprint = fingerprint
        self._support = support
        self._config = config

    def complete(self, ids: torch.Tensor, known: StoredPrefix | None, *, in_memory: bool = False) -> StoredPrefix:
        """Compute what `known` lacks of `ids`, in blocks, and publish it.

        Args:
            ids: int64 `(n,)`.
            known: the longest stored beginning, if any; it is loaded in full.
            in_memory: store nothing.

        Returns:
            The prefix, covering all of `ids`. Parts of it may be in memory, if they could not be stored.
        """
        for device in set(self._support.plan.devices):
            self._store.memory.on(device)  # From now on host memory is pinned.
        numbers = ids.cpu().numpy().astype(np.int64)
        for _ in range(_MAX_LOST_SEGMENTS):
            try:
                return self._complete(ids, numbers, known, in_memory)
            except (SegmentCorruptError, SegmentReadError) as error:
                if isinstance(error, SegmentReadError) and not error.damage:
                    break  # Nothing is wrong with it, but it cannot be read now.
                # What was known proved wrong: less is known.
                if isinstance(error.segment, Segment):
                    self._store.discard(error.segment, str(error))
                known = self._look_up(numbers)
        return self._complete(ids, numbers, None, True)

    def _complete(
        self, ids: torch.Tensor, numbers: TokenIds, known: StoredPrefix | None, in_memory: bool
    ) -> StoredPrefix:
        c = self._config.chunk_size
        while known is None or known.tokens < len(numbers):
            done = 0 if known is None else known.tokens
            end = len(numbers)
            if not in_memory:
                # Where a segment in the middle was lost, those behind it are found again once it is there.
                later = self._store.next_stored(self._fingerprint, numbers, c, done // c + 1)
                end = end if later is None else later * c
            known, in_memory = self._compute(ids[:end], numbers[:end], known, in_memory)
            if end < len(numbers) and not in_memory:
                found = self._look_up(numbers)
                known = found if found is not None and found.tokens > known.tokens else known
        return known

    def _look_up(self, numbers: TokenIds) -> StoredPrefix | None:
        c = self._config.chunk_size
        geometry = geometry_of(self._support, c)
        return self._store.lookup(self._fingerprint, numbers, c, geometry=geometry, count=False)

    def _compute(
        self, ids: torch.Tensor, numbers: TokenIds, known: StoredPrefix | None, in_memory: bool
    ) -> tuple[StoredPrefix, bool]:
        """Compute all of `ids` that `known` lacks; the prefix, and whether its end could only be kept in memory."""
        # Without a config every layer keeps all tokens, so that sliding-window layers can be stored in full as well.
        cache = _WriteThroughCache(_tagged_layers(self._support))
        done = 0 if known is None else known.tokens
        if known is not None:
            load_exactly(AttachedPrefix.of(known, done), self._store, self._support, cache)
        c = self._config.chunk_size
        geometry = geometry_of(self._support, c)
        begin = self._store.begin_memory_segment if in_memory else self._store.begin_segment
        begin_segment = partial(begin, self._fingerprint, geometry, numbers, done // c, known)
        writer = self._try(begin_segment)
        try:
            feed = None if writer is None else SegmentFeed(writer, geometry, done // c, len(numbers))
            started = time.perf_counter()
            self._forward(ids, done, cache, feed)
            seconds = time.perf_counter() - started
            stored = None if writer is None else self._try(partial(writer.commit, seconds))
        finally:
            if writer is not None:
                writer.abort()  # Does nothing after a commit.
        if stored is not None:
            return stored, in_memory
        # It is all computed: keep it in memory, for this request and the others of its cache.
        begin_segment = partial(
            self._store.begin_memory_segment, self._fingerprint, geometry, numbers, done // c, known
        )
        with begin_segment() as writer:
            feed = SegmentFeed(writer, geometry, done // c, len(numbers))
            for layer, states in enumerate(cache.layers):
                feed.feed(layer, states.keys[0], states.values[0], 0)
            return writer.commit(seconds), True

    def _try(self, action: Callable[[], T]) -> T | None:
        """What `action` returns; `None`, counted and reported, where the storage refuses."""
        try:
            return action()
        except StoreClosedError:
            raise
        except (StoreError, OSError) as error:
            self._store.write_failed(error)
            return None

    def _forward(self, ids: torch.Tensor, done: int, cache: _WriteThroughCache, feed: SegmentFeed | None) -> None:
        """Run the model over `ids[done:]` in blocks; layers are fed to the store as soon as they are known."""
        tokens, layers = ids.shape[0], len(self._support.plan.windows)
        block = self._config.prefill_block
        starts = range(done, tokens, block)
        device = input_device(self._model)
        silent = tokens - done < PROGRESS_TOKENS
        with tqdm(total=len(starts) * layers, desc="prefill", unit="layer", disable=silent, leave=False) as bar:

            def layer_done(layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
                if feed is not None:
                    feed.feed(layer, keys[0], values[0], 0)
                bar.update()

            cache.layer_done = layer_done
            installation = Installation(decoder_config(self._model))
            try:
                if _tagged_layers(self._support):
                    installation.activate()
                # A request that runs under autocast finds out in the middle of it that it must compute this.
                with torch.no_grad(), torch.autocast(device.type, enabled=False):
                    for start in starts:
                        part = ids[start : start + block][None].to(device)
                        run_forward(self._model, part, cache, start)
            finally:
                installation.release()
            cache.layer_done = None


def _tagged_layers(support: ModelSupport) -> frozenset[int]:
    plan = support.plan
    return frozenset(layer for layer in plan.full_layers if uses_our_attention(plan.devices[layer]))


def load_exactly(prefix: AttachedPrefix, store: PrefixStore, support: ModelSupport, cache: DynamicCache) -> None:
    """Put all tokens of all layers of a stored prefix into an empty `DynamicCache`."""
    g, devices = prefix.geometry, support.plan.devices
    loader = ChunkLoader(store, [prefix] * len(devices), devices, lookahead_bytes=ReadOptions().lookahead_bytes)
    chunks = np.arange(prefix.chunks)
    try:
        for layer in range(len(devices)):
            loader.want_later(layer, chunks)
        loader.start_queued()
        for layer, device in enumerate(devices):
            kv = torch.empty(2, g.kv_heads, len(chunks), g.chunk_size, g.head_dim, dtype=g.dtype, device=device)
            with closing(loader.take(layer)) as parts:
                for part in parts:
                    copy_in_order(prefix, part, 0, kv)
            keys, values = kv.flatten(2, 3)[:, None, :, : prefix.tokens]
            cache.update(keys, values, layer)
    finally:
        loader.close()


def persist_rows(
    rows: Sequence[tuple[np.ndarray, Sequence[tuple[torch.Tensor, torch.Tensor, int]]]],
    store: PrefixStore,
    fingerprint: str,
    geometry: KVGeometry,
    compute_s: float = 0.0,
) -> None:
    """Publish prompts whose KV was computed exactly by somebody else's forward.

    Args:
        rows: per prompt its ids, int64 `(n,)`, and per layer `(keys, values, start)`: `(kv_heads, n - start,
            head_dim)` of tokens `[start, n)`. Tokens before `start` must be stored already, or the prompt is skipped.
        compute_s: how long that forward took, in seconds.

    What cannot be stored is counted and reported (`PrefixStore.write_failed`): its request was answered long ago.
    """
    for ids, layers in rows:
        try:
            _persist_row(ids, layers, store, fingerprint, geometry, compute_s / len(rows))
        except StoreClosedError:
            raise
        except (StoreError, OSError) as error:
            store.write_failed(error)


def _persist_row(
    ids: np.ndarray,
    layers: Sequence[tuple[torch.Tensor, torch.Tensor, int]],
    store: PrefixStore,
    fingerprint: str,
    geometry: KVGeometry,
    compute_s: float,
) -> None:
    c = geometry.chunk_size
    if not all(keys.dtype == values.dtype == geometry.dtype for keys, values, _ in layers):
        return
    done = -1
    while True:
        known = store.lookup(fingerprint, ids, c, geometry=geometry, count=False)
        before, done = done, 0 if known is None else known.tokens
        first_chunk = done // c
        if done in (len(ids), before) or any(start > first_chunk * c for _, _, start in layers):
            return
        # Where a segment in the middle was lost, those behind it are found again once it is there.
        later = store.next_stored(fingerprint, ids, c, first_chunk + 1)
        end = len(ids) if later is None else later * c
        with store.begin_segment(fingerprint, geometry, ids[:end], first_chunk, known) as writer:
            feed = SegmentFeed(writer, geometry, first_chunk, end)
            for layer, (keys, values, start) in enumerate(layers):
                feed.feed(layer, keys[:, : end - start], values[:, : end - start], start)
            writer.commit(compute_s)
