"""Requests of systems that choose tokens and read blocks of them: AttentionStore with H2O, and IMPRESS.

Blocks have 64 tokens. How many of them hold a chosen token depends on how close chosen tokens lie together. Both
figures for that were measured: SmolLM2-135M and Qwen2.5-Coder-0.5B on text of 2,000 to 6,500 tokens, 5% of the tokens
(`python -m eval.plan_check` shows predicted beside measured bytes).
"""

from __future__ import annotations

import math

from ..store.reads import gap_worth_reading
from .costs import Case, HostWork
from .pipeline import Ask, LayerStep, RequestSteps
from .volumes import Volume, in_a_row, scattered

BLOCK_TOKENS = 64
# Chosen tokens lie as if they came in runs of this length: in the order of the text, and in the order of importance in
# which IMPRESS stores them.
RUN_TOKENS, REORDERED_RUN_TOKENS = 4.5, 6.0
# IMPRESS: the first three query heads probe (FAST'25). They agreed in 96% of the layers that were measured.
PROBE_HEADS = 3
AGREED = 0.96

_H2O = HostWork(28_173, 955, 201, 89, calls_per_piece=1.1)
_IMPRESS = HostWork(28_174, 1_638, 210, 93, calls_per_piece=1.5)
_LOOKAHEAD_BYTES = 64 * 2**20


def h2o(case: Case, budget: float, overlap: bool) -> RequestSteps:
    """AttentionStore with H2O: all keys of a layer are read, then the values of blocks that hold a chosen token.

    Args:
        case: the request.
        budget: share of the tokens that attention uses.
        overlap: keys are read ahead; else a layer's keys are asked for when it is its turn.
    """
    key_bytes = case.prefix_tokens * case.token_bytes / 2
    held = blocks_held(budget, RUN_TOKENS)
    units = case.model.shape.kv_heads * math.ceil(case.prefix_tokens / BLOCK_TOKENS) * held
    values = _scattered(case, units, held)
    choose = case.scoring_s(case.suffix_tokens, case.model.query_heads, key_bytes)
    return _chosen(case, budget, _H2O, in_a_row(key_bytes), choose, values, units, overlap)


def impress(case: Case, budget: float, overlap: bool) -> RequestSteps:
    """IMPRESS: the keys of the probe heads are read; where they agree, then the blocks that hold a chosen token.

    Args:
        case: the request.
        budget: share of the tokens that attention uses.
        overlap: the probe heads' keys are read ahead; else a layer asks for them when it is its turn.
    """
    shape = case.model.shape
    group = case.model.query_heads // shape.kv_heads
    # (Under grouped-query attention the first three heads may share one head of keys.)
    probing = min(shape.kv_heads, math.ceil(PROBE_HEADS / group))
    probed = case.prefix_tokens * case.token_bytes / 2 * probing / shape.kv_heads
    blocks, held = math.ceil(case.prefix_tokens / BLOCK_TOKENS), blocks_held(budget, REORDERED_RUN_TOKENS)
    keys = blocks * (shape.kv_heads - probing)
    # Values of the blocks, and their other keys; where the probing heads disagree, all other keys.
    units = blocks * held * shape.kv_heads + keys * (AGREED * held + 1 - AGREED)
    rest = _scattered(case, units, held, together=shape.kv_heads)
    choose = case.scoring_s(case.suffix_tokens, min(PROBE_HEADS, case.model.query_heads), probed)
    return _chosen(case, budget, _IMPRESS, in_a_row(probed), choose, rest, units, overlap)


def blocks_held(budget: float, run: float) -> float:
    """Share of the blocks that hold a chosen token, if `budget` of the tokens are chosen in runs of `run` tokens."""
    return 1.0 - float((1.0 - min(1.0, budget)) ** (BLOCK_TOKENS / run))


def _chosen(
    case: Case,
    budget: float,
    work: HostWork,
    first: Volume,
    choose_s: float,
    rest: Volume,
    pieces: float,
    overlap: bool,
) -> RequestSteps:
    windows = case.model.shape.layers.windows
    kept = math.ceil(case.prefix_tokens * budget)
    steps, used = [], 0.0
    for layer, window in enumerate(windows):
        if window is not None:  # Budgets apply to full attention: the window is read and used as a whole.
            nbytes = case.seen(layer) * case.token_bytes
            steps.append(LayerStep(*case.layer_s(work, case.seen(layer)), in_a_row(nbytes)))
            used += nbytes
            continue
        moved = 2.0 * kept * case.token_bytes
        steps.append(LayerStep(*case.layer_s(work, kept, moved, pieces), first, choose_s, (Ask(layer, rest),)))
        used += kept * case.token_bytes
    ahead = max(1, int(_LOOKAHEAD_BYTES / max(1.0, first.nbytes))) if overlap else 0
    return RequestSteps(steps, work.before_s(case.machine) + case.output_s(), ahead, used_bytes=used)


def _scattered(case: Case, units: float, held: float, together: int = 1) -> Volume:
    """Units (64 tokens of one head) of which a share `held` is wanted, so many `together` at a time."""
    unit_bytes = BLOCK_TOKENS * case.token_bytes // (2 * case.model.shape.kv_heads)
    gap = gap_worth_reading(case.machine.storage.bytes_s) if case.machine.has_accelerator else 0
    return scattered(units / together, held, unit_bytes * together, gap)
