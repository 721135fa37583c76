"""The library's own method: choose chunks once per period, read them for all of its layers, place them in text order.

*Intra-period*: once a leader layer has chosen, the reads of every layer of its period start. *Inter-period*: at a
subperiod boundary, the current chunks are read for the next period, before that has chosen (arXiv 2601.13631).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from itertools import groupby
from time import perf_counter

import numpy as np
import numpy.typing as npt
import torch

from ..config import IndexedKeys
from ..errors import InputError
from ..loading.chunk_accounts import Arrival
from ..loading.chunk_loader import ChunkLoader
from ..loading.key_loader import KeyLoader
from ..loading.placement import assemble, copy_in_order, place_keys
from ..loading.replacement import Exchange, NewChunks
from ..loading.token_placement import place_token_keys, place_tokens
from ..memory.blocks import among
from ..selection import (
    ChunkScorer,
    ChunkScores,
    IndexedKeysScorer,
    SelectionInput,
    choose_chunks,
    choose_tokens,
    device_product,
)
from ..store.attached_prefix import Chunks
from .choosing_again import LaterChoice
from .strategy import LayerInput, RequestContext

# Makes the scorer of a leader layer, from the keys that were wanted for it.
MakeScorer = Callable[[KeyLoader, int], ChunkScorer]


class ChunkStrategy:
    """Serves whole chunks, chosen by the plan's `selection`. Implements `Strategy`.

    Args:
        context: of the request.
        make_scorer: makes the scorers of leader layers; `KeyLoader.scorer` makes those of the plan.
    """

    def __init__(self, context: RequestContext, make_scorer: MakeScorer = KeyLoader.scorer) -> None:
        self._context = context
        self._plan = plan = context.plan
        self._make_scorer = make_scorer
        self.loader = ChunkLoader.of(plan, context.store, context.stats, timeline=context.timeline, usage=context.usage)
        # Per layer, the whole chunks that its rows use, int64 `(distinct rows, n)`, the single tokens beside them, if
        # any, int64 `(distinct rows, n)`, and the chunks that it reads for both.
        self._selected: dict[int, torch.Tensor] = {}
        self._tokens: dict[int, torch.Tensor] = {}
        self._wanted: dict[int, Chunks] = {}
        # While decoding: the chunks that rows have had since the choice before this one.
        self._before: dict[int, torch.Tensor] = {}
        self._replaced: set[int] = set()
        for device in set(plan.layers.devices):
            if context.store.memory.on(device) is not None and isinstance(plan.config.selection, IndexedKeys):
                device_product(device, plan.prefix.geometry.head_dim)  # Looks for a kernel now, not in the first layer.

    @property
    def keeps_all(self) -> bool:
        return self._plan.keeps_all

    @property
    def kept_tokens(self) -> int:
        return self._plan.kept_tokens

    def copy_for(self, context: RequestContext) -> ChunkStrategy:
        other = ChunkStrategy(context, self._make_scorer)
        other._selected, other._wanted = dict(self._selected), dict(self._wanted)
        other._tokens = dict(self._tokens)
        other._before, other._replaced = dict(self._before), set(self._replaced)
        return other

    # -- what to read -------------------------------------------------------------------------------------------------

    def start(self, loaded: Collection[int]) -> None:
        plan, loader = self._plan, self.loader
        if plan.keeps_all:
            self._start_all(loaded)
            return
        whole: list[int] = []
        together = plan.layers_together(loader.accelerated)
        for layer, window in enumerate(plan.layers.windows):
            if layer in loaded:
                continue
            if window is not None:
                loader.want_later([layer], plan.tail_chunks(window))
                continue
            if plan.keys_from_index or (plan.is_leader(layer) and layer not in self._wanted):
                loader.keys.want(layer)
            if layer in self._wanted:
                loader.want([layer], self._wanted[layer])  # Selected before the prefix was replaced.
            elif plan.reads_whole_layers and layer not in self._before:
                whole.append(layer)
                if len(whole) == together:
                    # Where memory has as many chunks as a request uses, the others are asked for by name, if at all.
                    loader.want_whole_layers_later(whole, plan.nominees)
                    whole = []
        if whole:
            loader.want_whole_layers_later(whole, plan.nominees)
        loader.start_queued()

    def _start_all(self, loaded: Collection[int]) -> None:
        """As `start`, if every chunk is used."""
        plan, loader = self._plan, self.loader
        missing = (layer for layer in range(len(plan.layers.windows)) if layer not in loaded)
        for window, layers in groupby(missing, key=lambda layer: plan.layers.windows[layer]):
            loader.want_later(
                list(layers), np.arange(plan.prefix.chunks) if window is None else plan.tail_chunks(window)
            )
        loader.start_queued()

    def _speculate(self, layer: int) -> None:
        members = self._plan.to_speculate(layer)
        if not members:
            return
        wanted = self._wanted[layer]
        if members[0] in self._before:
            wanted = _missing(self._before[members[0]], self._selected[layer])
        self.loader.want(members, wanted, speculative=True)

    # -- what to choose -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _select(self, asked: LayerInput) -> None:
        """Select for the period that a layer leads, and ask for the chunks."""
        plan, loader, layer = self._plan, self.loader, asked.layer
        rows = asked.rows.asking_on(asked.query.device)
        query, suffix_keys = asked.query, asked.suffix_keys
        if rows.representatives is not None:
            query, suffix_keys = query[rows.representatives], suffix_keys[rows.representatives]
        scaling, softcap = asked.options["scaling"], asked.options.get("softcap")
        inputs = SelectionInput(query, suffix_keys, rows.voters, rows.visible, scaling, softcap)
        scorer = self._make_scorer(loader.keys, layer)
        began = perf_counter()
        scores = self._scores(layer, scorer(inputs))
        selected = self._best(scores.importance, plan.chosen_chunks)
        members = plan.period_of(layer)
        wanted = _distinct(selected)
        if plan.single_tokens:
            assert isinstance(scorer, IndexedKeysScorer)
            tokens = self._best_tokens(scorer, layer, scores.importance, selected)
            self._tokens.update(dict.fromkeys(members, tokens))
            used = np.zeros(plan.prefix.whole_chunks, dtype=bool)
            used[wanted] = True
            used[tokens.numpy() // plan.prefix.geometry.chunk_size] = True
            wanted = np.flatnonzero(used)
        mass = scores.mass.detach().numpy().sum(0)
        self._context.timeline.add("identify", layer, began, perf_counter())
        if plan.prefix.tail_tokens:
            wanted = np.append(wanted, plan.prefix.whole_chunks)
        loader.accounts.note_importance(members, mass)
        self._want(members, selected, wanted, mass)

    def _scores(self, layer: int, scores: ChunkScores) -> ChunkScores:
        """The scores of a leader layer, on the host. Keys that are used for scores only are not needed any more."""
        if not self._plan.keys_from_index:
            self.loader.keys.release(layer)
        return self._on_host(layer, scores)

    def _best(self, importance: torch.Tensor, keep: int) -> torch.Tensor:
        rule = self._plan.config.selection
        return choose_chunks(importance, keep, rule.keep_first, rule.keep_last)

    def _best_tokens(
        self, scorer: IndexedKeysScorer, layer: int, importance: torch.Tensor, selected: torch.Tensor
    ) -> torch.Tensor:
        """Of each row, the best tokens of the best chunks but those of `selected`, int64 `(rows, single_tokens)`."""
        nominees = self._best(importance, self._plan.nominees).numpy()
        asked = [
            scorer.of_tokens(row, some[~among(some, chosen)])
            for row, (some, chosen) in enumerate(zip(nominees, selected.numpy(), strict=True))
        ]
        scores = self._fetched(layer, torch.stack([found for found, _ in asked]))
        keep = self._plan.single_tokens
        chosen = [choose_tokens(own, tokens, keep) for own, (_, tokens) in zip(scores, asked, strict=True)]
        return torch.from_numpy(np.stack(chosen))

    def _want(self, members: list[int], selected: torch.Tensor, wanted: Chunks, mass: npt.NDArray[np.float32]) -> None:
        """The first of `members` has selected for all of them: ask for the chunks."""
        self.loader.accounts.expect_importance(members, mass)
        for member in members:
            self._selected[member], self._wanted[member] = selected, wanted
        if len(wanted):
            self.loader.want(members, wanted)
        if not self._plan.keys_from_index:
            self.loader.read_on(members[0])

    def _on_host(self, layer: int, scores: ChunkScores) -> ChunkScores:
        """The choice is made on the host, where reads are issued. One copy, one wait."""
        if scores.mass is scores.importance:
            both = self._fetched(layer, scores.mass)
            return ChunkScores(both, both)
        return ChunkScores(*self._fetched(layer, torch.stack(scores)))

    def _fetched(self, layer: int, values: torch.Tensor) -> torch.Tensor:
        tier = self._context.store.memory.on(self._plan.layers.devices[layer])
        return values if tier is None else tier.device.fetch(values)

    def selected_chunks(self, layer: int) -> torch.Tensor | None:
        return self._selected.get(layer)

    def single_tokens(self, layer: int) -> torch.Tensor | None:
        return self._tokens.get(layer)

    # -- how to place -------------------------------------------------------------------------------------------------

    def load(self, asked: LayerInput, destination: torch.Tensor) -> Sequence[Arrival]:
        """Select, if the layer leads a period; then place chunks as soon as they have arrived."""
        plan, loader, layer = self._plan, self.loader, asked.layer
        if plan.keeps_all:
            self._wanted[layer] = np.arange(plan.prefix.chunks)
        else:
            if plan.is_leader(layer) and layer not in self._wanted:
                self._select(asked)
            self._speculate(layer)
        wanted, found = self._wanted[layer], self._selected.get(layer)
        selected = None if found is None else [row.numpy() for row in found]
        tokens = [row.numpy() for row in self._tokens.get(layer, ())]
        # Whole chunks and a partial last one come first, then single tokens.
        keep = plan.keep if found is None else found.shape[1]
        of_chunks = destination[:, :, :, : keep * plan.prefix.geometry.chunk_size + plan.prefix.tail_tokens]
        of_tokens = destination[:, :, :, of_chunks.shape[3] :]
        if plan.keys_from_index:
            assert selected is not None
            self._place_keys(layer, selected, of_chunks[0], tokens, of_tokens[0])
        # If exactly the wanted chunks were asked for, as is usual, there is nothing to sort out.
        exactly = loader.asked(layer) == len(wanted)
        arrived = []
        with closing(loader.take(layer)) as parts:
            for part in parts:
                began = perf_counter()
                alike = exactly and destination.shape[1] == 1 and not tokens
                assemble(plan.served, part, selected, keep, of_chunks, selected_only=alike)
                for row, own in enumerate(tokens):
                    place_tokens(plan.served, part, own, of_tokens[:, row])
                self._context.timeline.add("copy", layer, began, perf_counter())
                arrived.append(Arrival.of(part))
        if not exactly and not among(wanted, _chunks_of(arrived)).all():
            raise InputError(f"layer {layer} was loaded before: a forward was interrupted; call reset()")
        return arrived

    def _place_keys(
        self,
        layer: int,
        selected: Sequence[Chunks],
        of_chunks: torch.Tensor,
        tokens: Sequence[Chunks],
        of_tokens: torch.Tensor,
    ) -> None:
        """Keys of a packed prefix come from the index. Values may be under way meanwhile."""
        parts = self.loader.keys.index(layer)
        began = perf_counter()
        place_keys(self._plan.served, parts, selected, of_chunks)
        for row, own in enumerate(tokens):
            place_token_keys(self._plan.served, parts, own, of_tokens[row])
        self.loader.keys.release(layer)
        self.loader.read_on(layer)
        self._context.timeline.add("copy", layer, began, perf_counter())

    def load_tail(self, layer: int, window: int) -> tuple[torch.Tensor, torch.Tensor]:
        plan, loader, chunks = self._plan, self.loader, self._plan.tail_chunks(window)
        prefix, g = plan.prefix, plan.prefix.geometry
        first, before = plan.tail_start(window), int(chunks[0]) * g.chunk_size
        with torch.inference_mode(False):
            shape = 2, g.kv_heads, len(chunks), g.chunk_size, g.head_dim
            kv = torch.empty(*shape, dtype=g.dtype, device=plan.layers.devices[layer])
        arrived = []
        with closing(loader.take(layer)) as parts:
            for part in parts:
                copy_in_order(prefix, part, int(chunks[0]), kv)
                arrived.append(Arrival.of(part))
        for one in arrived:
            loader.accounts.count_hits(layer, one)
        loader.accounts.note_used(layer, chunks)
        # Without the tokens before the window and after the prefix.
        tokens = kv.flatten(2, 3)[:, None, :, first - before : prefix.tokens - before]
        self._context.stats.bytes_used += tokens.shape[3] * prefix.token_bytes()
        return tokens[0], tokens[1]

    # -- choosing again -----------------------------------------------------------------------------------------------

    def choose_again(self) -> None:
        """From now on, layers get the chunks of another choice with `replace`, in model order. `start` comes first."""
        self._before, self._selected, self._wanted = self._selected, {}, {}
        self._replaced = set()

    def keep_chosen(self) -> None:
        """Undo `choose_again` for layers that were not reached."""
        self._selected = self._before | {layer: self._selected[layer] for layer in self._replaced}

    def replace(self, asked: LayerInput, choice: LaterChoice, destination: torch.Tensor, rows: Chunks) -> list[Arrival]:
        """Select again, if the layer leads a period; then replace the chunks that are not selected any more.

        Until everything that is missing has arrived, `destination` stays as it is.

        Args:
            asked: by which layer; `query` are the queries that it remembers, `suffix_keys` those of the whole suffix.
            choice: who votes.
            destination: `(2 (K, V), n, kv_heads, kept_tokens, head_dim)`, with the chunks of the choice before.
            rows: int64 `(n,)`, the distinct row of each row of `destination`.

        Returns:
            what arrived, for `count`.
        """
        plan, loader, layer = self._plan, self.loader, asked.layer
        if plan.is_leader(layer) and layer not in self._wanted:
            self._select_again(asked, choice)
        self._speculate(layer)
        pairs = [(self._before[layer][row].numpy(), self._selected[layer][row].numpy()) for row in rows]
        new = NewChunks(plan.served, [Exchange.between(*pair) for pair in pairs], destination)
        if plan.keys_from_index:
            new.add_keys(loader.keys.index(layer))
            loader.keys.release(layer)
            loader.read_on(layer)
        arrived = []
        with closing(loader.take(layer)) as parts:
            for part in parts:
                new.add(part)
                arrived.append(Arrival.of(part))
        if not among(self._wanted[layer], _chunks_of(arrived)).all():
            raise InputError(f"layer {layer} was loaded before: a forward was interrupted; call reset()")
        new.replace()
        self._replaced.add(layer)
        return arrived

    @torch.no_grad()
    def _select_again(self, asked: LayerInput, choice: LaterChoice) -> None:
        layer, before = asked.layer, self._before[asked.layer]
        rows = choice.asking_on(asked.query.device)
        scaling, softcap = asked.options["scaling"], asked.options.get("softcap")
        inputs = SelectionInput(
            asked.query, asked.suffix_keys, rows.voters, rows.visible, scaling, softcap, rows.positions
        )
        scorer = self._make_scorer(self.loader.keys, layer)
        began = perf_counter()
        scores = self._scores(layer, scorer(inputs))
        # Rows that share their chunks (beams) vote together: scores are sums over queries.
        shared = scores.importance.new_zeros(len(before), scores.importance.shape[1])
        selected = self._best(shared.index_add(0, choice.of_batch, scores.importance.detach()), self._plan.keep)
        used = torch.unique(choice.of_batch)
        unused = torch.ones(len(before), dtype=torch.bool).index_fill(0, used, False)
        selected[unused] = before[unused]
        self._context.timeline.add("identify", layer, began, perf_counter())
        # Memory counts what the question used: a long answer that chooses a hundred times is still one request.
        mass = scores.mass.detach().numpy().sum(0)
        self._want(self._plan.period_of(layer), selected, _missing(before, selected), mass)

    # -- statistics ---------------------------------------------------------------------------------------------------

    def count(self, layer: int, arrived: Sequence[Arrival]) -> None:
        plan, stats, wanted = self._plan, self._context.stats, self._wanted[layer]
        size, tail = plan.served.extent_bytes, plan.prefix.tail_tokens
        exactly = sum(len(one.chunks) for one in arrived) == len(wanted)
        for one in arrived:
            used = None if exactly else among(one.chunks, wanted)
            from_disk = self.loader.accounts.count_hits(layer, one, used)
            unused = (one.from_disk - from_disk) * size
            if one.speculative:
                stats.prefetch_hits += from_disk
                stats.prefetch_wasted_bytes += unused
            else:
                stats.bytes_identified += unused  # The whole layer was read for its keys.
        if layer in self._before:
            stats.bytes_used += len(wanted) * size
            return
        self.loader.accounts.note_used(layer, wanted)
        whole, single = len(wanted) - (1 if tail else 0), 0
        if layer in self._tokens:
            chunks, of_tokens = _distinct(self._selected[layer]), _distinct(self._tokens[layer])
            # (What one row uses as a whole, another one may take tokens from.)
            single = int(np.count_nonzero(~among(of_tokens // plan.prefix.geometry.chunk_size, chunks)))
            whole = len(chunks)
        stats.bytes_used += whole * size + (single + tail) * plan.served.token_bytes()
        stats.chunks_used.append(plan.keep + (1 if tail else 0))


def _distinct(chosen: torch.Tensor) -> Chunks:
    """The different numbers in int64 `(rows, n)`, ascending, of which each row has each once, ascending."""
    return chosen[0].numpy() if len(chosen) == 1 else np.unique(chosen.numpy())


def _missing(before: torch.Tensor, after: torch.Tensor) -> Chunks:
    """The chunks of `after` that a row does not have, ascending; both are int64 `(rows, keep)`."""
    pairs = zip(before.numpy(), after.numpy(), strict=True)
    return np.unique(np.concatenate([Exchange.between(*pair).missing for pair in pairs]))


def _chunks_of(arrived: Sequence[Arrival]) -> Chunks:
    return np.concatenate([one.chunks for one in arrived]) if arrived else np.zeros(0, dtype=np.int64)
