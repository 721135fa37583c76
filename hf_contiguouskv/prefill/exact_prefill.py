"""Computes KV exactly and writes it to the store while the model goes on computing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import DynamicCache

from ..config import ReadOptions
from ..errors import SegmentCorruptError, SegmentReadError, StoreClosedError, StoreError
from ..loading.chunk_loader import ChunkLoader
from ..loading.placement import copy_in_order
from ..model.attention import tagged, uses_our_attention
from ..model.kv_geometry import KVGeometry
from ..model.layer_plan import LayerPlan
from ..model.served_model import ServedModel
from ..store.attached_prefix import AttachedPrefix
from ..store.entries import StoredPrefix
from ..store.hashing import TokenIds
from ..store.inner import StoreInner
from ..store.segment import Segment
from .segment_feed import SegmentFeed

# Prefilling more tokens than this shows a progress bar.
PROGRESS_TOKENS = 2048
# A prefix that loses this many segments while it is read is computed without the store.
_MAX_LOST_SEGMENTS = 64

T = TypeVar("T")


@dataclass(frozen=True)
class _Everything:
    """A `KVSource` (`model.attention`) that shows all K and V of a layer to the tokens of a block."""

    keys: torch.Tensor
    values: torch.Tensor
    plain: bool = True

    def visible_kv(
        self, query: torch.Tensor, attention_mask: torch.Tensor | None, options: Mapping[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.keys, self.values


class _WriteThroughCache(DynamicCache):
    """Calls `layer_done` with each layer's K/V as soon as they are known, while the model goes on with later layers.

    Args:
        tagged_layers: layers that use our attention function (`attention.attend`). After the first block there is a
            mask, which on an accelerator costs a copy of K and V per query head and rules out the flash kernel.
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

    Every prompt is completed even if the storage fails: KV that cannot be written is kept in memory, and segments that
    cannot be read are taken out of service and computed again.

    Args:
        model: the model; runs under `torch.no_grad`.
        fingerprint: the model's fingerprint, under which its KV is stored.
        geometry: layout of the stored KV.
        store: the store to write to.
        block: tokens per forward.

    Attributes:
        model, store: as passed.
    """

    def __init__(
        self, model: ServedModel, fingerprint: str, geometry: KVGeometry, store: StoreInner, block: int
    ) -> None:
        self.model = model
        self.store = store
        self._fingerprint = fingerprint
        self._block = block
        self._geometry = geometry

    @property
    def is_current(self) -> bool:
        """Whether the model still computes the KV that is stored under its fingerprint."""
        lm = self.model.lm
        return not lm.training and self.model.fingerprint() == self._fingerprint

    def look_up(self, ids: TokenIds, *, count: bool = False) -> StoredPrefix | None:
        """The longest stored beginning of `ids`, int64 `(n,)`.

        With `count`, this is a request's own look-up: it counts in the store's statistics, and waits for a prompt that
        is being written.
        """
        c = self._geometry.chunk_size
        return self.store.lookup(self._fingerprint, ids, c, geometry=self._geometry, count=count, wait=count)

    def complete(self, ids: torch.Tensor, known: StoredPrefix | None, *, in_memory: bool = False) -> StoredPrefix:
        """Compute the part of `ids` that `known` lacks, in blocks, and publish it.

        Args:
            ids: int64 `(n,)`.
            known: the longest stored beginning, if any; it is loaded in full.
            in_memory: keep the KV in memory and store nothing.

        Returns:
            The prefix, covering all of `ids`. Parts that could not be stored are in memory.
        """
        for device in set(self.model.layers.devices):
            self.store.memory.on(device)  # This makes host memory pinned from now on.
        numbers = ids.cpu().numpy().astype(np.int64)
        for _ in range(_MAX_LOST_SEGMENTS):
            try:
                return self._complete(ids, numbers, known, in_memory)
            except (SegmentCorruptError, SegmentReadError) as error:
                if isinstance(error, SegmentReadError) and not error.damage:
                    break  # The segment is not damaged, but cannot be read now.
                # A known segment is damaged: take it out of service and look up again.
                if isinstance(error.segment, Segment):
                    self.store.discard(error.segment, str(error))
                known = self.look_up(numbers)
        return self._complete(ids, numbers, None, True)

    def _complete(
        self, ids: torch.Tensor, numbers: TokenIds, known: StoredPrefix | None, in_memory: bool
    ) -> StoredPrefix:
        c = self._geometry.chunk_size
        while known is None or known.tokens < len(numbers):
            done = 0 if known is None else known.tokens
            end = len(numbers)
            if not in_memory:
                # If a segment in the middle was lost, the segments after it are found again once it is stored.
                later = self.store.next_stored(self._fingerprint, numbers, c, done // c + 1)
                end = end if later is None else later * c
            known, in_memory = self._compute(ids[:end], numbers[:end], known, in_memory)
            if end < len(numbers) and not in_memory:
                found = self.look_up(numbers)
                known = found if found is not None and found.tokens > known.tokens else known
        return known

    def _compute(
        self, ids: torch.Tensor, numbers: TokenIds, known: StoredPrefix | None, in_memory: bool
    ) -> tuple[StoredPrefix, bool]:
        """Compute the part of `ids` that `known` lacks; the prefix, and whether that part is only in memory."""
        # Without a config every layer keeps all tokens, so that sliding-window layers can also be stored in full.
        cache = _WriteThroughCache(_tagged_layers(self.model.layers))
        done = 0 if known is None else known.tokens
        if known is not None:
            load_exactly(AttachedPrefix.of(known, done), self.store, self.model.layers, cache)
        geometry, first = self._geometry, done // self._geometry.chunk_size
        begin = self.store.begin_memory_segment if in_memory else self.store.begin_segment
        begin_segment = partial(begin, self._fingerprint, geometry, numbers, first, known)
        writer = self._try(begin_segment)
        try:
            feed = None if writer is None else SegmentFeed(writer, first, len(numbers))
            started = time.perf_counter()
            self._forward(ids, done, cache, feed)
            seconds = time.perf_counter() - started
            stored = None if writer is None else self._try(partial(writer.commit, seconds))
        finally:
            if writer is not None:
                writer.abort()  # Does nothing after a commit.
        if stored is not None:
            return stored, in_memory
        # The KV is computed but could not be stored: keep it in memory for this and later requests of its cache.
        begin_segment = partial(self.store.begin_memory_segment, self._fingerprint, geometry, numbers, first, known)
        with begin_segment() as writer:
            feed = SegmentFeed(writer, first, len(numbers))
            for layer, states in enumerate(cache.layers):
                feed.feed(layer, states.keys[0], states.values[0], 0)
            return writer.commit(seconds), True

    def _try(self, action: Callable[[], T]) -> T | None:
        """The result of `action`; if the storage fails, count and report the failure and return `None`."""
        try:
            return action()
        except StoreClosedError:
            raise
        except (StoreError, OSError) as error:
            self.store.write_failed(error)
            return None

    def _forward(self, ids: torch.Tensor, done: int, cache: _WriteThroughCache, feed: SegmentFeed | None) -> None:
        """Run the model over `ids[done:]` in blocks, and feed each layer to the store as soon as it is known."""
        tokens, layers, block = ids.shape[0], len(self.model.windows), self._block
        starts = range(done, tokens, block)
        device = self.model.input_device
        silent = tokens - done < PROGRESS_TOKENS
        with tqdm(total=len(starts) * layers, desc="prefill", unit="layer", disable=silent, leave=False) as bar:

            def layer_done(layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
                if feed is not None:
                    feed.feed(layer, keys[0], values[0], 0)
                bar.update()

            cache.layer_done = layer_done
            installation = self.model.installation()
            try:
                if _tagged_layers(self.model.layers):
                    installation.activate()
                # A request may need this prefill in the middle of a forward under autocast.
                with torch.no_grad(), torch.autocast(device.type, enabled=False):
                    for start in starts:
                        part = ids[start : start + block][None].to(device)
                        self.model.run(part, cache, start)
            finally:
                installation.release()
            cache.layer_done = None


def _tagged_layers(layers: LayerPlan) -> frozenset[int]:
    return frozenset(layer for layer in layers.full_layers if uses_our_attention(layers.devices[layer]))


def load_exactly(prefix: AttachedPrefix, store: StoreInner, layers: LayerPlan, cache: DynamicCache) -> None:
    """Load all tokens of all layers of a stored prefix into an empty `DynamicCache`."""
    g, devices = prefix.geometry, layers.devices
    loader = ChunkLoader(store, [prefix] * len(devices), devices, lookahead_bytes=ReadOptions().lookahead_bytes)
    chunks = np.arange(prefix.chunks)
    try:
        loader.want_later(range(len(devices)), chunks)
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
