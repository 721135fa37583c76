"""Keys to identify chunks with: exact leader keys, or the int8 index, from memory or from disk."""

from __future__ import annotations

import threading
import weakref
from contextlib import suppress
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
from ..store import PrefixStore
from ..store.entries import SegmentSpan
from ..store.reader import Read, Ticket
from .payload_reads import PayloadReads, wait
from .placement import copy_in_order


class _Pending:
    """One tensor of one segment on its way: from disk, from the host's memory to a device, or from disk to a device.

    The thread that ends the read queues the copy to the device, while the model computes layers before this one.
    Reader threads work on this, so it must not keep `KeySource` alive.

    Args:
        name, which: as in `KeptKeys`.
        span: of the segment.
        nbytes: its length.
        host: the host's tier.
        buffer: where the read ends, of that tier; `None`: it is in the host's memory, at `source`.
        source: uint8 `(n,)` in the host's memory.
        there, target: the device's tier and where the copy ends, of that tier; `None`: it is used on the host.

    Attributes:
        ticket: of the read, if there is one.
    """

    def __init__(
        self,
        name: str,
        which: int,
        span: SegmentSpan,
        nbytes: int,
        host: Tier,
        buffer: Buffer | None,
        source: torch.Tensor,
        there: DeviceTier | None,
        target: Buffer | None,
    ) -> None:
        self.name = name
        self.which = which
        self.span = span
        self.nbytes = nbytes
        self.ticket: Ticket | None = None
        self.buffer = buffer
        self.there = there
        self.target = target
        self._host = host
        self._source = source
        self._lock = threading.Lock()
        self._queued = False

    def upload(self) -> None:
        """Queue the copy to the device, unless it has been queued."""
        if self.there is None or self.target is None:
            return
        with self._lock:
            if not self._queued:
                copied = self.there.device.copy_in(
                    self._source[: self.nbytes], self.target.data[: self.nbytes], after=self.target.busy
                )
                self._queued = True  # (The buffer may know of an earlier copy.)
                self.target.ready = self.target.busy = copied
                if self.buffer is not None:
                    self.buffer.busy = copied

    @property
    def bytes_read(self) -> int:
        """From disk, so far."""
        return 0 if self.ticket is None else self.ticket.bytes_read

    def give_up(self) -> None:
        """Nobody needs these bytes any more."""
        if self.ticket is not None:
            with suppress(Exception):
                self.ticket.wait()
        if self.buffer is not None:
            self._host.give_back(self.buffer)
        if self.there is not None and self.target is not None:
            self.there.give_back(self.target)


@dataclass
class _Taken:
    """What a request has of the tiers for its keys, per layer, to be given back whatever becomes of the request."""

    pending: dict[int, list[_Pending]] = field(default_factory=dict)
    # Keys that stay in a tier, and the tensors of all keys, by name.
    held: dict[int, list[tuple[Tier, KeptKeys]]] = field(default_factory=dict)
    data: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    # Memory of keys that do not stay.
    buffers: dict[int, list[tuple[Tier, Buffer]]] = field(default_factory=dict)


