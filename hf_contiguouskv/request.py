"""One request on an attached prefix: selects chunks, schedules their reads, and assembles K and V for attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import count, groupby
from typing import Any, TypeVar

import torch

from .config import ContiguousKVConfig
from .device import SlabPool, upload
from .errors import InputError, SegmentCorruptError, SegmentReadError
from .keys import KeySource
from .plan import LayerPlan, Rows
from .prefetch import Batch, Lookahead, PayloadReads
from .prefix import AttachedPrefix
from .selection import SelectionInput, choose_chunks
from .slots import Slots
from .stats import RequestStats
from .store import PrefixStore

# Leader layers whose keys are read ahead, where every layer leads. (In a longer period the next leader's keys are read
# once this one's are used: there is time.)
KEYS_AHEAD = 3
# A request whose prefix proves wrong more often than this gives up. (The last recoveries do without the disk.)
MAX_RECOVERIES = 20


Result = TypeVar("Result")
# Gets a readable prefix of the same tokens: from the prefix, the error that showed, and which attempt this is.
Recover = Callable[[AttachedPrefix, SegmentCorruptError | SegmentReadError, int], AttachedPrefix]


class PrefixRequest:
    """Life of a prefix from the first suffix token to `close`.

    Layers call `load_full` (full attention) or `load_tail` (sliding window) once each, in model order. Where stored
    bytes prove wrong, `recover` is asked for a prefix that can be read, and the request goes on with that one.
    """

    def __init__(
        self,
        prefix: AttachedPrefix,
        config: ContiguousKVConfig,
        plan: LayerPlan,
        store: PrefixStore,
        pool: SlabPool,
        stats: RequestStats,
        recover: Recover | None = None,
    ) -> None:
        self.prefix = prefix
        self.config = config
        self.plan = plan
        self.stats = stats
        self._store = store
        self._pool = pool
        self._recover = recover
        self.keep = config.chunks_kept(prefix.whole_chunks)
        self.selected: dict[int, torch.Tensor] = {}
        self.rows: Rows | None = None
        self._full = plan.full_layers
        self._ordinal = {layer: ordinal for ordinal, layer in enumerate(self._full)}
        self._wanted: dict[int, list[int]] = {}
        self._loaded: set[int] = set()
        self._voters: list[torch.Tensor] = []
        # Whether bytes of this prefix proved wrong, and could not be computed anew.
        self.damaged = False
        self._slots: dict[tuple[int, int], Slots] = {}
        self._open_reads()

    def _open_reads(self) -> None:
        store, stats = self._store, self.stats
        self._payload = PayloadReads(self.prefix, store.reader, self._pool, stats, self.config.verify)
        self._keys = KeySource(self.prefix, self.config, store, self._pool, self._payload, stats)
        self._ahead = Lookahead(self._ahead_bytes())
        self._reading = False

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
        self._recovering(lambda: None)

    def _recovering(self, action: Callable[[], Result]) -> Result:
        """Do what needs reads; where stored bytes prove wrong, do it again with a prefix that can be read."""
        for attempt in count(1):
            try:
                self._ensure_reading()
                return action()
            except (SegmentCorruptError, SegmentReadError) as error:
                self._replace_prefix(error, attempt)
        raise AssertionError  # `count` does not end.

    def _replace_prefix(self, error: SegmentCorruptError | SegmentReadError, attempt: int) -> None:
        self._keys.close()
        self._payload.close()
        self._slots.clear()
        self.damaged = True
        if self._recover is None or attempt > MAX_RECOVERIES:
            raise error
        self.prefix = self._recover(self.prefix, error, attempt)
        self.damaged = False
        self._open_reads()

    def _ensure_reading(self) -> None:
        if self._reading:
            return
        self._reading = True
        size = self.prefix.geometry.extent_bytes
        for layer, window in enumerate(self.plan.windows):
            device = self.plan.devices[layer]
            if layer in self._loaded:
                continue
            if window is not None:
                chunks = list(range(self._tail_start(window) // self.prefix.geometry.chunk_size, self.prefix.chunks))
                self._ahead.add(layer, len(chunks) * size, partial(self._payload.ask, [layer], chunks, device))
            elif self.keeps_all:
                chunks = list(range(self.prefix.chunks))
                self._ahead.add(layer, len(chunks) * size, partial(self._payload.ask, [layer], chunks, device))
            elif layer in self._wanted:
                self._ask([layer], self._wanted[layer])  # Selected before the prefix was replaced.
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
        scorer = self._keys.scorer(layer, self.plan.devices[layer])
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
        identify = partial(self._bring, layer, query, suffix_keys, options)
        batches = self._recovering(identify)
        try:
            arrived = {chunk for batch in batches for chunk in batch.chunks}
            if not arrived.issuperset(self._wanted[layer]):
                raise InputError(f"layer {layer} was loaded before: a forward was interrupted; call reset()")
            self._assemble(layer, batches, destination)
        finally:
            self._payload.give_back(batches)
        self._count(layer, batches)
        self._loaded.add(layer)
        if self.keeps_all:
            self._ahead.used(layer)

    def _bring(
        self, layer: int, query: torch.Tensor, suffix_keys: torch.Tensor, options: Mapping[str, Any]
    ) -> list[Batch]:
        """Select, if this layer leads a period, and wait for the chunks of this layer."""
        assert self.rows is not None
        if self.keeps_all:
            self._ahead.need(layer)
            self._wanted[layer] = list(range(self.prefix.chunks))
        elif self._is_leader(layer) and layer not in self._wanted:
            if not self.rows.in_order:
                some = self.rows.representatives.to(query.device)
                query, suffix_keys = query[some], suffix_keys[some]
            visible = self.rows.visible.to(query.device)
            voters = [positions.to(query.device) for positions in self._voters]
            softcap = options.get("softcap")
            self._identify(layer, SelectionInput(query, suffix_keys, voters, visible, options["scaling"], softcap))
        if not self.keeps_all:
            self._speculate(layer)
        return self._payload.take(layer)

    def load_tail(self, layer: int, window: int, batch: int, q_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V `(1, kv_heads, min(tokens, window - 1), head_dim)` of a sliding-window layer: all that it can see."""
        self._begun(batch, q_length)

        def bring() -> list[Batch]:
            self._ahead.need(layer)
            return self._payload.take(layer)

        (read,) = batches = self._recovering(bring)
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
        self._loaded.add(layer)
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

    def _slots_of(self, layer: int, slots: list[int], row: int, device: torch.device) -> Slots:
        """Which slots of a batch a row takes; found once for all layers of a period that read the same lists."""
        key = (id(slots), row)
        known = self._slots.get(key)
        if known is None or known.chunks is not slots:
            selected = self.selected.get(layer)
            known = Slots.of(slots, None if selected is None else selected[row].tolist(), self.keep, device)
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

    def twin(self, stats: RequestStats, recover: Recover | None) -> PrefixRequest:
        """The same request for a copy of the cache: selections are kept, reads under way are not."""
        other = PrefixRequest(self.prefix, self.config, self.plan, self._store, self._pool, stats, recover)
        other.rows, other.selected, other._wanted = self.rows, dict(self.selected), dict(self._wanted)
        other._loaded, other._voters = set(self._loaded), self._voters
        return other

    def close(self) -> None:
        """Wait for reads under way and give their buffers back."""
        self._keys.close()
        self._payload.close()
