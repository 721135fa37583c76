"""The keys that chunks are scored with: exact leader keys or the int8 index, from memory or from disk."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from ..hardware.aligned_memory import as_memoryview
from ..memory import Buffer, Tier
from ..memory.device_tier import DeviceTier
from ..memory.entries import KeptKeys
from ..planning.read_plan import ReadPlan
from ..selection import AttentionMassScorer, ChunkScorer, IndexedKeysScorer, Scratch
from ..selection.indexed_keys import Part
from ..stats import RequestStats
from ..store.entries import SegmentSpan
from ..store.reader import Read
from ..timeline import SpanRecorder
from .arriving_tensor import ArrivingTensor
from .payload_reads import Lookahead, PayloadReads, wait_for
from .placement import copy_in_order
from .residency import ChunkStore


@dataclass
class _Taken:
    """Memory of the tiers that a request holds for its keys, by layer. It is given back whatever ends the request."""

    pending: dict[int, list[ArrivingTensor]] = field(default_factory=dict)
    # Keys that stay in a tier.
    held: dict[int, list[tuple[Tier, KeptKeys]]] = field(default_factory=dict)
    # The tensors of all keys, by name.
    data: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    # Memory of keys that do not stay.
    buffers: dict[int, list[tuple[Tier, Buffer]]] = field(default_factory=dict)


class KeyLoader:
    """The keys of one request: `want` them in layer order, use them through `scorer` or `index`, `release` them.

    It is large because keys have three forms (index, leader keys, payload) and two places to stay.

    Keys stay in memory afterwards, where there is room and the policy finds them worth it. Where a segment has neither
    index nor leader keys for a layer, the whole payload of the layer is read.

    Args:
        plan: of the request.
        store: of the prefix.
        payload: reads of the prefix in the form that is served.
        ahead: starts reads in order, of keys and of chunks.
        stats: counts bytes and waits.
        timeline: records reads and waits.
    """

    def __init__(
        self,
        plan: ReadPlan,
        store: ChunkStore,
        payload: PayloadReads,
        ahead: Lookahead,
        stats: RequestStats,
        timeline: SpanRecorder,
    ) -> None:
        self._plan = plan
        prefix = self._prefix = plan.served
        self._verify = plan.config.reading.verify
        self._reader = store.reader
        self._memory = store.memory
        self._payload = payload
        self._ahead = ahead
        self._stats = stats
        self._timeline = timeline
        # Segments that end with the same chunk have the same key, wherever they begin; and a segment may have been
        # replaced by another one of the same key.
        self._names = {
            id(span): f"{span.segment.key}.{span.segment.first_chunk}.{span.segment.identity}/" for span in prefix.spans
        }
        self._scratch = Scratch()
        self._parts: dict[int, list[Part]] = {}
        self._taken = _Taken()
        give_up = partial(_give_up, self._taken, stats)
        self._finalizer = weakref.finalize(self, self._memory.defer, give_up)
        self._finalizer.atexit = False

    def _key(self, span: SegmentSpan, tensor: str) -> str:
        """Name of a segment's tensor in the memory tiers."""
        return self._names[id(span)] + tensor

    def _near(self, layer: int) -> Tier:
        return self._memory.on(self._plan.layers.devices[layer]) or self._memory.host

    def want(self, layer: int) -> None:
        """Queue the keys of a layer behind the reads that were queued before."""
        self._ahead.add(layer, self._missing_bytes(layer), partial(_bring, weakref.ref(self), layer))

    def start(self, layer: int) -> None:
        """Start bringing the keys of a layer now. They must have been wanted."""
        self._ahead.need(layer)

    def _missing_bytes(self, layer: int) -> int:
        """Bytes of the keys of this layer that are not in the tier of its device: those that `bring` would bring."""
        tensors = self._plan.key_tensors(layer)
        if not tensors:
            return self._plan.keys_bytes(layer)
        near = self._near(layer)
        return sum(
            span.segment.tensor_extent(tensors[0])[1]
            for span in self._prefix.spans
            if not near.has_keys(self._key(span, tensors[0]))
        )

    def resident(self, layer: int) -> bool:
        """Whether all keys of this layer are in the tier of its device: for measuring."""
        near = self._near(layer)
        names = self._plan.key_tensors(layer)
        return all(near.has_keys(self._key(span, name)) for span in self._prefix.spans for name in names)

    def bytes_arriving(self, layer: int) -> int:
        """Bytes of the keys of this layer that are on their way now: for measuring."""
        return sum(pending.nbytes for pending in self._taken.pending.get(layer, []))

    def bring(self, layer: int, must: bool) -> bool:
        """Start bringing the keys of one leader layer to its device, as a `payload_reads.Start`.

        Args:
            layer: layer index.
            must: where memory has no room, read them beside its limits: only for the layer that is about to be used.

        Returns:
            whether they are on their way. If not, nothing has changed.
        """
        device = self._plan.layers.devices[layer]
        if self._plan.scored_from_payload(layer):
            return self._payload.start(layer, np.arange(self._prefix.chunks), device, must)
        there = self._memory.on(device)
        for span in self._prefix.spans:
            for number, tensor in enumerate(self._plan.key_tensors(layer)):
                name = self._key(span, tensor)
                if there is not None and self._hold(layer, name, there) is not None:
                    continue
                known = self._hold(layer, name, self._memory.host)
                if known is not None and there is None:
                    continue
                pending = self._start(span, tensor, 2 * layer + number, must, there, known)
                if pending is None:
                    _give_up_layer(self._taken, layer, self._stats)
                    return False
                self._taken.pending.setdefault(layer, []).append(pending)
        return True

    def _hold(self, layer: int, name: str, tier: Tier) -> torch.Tensor | None:
        keys = tier.hold_keys(name)
        if keys is None:
            return None
        self._taken.held.setdefault(layer, []).append((tier, keys))
        self._taken.data.setdefault(layer, {})[name] = keys.buffer.data
        return keys.buffer.data

    def _start(
        self,
        span: SegmentSpan,
        tensor: str,
        which: int,
        must: bool,
        there: DeviceTier | None,
        known: torch.Tensor | None,
    ) -> ArrivingTensor | None:
        """Start reading a tensor, unless it is `known` (in the host's memory), and bring it `there`."""
        segment, host = span.segment, self._memory.host
        offset, length = segment.tensor_extent(tensor)
        buffer = host.lease(length, must=must, exact=True) if known is None else None
        source = known if buffer is None else buffer.data
        if source is None:
            return None
        try:
            target = None if there is None else there.lease(length, must=must, exact=True)
        except BaseException:
            if buffer is not None:
                host.give_back(buffer)
            raise
        pending = ArrivingTensor(self._key(span, tensor), which, span, length, host, buffer, source, there, target)
        try:
            if there is not None and target is None:
                pending.give_up()
                return None
            if buffer is None:
                pending.upload()
            else:
                # There is one checksum for all of it, so all of it is read, whatever part the prefix needs.
                checks = ((0, length, segment.tensor_checksum(tensor)),) if self._verify else ()
                read = Read(segment, offset, length, as_memoryview(buffer.data[:length]), checks)
                pending.ticket = self._reader.submit([read], then=pending.upload)
        except BaseException:
            pending.give_up()
            raise
        return pending

    def scorer(self, layer: int) -> ChunkScorer:
        """The scorer of a layer, once its keys have arrived. They must have been wanted; `release` gives them back."""
        self._ahead.need(layer)
        device = self._plan.layers.devices[layer]
        g, concentration = self._prefix.geometry, self._plan.config.selection.concentration
        if self._plan.scored_from_payload(layer):
            return AttentionMassScorer(self._keys_of_payload(layer, device), g.chunk_size, concentration)
        if layer in self._plan.indexed_layers:
            on_device = self._memory.on(device) is not None
            parts, whole = self._index(layer), self._prefix.whole_chunks
            return IndexedKeysScorer(parts, whole, concentration, self._scratch, on_device)
        self._collect(layer, device)
        return AttentionMassScorer(self._leader_keys(layer, device), g.chunk_size, concentration)

    def index(self, layer: int) -> list[Part]:
        """The key index of a layer, one part per segment, once it has arrived. It must have been wanted."""
        self._ahead.need(layer)
        return self._index(layer)

    def _index(self, layer: int) -> list[Part]:
        if layer not in self._parts:
            self._collect(layer, self._plan.layers.devices[layer])
            self._parts[layer] = self._index_parts(layer)
        return self._parts[layer]

    def release(self, layer: int) -> None:
        """Neither the scorer nor the index of this layer is needed any more."""
        there = self._memory.on(self._plan.layers.devices[layer])
        if there is not None:
            done = there.device.mark()
            for tier, buffer in self._taken.buffers.get(layer, []):
                if tier is there:
                    buffer.busy = done
        self._parts.pop(layer, None)
        _let_go(self._taken, layer)

    def close(self) -> None:
        """Wait for reads under way, and give back the keys that were not used."""
        for pending in self._taken.pending.values():
            self._stats.prefetch_wasted_bytes += sum(one.nbytes for one in pending if one.ticket is not None)
        _give_up(self._taken, self._stats)

    # -- from disk to where the scorer runs ---------------------------------------------------------------------------

    def _collect(self, layer: int, device: torch.device) -> None:
        """Wait for reads; afterwards all keys of the layer are in `data`, on `device`."""
        there, host = self._memory.on(device), self._memory.host
        for tier, kept in self._taken.held.get(layer, []):
            if there is not None and tier is there:
                # Another stream may have brought them.
                there.device.wait(kept.buffer.ready)
                there.device.uses(kept.buffer.data)
        waiting = self._taken.pending.get(layer, [])
        while waiting:  # One by one: if one fails, `close` gives back those that are left here.
            pending = waiting[0]
            if pending.ticket is not None:
                wait_for(pending.ticket, self._stats, self._timeline, layer, "read keys")
                self._stats.bytes_read += pending.bytes_read
                self._stats.bytes_identified += pending.bytes_read
            pending.upload()
            del waiting[0]
            if there is None or pending.target is None:
                assert pending.buffer is not None
                self._keep(layer, pending, pending.buffer, host)
                continue
            there.device.wait(pending.target.ready)
            there.device.uses(pending.target.data)
            if pending.buffer is not None:
                # Where the device has no room to keep them, the host may.
                if self._keep(layer, pending, pending.target, there):
                    host.give_back(pending.buffer)
                else:
                    self._keep(layer, pending, pending.buffer, host)
            else:
                self._keep(layer, pending, pending.target, there)

    def _keep(self, layer: int, pending: ArrivingTensor, buffer: Buffer, tier: Tier) -> bool:
        """Keep keys that have arrived in `buffer` in `tier`, if there is room; if not, until they are released."""
        data = self._taken.data.setdefault(layer, {})
        if tier.on_device or pending.there is None:
            data[pending.name] = buffer.data
        # Keys that were not compared with their checksum must not reach a request that compares.
        table = self._memory.table(pending.span.segment, self._prefix.form)
        kept = tier.keep_keys(pending.name, pending.which, buffer, table) if self._verify else None
        if kept is not None:
            self._taken.held.setdefault(layer, []).append((tier, kept))
        else:
            self._taken.buffers.setdefault(layer, []).append((tier, buffer))
        return kept is not None

    def _index_parts(self, layer: int) -> list[Part]:
        g = self._prefix.geometry
        data = self._taken.data[layer]
        parts = []
        for span in self._prefix.spans:
            packed, scales = (data[self._key(span, tensor)] for tensor in self._plan.key_tensors(layer))
            index = packed.view(torch.int8).view(g.kv_heads, g.chunk_size, -1, g.head_dim)
            if (span.offset, span.chunks) != (0, index.shape[2]):
                index = index[:, :, span.offset : span.offset + span.chunks].contiguous()
            parts.append((index, scales.view(torch.float32).view(g.kv_heads, g.head_dim)))
        return parts

    def _leader_keys(self, layer: int, device: torch.device) -> torch.Tensor:
        """Exact keys, float32 `(kv_heads, tokens, head_dim)`."""
        g = self._prefix.geometry
        keys = torch.empty(g.kv_heads, self._prefix.chunks, g.chunk_size, g.head_dim, device=device)
        for span in self._prefix.spans:
            octets = self._taken.data[layer][self._key(span, self._plan.key_tensors(layer)[0])]
            chunks = octets.view(g.dtype).view(-1, g.kv_heads, g.chunk_size, g.head_dim)
            part = chunks[span.offset : span.offset + span.chunks]
            # One pass for both: from the order on disk to that of the product, and to float32.
            keys[:, span.first_chunk : span.first_chunk + span.chunks].copy_(part.transpose(0, 1))
        return keys.flatten(1, 2)[:, : self._prefix.tokens]

    def _keys_of_payload(self, layer: int, device: torch.device) -> torch.Tensor:
        # The whole layer is read. It stays with `PayloadReads` until the selected chunks are taken.
        g = self._prefix.geometry
        kv = torch.empty(2, g.kv_heads, self._prefix.chunks, g.chunk_size, g.head_dim, dtype=g.dtype, device=device)
        for part in self._payload.peek(layer):
            copy_in_order(self._prefix, part, 0, kv)
        return kv[0].flatten(1, 2)[:, : self._prefix.tokens]


def _bring(loader: Callable[[], KeyLoader | None], layer: int, must: bool) -> bool:
    # The loader holds the queue, so the queue must not hold the loader: a dropped request would keep its memory until
    # the garbage collector runs.
    living = loader()
    return living is None or living.bring(layer, must)


def _give_up(taken: _Taken, stats: RequestStats) -> None:
    for layer in {*taken.pending, *taken.held, *taken.buffers, *taken.data}:
        _give_up_layer(taken, layer, stats)


def _give_up_layer(taken: _Taken, layer: int, stats: RequestStats) -> None:
    for pending in taken.pending.pop(layer, []):
        pending.give_up()
        stats.bytes_read += pending.bytes_read
    _let_go(taken, layer)


def _let_go(taken: _Taken, layer: int) -> None:
    taken.data.pop(layer, None)
    for tier, keys in taken.held.pop(layer, []):
        tier.let_go(keys)
    for tier, buffer in taken.buffers.pop(layer, []):
        tier.give_back(buffer)
