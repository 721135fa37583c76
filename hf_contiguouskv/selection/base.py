"""What every way of choosing chunks has in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class SelectionInput:
    """What the leader layer knows when its first suffix queries arrive.

    Attributes:
        queries: `(rows, heads, q, head_dim)`, after RoPE, in the model's dtype.
        suffix_keys: `(rows, kv_heads, q, head_dim)`, the suffix tokens' own keys.
        voting: bool `(rows, q)`, the queries that count (no padding, no draft tokens).
        visible: bool `(rows, q)`, the suffix keys that are real tokens (no padding).
        scaling: factor on `q @ k`.
        softcap: logits are squashed to `softcap * tanh(logits / softcap)`; `None`: they are not.
    """

    queries: torch.Tensor
    suffix_keys: torch.Tensor
    voting: torch.Tensor
    visible: torch.Tensor
    scaling: float
    softcap: float | None = None


class ChunkScorer(Protocol):
    """Scores chunks of one leader layer."""

    def __call__(self, inputs: SelectionInput) -> torch.Tensor:
        """Importance of each whole chunk, float32 `(rows, whole_chunks)`, higher = keep."""
        ...


def choose_chunks(importance: torch.Tensor, keep: int, keep_first: int, keep_last: int) -> torch.Tensor:
    """The `keep` best chunks of each row, in the order of the text.

    Args:
        importance: float `(rows, chunks)`, higher = keep.
        keep: chunks to keep, `<= chunks`.
        keep_first, keep_last: chunks at either end that are kept before all others (the first ones win if `keep` is
            too small for all).

    Returns:
        int64 `(rows, keep)`, ascending.
    """
    chunks = importance.shape[-1]
    importance = importance.clone()
    # Two finite steps above everything else, so that the beginning goes before the end where both do not fit.
    top = importance.max() + 1 if importance.numel() else 0
    importance[:, max(0, chunks - keep_last) :] = top if keep_last else importance[:, chunks:]
    importance[:, :keep_first] = top + 1 if keep_first else importance[:, :0]
    # A stable sort breaks ties towards the earlier chunk, on every device the same way.
    best = importance.argsort(dim=-1, descending=True, stable=True)[:, :keep]
    return best.sort(dim=-1).values
