"""The tokens that a cache holds: an attached prefix, and the suffix after it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import InputError
from .attached_request import PrefixLayer
from .cached_tokens import CachedTokens
from .forward_inputs import Prompt
from .prefix_slot import PrefixSlot


@dataclass
class NewPrompt:
    """A prompt that the model computes in automatic mode.

    Attributes:
        prompt: the tokens passed so far.
        block: tokens per forward, if the prompt is computed in blocks.
        began: start of its first forward, in seconds of `time.perf_counter`.
        rows: number of equal rows of the batch for which one row is computed.
        stores: whether its K/V are exact and will be stored.
    """

    prompt: Prompt
    block: int | None
    began: float
    rows: int = 1
    stores: bool = True


class CachedSequence:
    """The tokens that a cache holds, and the operations that shorten them. Each method of a transformers cache that
    changes tokens or rows has one here.

    Args:
        slot: the slot that attaches the prefix.
        layers: the cache's layers.
        automatic: whether the prefix comes from the current prompt; otherwise the user has named it, and it stays.

    Attributes:
        slot, layers, automatic: as passed.
        suffix: ids of the tokens after the prefix.
        new_prompt: the prompt that the model is computing in automatic mode, or `None`.
    """

    def __init__(self, slot: PrefixSlot, layers: Sequence[PrefixLayer], automatic: bool) -> None:
        self.slot = slot
        self.layers = layers
        self.automatic = automatic
        self.suffix = CachedTokens()
        self.new_prompt: NewPrompt | None = None
        # Suffix length before the running (or interrupted) forward; `None` between forwards.
        self._before: int | None = None
        # Tokens that `crop` has left of a prefix that the user has named; later prompts use this many.
        self._cropped_to: int | None = None

    @property
    def length(self) -> int:
        """Tokens of prefix and suffix."""
        return int(self.layers[0].get_seq_length())

    @property
    def suffix_length(self) -> int:
        """Tokens after the prefix."""
        return self.length - self.slot.tokens

    @property
    def prefix(self) -> torch.Tensor | None:
        """The tokens of the attached prefix, int64 `(tokens,)`, or `None`."""
        ids = self.slot.ids
        return None if ids is None or self.slot.attached is None else ids[: self.slot.tokens]

    @property
    def may_start_over(self) -> bool:
        """Whether cached tokens may be dropped: all of them but a prefix that the user has named."""
        return self.automatic or self.slot.attached is None or self.suffix_length > 0

    # -- shortening ---------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Drop the suffix and keep a prefix that the user has named; in automatic mode drop everything."""
        slot = self.slot
        self._cropped_to = self.new_prompt = self._before = None
        if self.automatic:
            slot.ids = None
            slot.detach()
        elif slot.is_damaged and slot.ids is not None:
            # The stored prefix was damaged and is out of service, so compute it again.
            slot.attach_ids(slot.ids)
        elif slot.whole is not None:
            slot.attach(slot.whole)
        else:
            for layer in self.layers:
                layer.reset()
        self.suffix.clear()

    def next_prompt(self) -> None:
        """Make room for another prompt: like `reset`, but a cropped prefix stays cropped."""
        cropped = self._cropped_to
        self.reset()
        if cropped is not None and cropped < self.slot.tokens:
            self.shorten_prefix(cropped)
            self._cropped_to = cropped

    def forward_begins(self, inputs: dict[str, Any]) -> None:
        """Note that the model's forward is about to cache the tokens of these arguments (by name)."""
        self.suffix.append_new(inputs)
        self._before = self.suffix_length

    def forward_ended(self) -> None:
        """Note that every layer has cached the tokens of the forward."""
        self._before = None

    def repair(self) -> None:
        """Recover from an interrupted forward: start over if it was the first one after the prefix.

        Raises:
            InputError: it was a later forward, so the layers hold different tokens.
        """
        if self._before is None:
            return
        if self._before > 0:
            raise InputError(
                "an earlier forward with this cache was interrupted, its layers hold different tokens; call reset()"
            )
        self._before = None
        if self.automatic or self.slot.is_damaged:
            self.reset()
        else:
            self.slot.restart()
            self.suffix.clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens. A crop into a named prefix shortens it until `reset`.

        Raises:
            ValueError: the number is positive and a prefix is attached.
        """
        if self.slot.attached is not None and tokens_to_remove > 0:
            raise ValueError(
                f"crop takes a negative number of tokens to remove (or 0), got {tokens_to_remove}; to keep "
                f"{tokens_to_remove} of {self.length} tokens, pass {tokens_to_remove - self.length}"
            )
        if self.automatic and 0 < self.length <= -tokens_to_remove:
            self.reset()  # (Sliding-window layers could not be cropped.)
            return
        before = self.slot.tokens
        self.give_back(-tokens_to_remove)
        if self.slot.whole is not None and self.slot.tokens < before:
            self._cropped_to = self.slot.tokens

    def give_back(self, tokens: int) -> None:
        """Remove the last `tokens` tokens. If that reaches the prefix, begin a new request on the rest of the
        prefix."""
        left = self.length - tokens
        if self.slot.attached is None or left > self.slot.tokens or tokens == 0:
            for layer in self.layers:
                layer.crop(-tokens)
            self.suffix.crop(self.suffix_length)
        else:
            self.shorten_prefix(left)

    def shorten_prefix(self, tokens: int) -> None:
        """Begin a new request on the first `tokens` tokens of the prefix (0: without a prefix)."""
        self.slot.shorten(tokens)
        self._forget_suffix()

    def detach(self) -> None:
        """Drop prefix and suffix."""
        self.slot.detach()
        self._forget_suffix()

    def _forget_suffix(self) -> None:
        # Every layer is new: a forward that was interrupted has left nothing behind.
        self.suffix.clear()
        self._before = None

    # -- rows ---------------------------------------------------------------------------------------------------------

    def select_rows(self, rows: torch.Tensor, *, reorder: bool = False) -> None:
        """Keep only these rows (positions, or a bool mask), in this order. `reorder`: the rows are beams."""
        for layer in self.layers:
            (layer.reorder_cache if reorder else layer.batch_select_indices)(rows)  # type: ignore[arg-type]
        if self.slot.attached is not None:
            self.slot.attached.request.take_rows(rows)
        self.suffix.select(rows)

    def repeat_rows(self, times: int) -> None:
        """Repeat each row `times` times."""
        for layer in self.layers:
            layer.batch_repeat_interleave(times)
        if self.slot.attached is not None:
            self.slot.attached.request.repeat_rows(times)
        self.suffix.repeat(times)

    def copy_for(self, layers: Sequence[PrefixLayer], memo: dict[int, Any]) -> CachedSequence:
        """A copy for a copy of the cache with these `layers`."""
        twin = copy.copy(self)
        twin.slot, twin.layers = self.slot.copy_for(layers, memo), layers
        twin.suffix = copy.deepcopy(self.suffix, memo)
        twin.new_prompt = copy.copy(self.new_prompt)
        return twin
