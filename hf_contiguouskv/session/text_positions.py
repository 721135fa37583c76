"""Positions of text tokens for models that would shift them by an offset remembered from an earlier image."""

from __future__ import annotations

from typing import Any

from ..model.served_model import ServedModel
from .cached_sequence import CachedSequence
from .forward_inputs import foreign_inputs, text_positions


class TextPositions:
    """Sets the plain positions of text tokens. Does nothing for models that shift no positions.

    Attributes:
        text_so_far: whether everything after the prefix is text.
    """

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        self.text_so_far = True

    def place(self, held: CachedSequence, inputs: dict[str, Any], in_generate: bool, started_over: bool) -> None:
        """Set the positions of a forward in `inputs`.

        Positions that the user passes to a forward are not changed. `generate` computes positions before it knows that
        its prompt starts over. Positions of a text are therefore computed here; with media the model computes them.

        Args:
            held: the tokens cached before the forward.
            inputs: the forward's arguments by name, changed in place.
            in_generate: whether the forward belongs to a `generate` call.
            started_over: whether that call found another prompt than its own in the cache.
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
        """Clear the shift of this forward, because `generate` adds it to the next prompt before it asks the cache."""
        if self.text_so_far or in_generate:
            self._model.forget_shift()