class KeySource:
    """Brings what the scorer of a leader layer needs. One per request.

    Keys stay in memory afterwards, where there is room and the policy finds them worth it. Where a segment has neither
    index nor leader keys for a layer, that layer's whole payload is read.
    """

    def __init__(
        self,
        plan: ReadPlan,
        store: PrefixStore,
        payload: PayloadReads,
        stats: RequestStats,
    ) -> None:
        self._plan = plan
        prefix = self._prefix = plan.served
        self._verify = plan.config.reading.verify
        self._store = store
        self._memory = store.memory
        self._payload = payload
        self._stats = stats
        # Segments that end with the same chunk have the same key, wherever they begin; and one may have been replaced.
        self._names = {
            id(span): f"{span.segment.key}.{span.segment.first_chunk}.{span.segment.identity}/" for span in prefix.spans
        }
        self._scratch = Scratch()
        self._parts: dict[int, list[Part]] = {}
        self._indexed = plan.indexed_layers
        self._leading = prefix.layers_with("leader_layers")
        self._taken = _Taken()
        give_up = partial(_give_up, self._taken, stats)
        self._finalizer = weakref.finalize(self, self._memory.defer, give_up)
        self._finalizer.atexit = False

    def uses_index(self, layer: int) -> bool:
        """Whether this layer is scored from the int8 index."""
        return layer in self._indexed

    def reads_payload(self, layer: int) -> bool:
        """Whether the keys of this layer can only be had by reading its whole payload."""
        return layer not in self._indexed and layer not in self._leading

    def _tensors(self, layer: int) -> list[str]:
        """Names of the tensors of a segment that this layer is scored from."""
        return [f"key_index.{layer}", f"key_scale.{layer}"] if self.uses_index(layer) else [f"leader_keys.{layer}"]

    def _key(self, span: SegmentSpan, tensor: str) -> str:
        """Name of a segment's tensor in the memory tiers."""
        return self._names[id(span)] + tensor

    def nbytes(self, layer: int, device: torch.device | None = None) -> int:
        """Bytes of the keys of this layer; with a `device`, those that `ask` would bring to where it finds them."""
        if self.reads_payload(layer):
            return self._prefix.chunks * self._prefix.geometry.extent_bytes
        first = self._tensors(layer)[0]
        near = None if device is None else self._memory.on(device) or self._memory.host
        return sum(
            span.segment.tensor_extent(first)[1]
            for span in self._prefix.spans
            if near is None or not near.has_keys(self._key(span, first))
        )

    def ask(self, layer: int, device: torch.device, must: bool = True) -> bool:
        """Start bringing the keys of one leader layer.

        Args:
            layer, device: which, and where they are going to be used.
            must: where memory has no room, read them beside its limits: only for the layer that is about to be used.

        Returns:
            whether they are on their way; otherwise everything is as before.
        """
        if self.reads_payload(layer):
            return self._payload.ask_ahead(layer, np.arange(self._prefix.chunks), device, must)
        there = self._memory.on(device)
        for span in self._prefix.spans:
            for number, tensor in enumerate(self._tensors(layer)):
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
    ) -> _Pending | None:
        """Start reading a tensor, unless it is `known` (in the host's memory), and bring it `there`, if it must be."""
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
        pending = _Pending(self._key(span, tensor), which, span, length, host, buffer, source, there, target)
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
                pending.ticket = self._store.reader.submit([read], then=pending.upload)
        except BaseException:
            pending.give_up()
            raise
        return pending

    def scorer(self, layer: int, device: torch.device) -> ChunkScorer:
        """Wait for the keys of a layer, and make its scorer. `used` gives them back."""
        g, concentration = self._prefix.geometry, self._plan.config.selection.concentration
        if self.reads_payload(layer):
            return AttentionMassScorer(self._keys_of_payload(layer, device), g.chunk_size, concentration)
        if self.uses_index(layer):
            on_device = self._memory.on(device) is not None
            parts, whole = self.index(layer, device), self._prefix.whole_chunks
            return IndexedKeysScorer(parts, whole, concentration, self._scratch, on_device)
        self._collect(layer, device)
        return AttentionMassScorer(self._leader_keys(layer, device), g.chunk_size, concentration)

    def index(self, layer: int, device: torch.device) -> list[Part]:
        """Wait for the key index of a layer, one part per segment. `used` gives it back."""
        if layer not in self._parts:
            self._collect(layer, device)
            self._parts[layer] = self._index_parts(layer)
        return self._parts[layer]

    def used(self, layer: int, device: torch.device) -> None:
        """Neither the scorer nor the index of this layer is needed any more."""
        there = self._memory.on(device)
        if there is not None:
            done = there.device.mark()
            for tier, buffer in self._taken.buffers.get(layer, []):
                if tier is there:
                    buffer.busy = done
        self._parts.pop(layer, None)
        _let_go(self._taken, layer)

    def close(self) -> None:
        """Give back what was asked for and not used."""
        for pending in self._taken.pending.values():
            self._stats.prefetch_wasted_bytes += sum(one.nbytes for one in pending if one.ticket is not None)
        _give_up(self._taken, self._stats)

    # -- from disk to where the scorer runs ---------------------------------------------------------------------------

    def _collect(self, layer: int, device: torch.device) -> None:
        """Wait for what comes from disk; afterwards all keys of the layer are in `data`, on `device`."""
        there, host = self._memory.on(device), self._memory.host
        for tier, kept in self._taken.held.get(layer, []):
            if there is not None and tier is there:
                # Another stream may have brought them.
                there.device.wait(kept.buffer.ready)
                there.device.uses(kept.buffer.data)
        waiting = self._taken.pending.get(layer, [])
        while waiting:  # One by one: what is left here when one fails is given back by `close`.
            pending = waiting[0]
            if pending.ticket is not None:
                wait(pending.ticket, self._stats, self._payload.timeline, layer, "read keys")
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

    def _keep(self, layer: int, pending: _Pending, buffer: Buffer, tier: Tier) -> bool:
        """Keys that have just arrived in `buffer` stay in `tier`, if there is room; if not, until they are used."""
        data = self._taken.data.setdefault(layer, {})
        if tier.on_device or pending.there is None:
            data[pending.name] = buffer.data
        # What was not compared with its checksum must not reach a request that wants that.
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
            packed, scales = (data[self._key(span, tensor)] for tensor in self._tensors(layer))
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
            octets = self._taken.data[layer][self._key(span, self._tensors(layer)[0])]
            chunks = octets.view(g.dtype).view(-1, g.kv_heads, g.chunk_size, g.head_dim)
            part = chunks[span.offset : span.offset + span.chunks]
            # One pass for both: from the order on disk to that of the product, and to float32.
            keys[:, span.first_chunk : span.first_chunk + span.chunks].copy_(part.transpose(0, 1))
        return keys.flatten(1, 2)[:, : self._prefix.tokens]

    def _keys_of_payload(self, layer: int, device: torch.device) -> torch.Tensor:
        # Everything of this layer is read now; the payload stays with `PayloadReads` for the selected chunks.
        g = self._prefix.geometry
        kv = torch.empty(2, g.kv_heads, self._prefix.chunks, g.chunk_size, g.head_dim, dtype=g.dtype, device=device)
        for batch in self._payload.peek(layer):
            copy_in_order(self._prefix, batch, 0, kv)
        return kv[0].flatten(1, 2)[:, : self._prefix.tokens]


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
