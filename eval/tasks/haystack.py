"""Real text in which to hide sentences: passages of NQ-Open if there is a data folder, else Python's language
reference."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..documents import reference_text
from .base import TooFewRowsError, encode
from .rows import data_folder, load_rows, note_rows


def paragraphs(data_dir: Path | str | None) -> list[str]:
    """Pieces of about a hundred words, always in the same order."""
    if data_folder(data_dir) is None:
        pieces = [piece.strip() for piece in reference_text().split("\n\n") if len(piece) > 80]
        note_rows("language reference of Python", pieces)
        return pieces
    rows = load_rows("nq_open", "test", data_dir, None)
    return [document["text"] for row in rows for document in row["documents"]]


class Haystack:
    """Text of any length with sentences hidden in it.

    Args:
        tokenizer: the model's tokenizer.
        data_dir: local data.
    """

    def __init__(self, tokenizer: Any, data_dir: Path | str | None = None) -> None:
        self._tokenizer = tokenizer
        self._pieces = paragraphs(data_dir)

    def hide(
        self, needles: Sequence[tuple[float, str]], tokens: int, begin: str, chance: random.Random
    ) -> torch.Tensor:
        """About `tokens` token ids, int64 `(n,)`: `begin`, then paragraphs with the needles between them.

        Args:
            needles: depth (0 is the beginning, 1 the end) and text of each; a needle never cuts a paragraph.
            tokens: target length with needles; the text is shorter by less than a paragraph.
            begin: the text that comes first.
            chance: chooses the paragraphs.

        Raises:
            TooFewRowsError: there is too little text.
        """
        first = encode(self._tokenizer, begin)
        hidden = [(depth, encode(self._tokenizer, f"{text}\n\n")) for depth, text in needles]
        room = tokens - len(first) - sum(len(ids) for _, ids in hidden)
        order = chance.sample(range(len(self._pieces)), len(self._pieces))
        hay: list[torch.Tensor] = []
        for number in order:
            piece = encode(self._tokenizer, f"{self._pieces[number]}\n\n")
            if len(piece) > room:
                break
            hay.append(piece)
            room -= len(piece)
        else:
            raise TooFewRowsError(f"there is not enough text for {tokens} tokens")
        # Insert from the back, so that earlier places do not shift. (Of two needles in one place, the deeper is later.)
        pieces = len(hay)
        for depth, ids in sorted(hidden, key=lambda one: -one[0]):
            hay.insert(round(depth * pieces), ids)
        return torch.cat([first, *hay])
