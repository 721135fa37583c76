"""Fitting the arguments of a forward to the prefix in front of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..errors import InputError
from ..request.rows import Rows
from .forward_inputs import foreign_inputs, mask_behind_prefix, rows_of, sees_everything


@dataclass(frozen=True)
class Prefixed:
    """What a forward must know of the prefix in front of it.

    Attributes:
        tokens: of the prefix.
        cached: tokens of prefix and suffix.
        prunes: whether attention sees only chosen chunks of the prefix.
        windowed: whether the model has layers with a sliding window.
        begun: whether the first suffix tokens were seen before.
        multimodal: whether the model takes images and the like.
    """

    tokens: int
    cached: int
    prunes: bool
    windowed: bool
    begun: bool
    multimodal: bool


@dataclass(frozen=True)
class Fitted:
    """A forward's arguments, as they fit the prefix.

    Attributes:
        attention_mask: to be passed on; `None`: as it was.
        rows: of the first suffix tokens; `None`: they were seen before.
        plain: whether all new tokens see all tokens before them.
        without_prefix: they cannot be fitted: left padding stands before the prefix, and windows count its columns. The
            forward has to compute the prefix with its rows.
    """

    attention_mask: torch.Tensor | None = None
    rows: Rows | None = None
    plain: bool = False
    without_prefix: bool = False


def fit_to_prefix(prefix: Prefixed, inputs: dict[str, Any], generate_begins: bool, more_follows: bool) -> Fitted:
    """What a forward's arguments must become behind a prefix.

    Args:
        prefix: in front of it.
        inputs: the forward's arguments by name, without what is cached; they are not changed.
        generate_begins: this is the first forward of a `generate` call.
        more_follows: the tokens are a block of a prompt that goes on (chunked prefill).

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
    rows = None
    if not prefix.begun:
        drafts = inputs.get("logits_to_keep", 1) if generate_begins else 1
        rows = rows_of(inputs, prefix.cached, drafts - 1 if isinstance(drafts, int) and drafts > 1 else 0)
    plain = not foreign_inputs(inputs, prefix.multimodal) and sees_everything(inputs)
    return Fitted(fitted, rows, plain)
