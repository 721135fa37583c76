"""One request on an attached prefix: the schedule from its first suffix tokens to `close`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any, TypeVar

import numpy as np
import torch

from ..errors import SegmentCorruptError, SegmentReadError, StoreClosedError
from ..loading.chunk_accounts import Arrival, RequestUsage
from ..loading.residency import ChunkStore
from ..planning.read_plan import ReadPlan
from ..stats import RequestStats
from ..store.attached_prefix import AttachedPrefix
from ..timeline import NO_TIMELINE, SpanRecorder, Timeline
from .choosing_again import ChoosingAgain
from .chunk_strategy import ChunkStrategy
from .rows import NextTokens, Rows, SuffixRows
from .strategy import LayerInput, RequestContext, Strategy, StrategyMaker

logger = logging.getLogger("hf_contiguouskv")

# A request whose prefix proves wrong more often than this gives up. (The last recoveries do without the disk.)
MAX_RECOVERIES = 20

Result = TypeVar("Result")
# Gets a readable prefix of the same tokens: from the prefix, the error that showed, and which attempt this is.
Recover = Callable[[AttachedPrefix, SegmentCorruptError | SegmentReadError, int], AttachedPrefix]


class PrefixRequest:
    """Life of a prefix from the first suffix token to `close`.

    Layers call `load_full` (full attention) or `load_tail` (sliding window) once each, in model order. A strategy
    chooses, reads and places. Where stored bytes prove wrong, `recover` is asked for a prefix that can be read, and the
    request goes on with that one. (Half of its methods are one-line properties for layers and session.)

    Args:
        plan: what the request uses of its prefix.
        store: reads and keeps the chunks of the prefix.
        stats: receives what the request does.
        recover: see `Recover`; `None`: damage ends the request. It is not used with `method`.
        method: makes the strategy; `None`: the library's own method does.
        copy_of: a strategy that has made its choices; this request makes the same ones (see `twin`).

    Attributes:
        plan: for the prefix that is attached now.
        rows: of the batch; `None` before the first suffix tokens.
        damaged: whether bytes of this prefix proved wrong and could not be computed again.
    """

    def __init__(
        self,
        plan: ReadPlan,
        store: ChunkStore,
        stats: RequestStats,
        recover: Recover | None = None,
        method: StrategyMaker | None = None,
        *,
        copy_of: Strategy | None = None,
    ) -> None:
        self.damaged = False
        self._recover = recover if method is None else None
        self._method = method
        self._store = store
        timeline: SpanRecorder = Timeline() if plan.config.timeline else NO_TIMELINE
        self._context = RequestContext(plan, store, stats, timeline, RequestUsage(store.memory))
        self._rows: SuffixRows | None = None
        self._reading = False
        self._loaded: set[int] = set()
        self._uncounted: list[tuple[int, Sequence[Arrival]]] = []
        self._unsettled = True
        # Memory for the layers that ask next, by what they ask for.
        self._rooms: dict[Any, tuple[torch.Tensor, ...]] = {}
        if store.memory.behind:
            store.reader.run(store.memory.catch_up)  # Requests before this one were dropped without `close`.
        self._strategy: Strategy
        if copy_of is not None:
            self._strategy = copy_of.copy_for(self._context)
        else:
            self._strategy = ChunkStrategy(self._context) if method is None else method.strategy(self._context)
        every = plan.config.reselect_every
        chooses = method is None and not plan.keeps_all and bool(plan.layers.full_layers)
        self._again = ChoosingAgain(every, plan.config.selection) if every and chooses else None

    @property
    def plan(self) -> ReadPlan:
        return self._context.plan

    @property
    def prefix(self) -> AttachedPrefix:
        """The prefix that is attached, in its exact form."""
        return self.plan.prefix

    @property
    def rows(self) -> Rows | None:
        return None if self._rows is None else self._rows.rows

    @property
    def strategy(self) -> Strategy:
        """What chooses, reads and places for this request."""
        return self._strategy

    @property
    def keeps_all(self) -> bool:
        """Whether every chunk is used: no selection, the exact answer."""
        return self._strategy.keeps_all

    @property
    def kept_tokens(self) -> int:
        """Prefix tokens that a full-attention layer shows to attention: the same for every layer and row."""
        return self._strategy.kept_tokens

    @property
    def timeline(self) -> Timeline | None:
        """When the request did what, where the configuration asks for it."""
        recorder = self._context.timeline
        return recorder if isinstance(recorder, Timeline) else None

    # -- the schedule -------------------------------------------------------------------------------------------------

    def begin(self, rows: Rows) -> None:
        """The first suffix tokens are here."""
        selection = self.plan.config.selection
        self._rows = SuffixRows(rows, selection.queries, selection.recent)
        if self._again is not None:
            self._again.begin(rows, self._rows.voters)
        self.start()

    def start(self) -> None:
        """Start the reads that do not depend on the queries, unless they have been started."""
        self._recovering(lambda: None)

    def _begun(self, batch: int, q_length: int) -> SuffixRows:
        if self._rows is None:
            # The model was called past the cache's hook (its base model, say): nothing is known of the rows.
            self.begin(Rows.distinct(batch, q_length))
        assert self._rows is not None
        return self._rows

    def row_of(self, batch: int, device: torch.device) -> torch.Tensor:
        """Per batch row, its distinct row: int64 `(batch,)` on `device`. The host does not wait for the copy."""
        return torch.arange(batch, device=device) if self._rows is None else self._rows.row_of(device)

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
        asked = LayerInput(layer, query, suffix_keys, options, self._begun(query.shape[0], query.shape[2]))
        self._context.timeline.layer_reached(layer)
        arrived = self._recovering(lambda: self._strategy.load(asked, destination))
        self._uncounted.append((layer, arrived))
        self._loaded.add(layer)
        self._context.timeline.layer_ready(layer)

    def load_tail(self, layer: int, window: int, batch: int, q_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V `(1, kv_heads, min(tokens, window - 1), head_dim)` of a sliding-window layer: all that it can see."""
        self._begun(batch, q_length)
        found = self._recovering(lambda: self._strategy.load_tail(layer, window))
        self._loaded.add(layer)
        return found

    def room(self, like: torch.Tensor, batch: int, tokens: int) -> torch.Tensor:
        """Memory for K and V, `(2, batch, kv_heads, tokens, head_dim)` (see `MemoryTiers.for_attention`)."""
        wanted = batch, tokens, like.shape[-3], like.shape[-1], like.dtype, like.device
        rooms = self._rooms.pop(wanted, None)
        if rooms is None:
            rooms = self._store.memory.for_attention(like, batch, tokens, len(self.plan.layers.full_layers))
        if len(rooms) > 1:
            self._rooms[wanted] = rooms[1:]
        return rooms[0]

    def selected_chunks(self, layer: int) -> torch.Tensor | None:
        """Whole chunks that a full-attention layer uses, int64 `(distinct rows, kept)` on the CPU, ascending.

        `None`: nothing has been selected yet.
        """
        if self.keeps_all:
            return torch.arange(self.plan.keep).expand(1 if self.rows is None else len(self.rows.representatives), -1)
        return self._strategy.selected_chunks(layer)

    def single_tokens(self, layer: int) -> torch.Tensor | None:
        """Single tokens beside them, int64 `(distinct rows, n)` on the CPU, ascending; `None`: there are none."""
        return self._strategy.single_tokens(layer)

    # -- choosing again -----------------------------------------------------------------------------------------------

    def go_on(self, tokens: NextTokens) -> None:
        """A forward after the first suffix tokens begins. It may be one that chooses again."""
        if self._again is None:
            return
        self._again.advance(tokens, self.prefix.tokens)
        if self.chooses_again:
            self._loaded.difference_update(self.plan.layers.full_layers)
            self._reading, self._unsettled = False, True
            self._chunks.choose_again()
            if self._while_open(self.start):
                self._context.stats.reselections += 1

    @property
    def chooses_again(self) -> bool:
        """Whether full-attention layers have to call `load_again` in the running forward."""
        return self._again is not None and self._again.choice is not None

    def remember(self, layer: int, before: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor | None:
        """The queries that a layer keeps for later choices, `(batch, heads, n, head_dim)`; `None`: it needs none.

        Args:
            layer: layer index.
            before: what it has kept.
            query: those of the running forward, `(batch, heads, q, head_dim)`.
        """
        if self._again is None or not self.plan.is_leader(layer):
            return None
        return self._again.remembered(before, query)

    def rows_now(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Per batch row its distinct row, int64 `(batch,)`; and per distinct row a batch row, int64 `(unique,)`.

        (Where no batch row is left of a distinct one, the first batch row stands for it.)
        """
        assert self._again is not None
        assert self.rows is not None
        of_batch = self._again.of_batch
        some = torch.zeros(len(self.rows.representatives), dtype=torch.long)
        some[of_batch] = torch.arange(len(of_batch))
        return of_batch, some

    def load_again(
        self,
        layer: int,
        queries: torch.Tensor | None,
        suffix_keys: torch.Tensor,
        options: Mapping[str, Any],
        destination: torch.Tensor,
        *,
        by_batch: bool,
    ) -> bool:
        """Replace the chunks of a full-attention layer that are not chosen any more.

        Args:
            layer: layer index.
            queries: that it remembers; `None`: it follows the choice of another layer.
            suffix_keys: `(batch, kv_heads, suffix, head_dim)`, those of the running forward included.
            options: the attention function's keyword arguments (`scaling`, `softcap`).
            destination: `(2 (K, V), rows, kv_heads, kept_tokens, head_dim)` with the chunks that were chosen before.
            by_batch: whether it has a row for each batch row; else for each distinct row.

        Returns:
            whether they are in place. If not, the store was closed, and the former choice stays.
        """
        assert self._again is not None
        assert self._rows is not None
        choice, of_batch = self._again.choice, self._again.of_batch.numpy()
        assert choice is not None
        rows = of_batch if by_batch else np.arange(len(self._rows.rows.representatives))
        query = suffix_keys if queries is None else queries
        asked = LayerInput(layer, query, suffix_keys, options, self._rows)

        def replaced() -> None:
            arrived = self._recovering(lambda: self._chunks.replace(asked, choice, destination, rows))
            self._uncounted.append((layer, arrived))
            self._loaded.add(layer)

        with torch.no_grad():
            return self._while_open(replaced)

    def _while_open(self, action: Callable[[], None]) -> bool:
        """Do what a later choice needs. If the store was closed meanwhile, choose never again; returns whether it was
        open."""
        try:
            action()
        except StoreClosedError:
            logger.warning("the store was closed: this answer goes on with the chunks that were chosen before")
            self._chunks.keep_chosen()
            self._loaded.update(self.plan.layers.full_layers)
            self._strategy.loader.close()
            self._again = None
            return False
        return True

    @property
    def _chunks(self) -> ChunkStrategy:
        assert isinstance(self._strategy, ChunkStrategy)
        return self._strategy

    def take_rows(self, rows: torch.Tensor) -> None:
        """Batch row `i` continues the former row `rows[i]`; a bool mask: only these rows go on."""
        if self._again is not None:
            self._again.take_rows(rows)

    def repeat_rows(self, times: int) -> None:
        """Each batch row goes on `times` times."""
        if self._again is not None:
            self._again.repeat_rows(times)

    # -- damage -------------------------------------------------------------------------------------------------------

    def _recovering(self, action: Callable[[], Result]) -> Result:
        """Do what needs reads; where stored bytes prove wrong, do it again with a prefix that can be read."""
        for attempt in count(1):
            try:
                if not self._reading:
                    self._reading = True
                    self._strategy.start(self._loaded)
                return action()
            except (SegmentCorruptError, SegmentReadError) as error:
                self._replace_prefix(error, attempt)
        raise AssertionError  # `count` does not end.

    def _replace_prefix(self, error: SegmentCorruptError | SegmentReadError, attempt: int) -> None:
        self.count()
        self._strategy.loader.close()
        self.damaged = True
        if self._recover is None or attempt > MAX_RECOVERIES:
            raise error
        plan = self.plan.on(self._recover(self.prefix, error, attempt))
        self.damaged = False
        self._context = replace(self._context, plan=plan)
        self._strategy = self._strategy.copy_for(self._context)
        self._reading = False

    # -- statistics and the end ---------------------------------------------------------------------------------------

    def count(self) -> None:
        """Count what layers have used, since the last time; they do not wait for that."""
        while self._uncounted:
            self._strategy.count(*self._uncounted.pop(0))

    def settle(self) -> None:
        """A token is out whose chunks were chosen: tell the memory tiers what was used (once per request)."""
        self._context.timeline.model_done()
        if self._loaded and self._unsettled:
            self._unsettled = False
            self.count()
            self._strategy.loader.settle()

    def twin(self, stats: RequestStats, recover: Recover | None) -> PrefixRequest:
        """The same request for a copy of the cache: selections are kept, reads under way are not."""
        other = PrefixRequest(self.plan, self._store, stats, recover, self._method, copy_of=self._strategy)
        other._rows, other._loaded = self._rows, set(self._loaded)
        other._again = None if self._again is None else self._again.copy()
        return other

    def close(self) -> None:
        """Wait for reads under way and give their buffers back."""
        self.count()
        self._rooms.clear()
        self._strategy.loader.close()
        self._context.usage.tell()
