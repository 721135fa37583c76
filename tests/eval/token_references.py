"""AS+H2O and IMPRESS as slow attention functions over the whole cache: what they do not choose is hidden.

They share nothing with `eval.systems`: sets and loops over tokens, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import combinations
from math import ceil, exp, sqrt
from typing import Any

import torch
from transformers import AttentionInterface

# Chooses for one layer: (weights (heads, q, n) over prefix tokens, heads per KV head, layer) -> a set per KV head.
Choose = Callable[[torch.Tensor, int, int], list[set[int]]]


def weights_of(query: torch.Tensor, keys: torch.Tensor, prefix: int) -> torch.Tensor:
    """Softmax weights of every query head on the prefix, float64 `(heads, q, prefix)`, number by number."""
    heads, length, head_dim = query.shape
    group = heads // keys.shape[0]
    found = torch.zeros(heads, length, prefix, dtype=torch.float64)
    for head in range(heads):
        for position in range(length):
            seen = keys[head // group, : prefix + position + 1].double()
            logits = (seen @ query[head, position].double() / sqrt(head_dim)).tolist()
            powers = [exp(one - max(logits)) for one in logits]
            for token in range(prefix):
                found[head, position, token] = powers[token] / sum(powers)
    return found


def best(scores: list[float], count: int) -> set[int]:
    return set(sorted(range(len(scores)), key=lambda token: (-scores[token], token))[:count])


def h2o(budget: float) -> Choose:
    def choose(weights: torch.Tensor, group: int, layer: int) -> list[set[int]]:
        heads, _, tokens = weights.shape
        count = ceil(round(tokens * budget, 6))
        found = []
        for first in range(0, heads, group):
            scores = [sum(float(weights[first + h, :, token].sum()) for h in range(group)) for token in range(tokens)]
            found.append(best(scores, count))
        return found

    return choose


def blocks_of(order: list[int], block: int = 64) -> list[list[int]]:
    """Tokens in the order in which they are stored, block by block."""
    return [order[begin : begin + block] for begin in range(0, len(order), block)]


def whole_blocks(chosen: set[int], blocks: list[list[int]], block: int) -> set[int]:
    """Blocks that hold the most chosen tokens, until they hold as many tokens as were chosen, in whole blocks."""
    ranked = sorted(range(len(blocks)), key=lambda one: (-len(chosen & set(blocks[one])), one))
    room = min(sum(map(len, blocks)), ceil(len(chosen) / block) * block)
    return set([token for one in ranked for token in blocks[one]][:room])


def impress(
    budget: float, probes: list[int], agreed: list[bool], blocks: list[list[list[int]]] | None = None, block: int = 64
) -> Choose:
    """`agreed` gets one entry for each layer. With `blocks`, those of each layer, whole blocks are used."""

    def choose(weights: torch.Tensor, group: int, layer: int) -> list[set[int]]:
        heads, _, tokens = weights.shape
        count = ceil(round(tokens * budget, 6))
        scores = [[float(weights[head, :, token].sum()) for token in range(tokens)] for head in range(heads)]
        named = [best(scores[head], count) for head in probes]
        pairs = [len(one & other) / len(one | other) for one, other in combinations(named, 2)]
        expected = count / (2 * tokens - count)
        agreed.append(not pairs or sum(pairs) / len(pairs) >= expected**0.6)
        if agreed[-1]:
            ranked = sorted(
                range(tokens),
                key=lambda token: (
                    -sum(token in names for names in named),
                    -sum(scores[head][token] for head in probes),
                ),
            )
            chosen = set(ranked[:count])
        else:
            chosen = best([sum(scores[head][token] for head in range(heads)) for token in range(tokens)], count)
        if blocks is not None:
            chosen = whole_blocks(chosen, blocks[layer], block)
        return [chosen] * (heads // group)

    return choose


@contextmanager
def attending(model: Any, prefix: int, choose: Choose) -> Iterator[None]:
    """Inside, suffix queries of `model` see what `choose` names of the first `prefix` tokens, and the suffix."""
    before = model.config._attn_implementation

    def attention(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any
    ) -> tuple[torch.Tensor, None]:
        _, heads, length, head_dim = query.shape
        group = heads // key.shape[1]
        chosen = choose(weights_of(query[0], key[0], prefix), group, module.layer_idx)
        out = torch.zeros(1, length, heads, head_dim, dtype=query.dtype)
        for head in range(heads):
            for position in range(length):
                seen = sorted(chosen[head // group]) + list(range(prefix, prefix + position + 1))
                logits = key[0, head // group, seen].double() @ query[0, head, position].double() / sqrt(head_dim)
                mixed = logits.softmax(0) @ value[0, head // group, seen].double()
                out[0, position, head] = mixed.to(query.dtype)
        return out, None

    AttentionInterface.register("token_reference", attention)
    model.config._attn_implementation_internal = "token_reference"
    try:
        yield
    finally:
        model.config._attn_implementation_internal = before
