"""Fitting the arguments of a forward to the prefix that a cache has attached."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..config import ContiguousKVConfig
from ..errors import InputError
from ..model.fingerprint import model_fingerprint
from ..model.peft_adapters import require_one_adapter
from ..model.transformers_internals import GenerateCall, cut_before_blocks, forget_shift
from .forward_inputs import (
    cut_cached,
    foreign_inputs,
    mask_behind_prefix,
    pads_before_prefix,
    rows_of,
    sees_everything,
    text_positions,
    uncut_prefix,
)

if TYPE_CHECKING:
    from ..cache.contiguous_cache import ContiguousKVCache

FEWEST_VOTERS = 4
"""A pruned prefix that leaves fewer tokens of the prompt to choose its chunks gives some of its own back."""


SEAM_TOKENS = 8
"""A prompt that differs from the prefix in so many of its last tokens was probably tokenised across the seam."""


def voters_wanted(config: ContiguousKVConfig) -> int:
    """How many tokens of a prompt should stay behind a pruned prefix, because their queries choose its chunks."""
    return 1 if config.budget == 1.0 else config.selection.queries or config.chunk_size


def begin_prompt(cache: ContiguousKVCache, call: GenerateCall) -> None:
    """A `generate` is about to use what `cache` holds: keep what its prompt provably continues, and nothing else.

    Raises:
        InputError: the prompt does not begin with the prefix of the cache.
    """
    if cache.get_seq_length() == 0:
        return
    prompt, mask = call.whole_prompt, call.attention_mask
    if call.embeddings is not None:
        if cache._suffix_length() > 0:
            cache.next_prompt()  # Nothing can be said about what embeddings continue.
        if cache._attached is None:
            return
        prompt = call.embeddings
        _check_embeddings(cache, prompt, mask)
    elif prompt is None:
        return
    elif _may_start_over(cache) and not _continues(cache, prompt, mask):
        cache.next_prompt()
        cache._started_over = True
    if cache._suffix_length() > 0:
        _leave(cache, prompt.shape[1], 1)
    if call.block and cache.get_seq_length() > 0:
        cut_before_blocks(call)
    if cache._attached is None:
        return
    if call.embeddings is None:
        check_rows(cache, prompt, mask)
    prefix, left = cache._attached.request.prefix.tokens, _shortest_row(prompt, mask)
    keep_back = voters_wanted(cache._attached.request.plan.config)
    if cache._suffix_length() == 0 and left - prefix < min(keep_back, FEWEST_VOTERS):
        # Cut before `generate` cuts the prompt by what is cached.
        cache.shorten_prefix(max(0, left - keep_back))


def _may_start_over(cache: ContiguousKVCache) -> bool:
    """Whether what is cached may be forgotten: anything but the prefix that the user has named."""
    return cache._automatic is not None or cache._attached is None or cache._suffix_length() > 0


def _continues(cache: ContiguousKVCache, prompt: torch.Tensor, mask: torch.Tensor | None) -> bool:
    prefix = cache.prefix_ids
    before = prefix[: cache._tokens()] if prefix is not None and cache._attached is not None else None
    hidden = mask == 0 if mask is not None and mask.shape == prompt.shape else None
    if cache._suffix_length() > 0 or before is None:
        return cache._suffix_ids.continued_by(prompt, hidden, before, cache._suffix_length())
    pads = [0] * len(prompt) if mask is None else pads_before_prefix(mask).tolist()
    rows = [row[skip : skip + len(before)].cpu() for row, skip in zip(prompt, pads, strict=True)]
    return all(torch.equal(row, before[: len(row)]) for row in rows)


def _check_embeddings(cache: ContiguousKVCache, embeddings: torch.Tensor, mask: torch.Tensor | None) -> None:
    """Raise `InputError` if a prompt of embeddings does not begin with those of the prefix, as far as it goes."""
    model: Any = cache._living_model()
    assert cache.prefix_ids is not None
    ids = cache.prefix_ids[: cache._tokens()]
    with torch.no_grad():
        expected = model.get_input_embeddings()(ids.to(embeddings.device))
    pads = [0] * len(embeddings) if mask is None else pads_before_prefix(mask).tolist()
    for position, (row, skip) in enumerate(zip(embeddings, pads, strict=True)):
        shown = row[skip : skip + len(ids)]
        if not torch.equal(shown, expected[: len(shown)].to(shown.dtype)):
            raise InputError(
                f"row {position} of inputs_embeds does not begin with the embeddings of this cache's prefix"
            )


def _shortest_row(prompt: torch.Tensor, mask: torch.Tensor | None) -> int:
    """Tokens of the shortest row of ids or embeddings, left padding not counted."""
    return prompt.shape[1] - (0 if mask is None else int(pads_before_prefix(mask).max()))


def drop_cached(cache: ContiguousKVCache, inputs: dict[str, Any], generate_begins: bool) -> None:
    """The whole prompt is passed although some of it is cached: keep what is new of it, and at least one token.

    What is cached and is not its beginning is forgotten first.
    """
    ids, mask, needed = inputs["input_ids"], inputs.get("attention_mask"), inputs.get("logits_to_keep", 0)
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        mask = None
    if _may_start_over(cache) and not _continues(cache, ids, mask):
        cache.next_prompt()
    cached, length = cache.get_seq_length(), ids.shape[1]
    if cached == 0:
        return
    if not generate_begins and (not isinstance(needed, int) or not 1 <= needed <= length):
        if cache._automatic is not None:
            cache.next_prompt()  # Logits of all tokens are wanted: all are computed.
            return
        raise InputError(
            f"{cached} of these {length} tokens are in the cache already, and have no logits: pass the new tokens "
            "only, with an attention mask that covers both (or position ids), or say with logits_to_keep how many "
            "logits you need"
        )
    needed = max(1, needed) if isinstance(needed, int) else 1
    if cache._attached is not None:
        check_rows(cache, ids, mask)
    if length < cached:
        raise InputError(f"the prompt has {length} tokens, fewer than the {cached} that the cache holds")
    _leave(cache, length, needed)
    cut_cached(inputs, cache.get_seq_length())


def _leave(cache: ContiguousKVCache, length: int, needed: int) -> None:
    """Give back the end of what is cached of a prompt of `length` tokens, so that `needed` are left to compute."""
    if length - cache.get_seq_length() < needed and cache._suffix_length() > 0 and any(cache._support.plan.windows):
        cache.next_prompt()  # Windows do not remember what has left them.
    missing = needed - (length - cache.get_seq_length())
    if missing > 0 and cache.get_seq_length() > 0:
        cache.give_back(missing)


def fit_to_prefix(
    cache: ContiguousKVCache,
    inputs: dict[str, Any],
    generate_begins: bool,
    more_follows: bool,
) -> None:
    """Make a forward's arguments fit the attached prefix, and begin its request with the first suffix tokens.

    Args:
        cache: with a prefix attached.
        inputs: the forward's arguments by name, without what is cached; changed in place.
        generate_begins: this is the first forward of a `generate` call.
        more_follows: the tokens are a block of a prompt that goes on (chunked prefill).
    """
    assert cache._attached is not None
    cache._attached.expected = None
    cached = cache.get_seq_length()
    request, mask = cache._attached.request, inputs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        moved = mask_behind_prefix(mask, request.prefix.tokens, more_follows)
        if moved is not mask and any(request.plan.layers.windows):
            _compute_everything(cache, inputs, request.prefix.tokens)
            return
        inputs["attention_mask"] = moved
        if request.rows is None and not request.keeps_all and not bool(moved[:, : request.prefix.tokens].all()):
            raise InputError("the attention mask hides tokens of a prefix that is pruned; use budget=1.0")
    elif isinstance(mask, torch.Tensor) and not request.keeps_all:
        raise InputError("a 4D attention mask cannot say what to do with a pruned prefix; pass a 2D mask")
    if cache._automatic is None:
        require_one_adapter(cache._living_model())
    if request.rows is None:
        if cache._automatic is None and model_fingerprint(cache._living_model()) != cache._fingerprint:
            raise InputError(
                "the model's weights, adapters or configuration have changed since this cache was made: its prefix "
                "does not fit any more; make a new cache"
            )
        drafts = inputs.get("logits_to_keep", 1) if generate_begins else 1
        drafts = drafts - 1 if isinstance(drafts, int) and drafts > 1 else 0
        request.begin(rows_of(inputs, cached, drafts))
    cache._attached.plain = not foreign_inputs(inputs, cache._multimodal) and sees_everything(inputs)


def place_tokens(cache: ContiguousKVCache, inputs: dict[str, Any], in_generate: bool) -> None:
    """Give tokens their own positions, where the model would shift them by what it remembers of an earlier image.

    Positions that the user passes to a forward are left alone. `generate` computes them before it knows that its prompt
    starts over: of a text they are counted here, and with media the model finds them itself.
    """
    if not cache._shifted:
        return
    cached = cache.get_seq_length()
    if cached == cache._tokens():
        cache._text_so_far = True
    if foreign_inputs(inputs, cache._multimodal):
        cache._text_so_far = False
    if cache._text_so_far:
        if in_generate or (inputs.get("position_ids") is None and cached > 0):
            inputs["position_ids"] = text_positions(inputs, cached)
    elif in_generate and cache._started_over:
        inputs["position_ids"] = None
        if cached == 0:
            forget_shift(cache._shifted)


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
            left = len(prefix_ids) - at
            remedy = (
                f"; if the tokenizer joins the end of the prefix with the question, leave the last {left} tokens out "
                f"of the prefix, or call crop({-left}) on this cache"
            )
            raise InputError(
                f"row {position} does not begin with the prefix of this cache: token {at} is {int(row[at])}, "
                f"expected {int(prefix_ids[at])}" + (remedy if left <= SEAM_TOKENS else "")
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
