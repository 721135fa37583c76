"""Fitting the arguments of a forward to the prefix that a cache has attached."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .errors import InputError
from .forward import cut_cached, is_refed, mask_behind_prefix, pads_before_prefix, rows_of, uncut_prefix
from .store.fingerprint import model_fingerprint

if TYPE_CHECKING:
    from .cache import ContiguousKVCache


def fit_to_prefix(cache: ContiguousKVCache, inputs: dict[str, Any], generate_begins: bool, more_follows: bool) -> None:
    """Make a forward's arguments fit the attached prefix, and begin its request with the first suffix tokens.

    Args:
        cache: with a prefix attached.
        inputs: the forward's arguments by name; changed in place.
        generate_begins: this is the first forward of a `generate` call.
        more_follows: the tokens are a block of a prompt that goes on (chunked prefill).
    """
    assert cache._attached is not None
    cache._attached.require_active()
    cache._attached.expected = None
    cached = cache.get_seq_length()
    if is_refed(inputs, cached, generate_begins, cache.prefix_ids):
        _cut_refed(cache, inputs, cached, generate_begins)
        cached = cache.get_seq_length()
    if cache._attached is None:  # The whole prefix had to be given up.
        return
    request, mask = cache._attached.request, inputs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        moved = mask_behind_prefix(mask, request.prefix.tokens, more_follows)
        if moved is not mask and any(request.plan.windows):
            _compute_everything(cache, inputs, request.prefix.tokens)
            return
        inputs["attention_mask"] = moved
        if request.rows is None and not request.keeps_all and not bool(moved[:, : request.prefix.tokens].all()):
            raise InputError("the attention mask hides tokens of a prefix that is pruned; use budget=1.0")
    elif isinstance(mask, torch.Tensor) and not request.keeps_all:
        raise InputError("a 4D attention mask cannot say what to do with a pruned prefix; pass a 2D mask")
    if request.rows is None:
        if cache._automatic is None and model_fingerprint(cache._living_model()) != cache._fingerprint:
            raise InputError(
                "the model's weights, adapters or configuration have changed since this cache was made: its prefix "
                "does not fit any more; make a new cache"
            )
        drafts = inputs.get("logits_to_keep", 1) if generate_begins else 1
        drafts = drafts - 1 if isinstance(drafts, int) and drafts > 1 else 0
        request.begin(rows_of(inputs, cached, drafts))


def _cut_refed(cache: ContiguousKVCache, inputs: dict[str, Any], cached: int, generate_begins: bool) -> None:
    """The whole prompt is at hand although most of it is cached: keep what is new, and at least one token."""
    needed, length = inputs.get("logits_to_keep", 0), inputs["input_ids"].shape[1]
    if not generate_begins and (not isinstance(needed, int) or needed < 1 or needed > length - cached):
        raise InputError(
            f"{cached} of these {length} tokens are in the cache already: pass the new ones only (the attention "
            "mask covers both), or logits_to_keep for no more than the new ones"
        )
    needed = max(1, needed) if isinstance(needed, int) else 1
    mask = inputs.get("attention_mask")
    check_rows(cache, inputs["input_ids"], mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None)
    if length < cached:
        raise InputError(f"the prompt has {length} tokens, fewer than the {cached} that the cache holds")
    if length - cached < needed:
        cache.crop(length - cached - needed)
    cut_cached(inputs, cache.get_seq_length())


def check_rows(cache: ContiguousKVCache, ids: torch.Tensor, mask: torch.Tensor | None) -> None:
    """Make sure that whole prompts begin with the prefix, behind their left padding."""
    pads = [0] * len(ids) if mask is None else pads_before_prefix(mask).tolist()
    for row, skip in zip(ids, pads, strict=True):
        cache.check(row[skip:], partial=True)


def check_ids(prefix_ids: torch.Tensor, input_ids: torch.Tensor, partial: bool) -> None:
    """Raise `InputError` if ids (`[n]`, or `[batch, n]`: each row) do not begin with the prefix, int64 `(tokens,)`.

    With `partial`, ids shorter than the prefix need only agree as far as they go.
    """
    rows = input_ids[None] if input_ids.ndim == 1 else input_ids
    for position, row in enumerate(rows.cpu()):
        length = min(len(row), len(prefix_ids))
        if length < len(prefix_ids) and not partial:
            raise InputError(f"row {position} has {len(row)} tokens, fewer than the prefix of {len(prefix_ids)}")
        differs = (row[:length] != prefix_ids[:length]).nonzero()
        if len(differs):
            at = int(differs[0])
            raise InputError(
                f"row {position} does not begin with the prefix of this cache: token {at} is {int(row[at])}, "
                f"expected {int(prefix_ids[at])}"
            )


def _compute_everything(cache: ContiguousKVCache, inputs: dict[str, Any], tokens: int) -> None:
    """Left padding before the prefix on a model with sliding windows: they count columns, and the padding cannot
    be moved behind the prefix. This request computes the prefix with its rows, exactly; `reset` attaches it again.
    """
    ids = inputs.get("input_ids")
    if cache.get_seq_length() > tokens or not isinstance(ids, torch.Tensor) or cache.prefix_ids is None:
        raise InputError(
            "left padding before the prefix is not supported on a model with sliding-window attention once a "
            "suffix is cached, or with inputs_embeds; pad between prefix and suffix, or pass one row at a time"
        )
    uncut_prefix(inputs, cache.prefix_ids[:tokens])
    cache._attach(None)
