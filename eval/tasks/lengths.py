"""Requests of given lengths, for time alone: nothing is asked, and no answer is judged."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Any

import torch

from ..documents import document_ids, reference_text
from .base import UNJUDGED, Request, TooFewRowsError

TEXT, RANDOM = "text:", "random:"


@dataclass(frozen=True)
class Lengths:
    """Requests that share one prefix and have different suffixes.

    Attributes:
        kind: `TEXT`: real text, and suffixes are what follows the prefix. `RANDOM`: random tokens, and random K and V
            stand for those of the prefix, so that it may be longer than the model's context.
        prefix_tokens: tokens of the prefix.
        suffix_tokens: tokens of each suffix.
        metric: none.
    """

    kind: str
    prefix_tokens: int
    suffix_tokens: int
    metric: str = UNJUDGED

    @classmethod
    def parse(cls, name: str) -> Lengths:
        """The task that `text:PREFIX+SUFFIX` or `random:PREFIX+SUFFIX` stands for.

        Raises:
            ValueError: two positive numbers with a plus between them are missing.
        """
        kind = next(kind for kind in (TEXT, RANDOM) if name.startswith(kind))
        found = re.fullmatch(r"([1-9]\d*)\+([1-9]\d*)", name.removeprefix(kind), re.ASCII)
        if found is None:
            raise ValueError(f"{name!r}: tokens of prefix and suffix must follow {kind}, as in {kind}8128+32")
        return cls(kind, int(found[1]), int(found[2]))

    @property
    def name(self) -> str:
        """As it is written."""
        return f"{self.kind}{self.prefix_tokens}+{self.suffix_tokens}"

    def requests(self, tokenizer: Any, count: int, seed: int = 0) -> list[Request]:
        """See `Task`. Another seed begins at another place of the text, or draws other tokens.

        Raises:
            TooFewRowsError: the text is too short.
        """
        tokens = self.prefix_tokens + count * self.suffix_tokens
        if self.kind == RANDOM:
            chance = torch.Generator().manual_seed(seed)
            # (Padding would be masked, and the end of a text may be padding, too.)
            known = torch.tensor(sorted({*range(tokenizer.vocab_size)} - {*tokenizer.all_special_ids}))
            ids = known[torch.randint(0, len(known), (tokens,), generator=chance)]
        else:
            begin = random.Random(seed).randrange(len(reference_text())) if seed else 0
            try:
                ids = document_ids(tokenizer, tokens, begin)
            except ValueError as error:
                raise TooFewRowsError(str(error)) from error
        prefix, suffixes = ids[: self.prefix_tokens], ids[self.prefix_tokens :].split(self.suffix_tokens)
        return [
            Request(self.name, number, prefix, 0, suffix, (), computed=self.kind == TEXT)
            for number, suffix in enumerate(suffixes)
        ]
