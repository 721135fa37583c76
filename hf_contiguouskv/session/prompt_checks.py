"""Checks whether a prompt continues the cached tokens, and whether it begins with the prefix."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import InputError
from .cached_sequence import CachedSequence
from .forward_inputs import pads_before_prefix, repeats_cached

SEAM_TOKENS = 8
"""A prompt that differs only in the prefix's last tokens, up to this many, was probably tokenised across the
boundary."""


SURELY_THE_PREFIX = 16
"""At least this many tokens that equal the beginning of the prefix are taken for the prefix, not for new tokens."""


def is_refed(held: CachedSequence, inputs: dict[str, Any], from_generate: bool) -> bool:
    """Whether a forward passes the whole prompt, although its beginning is in the cache.

    Args:
        held: what the cache holds.
        inputs: the forward's arguments by name.
        from_generate: whether this is the first forward of a `generate` call.
    """
    repeats = repeats_cached(inputs, held.length)
    if repeats is not None:
        return repeats
    # Neither mask nor positions show where these tokens belong.
    ids, prefix = inputs["input_ids"], None if held.slot.attached is None else held.slot.ids
    if prefix is None:
        return False
    length = ids.shape[1]
    if held.suffix_length > 0 and not from_generate:
        # Tokens that repeat the beginning of a text may be new ones, as in a `DynamicCache`: texts repeat themselves.
        if held.automatic:
            return length > held.length and continues(held, ids, None)
        if length <= len(prefix):
            return False
    # Tokens that repeat the prefix are the prompt, but a few that repeat only its beginning may be new.
    shown = min(length, len(prefix))
    if shown < SURELY_THE_PREFIX and length <= len(prefix) - from_generate:
        return False
    return bool((ids[:, :shown].cpu() == prefix[:shown]).all())


def continues(held: CachedSequence, prompt: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether each row of `prompt`, int64 `(rows, n)`, provably begins with the cached tokens of the same row."""
    before = held.prefix
    hidden = mask == 0 if mask is not None and mask.shape == prompt.shape else None
    if held.suffix_length > 0 or before is None:
        return held.suffix.continued_by(prompt, hidden, before, held.suffix_length)
    rows = [row[skip : skip + len(before)].cpu() for row, skip in zip(prompt, _pads(prompt, mask), strict=True)]
    return all(torch.equal(row, before[: len(row)]) for row in rows)


def check_rows(prefix: torch.Tensor | None, ids: torch.Tensor, mask: torch.Tensor | None) -> None:
    """Raise `InputError` if whole prompts `(rows, n)` do not begin with the prefix after their left padding."""
    if prefix is None:
        return
    for row, skip in zip(ids, _pads(ids, mask), strict=True):
        check_ids(prefix, row[skip:], partial=True)


def check_ids(prefix: torch.Tensor, input_ids: torch.Tensor, partial: bool) -> None:
    """Raise `InputError` if ids (`[n]`, or `[batch, n]`: each row) do not begin with the prefix, int64 `(tokens,)`.

    With `partial`, ids shorter than the prefix need only match its beginning.
    """
    rows = input_ids[None] if input_ids.ndim == 1 else input_ids
    for position, row in enumerate(rows.cpu()):
        length = min(len(row), len(prefix))
        if length < len(prefix) and not partial:
            raise InputError(f"row {position} has {len(row)} tokens, fewer than the prefix of {len(prefix)}")
        differs = (row[:length] != prefix[:length]).nonzero()
        if len(differs):
            at = int(differs[0])
            left = len(prefix) - at
            remedy = (
                f"; if the tokenizer joins the end of the prefix with the question, leave the last {left} tokens out "
                f"of the prefix, or call crop({-left}) on this cache"
            )
            whole = "; pass the prefix and what follows it, as to any other cache"
            raise InputError(
                f"row {position} does not begin with the prefix of this cache: token {at} is {int(row[at])}, "
                f"expected {int(prefix[at])}" + (remedy if left <= SEAM_TOKENS else "" if at else whole)
            )


def check_embeddings(lm: Any, prefix: torch.Tensor, embeddings: torch.Tensor, mask: torch.Tensor | None) -> None:
    """Raise `InputError` if a prompt of embeddings `(rows, n, hidden)` does not begin with the embeddings of the
    prefix, int64 `(tokens,)`. A shorter prompt need only match their beginning."""
    with torch.no_grad():
        expected = lm.get_input_embeddings()(prefix.to(embeddings.device))
    for position, (row, skip) in enumerate(zip(embeddings, _pads(embeddings, mask), strict=True)):
        shown = row[skip : skip + len(prefix)]
        if not torch.equal(shown, expected[: len(shown)].to(shown.dtype)):
            raise InputError(
                f"row {position} of inputs_embeds does not begin with the embeddings of this cache's prefix"
            )


def shortest_row(prompt: torch.Tensor, mask: torch.Tensor | None) -> int:
    """Tokens of the shortest row of ids or embeddings, without left padding."""
    return prompt.shape[1] - (0 if mask is None else int(pads_before_prefix(mask).max()))


def _pads(prompt: torch.Tensor, mask: torch.Tensor | None) -> list[int]:
    pads: list[int] = [0] * len(prompt) if mask is None else pads_before_prefix(mask).tolist()
    return pads
