"""Prepares the cache for a new prompt: keeps the tokens that the prompt provably continues, and leaves enough to
compute."""

from __future__ import annotations

from typing import Any

import torch

from ..config import ContiguousKVConfig
from ..errors import InputError
from ..model.transformers_internals import GenerateCall, cut_before_blocks
from .cached_sequence import CachedSequence
from .forward_inputs import cut_cached
from .prompt_checks import check_embeddings, check_rows, continues, shortest_row

FEWEST_VOTERS = 4
"""If a pruned prefix leaves fewer tokens of the prompt to choose its chunks, it is shortened."""


def voters_wanted(config: ContiguousKVConfig) -> int:
    """Number of prompt tokens that should follow a pruned prefix, because their queries choose its chunks."""
    return 1 if config.budget == 1.0 else config.selection.queries or config.chunk_size


def begin_prompt(held: CachedSequence, call: GenerateCall) -> bool:
    """Keep only the cached tokens that the prompt of a beginning `generate` provably continues.

    Returns:
        whether the prompt starts over, because the cache held another prompt.

    Raises:
        InputError: the prompt does not begin with the prefix of the cache.
    """
    if held.length == 0:
        return False
    started_over = False
    prompt, mask, slot = call.whole_prompt, call.attention_mask, held.slot
    if call.embeddings is not None:
        if held.suffix_length > 0:
            held.next_prompt()  # Whether embeddings continue a suffix is unknown.
        if held.prefix is None:
            return False
        prompt = call.embeddings
        check_embeddings(slot.source.model.lm, held.prefix, prompt, mask)
    elif prompt is None:
        return False
    elif held.may_start_over and not _goes_on(held, prompt, mask):
        held.next_prompt()
        started_over = True
    if held.suffix_length > 0:
        _leave(held, prompt.shape[1], 1)
    if call.block and held.length > 0:
        cut_before_blocks(call)
    if slot.attached is None:
        return started_over
    if call.embeddings is None:
        check_rows(held.prefix, prompt, mask)
    left, keep_back = shortest_row(prompt, mask), voters_wanted(slot.attached.request.plan.config)
    if held.suffix_length == 0 and left - slot.tokens < min(keep_back, FEWEST_VOTERS):
        # Shorten the prefix before `generate` cuts the cached tokens from the prompt.
        held.shorten_prefix(max(0, left - keep_back))
    return started_over


def drop_cached(held: CachedSequence, inputs: dict[str, Any], generate_begins: bool) -> None:
    """Cut the cached tokens from a forward that was passed the whole prompt; at least one token stays in `inputs`.

    Cached tokens that are not the beginning of the prompt are dropped first.

    Raises:
        InputError: logits of cached tokens are wanted, or the prompt is shorter than the cached tokens.
    """
    ids, mask, needed = inputs["input_ids"], inputs.get("attention_mask"), inputs.get("logits_to_keep", 0)
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        mask = None
    if held.may_start_over and not _goes_on(held, ids, mask):
        held.next_prompt()
    cached, length = held.length, ids.shape[1]
    if cached == 0:
        return
    if length < cached and not held.automatic and not generate_begins:
        raise InputError(
            f"{length} tokens were passed with a mask or positions of a whole prompt, but the cache holds {cached}: if "
            "they are new, pass an attention mask over all tokens, cached ones included, or none; if they are the "
            "prompt, it must begin with the prefix"
        )
    if not generate_begins and (not isinstance(needed, int) or not 1 <= needed <= length):
        if held.automatic:
            held.next_prompt()  # Logits of all tokens are wanted, so compute all tokens.
            return
        raise InputError(
            f"{cached} of these {length} tokens are in the cache already, and have no logits: pass the new tokens "
            "only, with an attention mask that covers both (or position ids), or say with logits_to_keep how many "
            "logits you need"
        )
    needed = max(1, needed) if isinstance(needed, int) else 1
    check_rows(held.prefix, ids, mask)
    if length < cached:
        raise InputError(f"the prompt has {length} tokens, fewer than the {cached} that the cache holds")
    _leave(held, length, needed)
    cut_cached(inputs, held.length)


def _goes_on(held: CachedSequence, prompt: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether a prompt goes on where the cache ends: it begins with the cached tokens, and they serve it.

    The chunks of a pruned prefix were chosen for the question that the cache holds. A further question needs others, so
    all tokens after the prefix are computed again. (With `reselect_every`, a request itself chooses again.)
    """
    if not continues(held, prompt, mask):
        return False
    attached = held.slot.attached
    if attached is None or attached.request.rows is None or attached.request.keeps_all:
        return True
    # The last token of an answer is not cached.
    asked = prompt.shape[1] - held.length - 1
    return asked < FEWEST_VOTERS or attached.request.plan.config.reselect_every is not None


def _leave(held: CachedSequence, length: int, needed: int) -> None:
    """Remove the last cached tokens of a prompt of `length` tokens, so that `needed` are left to compute."""
    missing = needed - (length - held.length)
    if missing > 0 and held.suffix_length > 0 and any(held.slot.source.model.windows):
        held.next_prompt()  # A sliding window cannot restore tokens that have left it.
        missing = needed - (length - held.length)
    if missing > 0 and held.length > 0:
        held.give_back(missing)
