"""Keys to identify chunks with: exact leader keys, or the int8 index, from memory or from disk."""

from __future__ import annotations

import weakref
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from .config import ContiguousKVConfig
from .memory import Buffer, Tier
from .memory.device_tier import DeviceTier
from .memory.entries import KeptKeys
from .prefetch import PayloadReads, wait
from .prefix import AttachedPrefix
from .selection import AttentionMass, ChunkScorer, IndexedKeys, Scratch
from .selection.indexed_keys import Part
from .slots import copy_in_order
from .stats import RequestStats
from .store import PrefixStore
from .store.entries import SegmentSpan
from .store.pread import as_memoryview
from .store.reader import Read, Ticket


@dataclass
class _Pending:
    """One tensor of one segment on its way from disk, `nbytes` of it; `which` is as in `KeptKeys`."""

    name: str
    which: int
    span: SegmentSpan
    buffer: Buffer
    nbytes: int
    ticket: Ticket


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
        prefix: AttachedPrefix,
        config: ContiguousKVConfig,
        store: PrefixStore,
        payload: PayloadReads,
        stats: RequestStats,
    ) -> None:
        self._prefix = prefix
        self._config = config
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
        self._indexed = prefix.layers_with("indexed_layers") if config.selection == "indexed_keys" else frozenset()
        self._leading = prefix.layers_with("leader_layers")
        self._taken = _Taken()
        give_up = partial(_give_up, self._taken, self._memory.host, stats)
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

    def nbytes(self, layer: int) -> int:
        """Bytes that `ask` would read for this layer."""
        if self.reads_payload(layer):
            return self._prefix.chunks * self._prefix.geometry.extent_bytes
        first = self._tensors(layer)[0]
        return sum(
            span.segment.tensor_extent(first)[1]
            for span in self._prefix.spans
            if not any(tier.has_keys(self._key(span, first)) for tier in self._memory.tiers)
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
        tiers = [tier for tier in (there, self._memory.host) if tier is not None]
        for span in self._prefix.spans:
            for number, tensor in enumerate(self._tensors(layer)):
                name = self._key(span, tensor)
                if any(self._hold(layer, name, tier) for tier in tiers):
                    continue
                pending = self._start(span, tensor, 2 * layer + number, must)
                if pending is None:
                    _give_up_layer(self._taken, layer, self._memory.host, self._stats)
                    return False
                self._taken.pending.setdefault(layer, []).append(pending)
        return True

    def _hold(self, layer: int, name: str, tier: Tier) -> bool:
        keys = tier.hold_keys(name)
        if keys is None:
            return False
        self._taken.held.setdefault(layer, []).append((tier, keys))
        self._taken.data.setdefault(layer, {})[name] = keys.buffer.data
        return True

    def _start(self, span: SegmentSpan, tensor: str, which: int, must: bool) -> _Pending | None:
        segment = span.segment
        offset, length = segment.tensor_extent(tensor)
        # There is one checksum for all of it, so all of it is read, whatever part the prefix needs.
        checks = ((0, length, segment.tensor_checksum(tensor)),) if self._config.verify else ()
        buffer = self._memory.host.lease(length, must=must, exact=True)
        if buffer is None:
            return None
        try:
            read = Read(segment, offset, length, as_memoryview(buffer.data[:length]), checks)
            return _Pending(self._key(span, tensor), which, span, buffer, length, self._store.reader.submit([read]))
        except BaseException:
            self._memory.host.give_back(buffer)
            raise

    def scorer(self, layer: int, device: torch.device) -> ChunkScorer:
        """Wait for the keys of a layer, and make its scorer. `used` gives them back."""
        g, concentration = self._prefix.geometry, self._config.concentration
        if self.reads_payload(layer):
            return AttentionMass(self._keys_of_payload(layer, device), g.chunk_size, concentration)
        if self.uses_index(layer):
            on_device = self._memory.on(device) is not None
            parts, whole = self.index(layer, device), self._prefix.whole_chunks
            return IndexedKeys(parts, whole, concentration, self._scratch, on_device)
        self._collect(layer, device)
        return AttentionMass(self._leader_keys(layer, device), g.chunk_size, concentration)

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
            self._stats.prefetch_wasted_bytes += sum(one.nbytes for one in pending)
        _give_up(self._taken, self._memory.host, self._stats)

    # -- from disk to where the scorer runs ---------------------------------------------------------------------------

    def _collect(self, layer: int, device: torch.device) -> None:
        """Wait for what comes from disk; afterwards all keys of the layer are in `data`, on `device`."""
        there = self._memory.on(device)
        held = list(self._taken.held.get(layer, []))
        waiting = self._taken.pending.get(layer, [])
        while waiting:  # One by one: what is left here when one fails is given back by `close`.
            pending = waiting[0]
            try:
                wait(pending.ticket, self._stats, self._payload.timeline, layer, "read keys")
            finally:
                self._stats.bytes_read += pending.ticket.bytes_read
                self._stats.bytes_identified += pending.ticket.bytes_read
            del waiting[0]
            buffer, host, keys = pending.buffer, self._memory.host, (pending.name, pending.which)
            if there is None or not self._upload(layer, *keys, pending.span, buffer.data, there, buffer):
                self._keep(layer, *keys, pending.span, buffer, host)
            else:
                host.give_back(buffer)
        if there is not None:
            for tier, kept in held:
                if tier is there:
                    # Another stream may have brought them.
                    there.device.wait(kept.buffer.ready)
                    there.device.uses(kept.buffer.data)
                else:
                    span = next(span for span in self._prefix.spans if kept.name.startswith(self._key(span, "")))
                    self._upload(layer, kept.name, kept.which, span, kept.buffer.data, there)

    def _keep(self, layer: int, name: str, which: int, span: SegmentSpan, buffer: Buffer, tier: Tier) -> bool:
        """Keys that have just arrived in `buffer` stay in `tier`, if there is room; if not, until they are used."""
        data = self._taken.data.setdefault(layer, {})
        if tier.on_device or name not in data:
            data[name] = buffer.data
        # What was not compared with its checksum must not reach a request that wants that.
        table = self._memory.table(span.segment, self._prefix.form)
        kept = tier.keep_keys(name, which, buffer, table) if self._config.verify else None
        if kept is not None:
            self._taken.held.setdefault(layer, []).append((tier, kept))
        else:
            self._taken.buffers.setdefault(layer, []).append((tier, buffer))
        return kept is not None

    def _upload(
        self,
        layer: int,
        name: str,
        which: int,
        span: SegmentSpan,
        source: torch.Tensor,
        there: DeviceTier,
        source_buffer: Buffer | None = None,
    ) -> bool:
        """Copy keys to the device, where attention's stream waits for them; whether they stay there."""
        buffer = there.lease(source.numel(), exact=True)
        assert buffer is not None
        copied = there.device.copy_in(source, buffer.data, after=buffer.busy)
        buffer.ready = copied
        there.device.wait(copied)
        there.device.uses(buffer.data)
        if source_buffer is not None:
            source_buffer.busy = copied
        return self._keep(layer, name, which, span, buffer, there)

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


def _give_up(taken: _Taken, host: Tier, stats: RequestStats) -> None:
    for layer in {*taken.pending, *taken.held, *taken.buffers, *taken.data}:
        _give_up_layer(taken, layer, host, stats)


def _give_up_layer(taken: _Taken, layer: int, host: Tier, stats: RequestStats) -> None:
    for pending in taken.pending.pop(layer, []):
        with suppress(Exception):  # Nobody needs these bytes any more.
            pending.ticket.wait()
        stats.bytes_read += pending.ticket.bytes_read
        host.give_back(pending.buffer)
    _let_go(taken, layer)


def _let_go(taken: _Taken, layer: int) -> None:
    taken.data.pop(layer, None)
    for tier, keys in taken.held.pop(layer, []):
        tier.let_go(keys)
    for tier, buffer in taken.buffers.pop(layer, []):
        tier.give_back(buffer)
