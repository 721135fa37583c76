"""The keys that chunks are scored with: exact leader keys or the key index, from memory or from disk."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch

from ..memory import Buffer, Tier
from ..memory.device_tier import DeviceTier
from ..planning.read_plan import ReadPlan
from ..selection import AttentionMassScorer, ChunkScorer, IndexedKeysScorer, Scratch
from ..selection.index_parts import CoarseIndex, IndexPart, KeyIndex
from ..stats import RequestStats
from ..timeline import SpanRecorder
from .arriving_tensor import ArrivingTensor
from .key_runs import HeldRun, KeyRun, key_runs
from .payload_reads import Lookahead, PayloadReads, wait_for
from .placement import copy_in_order
from .residency import ChunkStore


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
        accelerated: whether the store serves an accelerator: what is kept in its host's memory is then kept by layer.
    """

    def __init__(
        self,
        plan: ReadPlan,
        store: ChunkStore,
        payload: PayloadReads,
        ahead: Lookahead,
        stats: RequestStats,
        timeline: SpanRecorder,
        accelerated: bool,
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
        self._names = [
            f"{span.segment.key}.{span.segment.first_chunk}.{span.segment.identity}/" for span in prefix.spans
        ]
        together = plan.keys_together(accelerated)
        scored = [layer for layer in plan.key_layers if not plan.scored_from_payload(layer)]
        self._runs = [
            key_runs(segment, {layer: plan.key_tensors(segment, layer) for layer in scored}, together)
            for segment in (span.segment for span in prefix.spans)
        ]
        self._scratch, self._expanded = Scratch(), Scratch()
        self._parts: dict[int, list[IndexPart]] = {}
        # Memory of the tiers that the request holds for its keys, by span and first layer of the run. It is given back
        # whatever ends the request.
        self._held: dict[tuple[int, int], HeldRun] = {}
        give_up = partial(_give_up, self._held, stats)
        self._finalizer = weakref.finalize(self, self._memory.defer, give_up)
        self._finalizer.atexit = False

    def _key(self, span: int, run: KeyRun) -> str:
        """Name of a run of the span with this number in the memory tiers."""
        return self._names[span] + run.name

    def _near(self, layer: int) -> Tier:
        return self._memory.on(self._plan.layers.devices[layer]) or self._memory.host

    def _held_by(self, layer: int) -> Iterator[tuple[int, HeldRun]]:
        """The runs of a layer that were wanted and not released, each with the number of its span."""
        for number, runs in enumerate(self._runs):
            held = self._held.get((number, runs[layer].first))
            if held is not None:
                yield number, held

    def _holding(self, layer: int) -> list[HeldRun]:
        """The runs of a layer, one per segment, that were wanted and not released."""
        return [held for _, held in self._held_by(layer)]

    def want(self, layer: int) -> None:
        """Queue the keys of a layer behind the reads that were queued before."""
        nbytes = 0
        if self._plan.scored_from_payload(layer):
            nbytes = self._plan.keys_bytes(layer)
        else:
            near = self._near(layer)
            for number, (span, runs) in enumerate(zip(self._prefix.spans, self._runs, strict=True)):
                run = runs[layer]
                held = self._held.get((number, run.first))
                if held is None:
                    held = self._held[number, run.first] = HeldRun(span, run)
                    nbytes += 0 if near.has_keys(self._key(number, run)) else run.nbytes
                held.layers.add(layer)
        self._ahead.add([layer], nbytes, partial(_bring, weakref.ref(self), layer))

    def start(self, layer: int) -> None:
        """Start bringing the keys of a layer now. They must have been wanted."""
        self._ahead.need(layer)

    def resident(self, layer: int) -> bool:
        """Whether all keys of this layer are in the tier of its device: for measuring."""
        near = self._near(layer)
        return all(near.has_keys(self._key(number, runs[layer])) for number, runs in enumerate(self._runs))

    def bytes_arriving(self, layer: int) -> int:
        """Bytes of keys that are being read now with those of this layer: for measuring."""
        arriving = [
            held.run for held in self._holding(layer) if held.pending is not None and held.pending.ticket is not None
        ]
        return sum(place.nbytes for run in arriving for places in run.places.values() for place in places)

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
            return self._payload.start([layer], np.arange(self._prefix.chunks), device, must)
        there = self._memory.on(device)
        begun: list[HeldRun] = []
        for number, held in self._held_by(layer):
            if held.begun:
                continue  # An earlier layer has brought it.
            begun.append(held)
            if not self._begin(held, self._key(number, held.run), must, there):
                for one in begun:
                    self._stats.bytes_read += one.give_up()
                return False
        return True

    def _begin(self, held: HeldRun, name: str, must: bool, there: DeviceTier | None) -> bool:
        """Hold a run where it is used, or start bringing it there; whether there was room."""
        if there is not None and self._hold(held, name, there) is not None:
            return True
        known = self._hold(held, name, self._memory.host)
        if known is not None and there is None:
            return True
        held.data = None  # (It is to be used on the device.)
        held.pending = self._start(held, name, must, there, known)
        return held.pending is not None

    def _hold(self, held: HeldRun, name: str, tier: Tier) -> torch.Tensor | None:
        keys = tier.hold_keys(name)
        if keys is None:
            return None
        held.kept.append((tier, keys))
        held.data = keys.buffer.data
        return keys.buffer.data

    def _start(
        self, held: HeldRun, name: str, must: bool, there: DeviceTier | None, known: torch.Tensor | None
    ) -> ArrivingTensor | None:
        """Start reading a run, unless it is `known` (in the host's memory), and bring it `there`."""
        run, segment, host = held.run, held.span.segment, self._memory.host
        length = run.nbytes
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
        pending = ArrivingTensor(name, 2 * run.first, held.span, length, host, buffer, source, there, target)
        try:
            if there is not None and target is None:
                pending.give_up()
                return None
            if buffer is None:
                pending.upload()
            else:
                reads = run.reads(segment, buffer.data[:length], self._verify)
                pending.ticket = self._reader.submit(reads, then=pending.upload)
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
            return IndexedKeysScorer(
                parts,
                whole,
                concentration,
                self._scratch,
                self._expanded,
                on_device,
                keeps_queries=self._plan.single_tokens > 0,
            )
        self._collect(layer, device)
        return AttentionMassScorer(self._leader_keys(layer, device), g.chunk_size, concentration)

    def index(self, layer: int) -> list[KeyIndex]:
        """The 8-bit index of a layer, one part per segment, once it has arrived. It must have been wanted."""
        self._ahead.need(layer)
        return [part for part in self._index(layer) if isinstance(part, KeyIndex)]

    def _index(self, layer: int) -> list[IndexPart]:
        if layer not in self._parts:
            self._collect(layer, self._plan.layers.devices[layer])
            self._parts[layer] = self._index_parts(layer)
        return self._parts[layer]

    def release(self, layer: int) -> None:
        """Neither the scorer nor the index of this layer is needed any more."""
        self._parts.pop(layer, None)
        if self._plan.scored_from_payload(layer):
            return
        there = self._memory.on(self._plan.layers.devices[layer])
        for number, held in list(self._held_by(layer)):
            held.layers.discard(layer)
            if held.layers:
                continue
            if there is not None:
                done = there.device.mark()
                for tier, buffer in held.buffers:
                    if tier is there:
                        buffer.busy = done
            del self._held[number, held.run.first]
            self._stats.bytes_read += held.give_up()

    def close(self) -> None:
        """Wait for reads under way, and give back the keys that were not used."""
        for held in self._held.values():
            if held.pending is not None and held.pending.ticket is not None:
                self._stats.prefetch_wasted_bytes += held.pending.nbytes
        _give_up(self._held, self._stats)

    # -- from disk to where the scorer runs ---------------------------------------------------------------------------

    def _collect(self, layer: int, device: torch.device) -> None:
        """Wait for reads; afterwards all keys of the layer are on `device`."""
        there = self._memory.on(device)
        for held in self._holding(layer):
            if there is not None:
                for tier, kept in held.kept:
                    if tier is there:
                        # Another stream may have brought them.
                        there.device.wait(kept.buffer.ready)
                        there.device.uses(kept.buffer.data)
            if held.pending is not None:
                self._receive(layer, held, held.pending, there)

    def _receive(self, layer: int, held: HeldRun, pending: ArrivingTensor, there: DeviceTier | None) -> None:
        host = self._memory.host
        if pending.ticket is not None:
            wait_for(pending.ticket, self._stats, self._timeline, layer, "read keys")
            self._stats.bytes_read += pending.bytes_read
            self._stats.bytes_identified += pending.bytes_read
        pending.upload()
        held.pending = None  # (If its read fails, `close` gives it back.)
        if there is None or pending.target is None:
            assert pending.buffer is not None
            self._keep(held, pending, pending.buffer, host)
            return
        there.device.wait(pending.target.ready)
        there.device.uses(pending.target.data)
        if self._keep(held, pending, pending.target, there):
            if pending.buffer is not None:
                host.give_back(pending.buffer)
        elif pending.buffer is not None:
            # Where the device has no room to keep them, the host may.
            self._keep(held, pending, pending.buffer, host)

    def _keep(self, held: HeldRun, pending: ArrivingTensor, buffer: Buffer, tier: Tier) -> bool:
        """Keep keys that have arrived in `buffer` in `tier`, if there is room; if not, until they are released."""
        if tier.on_device or pending.there is None:
            held.data = buffer.data
        # Keys that were not compared with their checksum must not reach a request that compares.
        table = self._memory.table(pending.span.segment, self._prefix.form)
        kept = tier.keep_keys(pending.name, pending.which, buffer, table) if self._verify else None
        if kept is not None:
            held.kept.append((tier, kept))
        else:
            held.buffers.append((tier, buffer))
        return kept is not None

    def _index_parts(self, layer: int) -> list[IndexPart]:
        parts: list[IndexPart] = []
        for held in self._holding(layer):
            span = held.span
            *numbers, scale = span.segment.shaped(self._plan.key_tensors(span.segment, layer), held.tensors(layer))
            if len(numbers) == 2:
                codes, levels = numbers
                parts.append(CoarseIndex(codes, levels, scale, span.offset, span.chunks))
                continue
            (index,) = numbers
            if (span.offset, span.chunks) != (0, index.shape[2]):
                index = index[:, :, span.offset : span.offset + span.chunks].contiguous()
            parts.append(KeyIndex(index, scale))
        return parts

    def _leader_keys(self, layer: int, device: torch.device) -> torch.Tensor:
        """Exact keys, float32 `(kv_heads, tokens, head_dim)`."""
        g = self._prefix.geometry
        keys = torch.empty(g.kv_heads, self._prefix.chunks, g.chunk_size, g.head_dim, device=device)
        for held in self._holding(layer):
            span, (octets,) = held.span, held.tensors(layer)
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


def _give_up(held: dict[tuple[int, int], HeldRun], stats: RequestStats) -> None:
    while held:
        stats.bytes_read += held.popitem()[1].give_up()
