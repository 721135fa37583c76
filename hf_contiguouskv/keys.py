"""Keys to identify chunks with: exact leader keys, or the int8 index, from memory or from disk."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace

import torch

from .config import ContiguousKVConfig
from .device import Slab, SlabPool, upload
from .prefetch import PayloadReads, wait
from .prefix import AttachedPrefix
from .selection import AttentionMass, ChunkScorer, IndexedKeys
from .stats import RequestStats
from .store import PrefixStore
from .store.entries import SegmentSpan
from .store.reader import Read, Ticket
from .store.segment import Segment


@dataclass
class _Pending:
    """One tensor of one segment on its way from disk. `data` is its bytes in `slab`."""

    name: str
    slab: Slab
    data: torch.Tensor
    ticket: Ticket


class KeySource:
    """Brings what the scorer of a leader layer needs. One per request.

    The int8 index stays in the store's host memory afterwards; exact leader keys are used once and given back, as in
    the published method. Where a segment has neither for a layer, that layer's whole payload is read.
    """

    def __init__(
        self,
        prefix: AttachedPrefix,
        config: ContiguousKVConfig,
        store: PrefixStore,
        pool: SlabPool,
        payload: PayloadReads,
        stats: RequestStats,
    ) -> None:
        self._prefix = prefix
        self._config = config
        self._store = store
        self._pool = pool
        self._payload = payload
        self._stats = stats
        self._pending: dict[int, list[_Pending]] = {}
        # Held from `ask` to `scorer`, so that an eviction in between does not lose them.
        self._resident: dict[int, dict[str, torch.Tensor]] = {}

    def uses_index(self, layer: int) -> bool:
        """Whether this layer is scored from the int8 index (which stays resident)."""
        return self._config.selection == "indexed_keys" and all(
            layer in span.segment.geometry.indexed_layers for span in self._prefix.spans
        )

    def _missing(self, layer: int) -> list[SegmentSpan]:
        return [s for s in self._prefix.spans if self._store.host.get(_index_names(s, layer)[0]) is None]

    def _has_leader_keys(self, layer: int) -> bool:
        return all(layer in span.segment.geometry.leader_layers for span in self._prefix.spans)

    def reads_payload(self, layer: int) -> bool:
        """Whether the keys of this layer can only be had by reading its whole payload."""
        return not self.uses_index(layer) and not self._has_leader_keys(layer)

    def nbytes(self, layer: int) -> int:
        """Bytes that `ask` would read for this layer."""
        if self.uses_index(layer):
            return sum(span.segment.tensor_extent(f"key_index.{layer}")[1] for span in self._missing(layer))
        whole = self._prefix.chunks * self._prefix.geometry.extent_bytes
        return whole // 2 if self._has_leader_keys(layer) else whole

    def ask(self, layer: int, device: torch.device) -> None:
        """Start reading the keys of one leader layer."""
        if self.uses_index(layer):
            resident: dict[str, torch.Tensor] = self._resident.setdefault(layer, {})
            for span in self._prefix.spans:
                for name in _index_names(span, layer):
                    data = self._store.host.get(name)
                    if data is not None:
                        resident[name] = data
                    else:
                        pending = self._start(span.segment, name.partition("/")[2], device)
                        self._pending.setdefault(layer, []).append(replace(pending, name=name))
        elif self._has_leader_keys(layer):
            self._pending[layer] = [self._start_leader(span, layer, device) for span in self._prefix.spans]
        else:
            self._payload.ask([layer], range(self._prefix.chunks), device)

    def scorer(self, layer: int, device: torch.device) -> ChunkScorer:
        """Wait for the keys of a layer, and make its scorer."""
        if self.uses_index(layer):
            return IndexedKeys(
                self._index_parts(layer, device),
                self._prefix.whole_chunks,
                self._config.concentration,
            )
        keys = (
            self._leader_keys(layer, device) if self._has_leader_keys(layer) else self._keys_of_payload(layer, device)
        )
        return AttentionMass(keys, self._prefix.geometry.chunk_size, self._config.concentration)

    def close(self) -> None:
        for layer in list(self._pending):
            for pending in self._pending.pop(layer):
                with suppress(Exception):  # Nobody needs these bytes any more.
                    pending.ticket.wait()
                self._stats.prefetch_wasted_bytes += pending.ticket.bytes_read
                self._stats.bytes_read += pending.ticket.bytes_read
                self._pool.release(pending.slab)

    def _start(self, segment: Segment, name: str, device: torch.device, nbytes: int | None = None) -> _Pending:
        offset, full = segment.tensor_extent(name)
        length = full if nbytes is None else nbytes
        checks: tuple[tuple[int, int, int], ...] = ()
        if self._config.verify:
            length = full  # There is one checksum for all of it.
            checks = ((0, full, segment.tensor_checksum(name)),)
        slab = self._pool.acquire(length, device)
        read = Read(segment, offset, length, slab.view(length), checks)
        return _Pending(name, slab, slab.data[:length], self._store.reader.submit([read]))

    def _start_leader(self, span: SegmentSpan, layer: int, device: torch.device) -> _Pending:
        # A span that starts inside its segment cannot be cut at the front without a second read path; its chunks
        # before `offset` are read and skipped.
        per_chunk = self._prefix.geometry.extent_bytes // 2
        return self._start(span.segment, f"leader_keys.{layer}", device, (span.offset + span.chunks) * per_chunk)

    def _finish(self, pending: _Pending) -> torch.Tensor:
        try:
            wait(pending.ticket, self._stats)
        finally:
            self._stats.bytes_read += pending.ticket.bytes_read
            self._stats.bytes_identified += pending.ticket.bytes_read
        return pending.data

    def _index_parts(self, layer: int, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
        g = self._prefix.geometry
        tensors_of = self._resident.pop(layer, {})
        waiting = self._pending.get(layer, [])
        while waiting:  # One by one: what is left here when one fails is given back by `close`.
            pending = waiting[0]
            tensors_of[pending.name] = self._finish(pending)
            if self._config.verify:
                # What has just arrived stays in memory, if there is room; its slab goes with it.
                self._store.host.put(pending.name, pending.data)
            del waiting[0]
        self._pending.pop(layer, None)
        parts = []
        for span in self._prefix.spans:
            packed, scales = (tensors_of[name] for name in _index_names(span, layer))
            index = packed.view(torch.int8).view(g.kv_heads, g.chunk_size, -1, g.head_dim)
            if (span.offset, span.chunks) != (0, index.shape[2]):
                index = index[:, :, span.offset : span.offset + span.chunks].contiguous()
            scale = scales.view(torch.float32).view(g.kv_heads, g.head_dim)
            parts.append((upload(index, device), upload(scale, device)))
        return parts

    def _leader_keys(self, layer: int, device: torch.device) -> torch.Tensor:
        """Exact keys, float32 `(kv_heads, tokens, head_dim)`."""
        g = self._prefix.geometry
        keys = torch.empty(g.kv_heads, self._prefix.chunks, g.chunk_size, g.head_dim, device=device)
        waiting = self._pending[layer]
        for span in self._prefix.spans:
            pending = waiting[0]
            chunks = self._finish(pending).view(g.dtype).view(-1, g.kv_heads, g.chunk_size, g.head_dim)
            part = upload(chunks[span.offset : span.offset + span.chunks], device, pending.slab)
            # One pass for both: from the order on disk to that of the product, and to float32.
            keys[:, span.first_chunk : span.first_chunk + span.chunks].copy_(part.transpose(0, 1))
            self._pool.release(pending.slab)
            del waiting[0]
        del self._pending[layer]
        return keys.flatten(1, 2)[:, : self._prefix.tokens]

    def _keys_of_payload(self, layer: int, device: torch.device) -> torch.Tensor:
        # Everything of this layer is read now; the payload stays with `PayloadReads` for the selected chunks.
        (batch,) = self._payload.peek(layer)
        kv = self._prefix.kv_view(batch.slab.data, len(batch.chunks))
        keys = upload(kv[:, 0].contiguous(), device).transpose(0, 1)
        return keys.flatten(1, 2)[:, : self._prefix.tokens]


def _index_names(span: SegmentSpan, layer: int) -> tuple[str, str]:
    """Names of a segment's index and scale in the store's host memory."""
    # Segments that end with the same chunk have the same key, wherever they begin; and one may have been replaced.
    name = f"{span.segment.key}.{span.segment.first_chunk}.{span.segment.identity}"
    return f"{name}/key_index.{layer}", f"{name}/key_scale.{layer}"
