"""What all selection methods share: their input and output types, and the choice by scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class SelectionInput:
    """What the leader layer knows when it chooses: when its first suffix queries arrive, or in mid-answer.

    Attributes:
        queries: `(rows, heads, q, head_dim)`, after RoPE, in the model's dtype.
        suffix_keys: `(rows, kv_heads, s, head_dim)`, the suffix tokens' own keys.
        voters: per row, which of the queries count, int64 `(n,)`, ascending, never empty.
        visible: bool `(rows, s)`, true for suffix keys that are real tokens, not padding.
        scaling: factor on `q @ k`.
        softcap: logits become `softcap * tanh(logits / softcap)`; `None` leaves them unchanged.
        positions: int64 `(q,)`, the position in the suffix of each query; `None`: there is a query for each suffix
            token, in order.
    """

    queries: torch.Tensor
    suffix_keys: torch.Tensor
    voters: Sequence[torch.Tensor]
    visible: torch.Tensor
    scaling: float
    softcap: float | None = None
    positions: torch.Tensor | None = None


class ChunkScores(NamedTuple):
    """Scores of a leader layer's whole chunks. Both are float32 `(rows, whole_chunks)`.

    Attributes:
        importance: the score by which the request chooses chunks, higher = keep.
        mass: `A_j`, the attention mass by which the memory tiers judge chunks: summed over the voting queries, mean
            over heads, without a method's own emphasis, such as a power.
    """

    importance: torch.Tensor
    mass: torch.Tensor


class ChunkScorer(Protocol):
    """Scores the chunks of one leader layer."""

    def __call__(self, inputs: SelectionInput) -> ChunkScores:
        """Importance and attention mass of each whole chunk, for every row."""
        ...


def scores_of_rows(rows: Sequence[ChunkScores]) -> ChunkScores:
    """Stack the scores `(whole_chunks,)` of single rows."""
    if len(rows) == 1:
        importance, mass = rows[0]
        return ChunkScores(importance[None], importance[None] if mass is importance else mass[None])
    return ChunkScores(torch.stack([row.importance for row in rows]), torch.stack([row.mass for row in rows]))


def choose_chunks(importance: torch.Tensor, keep: int, keep_first: int, keep_last: int) -> torch.Tensor:
    """The `keep` best chunks of each row, in text order.

    Args:
        importance: float `(rows, chunks)`, higher = keep; on any device. The choice is made on the host, which issues
            the reads.
        keep: chunks to keep, `<= chunks`.
        keep_first, keep_last: chunks at either end that are kept before all others. If `keep` is too small for all of
            them, the first ones win.

    Returns:
        int64 `(rows, keep)` on the CPU, ascending. Ties go to the earlier chunk.
    """
    # For hundreds of numbers per layer, numpy takes a third of the time of tensor calls.
    importance = importance.detach() if importance.device.type == "cpu" else importance.detach().cpu()
    costs = -importance.float().numpy()
    if keep_last:
        costs[:, -keep_last:] = -_LARGEST
    costs[:, :keep_first] = -np.inf
    chosen = [cheapest(row, keep) for row in costs]
    return torch.from_numpy(chosen[0][None] if len(chosen) == 1 else np.stack(chosen))


def cheapest(costs: npt.NDArray[np.float32], keep: int) -> npt.NDArray[np.int64]:
    """Positions of the `keep` lowest costs, ascending. Ties go to the earlier position; NaN counts as the highest
    cost."""
    limit = np.partition(costs, keep - 1)[keep - 1]
    if np.isnan(limit):
        return cheapest(np.where(np.isnan(costs), np.float32(np.inf), costs), keep)
    chosen = costs < limit
    chosen[np.flatnonzero(costs == limit)[: keep - np.count_nonzero(chosen)]] = True
    return np.flatnonzero(chosen)


def voting_queries(voting: torch.Tensor, queries: int | None, recent: int | None = None) -> torch.Tensor:
    """Positions `(n,)` int64, ascending, of the queries that count; never empty.

    The meaning of a question is spread over its tokens, so evenly spread votes choose better than the same number of
    last queries. But the very last queries look for what the next token needs.

    Args:
        voting: bool `(q,)`, the queries that may vote.
        queries: how many queries count at most; `None` for all.
        recent: how many of these are the last queries; `None` for all. The others are spread evenly over the earlier
            queries.

    If a row is all padding (possible in a padded batch), its last query votes.
    """
    positions = voting.nonzero().squeeze(-1)
    count = positions.numel()
    if count == 0:
        return torch.tensor([voting.shape[0] - 1], device=voting.device)
    if queries is None or queries >= count:
        return positions
    last = queries if recent is None else min(recent, queries)
    spread, before = queries - last, count - last
    # The midpoints of equal intervals.
    even = (2 * torch.arange(spread, device=voting.device) + 1) * before // max(2 * spread, 1)
    return torch.cat([positions[even], positions[before:]])
