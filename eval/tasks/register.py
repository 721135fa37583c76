"""A register in a text: numbers of cities are scattered over it, and one answer names a dozen of them.

What the end of the answer looks up, its beginning did not need.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .base import Request, answer_turn, encode, user_turn
from .haystack import Haystack
from .needle import CITIES, evenly

MORE_CITIES = (
    *("Athens", "Bangkok", "Berlin", "Boston", "Chicago", "Dallas", "Denver", "Dublin", "Geneva", "Hanoi", "Havana"),
    *("Houston", "Jakarta", "Karachi", "Lagos", "London", "Madrid", "Manila", "Miami", "Milan", "Moscow", "Munich"),
    *("Nairobi", "Osaka", "Paris", "Prague", "Rome", "Seattle", "Shanghai", "Sydney", "Tehran", "Tokyo", "Toronto"),
    *("Venice", "Vienna", "Warsaw"),
)
_BEGIN = user_turn("Read this text. It hides the secret numbers of many cities.\n\n")


@dataclass(frozen=True)
class Register:
    """Secret numbers of cities in real text, of which each request wants some as JSON lines.

    Attributes:
        rows: cities in one text, at most 48. (With more, or with longer numbers, a model of half a billion parameters
            mixes them up even with the whole cache.)
        questions: requests with one text.
        asked: how many of them one answer names, in an order that has nothing to do with that of the text.
        tokens: tokens of the prefix.
        data_dir: local data.
    """

    rows: int = 24
    questions: int = 4
    asked: int = 12
    tokens: int = 4096
    data_dir: Path | str | None = None
    name: str = "register"
    metric: str = "needle_recall"

    def requests(self, tokenizer: Any, count: int, seed: int = 0) -> list[Request]:
        """The first `count` requests; `count / questions` prefixes, rounded up.

        Rows are spread evenly over the text, and those that a request wants have an order of their own.
        """
        haystack = Haystack(tokenizer, self.data_dir)
        chance = random.Random(f"{self.name} {seed}")
        found: list[Request] = []
        while len(found) < count:
            prefix = len(found) // self.questions
            cities = chance.sample([*CITIES, *MORE_CITIES], self.rows)
            numbers = chance.sample(range(100, 1000), self.rows)
            needles = [
                ((place + evenly(prefix)) / self.rows, f"The secret number of {city} is {secret}. Remember it.")
                for place, (city, secret) in enumerate(zip(cities, numbers, strict=True))
            ]
            prefix_ids = haystack.hide(needles, self.tokens, _BEGIN, chance)
            for _ in range(self.questions):
                some = chance.sample(range(self.rows), self.asked)
                found.append(
                    self._request(tokenizer, len(found), prefix_ids, prefix, [(cities[n], numbers[n]) for n in some])
                )
        return found[:count]

    def _request(
        self, tokenizer: Any, number: int, prefix_ids: torch.Tensor, prefix: int, wanted: list[tuple[str, int]]
    ) -> Request:
        question = (
            f"What are the secret numbers of these {self.asked} cities, in this order: "
            f"{', '.join(city for city, _ in wanted)}? "
            'Answer with one JSON object per line, with the fields "city" and "number".'
        )
        # A number counts with its city only. (The first city is in the prompt.)
        lines = [f'"city": "{city}", "number": {secret}}}' for city, secret in wanted]
        answers = (f"{wanted[0][1]}}}", *lines[1:])
        return Request(
            self.name,
            number,
            prefix_ids,
            prefix,
            encode(tokenizer, answer_turn(question, f'{{"city": "{wanted[0][0]}", "number":')),
            answers,
            max_new_tokens=16 * self.asked,
            # Recall by position is read off the rows.
            about=(("answers", list(answers)),),
        )


def register(data_dir: Path | str | None = None) -> Register:
    """Twelve of 24 cities in 4,096 tokens."""
    return Register(data_dir=data_dir)
