"""Fits the arguments of a forward to the prefix in front of its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..errors import InputError
from ..request.rows import NextTokens, Rows
from .forward_inputs import drafts_in, foreign_inputs, mask_behind_prefix, next_tokens, rows_of, sees_everything


@dataclass(frozen=True)
class Prefixed:
    """What `fit_to_prefix` must know about the attached prefix.

    Attributes:
        tokens: tokens of the prefix.
        cached: tokens of prefix and suffix.
        prunes: whether attention sees only selected chunks of the prefix.
        windowed: whether the model has layers with a sliding window.
        begun: whether an earlier forward has passed the first suffix tokens.
        multimodal: whether the model takes media, such as images.
    """

    tokens: int
    cached: int
    prunes: bool
    windowed: bool
    begun: bool
    multimodal: bool


@dataclass(frozen=True)
class Fitted:
    """A forward's arguments, fitted to the prefix.

    Attributes:
        attention_mask: the mask to pass on; `None` to leave it unchanged.
        rows: rows of the first suffix tokens; `None` if an earlier forward has passed them.
        later: what this forward passes, if an earlier one has passed the first suffix tokens.
        plain: whether all new tokens see all tokens before them.
        without_prefix: whether fitting is impossible, because left padding stands before the prefix and windows count
            its columns. The forward must then compute the prefix with its rows.
    """

    attention_mask: torch.Tensor | None = None
    rows: Rows | None = None
    later: NextTokens | None = None
    plain: bool = False
    without_prefix: bool = False


def fit_to_prefix(
    prefix: Prefixed, inputs: dict[str, Any], generate_begins: bool, more_follows: bool, in_generate: bool = False
) -> Fitted:
    """Fit a forward's arguments to a prefix.

    Args:
        prefix: the attached prefix.
        inputs: the forward's arguments by name, without cached tokens; they are not changed.
        generate_begins: whether this is the first forward of a `generate` call.
        more_follows: whether the tokens are a block of a prompt that goes on (chunked prefill).
        in_generate: whether the forward belongs to a `generate` call.

    Raises:
        InputError: the mask hides tokens of a pruned prefix, or has a form that cannot be served.
    """
    mask = inputs.get("attention_mask")
    fitted: torch.Tensor | None = None
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        fitted = mask_behind_prefix(mask, prefix.tokens, more_follows)
        if fitted is not mask and prefix.windowed:
            return Fitted(without_prefix=True)
        if not prefix.begun and prefix.prunes and not bool(fitted[:, : prefix.tokens].all()):
            raise InputError("the attention mask hides tokens of a prefix that is pruned; use budget=1.0")
        inputs = inputs | {"attention_mask": fitted}
    elif isinstance(mask, torch.Tensor) and prefix.prunes:
        raise InputError("a 4D attention mask cannot say what to do with a pruned prefix; pass a 2D mask")
    rows = later = None
    if prefix.begun:
        drafts = drafts_in(inputs, generate_begins, in_generate and not generate_begins and not more_follows)
        later = next_tokens(inputs, prefix.cached - prefix.tokens, drafts)
    else:
        rows = rows_of(inputs, prefix.cached, drafts_in(inputs, generate_begins, False))
    plain = not foreign_inputs(inputs, prefix.multimodal) and sees_everything(inputs)
    return Fitted(fitted, rows, later, plain)
