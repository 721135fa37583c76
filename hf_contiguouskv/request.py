"""One request on an attached prefix: selects chunks, schedules their reads, and assembles K and V for attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .config import ContiguousKVConfig
from .device import SlabPool, upload
from .keys import KeySource
from .prefetch import Batch, Lookahead, PayloadReads
from .prefix import AttachedPrefix
from .selection import SelectionInput, choose_chunks
from .stats import RequestStats
from .store import PrefixStore

# Leader layers whose keys are read ahead.
KEYS_AHEAD = 3


@dataclass(frozen=True)
class LayerPlan:
    """What the model's layers are, in order.

    Attributes:
        windows: sliding window in tokens per layer, `None` for full attention.
        devices: where each layer's K and V live.
    """

    windows: tuple[int | None, ...]
    devices: tuple[torch.device, ...]

    @property
    def full_layers(self) -> list[int]:
        """Layers with full attention: the ones that budgets apply to."""
        return [layer for layer, window in enumerate(self.windows) if window is None]


@dataclass(frozen=True)
class Rows:
    """The rows of a batch, with equal rows (beams of one prompt) taken once.

    Attributes:
        representatives: int64 `(unique,)`: a batch row for each distinct one.
        of_batch: int64 `(batch,)`: which distinct row each batch row is.
        voting: bool `(unique, q)`: queries that count in a selection.
        visible: bool `(unique, q)`: suffix tokens that are not padding.
    """

    representatives: torch.Tensor
    of_batch: torch.Tensor
    voting: torch.Tensor
    visible: torch.Tensor

    @classmethod
    def distinct(cls, batch: int, q_length: int) -> Rows:
        """Every row for itself, every token real and voting."""
        real = torch.ones(batch, q_length, dtype=torch.bool)
        return cls(torch.arange(batch), torch.arange(batch), real, real)


class PrefixRequest:
    """Life of a prefix from the first suffix token to `close`.

    Layers call `load_full` (full attention) or `load_tail` (sliding window) once each, in model order.
    """

    def __init__(
        self,
        prefix: AttachedPrefix,
        config: ContiguousKVConfig,
        plan: LayerPlan,
        store: PrefixStore,
        pool: SlabPool,
        stats: RequestStats,
    ) -> None:
        self.prefix = prefix
        self.config = config
        self.plan = plan
        self.stats = stats
        self._store = store
        self._pool = pool
        self.keep = config.chunks_kept(prefix.whole_chunks)
        self.selected: dict[int, torch.Tensor] = {}
        self.rows: Rows | None = None
        self._full = plan.full_layers
        self._ordinal = {layer: ordinal for ordinal, layer in enumerate(self._full)}
        self._payload = PayloadReads(prefix, store.reader, pool, stats, config.verify)
        self._keys = KeySource(prefix, config, store, pool, self._payload, stats)
        self._ahead = Lookahead(self._ahead_bytes())
        self._wanted: dict[int, list[int]] = {}

    @property
    def keeps_all(self) -> bool:
        """Whether every chunk is used: no selection, the exact answer."""
        return self.keep == self.prefix.whole_chunks

    @property
    def kept_tokens(self) -> int:
        """Prefix tokens that a full-attention layer shows to attention: the same for every layer and row."""
        return self.keep * self.prefix.geometry.chunk_size + self.prefix.tail_tokens

    def _ahead_bytes(self) -> int:
        """How far ahead of compute to read. Reads are served in order, so keys that are far from being needed must
        not stand in the way of the chunks that a selection has just named."""
        if self.keeps_all or not self._full:
            return self.config.lookahead_bytes
        return min(self.config.lookahead_bytes, KEYS_AHEAD * self._keys.nbytes(self._full[0]))

    # -- the schedule -------------------------------------------------------------------------------------------------

    def begin(self, rows: Rows) -> None:
        """The first suffix tokens are here: start the reads that do not depend on their queries."""
        self.rows = rows
        size = self.prefix.geometry.extent_bytes
        for layer, window in enumerate(self.plan.windows):
            device = self.plan.devices[layer]
            if window is not None:
                chunks = list(range(self._tail_start(window) // self.prefix.geometry.chunk_size, self.prefix.chunks))
                self._ahead.add(layer, len(chunks) * size, partial(self._payload.ask, layer, chunks, device))
            elif self.keeps_all:
                chunks = list(range(self.prefix.chunks))
                self._ahead.add(layer, len(chunks) * size, partial(self._payload.ask, layer, chunks, device))
            elif self._is_leader(layer):
                self._ahead.add(layer, self._keys.nbytes(layer), partial(self._keys.ask, layer, device))
        self._ahead.pump()

    def _is_leader(self, layer: int) -> bool:
        return self._ordinal[layer] % self.config.period == 0

    def _period(self, leader: int) -> list[int]:
        start = self._ordinal[leader]
        return self._full[start : start + self.config.period]

    def _identify(self, layer: int, inputs: SelectionInput) -> None:
        """Select for the period that `layer` leads, and ask for what that needs (intra-period prefetch)."""
        self._ahead.need(layer)
        scores = self._keys.scorer(layer, self.plan.devices[layer])(inputs)
        selected = choose_chunks(scores, self.keep, self.config.keep_first, self.config.keep_last)
        wanted = self._chunks_to_read(selected)
        for member in self._period(layer):
            self.selected[member] = selected
            self._wanted[member] = wanted
            self._payload.ask(member, wanted, self.plan.devices[member])
        self._ahead.used(layer)

    def _chunks_to_read(self, selected: torch.Tensor) -> list[int]:
        chunks: list[int] = torch.unique(selected).tolist() if selected.shape[0] > 1 else selected[0].tolist()
        if self.prefix.tail_tokens:
            chunks.append(self.prefix.whole_chunks)
        return chunks

    def _speculate(self, layer: int) -> None:
        """At the subperiod boundary, start reading the current selection for the next period (inter-period)."""
        ordinal, config = self._ordinal[layer], self.config
        if config.subperiod == config.period or ordinal % config.period != config.subperiod:
            return
        start = ordinal - config.subperiod + config.period
        for member in self._full[start : start + config.period]:
            self._payload.ask(member, self._wanted[layer], self.plan.devices[member], speculative=True)

    # -- what layers ask for ------------------------------------------------------------------------------------------

    def load_full(
        self,
        layer: int,
        query: torch.Tensor,
        suffix_keys: torch.Tensor,
        options: Mapping[str, Any],
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        """Fill `keys` and `values` `(rows, kv_heads, kept_tokens, head_dim)` with the chunks of a full layer.

        Args:
            layer: layer index.
            query: `(batch, heads, q, head_dim)` after RoPE.
            suffix_keys: `(batch, kv_heads, q, head_dim)`.
            options: the attention function's keyword arguments (`scaling`, `softcap`).
            keys, values: the destination, one row for each distinct row, or a single one if all chunks are kept.
        """
        if self.rows is None:
            self.begin(Rows.distinct(query.shape[0], query.shape[2]))
        assert self.rows is not None
        if self.keeps_all:
            self._ahead.need(layer)
            self._wanted[layer] = list(range(self.prefix.chunks))
        elif self._is_leader(layer):
            device = query.device
            some = self.rows.representatives.to(device)
            self._identify(
                layer,
                SelectionInput(
                    query[some],
                    suffix_keys[some],
                    self.rows.voting.to(device),
                    self.rows.visible.to(device),
                    options["scaling"],
                    options.get("softcap"),
                ),
            )
        if not self.keeps_all:
            self._speculate(layer)
        batches = self._payload.take(layer)
        self._assemble(layer, batches, keys, values)
        self._payload.give_back(batches)
        self._count(layer, batches)
        if self.keeps_all:
            self._ahead.used(layer)

    def load_tail(self, layer: int, window: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V `(1, kv_heads, min(tokens, window - 1), head_dim)` of a sliding-window layer: all that it can see."""
        self._ahead.need(layer)
        batches = self._payload.take(layer)
        (batch,) = batches
        c = self.prefix.geometry.chunk_size
        kv = upload(self.prefix.kv_view(batch.slab.data, len(batch.chunks)), self.plan.devices[layer], batch.slab)
        skip = self._tail_start(window) - batch.chunks[0] * c
        # (chunks, 2, h, c, d) -> (2, 1, h, tokens, d), without the tokens before the window and after the prefix.
        tokens = kv.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, None, :, skip : self.prefix.tokens - batch.chunks[0] * c]
        keys, values = tokens[0].clone(), tokens[1].clone()
        self._payload.give_back(batches)
        self.stats.hits["disk"] += len(batch.chunks)
        self.stats.bytes_used += keys.shape[2] * self.prefix.token_bytes()
        self._ahead.used(layer)
        return keys, values

    def _tail_start(self, window: int) -> int:
        return max(0, self.prefix.tokens - window + 1)

    # -- from extents to K and V --------------------------------------------------------------------------------------

    def _assemble(self, layer: int, batches: Sequence[Batch], keys: torch.Tensor, values: torch.Tensor) -> None:
        c = self.prefix.geometry.chunk_size
        whole = self.keep * c
        selected = self.selected.get(layer)
        destinations = [part[:, :, :whole].unflatten(2, (self.keep, c)) for part in (keys, values)]
        for batch in batches:
            kv = upload(self.prefix.kv_view(batch.slab.data, len(batch.chunks)), keys.device, batch.slab)
            slots = batch.chunks
            if self.prefix.tail_tokens and slots[-1] == self.prefix.whole_chunks:
                for half, part in enumerate((keys, values)):
                    part[:, :, whole:] = kv[-1, half, :, : self.prefix.tail_tokens]
                slots = slots[:-1]
            for row in range(keys.shape[0]):
                take, put = _slots_of(slots, None if selected is None else selected[row].tolist())
                for half, destination in enumerate(destinations):
                    _copy_chunks(kv[:, half], take, destination[row], put)

    def _count(self, layer: int, batches: Sequence[Batch]) -> None:
        wanted = self._wanted[layer]
        size = self.prefix.geometry.extent_bytes
        needed = set(wanted)
        for batch in batches:
            used = sum(chunk in needed for chunk in batch.chunks)
            self.stats.hits["disk"] += used
            unused = (len(batch.chunks) - used) * size
            if batch.speculative:
                self.stats.prefetch_hits += used
                self.stats.prefetch_wasted_bytes += unused
            else:
                self.stats.bytes_identified += unused  # A whole layer was read for its keys.
        tail = self.prefix.tail_tokens
        whole = len(wanted) - (1 if tail else 0)
        self.stats.bytes_used += whole * size + tail * self.prefix.token_bytes()
        self.stats.chunks_used.append(self.keep + (1 if tail else 0))

    def twin(self, stats: RequestStats) -> PrefixRequest:
        """The same request for a copy of the cache: selections are kept, reads under way are not."""
        other = PrefixRequest(self.prefix, self.config, self.plan, self._store, self._pool, stats)
        other.rows, other.selected, other._wanted = self.rows, dict(self.selected), dict(self._wanted)
        return other

    def close(self) -> None:
        """Wait for reads under way and give their buffers back."""
        self._keys.close()
        self._payload.close()


