"""How systems that choose tokens score and choose them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations

import numpy as np
import numpy.typing as npt
import torch

from hf_contiguouskv.selection import choose_chunks
from hf_contiguouskv.selection.attention_mass import LOGITS_AT_ONCE

# Logits held at once (float32) on an accelerator: 256 MiB.
DEVICE_LOGITS_AT_ONCE = 2**26
Tokens = npt.NDArray[np.int64]


def tokens_kept(tokens: int, budget: float) -> int:
    """How many of `tokens` prefix tokens a budget keeps, at least one."""
    # Guard against 0.1 * 30 == 3.0000000000000004 becoming 4.
    return min(tokens, max(1, int(np.ceil(tokens * budget - 1e-9))))


def column_sums(
    queries: torch.Tensor,
    prefix_keys: torch.Tensor,
    suffix_keys: torch.Tensor,
    scaling: float,
    on_device: bool | None = None,
) -> torch.Tensor:
    """Attention that each prefix token gets from all suffix queries, per query head, in float32.

    The softmax is over prefix and suffix (causal). Sums are in float32, and products exact, except that those of a
    float32 model on a GPU are rounded to TF32 if the user has the model's own products rounded so.

    Args:
        queries: `(heads, q, head_dim)` after RoPE, of the suffix.
        prefix_keys: `(kv_heads, n, head_dim)`; heads are groups of equal size, one for each KV head.
        suffix_keys: `(kv_heads, q, head_dim)`.
        scaling: factor on `q @ k`.
        on_device: whether the work is done as an accelerator does it; by default, where the keys are on one.

    Returns:
        float32 `(heads, n)`, on the device of the keys.
    """
    if prefix_keys.device.type != "cpu" if on_device is None else on_device:
        return _sums_on_device(queries, prefix_keys, suffix_keys, scaling)
    kv_heads, tokens, head_dim = prefix_keys.shape
    heads, length, _ = queries.shape
    group = heads // kv_heads
    grouped = queries.float().reshape(kv_heads, group * length, head_dim) * scaling
    later = torch.ones(length, length, dtype=torch.bool).triu(1).repeat(group, 1)
    sums = torch.zeros(heads, tokens)
    # Whole query heads at a time, and one piece of memory for all: fresh megabytes cost more than the arithmetic.
    at_once = max(1, min(group, LOGITS_AT_ONCE // (length * (tokens + length))))
    scratch = torch.empty(at_once * length, tokens + length)
    for head in range(kv_heads):
        prefix, suffix = prefix_keys[head].float().T, suffix_keys[head].float().T
        for first in range(0, group, at_once):
            rows = slice(first * length, min(group, first + at_once) * length)
            block = grouped[head, rows]
            logits = scratch[: len(block)]
            torch.mm(block, prefix, out=logits[:, :tokens])
            torch.mm(block, suffix, out=logits[:, tokens:])
            logits[:, tokens:].masked_fill_(later[rows], float("-inf"))
            weights = torch.softmax(logits, dim=-1, out=logits)
            own = weights.view(-1, length, tokens + length)[:, :, :tokens]
            torch.sum(own, 1, out=sums[head * group + first : head * group + first + len(own)])
    return sums


def _sums_on_device(
    queries: torch.Tensor, prefix_keys: torch.Tensor, suffix_keys: torch.Tensor, scaling: float
) -> torch.Tensor:
    """As `column_sums`, all KV heads at once: few large kernels, and bounded memory for suffixes of any length."""
    kv_heads, tokens, head_dim = prefix_keys.shape
    heads, length, _ = queries.shape
    group = heads // kv_heads
    grouped = queries.float().reshape(kv_heads, group, length, head_dim)
    keys = grouped.new_empty(kv_heads, tokens + length, head_dim)
    keys[:, :tokens], keys[:, tokens:] = prefix_keys, suffix_keys
    later = torch.ones(length, length, dtype=torch.bool, device=keys.device).triu(1)
    sums = keys.new_zeros(kv_heads, group, tokens)
    rows = max(1, DEVICE_LOGITS_AT_ONCE // (kv_heads * (tokens + length)))
    some_heads, some_queries = max(1, min(group, rows // length)), min(length, rows)
    scratch = keys.new_empty(kv_heads * some_heads * some_queries * (tokens + length))
    for first in range(0, group, some_heads):
        for begin in range(0, length, some_queries):
            block = grouped[:, first : first + some_heads, begin : begin + some_queries]
            shape = (kv_heads, block.shape[1] * block.shape[2], tokens + length)
            logits = scratch[: math.prod(shape)].view(shape)
            with _tf32_where_exact(queries.dtype):  # Scaled afterwards: scaled numbers would be rounded.
                torch.baddbmm(logits, block.flatten(1, 2), keys.mT, beta=0, alpha=scaling, out=logits)
            logits = logits.unflatten(1, block.shape[1:3])
            logits[..., tokens:].masked_fill_(later[begin : begin + some_queries], float("-inf"))
            weights = torch.softmax(logits, dim=-1)
            sums[:, first : first + some_heads] += weights[..., :tokens].sum(2)
    return sums.flatten(0, 1)


@contextmanager
def _tf32_where_exact(dtype: torch.dtype) -> Iterator[None]:
    """Inside, a GPU multiplies in TF32, which holds every number of a 16-bit `dtype` and is many times as fast."""
    if dtype not in (torch.bfloat16, torch.float16):
        yield
        return
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def best_tokens(mass: torch.Tensor, keep: int) -> Tokens:
    """The `keep` tokens with the most mass, per row: int64 `(rows, keep)`, ascending; ties go to the earlier token."""
    return choose_chunks(mass, keep, 0, 0).numpy()


def similarity(chosen: Tokens) -> float:
    """Mean Jaccard index of all pairs of rows of `(rows, keep)`; 1.0 for a single row."""
    named = np.zeros((len(chosen), int(chosen.max(initial=-1)) + 1), dtype=bool)
    np.put_along_axis(named, chosen, True, axis=1)
    pairs = [int(np.count_nonzero(one & other)) for one, other in combinations(named, 2)]
    return mean_jaccard(pairs, chosen.shape[1])


def mean_jaccard(pairs: Sequence[int], keep: int) -> float:
    """Mean Jaccard index of pairs of sets of `keep` tokens that have so many in common; 1.0 without a pair."""
    return float(np.mean([common / (2 * keep - common) for common in pairs])) if pairs else 1.0


def similar_enough(tokens: int, keep: int, exponent: float = 0.6) -> float:
    """From which `similarity` on probe heads speak for all: `E[J] ** 0.6`, where `E[J] = k / (2N - k)` is that of
    random choices of `k` of `N` tokens (IMPRESS, FAST'25)."""
    return float((keep / (2 * tokens - keep)) ** exponent)


def voted(chosen: Tokens, mass: torch.Tensor, keep: int) -> Tokens:
    """The `keep` tokens that the most rows have chosen; of equals, those with the most mass.

    Args:
        chosen: int64 `(rows, keep)`.
        mass: float32 `(rows, n)`, what they have chosen by.

    Returns:
        int64 `(keep,)`, ascending.
    """
    votes = np.bincount(chosen.ravel(), minlength=mass.shape[1])
    # The fewest votes with which a token may be among the best, and how many tokens have more.
    at_least = np.bincount(votes)[::-1].cumsum()[::-1]
    fewest = int(np.flatnonzero(at_least >= keep)[-1])
    certain = votes > fewest
    left = keep - int(np.count_nonzero(certain))
    candidates = np.flatnonzero(votes == fewest)
    if left < len(candidates):
        candidates = candidates[_heaviest(mass.sum(0).numpy()[candidates], left)]
    certain[candidates] = True
    return np.flatnonzero(certain)


def _heaviest(mass: npt.NDArray[np.float32], keep: int) -> npt.NDArray[np.bool_]:
    """Which are the `keep` largest, fewer than all; of equals the earlier ones. Without sorting all of them."""
    if not keep:
        return np.zeros(len(mass), dtype=bool)
    limit = np.partition(mass, len(mass) - keep)[len(mass) - keep]
    best: npt.NDArray[np.bool_] = mass > limit
    best[np.flatnonzero(mass == limit)[: keep - np.count_nonzero(best)]] = True
    return best
