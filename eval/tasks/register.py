"""A register in a text: numbers of cities are scattered over it, and one answer names a dozen of them.

What the end of the answer looks up, its beginning did not need.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """Secret numbers of cities in real text; each request has its own text, and wants some of them as JSON lines.

    Attributes:
        rows: cities in one text, at most 48. (With more, or with longer numbers, a model of half a billion parameters
            mixes them up even with the whole cache.)
        asked: how many of them one answer names, in an order that has nothing to do with that of the text.
        tokens: tokens of the prefix.
        data_dir: local data.
    """

    rows: int = 24
    asked: int = 12
    tokens: int = 4096
    data_dir: Path | str | None = None
    name: str = "register"
    metric: str = "needle_recall"

    def requests(self, tokenizer: Any, count: int, seed: int = 0) -> list[Request]:
        """The first `count` requests. Rows are spread evenly over the text."""
        haystack = Haystack(tokenizer, self.data_dir)
        chance = random.Random(f"{self.name} {seed}")
        found = []
        for number in range(count):
            cities = chance.sample([*CITIES, *MORE_CITIES], self.rows)
            numbers = chance.sample(range(100, 1000), self.rows)
            needles = [
                ((place + evenly(number)) / self.rows, f"The secret number of {city} is {secret}. Remember it.")
                for place, (city, secret) in enumerate(zip(cities, numbers, strict=True))
            ]
            prefix_ids = haystack.hide(needles, self.tokens, _BEGIN, chance)
            some = chance.sample(range(self.rows), self.asked)
            wanted = ", ".join(cities[one] for one in some)
            question = (
                f"What are the secret numbers of these {self.asked} cities, in this order: {wanted}? "
                'Answer with one JSON object per line, with the fields "city" and "number".'
            )
            # A number counts with its city only. (The first city is in the prompt.)
            lines = [f'"city": "{cities[one]}", "number": {numbers[one]}}}' for one in some]
            answers = (f"{numbers[some[0]]}}}", *lines[1:])
            found.append(
                Request(
                    self.name,
                    number,
                    prefix_ids,
                    number,
                    encode(tokenizer, answer_turn(question, f'{{"city": "{cities[some[0]]}", "number":')),
                    answers,
                    max_new_tokens=16 * self.asked,
                    # Recall by position is read off the run's rows.
                    about=(("answers", list(answers)),),
                )
            )
        return found


def register(data_dir: Path | str | None = None) -> Register:
    """Twelve of 24 cities in 4,096 tokens."""
    return Register(data_dir=data_dir)