def _slots_of(slots: Sequence[int], selected: list[int] | None) -> tuple[list[int], list[int]]:
    """Which slots a row takes from a batch, and which positions of the row they fill. Both inputs ascend."""
    if selected is None or list(slots) == selected:
        everything = list(range(len(slots)))
        return everything, everything if selected is not None else list(slots)
    slot_of = {chunk: slot for slot, chunk in enumerate(slots)}
    pairs = [(slot_of[chunk], position) for position, chunk in enumerate(selected) if chunk in slot_of]
    return [slot for slot, _ in pairs], [position for _, position in pairs]


def _copy_chunks(source: torch.Tensor, take: Sequence[int], destination: torch.Tensor, put: Sequence[int]) -> None:
    """Copy chunks `(n, kv_heads, c, head_dim)` to their positions in `(kv_heads, kept, c, head_dim)`."""
    if not take:
        return
    if len(take) == take[-1] - take[0] + 1 and len(put) == put[-1] - put[0] + 1:
        part = source[take[0] : take[-1] + 1].transpose(0, 1)
        destination[:, put[0] : put[-1] + 1].copy_(part)
        return
    taken = source.index_select(0, torch.tensor(take, device=source.device))
    destination.index_copy_(1, torch.tensor(put, device=destination.device), taken.transpose(0, 1))
