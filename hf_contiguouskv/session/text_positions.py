"""Positions of text tokens, where the model would shift them by what it remembers of an earlier image."""

from __future__ import annotations

from typing import Any

from ..model.served_model import ServedModel
from .cached_sequence import CachedSequence
from .forward_inputs import foreign_inputs, text_positions


class TextPositions:
    """Gives the tokens of a text their own positions. It does nothing for models that shift none.

    Attributes:
        text_so_far: whether everything behind the prefix is text.
    """

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        self.text_so_far = True

    def place(self, held: CachedSequence, inputs: dict[str, Any], in_generate: bool, started_over: bool) -> None:
        """Set the positions of a forward in `inputs`.

        Positions that the user passes to a forward are left alone. `generate` computes them before it knows that its
        prompt starts over: those of a text are counted here, and with media the model finds them itself.

        Args:
            held: what is cached before the forward.
            inputs: its arguments by name, changed in place.
            in_generate: it is one of a `generate` call.
            started_over: that call has found another prompt in the cache than its own.
        """
        if not self._model.shifts_positions:
            return
        cached = held.length
        if cached == held.slot.tokens:
            self.text_so_far = True
        if foreign_inputs(inputs, self._model.is_multimodal):
            self.text_so_far = False
        if self.text_so_far:
            if in_generate or (inputs.get("position_ids") is None and cached > 0):
                inputs["position_ids"] = text_positions(inputs, cached)
        elif in_generate and started_over:
            inputs["position_ids"] = None
            if cached == 0:
                self._model.forget_shift()

    def forward_ended(self, in_generate: bool) -> None:
        """Forget the shift of this forward: `generate` adds it to the next prompt, before it asks what is cached."""
        if self.text_so_far or in_generate:
            self._model.forget_shift()
