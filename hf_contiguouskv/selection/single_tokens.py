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


def choose_tokens(importance: torch.Tensor, tokens: npt.NDArray[np.int64], keep: int) -> npt.NDArray[np.int64]:
    """The `keep` best of some tokens.

    Args:
        importance: float `(n,)` on the CPU, of each of `tokens`, higher = keep.
        tokens: int64 `(n,)`, positions in the prefix, each once, in any order.
        keep: how many tokens to keep, `<= n`.

    Returns:
        int64 `(keep,)`, ascending.
    """
    return np.sort(tokens[cheapest(-importance.detach().float().numpy(), keep)])
