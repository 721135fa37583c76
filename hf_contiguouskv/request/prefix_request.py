"""One request on an attached prefix: selects chunks, schedules their reads, and assembles K and V for attention."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from itertools import count, groupby
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
import torch

from ..config import IndexedKeys
from ..errors import InputError, SegmentCorruptError, SegmentReadError
from ..hardware.accelerator import send
from ..loading.hit_counting import Noted, count_hits
from ..loading.key_source import KeySource
from ..loading.packed_keys import place_keys
from ..loading.payload_reads import Lookahead, PayloadReads
from ..loading.placement import assemble
from ..loading.window_tails import WindowTails
from ..memory import Usage
from ..memory.blocks import among
from ..planning.read_plan import ReadPlan
from ..selection import ChunkScores, SelectionInput, choose_chunks, device_product
from ..stats import RequestStats
from ..store import PrefixStore
from ..store.attached_prefix import AttachedPrefix, Chunks
from ..timeline import Timeline
from .rows import AskingRows, Rows

# Leader layers whose keys are read ahead, where every layer leads. (In a longer period the next leader's keys are read
# once this one's are used: there is time.)
KEYS_AHEAD = 3
# Whole layers that are read ahead at least where they cross to an accelerator: one read, one hashed, one copied.
LAYERS_AHEAD = 3
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
        plan: ReadPlan,
        store: PrefixStore,
        stats: RequestStats,
        recover: Recover | None = None,
    ) -> None:
        self.plan = plan
        self.stats = stats
        self._store = store
        self._recover = recover
        self.selected: dict[int, torch.Tensor] = {}
        self.rows: Rows | None = None
        self._full = plan.layers.full_layers
        self._ordinal = {layer: ordinal for ordinal, layer in enumerate(self._full)}
        self._wanted: dict[int, Chunks] = {}
        self._loaded: set[int] = set()
        self._uncounted: list[tuple[int, Sequence[Noted]]] = []
        self._voters: list[torch.Tensor] = []
        self._row_of: dict[torch.device, torch.Tensor] = {}
        self._asking: dict[torch.device, AskingRows] = {}
        # Whether bytes of this prefix proved wrong, and could not be computed anew.
        self.damaged = False
        self.timeline = Timeline() if plan.config.timeline else None
        for device in set(plan.layers.devices):
            if store.memory.on(device) is not None and isinstance(plan.config.selection, IndexedKeys):
                device_product(device, plan.prefix.geometry.head_dim)  # Found out now, not in the first layer.
        # What the memory tiers are told of this request once its first token is out.
        self._usage, self._tail_usage = Usage(), Usage()
        self._settled = weakref.finalize(self, store.memory.finished, self._usage, self._tail_usage)
        self._settled.atexit = False
        self._open_reads()

    def _open_reads(self) -> None:
        store, stats, verify = self._store, self.stats, self.plan.config.reading.verify
        if store.memory.behind:
            store.reader.run(store.memory.catch_up)  # Requests before this one were dropped without `close`.
        self._payload = PayloadReads(self.plan.served, store.reader, store.memory, stats, verify, self.timeline)
        exact = self._payload
        if self.plan.packed and len(self._full) < len(self.plan.layers.windows):
            exact = PayloadReads(self.prefix, store.reader, store.memory, stats, verify, self.timeline)
        self._tails = WindowTails(self.prefix, exact, stats, self._tail_usage)
        self._keys = KeySource(self.plan, store, self._payload, stats)
        self._ahead = Lookahead(self._ahead_bytes())
        self._reading = False

    @property
    def prefix(self) -> AttachedPrefix:
        """The prefix that is attached, in its exact form."""
        return self.plan.prefix

    @property
    def keeps_all(self) -> bool:
        """Whether every chunk is used: no selection, the exact answer."""
        return self.plan.keeps_all

    @property
    def kept_tokens(self) -> int:
        """Prefix tokens that a full-attention layer shows to attention: the same for every layer and row."""
        return self.plan.kept_tokens

    def _ahead_bytes(self) -> int:
        """How far ahead of compute to read. Reads are served in order, so keys that are far from being needed must
        not stand in the way of the chunks that a selection has just named."""
        lookahead = self.plan.config.reading.lookahead_bytes
        if self.keeps_all or not self._full or self.plan.reads_whole_layers:
            # Nothing that a selection names is going to wait for them. Where a layer crosses to an accelerator, the
            # next one is read meanwhile, however large they are.
            layer_bytes = self.prefix.chunks * self.plan.served.extent_bytes
            crosses = any(self._store.memory.on(device) is not None for device in self.plan.layers.devices)
            return max(lookahead, LAYERS_AHEAD * layer_bytes if crosses else 0)
        layers_ahead = KEYS_AHEAD if self.plan.config.selection.period == 1 else 1
        return min(lookahead, layers_ahead * self._keys.nbytes(self._full[0]))

    # -- the schedule -------------------------------------------------------------------------------------------------

    def begin(self, rows: Rows) -> None:
        """The first suffix tokens are here."""
        self.rows = rows
        self._row_of.clear()
        self._asking.clear()
        self._voters = rows.voters(self.plan.config.selection.queries, self.plan.config.selection.recent)
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
        self.count()
        self._close_reads()
        self.damaged = True
        if self._recover is None or attempt > MAX_RECOVERIES:
            raise error
        self.plan = self.plan.on(self._recover(self.prefix, error, attempt))
        self.damaged = False
        self._open_reads()

    def _ensure_reading(self) -> None:
        if self._reading:
            return
        self._reading = True
        exact, whole = self.prefix.extent_bytes, self.plan.reads_whole_layers
        for layer, window in enumerate(self.plan.layers.windows):
            device = self.plan.layers.devices[layer]
            if layer in self._loaded:
                continue
            if window is not None:
                chunks, tails = self._tails.chunks(window), self._tails.payload
                self._ahead.add(layer, len(chunks) * exact, partial(tails.ask_ahead, layer, chunks, device))
                continue
            if self.keeps_all:
                chunks = np.arange(self.prefix.chunks)
                self._ahead.add(layer, len(chunks) * exact, partial(self._payload.ask_ahead, layer, chunks, device))
                continue
            if self.plan.packed or (self._is_leader(layer) and layer not in self._wanted):
                self._ahead.add(layer, self._keys.nbytes(layer, device), partial(self._keys.ask, layer, device))
            if layer in self._wanted:
                self._ask([layer], self._wanted[layer])  # Selected before the prefix was replaced.
            elif whole:
                size = self.prefix.chunks * self.plan.served.extent_bytes
                self._ahead.add(layer, size, partial(self._read_whole, layer, device))
        self._ahead.pump()

    def _read_whole(self, layer: int, device: torch.device, must: bool) -> bool:
        # Where memory has as much as a request uses, what it lacks is asked for by name: it may be nothing.
        if self._payload.tables.resident(layer) < self.plan.keep:
            self._payload.ask([layer], np.arange(self.prefix.chunks), device, speculative=True)
        return True

    def _is_leader(self, layer: int) -> bool:
        return self._ordinal[layer] % self.plan.config.selection.period == 0

    def _period(self, leader: int) -> list[int]:
        start = self._ordinal[leader]
        return self._full[start : start + self.plan.config.selection.period]

    @torch.no_grad()
    def _identify(self, layer: int, inputs: SelectionInput) -> None:
        """Select for the period that `layer` leads, and ask for what that needs (intra-period prefetch)."""
        self._ahead.need(layer)
        scorer = self._keys.scorer(layer, self.plan.layers.devices[layer])
        began = perf_counter()
        scores = scorer(inputs)
        if not self.plan.packed:
            self._keys.used(layer, self.plan.layers.devices[layer])
        there = self._store.memory.on(self.plan.layers.devices[layer])
        if there is not None:  # The choice is made where reads are issued: one copy, one wait.
            alone = scores.mass is scores.importance
            both = there.device.fetch(scores.mass[None] if alone else torch.stack(scores))
            scores = ChunkScores(both[0], both[-1])
        ends = self.plan.config.selection.keep_first, self.plan.config.selection.keep_last
        selected = choose_chunks(scores.importance, self.plan.keep, *ends)
        mass = scores.mass.detach().numpy().sum(0)
        if self.timeline is not None:
            self.timeline.add("identify", layer, began, perf_counter())
        wanted = self._chunks_to_read(selected)
        members = self._period(layer)
        self._usage.mass.append((members, mass))
        self._payload.tables.mass.update(dict.fromkeys(members, mass))
        for member in members:
            self.selected[member], self._wanted[member] = selected, wanted
        self._ask(members, wanted)
        if not self.plan.packed:
            self._ahead.used(layer)

    def _ask(self, layers: Sequence[int], chunks: Chunks, speculative: bool = False) -> None:
        for device, group in groupby(layers, key=lambda layer: self.plan.layers.devices[layer]):
            self._payload.ask(list(group), chunks, device, speculative)

    def _chunks_to_read(self, selected: torch.Tensor) -> Chunks:
        chunks: Chunks = selected[0].numpy() if selected.shape[0] == 1 else np.unique(selected.numpy())
        return np.append(chunks, self.prefix.whole_chunks) if self.prefix.tail_tokens else chunks

    def _speculate(self, layer: int) -> None:
        """At the subperiod boundary, start reading the current selection for the next period (inter-period)."""
        ordinal, rule = self._ordinal[layer], self.plan.config.selection
        if rule.subperiod == rule.period or ordinal % rule.period != rule.subperiod:
            return
        start = ordinal - rule.subperiod + rule.period
        members = self._full[start : start + rule.period]
        if members and self._keys.reads_payload(members[0]):
            members = members[1:]  # All of the next leader's chunks are read for its keys anyway.
        self._ask(members, self._wanted[layer], speculative=True)

    # -- what layers ask for ------------------------------------------------------------------------------------------

    def room(self, like: torch.Tensor, batch: int, tokens: int) -> torch.Tensor:
        """Memory for K and V, `(2, batch, kv_heads, tokens, head_dim)`.

        `like` is a tensor `(..., kv_heads, any, head_dim)` of the same dtype, on the same device. What comes back is an
        ordinary tensor even in inference mode, so that a cache may be continued outside of it.
        """
        shape = (2, batch, like.shape[-3], tokens, like.shape[-1])
        with torch.inference_mode(False):
            if like.device.type == "cpu":
                octets = self._store.memory.workspace(math.prod(shape) * like.dtype.itemsize)
                if octets is not None:
                    return octets.view(like.dtype).view(shape)
            tier = self._store.memory.devices.get(like.device)
            if tier is None:
                return like.new_empty(shape)
            return tier.where_it_fits(math.prod(shape) * like.dtype.itemsize, lambda: like.new_empty(shape))

    def _begun(self, batch: int, q_length: int) -> None:
        """The model was called past the cache's hook (its base model, say): nothing is known of the rows."""
        if self.rows is None:
            self.begin(Rows.distinct(batch, q_length))

    def row_of(self, batch: int, device: torch.device) -> torch.Tensor:
        """Which distinct row each batch row is, int64 `(batch,)` on `device`; copied there once, without a wait."""
        found = self._row_of.get(device)
        if found is None:
            rows = torch.arange(batch) if self.rows is None else self.rows.of_batch
            found = self._row_of[device] = send(rows, device)
        return found

    def _asking_on(self, device: torch.device) -> AskingRows:
        """What a leader layer on `device` must know of the rows; copied there once."""
        found = self._asking.get(device)
        if found is None:
            assert self.rows is not None
            voters = send(torch.cat(self._voters), device).split([len(one) for one in self._voters])
            some = None if self.rows.in_order else send(self.rows.representatives, device)
            found = self._asking[device] = AskingRows(some, list(voters), send(self.rows.visible, device))
        return found

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
        if self.timeline is not None:
            self.timeline.layer_reached(layer)
        batches = self._recovering(partial(self._fill, layer, query, suffix_keys, options, destination))
        self._uncounted.append((layer, batches))
        self._loaded.add(layer)
        if self.keeps_all:
            self._ahead.used(layer)
        if self.timeline is not None:
            self.timeline.layer_ready(layer)

    def _fill(
        self,
        layer: int,
        query: torch.Tensor,
        suffix_keys: torch.Tensor,
        options: Mapping[str, Any],
        destination: torch.Tensor,
    ) -> list[Noted]:
        """Select, if this layer leads a period; then put each batch in its place as soon as it is there."""
        self._bring(layer, query, suffix_keys, options)
        wanted = self._wanted[layer]
        selected = self._selected_of(layer)
        if self.plan.packed:
            self._place_keys(layer, selected, destination)
        # Mostly exactly the wanted chunks were asked for, and there is nothing to sort out.
        asked = self._payload.asked(layer)
        exactly = asked == len(wanted)
        batches = []
        with closing(self._payload.take(layer)) as arriving:
            for batch in arriving:
                began = perf_counter()
                alike = exactly and destination.shape[1] == 1
                assemble(self.plan.served, batch, selected, self.plan.keep, destination, selected_only=alike)
                if self.timeline is not None:
                    self.timeline.add("copy", layer, began, perf_counter())
                batches.append(Noted.of(batch))
        if not exactly and not among(wanted, _chunks_of(batches)).all():
            raise InputError(f"layer {layer} was loaded before: a forward was interrupted; call reset()")
        return batches

    def _selected_of(self, layer: int) -> list[Chunks] | None:
        selected = self.selected.get(layer)
        return None if selected is None else [row.numpy() for row in selected]

    def _place_keys(self, layer: int, selected: Sequence[Chunks] | None, destination: torch.Tensor) -> None:
        """Of a packed prefix, keys come from the index. Values may be under way meanwhile."""
        assert selected is not None
        device = self.plan.layers.devices[layer]
        self._ahead.need(layer)
        parts = self._keys.index(layer, device)
        began = perf_counter()
        place_keys(self.plan.served, parts, selected, destination[0])
        self._keys.used(layer, device)
        self._ahead.used(layer)
        if self.timeline is not None:
            self.timeline.add("copy", layer, began, perf_counter())

    def _bring(self, layer: int, query: torch.Tensor, suffix_keys: torch.Tensor, options: Mapping[str, Any]) -> None:
        """See to it that the chunks of this layer are on their way."""
        assert self.rows is not None
        if self.keeps_all:
            self._ahead.need(layer)
            self._wanted[layer] = np.arange(self.prefix.chunks)
        elif self._is_leader(layer) and layer not in self._wanted:
            asking = self._asking_on(query.device)
            if asking.representatives is not None:
                query, suffix_keys = query[asking.representatives], suffix_keys[asking.representatives]
            scaling, softcap = options["scaling"], options.get("softcap")
            self._identify(layer, SelectionInput(query, suffix_keys, asking.voters, asking.visible, scaling, softcap))
        if not self.keeps_all:
            self._speculate(layer)

    def load_tail(self, layer: int, window: int, batch: int, q_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V `(1, kv_heads, min(tokens, window - 1), head_dim)` of a sliding-window layer: all that it can see."""
        self._begun(batch, q_length)

        def load() -> tuple[torch.Tensor, torch.Tensor]:
            self._ahead.need(layer)
            return self._tails.load(layer, window, self.plan.layers.devices[layer])

        found = self._recovering(load)
        self._loaded.add(layer)
        self._ahead.used(layer)
        return found

    def selected_chunks(self, layer: int) -> torch.Tensor | None:
        """Whole chunks that each distinct row uses in a layer, int64 `(rows, kept)` on the CPU, ascending.

        `None` before they were selected; one row stands for all rows where all chunks are kept.
        """
        if self.keeps_all:
            rows = 1 if self.rows is None else len(self.rows.representatives)
            return torch.arange(self.plan.keep).expand(rows, -1)
        found = self.selected.get(layer)
        return None if found is None else found.cpu()

    def _count(self, layer: int, batches: Sequence[Noted]) -> None:
        wanted = self._wanted[layer]
        size = self.plan.served.extent_bytes
        exactly = sum(len(batch.chunks) for batch in batches) == len(wanted)
        for batch in batches:
            used = None if exactly else among(batch.chunks, wanted)
            from_disk = count_hits(self.stats, self._usage, batch, size, used)
            unused = (batch.from_disk - from_disk) * size
            if batch.speculative:
                self.stats.prefetch_hits += from_disk
                self.stats.prefetch_wasted_bytes += unused
            else:
                self.stats.bytes_identified += unused  # A whole layer was read for its keys.
        tail = self.prefix.tail_tokens
        whole = len(wanted) - (1 if tail else 0)
        self._usage.used(self._payload.tables, layer, wanted)
        self.stats.bytes_used += whole * size + tail * self.plan.served.token_bytes()
        self.stats.chunks_used.append(self.plan.keep + (1 if tail else 0))

    def count(self) -> None:
        """Count what layers have used, since the last time; they do not wait for that."""
        while self._uncounted:
            self._count(*self._uncounted.pop(0))

    def settle(self) -> None:
        """The first token is out: tell the memory tiers what was used (once per request)."""
        if self.timeline is not None:
            self.timeline.model_done()
        if self._loaded and self._settled.alive:
            self.count()
            self._settle_reads()
            self._settled()
            self._store.memory.catch_up()

    def _settle_reads(self) -> None:
        self._payload.settle()
        if self._tails.payload is not self._payload:
            self._tails.payload.settle()

    def twin(self, stats: RequestStats, recover: Recover | None) -> PrefixRequest:
        """The same request for a copy of the cache: selections are kept, reads under way are not."""
        other = PrefixRequest(self.plan, self._store, stats, recover)
        other.rows, other.selected, other._wanted = self.rows, dict(self.selected), dict(self._wanted)
        other._loaded, other._voters = set(self._loaded), self._voters
        return other

    def _close_reads(self) -> None:
        self._keys.close()
        self._payload.close()
        if self._tails.payload is not self._payload:
            self._tails.payload.close()

    def close(self) -> None:
        """Wait for reads under way and give their buffers back."""
        self.count()
        self._close_reads()
        self._settled()
        self._store.memory.catch_up()


def _chunks_of(batches: Sequence[Noted]) -> Chunks:
    return np.concatenate([batch.chunks for batch in batches]) if batches else np.zeros(0, dtype=np.int64)
