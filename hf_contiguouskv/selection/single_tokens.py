"""Choosing single tokens beside whole chunks.

A question's queries find where an answer begins, and whole chunks bring the tokens behind it. Of examples, one token in
each counts: a label, the end of a line. So a part of the budget goes to chunks, and the rest to the best tokens of
others (docs/research.md, section 12).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from .base import cheapest


def choose_tokens(
    importance: torch.Tensor, tokens: npt.NDArray[np.int64], chunk_size: int, chosen: npt.NDArray[np.int64], keep: int
) -> npt.NDArray[np.int64]:
    """The `keep` best tokens outside of the chunks that are kept as a whole.

    Args:
        importance: float `(n,)` on the CPU, of each of `tokens`, higher = keep.
        tokens: int64 `(n,)`, positions in the prefix, each once, in any order.
        chunk_size: tokens per chunk.
        chosen: the chunks that are kept as a whole, int64. There are at least `keep` tokens outside of them.
        keep: how many tokens to keep.

    Returns:
        int64 `(keep,)`, ascending.
    """
    costs = -importance.detach().float().numpy()
    chunks = tokens // chunk_size
    kept = np.zeros(int(max(chunks.max(), chosen.max(initial=0))) + 1, dtype=bool)
    kept[chosen] = True
    costs[kept[chunks]] = np.inf
    return np.sort(tokens[cheapest(costs, keep)])
