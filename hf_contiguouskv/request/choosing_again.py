"""When a request chooses its chunks again while the model answers, and whose queries vote then.

A first choice knows the question only. What a long answer looks up later need not be in it, so after every `every`
tokens the chunks are chosen again: by the queries that voted on the question, since all of it still has to be answered,
and by those of the tokens since the last choice. Layers remember these queries (`PrefixRequest.remember`). Which ones
they remember is the same for all layers, and is decided here, once per forward.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import numpy as np
import torch

from ..config import Selection
from ..hardware.accelerator import send
from ..selection import voting_queries
from ..store.attached_prefix import Chunks
from .rows import AskingRows, NextTokens, Rows


@dataclass(frozen=True, eq=False)
class LaterChoice:
    """A choice in mid-answer: the queries that layers remember, and which of them vote.

    Attributes:
        positions: int64 `(n,)`: positions in the suffix of the remembered queries, ascending.
        voters: per batch row, which of them vote, int64 `(m,)`.
        visible: bool `(batch, suffix)`: suffix tokens that are not padding, those of this forward included.
        of_batch: int64 `(batch,)`: per batch row, its distinct row. Rows that share one (beams) vote together.
    """

    positions: torch.Tensor
    voters: list[torch.Tensor]
    visible: torch.Tensor
    of_batch: torch.Tensor
    _asking: dict[torch.device, AskingRows] = field(default_factory=dict)

    def asking_on(self, device: torch.device) -> AskingRows:
        """The batch's rows, for a leader layer on `device`."""
        found = self._asking.get(device)
        if found is None:
            voters = send(torch.cat(self.voters), device).split([len(one) for one in self.voters])
            sent = send(self.visible, device), send(self.positions, device)
            found = self._asking[device] = AskingRows(None, list(voters), *sent)
        return found


