"""One request on an attached prefix: selects chunks, schedules their reads, and assembles K and V for attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch

from .config import ContiguousKVConfig
from .device import SlabPool, upload
from .errors import InputError, SegmentCorruptError
from .keys import KeySource
from .prefetch import Batch, Lookahead, PayloadReads
from .prefix import AttachedPrefix
from .selection import SelectionInput, choose_chunks, voting_queries
from .stats import RequestStats
from .store import PrefixStore
from .store.segment import Segment

# Leader layers whose keys are read ahead, where every layer leads. (In a longer period the next leader's keys are read
# once this one's are used: there is time.)
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

    def voters(self, limit: int | None) -> list[torch.Tensor]:
        """Per distinct row, the positions of the (last `limit`) queries that vote."""
        return [voting_queries(voting, limit) for voting in self.voting]

    @property
    def in_order(self) -> bool:
        """Whether the distinct rows are the batch's rows."""
        return len(self.representatives) == len(self.of_batch)

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
        self._voters: list[torch.Tensor] = []
        self._started = False
        # Whether bytes of this prefix proved wrong.
        self.damaged = False
        self._slots: dict[tuple[int, int], _Slots] = {}

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
        layers_ahead = KEYS_AHEAD if self.config.period == 1 else 1
        return min(self.config.lookahead_bytes, layers_ahead * self._keys.nbytes(self._full[0]))

    # -- the schedule -------------------------------------------------------------------------------------------------

    def begin(self, rows: Rows) -> None:
        """The first suffix tokens are here."""
        self.rows = rows
        self._voters = rows.voters(self.config.suffix_queries)
        self.start()

    def start(self) -> None:
        """Start the reads that do not depend on the queries, unless they have been started."""
        if self._started:
            return
        self._started = True
        size = self.prefix.geometry.extent_bytes
        for layer, window in enumerate(self.plan.windows):
            device = self.plan.devices[layer]
            if window is not None:
                chunks = list(range(self._tail_start(window) // self.prefix.geometry.chunk_size, self.prefix.chunks))
                self._ahead.add(layer, len(chunks) * size, partial(self._payload.ask, [layer], chunks, device))
            elif self.keeps_all:
                chunks = list(range(self.prefix.chunks))
                self._ahead.add(layer, len(chunks) * size, partial(self._payload.ask, [layer], chunks, device))
            elif self._is_leader(layer):
                self._ahead.add(layer, self._keys.nbytes(layer), partial(self._keys.ask, layer, device))
        self._ahead.pump()

    def _is_leader(self, layer: int) -> bool:
        return self._ordinal[layer] % self.config.period == 0

    def _period(self, leader: int) -> list[int]:
        start = self._ordinal[leader]
        return self._full[start : start + self.config.period]

    @torch.no_grad()
    def _identify(self, layer: int, inputs: SelectionInput) -> None:
        """Select for the period that `layer` leads, and ask for what that needs (intra-period prefetch)."""
        self._ahead.need(layer)
        try:
            scorer = self._keys.scorer(layer, self.plan.devices[layer])
        except SegmentCorruptError as error:
            self._discard(error)
            raise
        scores = scorer(inputs)
        selected = choose_chunks(scores, self.keep, self.config.keep_first, self.config.keep_last)
        wanted = self._chunks_to_read(selected)
        self._slots.clear()
        members = self._period(layer)
        for member in members:
            self.selected[member], self._wanted[member] = selected, wanted
        self._ask(members, wanted)
        self._ahead.used(layer)

    def _ask(self, layers: Sequence[int], chunks: Sequence[int], speculative: bool = False) -> None:
        for device, group in groupby(layers, key=lambda layer: self.plan.devices[layer]):
            self._payload.ask(list(group), chunks, device, speculative)

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
        members = self._full[start : start + config.period]
        if members and self._keys.reads_payload(members[0]):
            members = members[1:]  # All of the next leader's chunks are read for its keys anyway.
        self._ask(members, self._wanted[layer], speculative=True)

    # -- what layers ask for ------------------------------------------------------------------------------------------

    def _begun(self, batch: int, q_length: int) -> None:
        """The model was called past the cache's hook (its base model, say): nothing is known of the rows."""
        if self.rows is None:
            self.begin(Rows.distinct(batch, q_length))

    def _take(self, layer: int) -> list[Batch]:
        try:
            return self._payload.take(layer)
        except SegmentCorruptError as error:
            self._discard(error)
            raise

    def _discard(self, error: SegmentCorruptError) -> None:
        """Take a damaged segment out of service, so that the next request computes its tokens anew."""
        self.damaged = True
        if isinstance(error.segment, Segment):
            self._store.discard(error.segment, str(error))

    def load_full(
        self,
        layer: int,
        query: torch.Tensor,
        suffix_keys: torch.Tensor,
        options: Mapping[str, Any],
        destination: torch.Tensor,
    ) -> None:
        """Fill `destination` with the chunks of a full-attention layer.

        Args:
            layer: layer index.
            query: `(batch, heads, q, head_dim)` after RoPE.
            suffix_keys: `(batch, kv_heads, q, head_dim)`.
            options: the attention function's keyword arguments (`scaling`, `softcap`).
            destination: `(2 (K, V), rows, kv_heads, kept_tokens, head_dim)`, one row for each distinct row, or a
                single one if all chunks are kept.
        """
        self._begun(query.shape[0], query.shape[2])
        assert self.rows is not None
        if self.keeps_all:
            self._ahead.need(layer)
            self._wanted[layer] = list(range(self.prefix.chunks))
        elif self._is_leader(layer):
            if not self.rows.in_order:
                some = self.rows.representatives.to(query.device)
                query, suffix_keys = query[some], suffix_keys[some]
            visible = self.rows.visible.to(query.device)
            voters = [positions.to(query.device) for positions in self._voters]
            softcap = options.get("softcap")
            self._identify(layer, SelectionInput(query, suffix_keys, voters, visible, options["scaling"], softcap))
        if not self.keeps_all:
            self._speculate(layer)
        batches = self._take(layer)
        try:
            arrived = {chunk for batch in batches for chunk in batch.chunks}
            if not arrived.issuperset(self._wanted[layer]):
                raise InputError(f"layer {layer} was loaded before: a forward was interrupted; call reset()")
            self._assemble(layer, batches, destination)
        finally:
            self._payload.give_back(batches)
        self._count(layer, batches)
        if self.keeps_all:
            self._ahead.used(layer)

    def load_tail(self, layer: int, window: int, batch: int, q_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V `(1, kv_heads, min(tokens, window - 1), head_dim)` of a sliding-window layer: all that it can see."""
        self._begun(batch, q_length)
        self._ahead.need(layer)
        (read,) = batches = self._take(layer)
        c = self.prefix.geometry.chunk_size
        kv = upload(self.prefix.kv_view(read.slab.data, len(read.chunks)), self.plan.devices[layer], read.slab)
        begin = read.chunks[0] * c
        skip = self._tail_start(window) - begin
        # (chunks, 2, h, c, d) -> (2, 1, h, tokens, d), without the tokens before the window and after the prefix.
        tokens = kv.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, None, :, skip : self.prefix.tokens - begin]
        keys, values = tokens[0].clone(), tokens[1].clone()
        self._payload.give_back(batches)
        self.stats.hits["disk"] += len(read.chunks)
        self.stats.bytes_used += keys.shape[2] * self.prefix.token_bytes()
        self._ahead.used(layer)
        return keys, values

    def _tail_start(self, window: int) -> int:
        return max(0, self.prefix.tokens - window + 1)

    # -- from extents to K and V --------------------------------------------------------------------------------------

    def _assemble(self, layer: int, batches: Sequence[Batch], destination: torch.Tensor) -> None:
        c, tail = self.prefix.geometry.chunk_size, self.prefix.tail_tokens
        whole = self.keep * c
        chunks = destination[:, :, :, :whole].unflatten(3, (self.keep, c))
        # RoPE is in the keys, so attention does not mind the order of chunks: they are put as they were read.
        filled = [0] * destination.shape[1]
        for batch in batches:
            kv = upload(self.prefix.kv_view(batch.slab.data, len(batch.chunks)), destination.device, batch.slab)
            if tail and batch.chunks[-1] == self.prefix.whole_chunks:
                destination[:, :, :, whole:] = kv[-1, :, None, :, :tail]
            for row in range(destination.shape[1]):
                # (n, 2, kv_heads, c, head_dim) -> (2, kv_heads, n, c, head_dim)
                slots = self._slots_of(layer, batch.chunks, row, destination.device)
                slots.copy(kv, chunks[:, row], filled[row])
                filled[row] += slots.count

    def _slots_of(self, layer: int, slots: list[int], row: int, device: torch.device) -> _Slots:
        """Which slots of a batch a row takes; found once for all layers of a period that read the same lists."""
        key = (id(slots), row)
        known = self._slots.get(key)
        if known is None or known.chunks is not slots:
            selected = self.selected.get(layer)
            known = _Slots.of(slots, None if selected is None else selected[row].tolist(), self.keep, device)
            self._slots[key] = known
        return known

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


@dataclass(frozen=True)
class _Slots:
    """Which slots of a slab a row uses.

    Attributes:
        chunks: what the slab holds (kept so that its identity stays its own).
        take: the slots as an index, or `None` where they are the first `count`.
        count: how many.
    """

    chunks: list[int]
    take: torch.Tensor | None
    count: int

    @classmethod
    def of(cls, chunks: list[int], selected: list[int] | None, keep: int, device: torch.device) -> _Slots:
        """Slots of `chunks` for a row that uses `selected` (`None`: the first `keep` chunks)."""
        wanted = set(range(keep) if selected is None else selected)
        slots = [slot for slot, chunk in enumerate(chunks) if chunk in wanted]
        if not slots or slots[-1] == len(slots) - 1:
            return cls(chunks, None, len(slots))
        return cls(chunks, torch.tensor(slots, dtype=torch.long, device=device), len(slots))

    def copy(self, source: torch.Tensor, destination: torch.Tensor, start: int) -> None:
        """From `(n, 2, kv_heads, c, head_dim)` to `(2, kv_heads, kept, c, head_dim)`, from position `start` on."""
        if self.count:
            used = source[: self.count] if self.take is None else source.index_select(0, self.take)
            destination.narrow(2, start, self.count).copy_(used.permute(1, 2, 0, 3, 4))
