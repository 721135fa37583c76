"""A tokenizer for tests that need neither a model nor a download."""

from __future__ import annotations

import re

import torch


class Words:
    """A tokenizer that keeps every piece: words with the space before them, and single other characters."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.numbers: dict[str, int] = {}

    def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        found = []
        for piece in re.findall(r" ?\w+|\W", text):
            if piece not in self.numbers:
                self.numbers[piece] = len(self.pieces)
                self.pieces.append(piece)
            found.append(self.numbers[piece])
        return {"input_ids": found}

    def decode(self, ids: torch.Tensor) -> str:
        return "".join(self.pieces[int(number)] for number in ids)