class ChoosingAgain:
    """The schedule of one request. Tokens are counted as columns of the suffix, padding included.

    Args:
        every: tokens after which chunks are chosen again.
        selection: how many queries vote (`queries`, `recent`).

    Attributes:
        of_batch: int64 `(batch,)`: per batch row, its distinct row of the request.
        choice: of the running forward; `None`: it chooses nothing.
    """

    def __init__(self, every: int, selection: Selection) -> None:
        self.of_batch = torch.zeros(0, dtype=torch.long)
        self.choice: LaterChoice | None = None
        self._every = every
        self._queries, self._recent = selection.queries, selection.recent
        # No more recent queries than this vote, so no more are remembered.
        self._window = every if selection.queries is None else min(every, selection.queries)
        # Positions of the queries that voted on the question, one set per row; and for each batch row, which set.
        self._asked: list[Chunks] = []
        self._asked_by = self.of_batch
        # Positions of the queries that layers remember, ascending; and which columns of [remembered ; new] they
        # remember from the running forward on (`None`: what they do already).
        self._positions: Chunks = np.zeros(0, dtype=np.int64)
        self._kept: torch.Tensor | None = None
        self._kept_on: dict[torch.device, torch.Tensor] = {}
        # Length of the suffix, without drafts, at the last choice; and with all tokens after the last forward.
        self._chosen_at = self._end = 0

    def begin(self, rows: Rows, voters: list[torch.Tensor]) -> None:
        """The first suffix tokens are here; `voters` of each distinct row choose."""
        self.of_batch = self._asked_by = rows.of_batch
        self._asked = [one.numpy() for one in voters]
        self._end = rows.voting.shape[1]
        voting = rows.voting.any(0).nonzero()
        self._chosen_at = int(voting.max()) + 1 if len(voting) else self._end
        self._keep(np.unique(np.concatenate(self._asked)), np.arange(self._end))

    def advance(self, tokens: NextTokens, prefix_tokens: int) -> None:
        """A later forward begins: find out whether it chooses, and what layers remember of it.

        Args:
            tokens: what it passes.
            prefix_tokens: of the attached prefix.
        """
        self.choice = None
        if tokens.batch != len(self.of_batch):
            return  # The layers refuse it.
        cached, real, end = tokens.cached, tokens.cached + tokens.new - tokens.drafts, tokens.cached + tokens.new
        shortened, self._end = cached < self._end, end
        # What voted last may have been removed since.
        undone = cached < self._chosen_at
        since = real - self._chosen_at
        early = not undone and self._every - since >= self._window
        if early and not shortened:
            self._kept, self._kept_on = None, {}
            return
        if undone:
            self._asked = [one[one < cached] for one in self._asked]
        places = np.concatenate([self._positions, np.arange(cached, end)])
        held = np.arange(len(places)) < len(self._positions)
        there = ~held | (places < cached)
        asked = held & there & np.isin(places, np.concatenate(self._asked))
        recent = there & ~asked & (places < real)
        if not undone:
            recent &= places >= self._chosen_at
        drafts = ~held & (places >= real)
        if undone or since >= self._every:
            self._choose(tokens, prefix_tokens, places, asked, np.flatnonzero(recent), drafts)
            self._chosen_at = real
            return
        recent[np.flatnonzero(recent)[: -self._window]] = False
        # (Where it is too early for any of them to vote, layers only forget what was removed.)
        self._keep(np.flatnonzero(asked if early else asked | recent | drafts), places)

    def _choose(
        self,
        tokens: NextTokens,
        prefix_tokens: int,
        places: Chunks,
        asked: np.ndarray,
        recent: Chunks,
        drafts: np.ndarray,
    ) -> None:
        """This forward chooses, by queries at `places`; `asked` and `recent` say which of them may vote."""
        visible = tokens.visible(prefix_tokens)
        of_question, of_answer = [], []
        for row, known in enumerate(visible):
            mine = self._asked[int(self._asked_by[row])]
            of_question.append(np.flatnonzero(asked & np.isin(places, mine)))
            voting = voting_queries(known[torch.from_numpy(places[recent])], self._queries, self._recent)
            of_answer.append(recent[voting.numpy()])
        voters = [np.union1d(*both) for both in zip(of_question, of_answer, strict=True)]
        keep = np.unique(np.concatenate([*voters, np.flatnonzero(drafts)]))
        self._keep(keep, places)
        if tokens.new - tokens.drafts > 1:
            # A prompt that continues the suffix is the question from now on.
            self._asked, self._asked_by = [places[one] for one in of_answer], torch.arange(tokens.batch)
        numbers = [torch.from_numpy(np.searchsorted(keep, one)) for one in voters]
        self.choice = LaterChoice(torch.from_numpy(places[keep]), numbers, visible, self.of_batch)

    def _keep(self, columns: Chunks, places: Chunks) -> None:
        self._positions = places[columns]
        self._kept = torch.from_numpy(columns)
        self._kept_on = {}

    def remembered(self, before: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor | None:
        """The queries that a layer remembers from the running forward on, `(batch, heads, n, head_dim)`.

        Args:
            before: what it has remembered.
            query: those of the running forward, `(batch, heads, q, head_dim)`.
        """
        if self._kept is None:
            return before
        kept = self._kept_on.get(query.device)
        if kept is None:
            kept = self._kept_on[query.device] = send(self._kept, query.device)
        with torch.no_grad():
            query = query.detach()
            both = query if before is None else torch.cat([before, query], dim=2)
            return both.index_select(2, kept)

    def take_rows(self, rows: torch.Tensor) -> None:
        """Batch row `i` continues the former row `rows[i]`; a bool mask: only these rows go on."""
        rows = rows.cpu()
        self.of_batch, self._asked_by = self.of_batch[rows], self._asked_by[rows]

    def repeat_rows(self, times: int) -> None:
        """Each batch row goes on `times` times."""
        self.take_rows(torch.arange(len(self.of_batch)).repeat_interleave(times))

    def copy(self) -> ChoosingAgain:
        """The same schedule, for a copy of the cache."""
        return copy.copy(self)  # (Its values are replaced, and never changed.)
