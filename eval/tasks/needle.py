"""A needle in a haystack: one sentence of a long text answers the question; with several keys, others look like it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .base import Request, answer_turn, encode, user_turn
from .haystack import Haystack

# Needles in one prefix, by the name of the task.
NEEDLES = {"needle": 1, "needle_multikey": 4}
# With less, needles and question are most of the text.
_LEAST_TOKENS = 256
CITIES = ("Lisbon", "Oslo", "Cairo", "Lima", "Quito", "Seoul", "Delhi", "Accra", "Turin", "Kyoto", "Perth", "Riga")
_BEGIN = user_turn("Read this text. It hides secret numbers.\n\n")


def evenly(number: int) -> float:
    """A number between 0 and 1: 1/2, 1/4, 3/4, 1/8, 5/8, ... (van der Corput); the first `n` are spread evenly."""
    found, share, left = 0.0, 0.5, number + 1
    while left:
        found += share * (left % 2)
        left, share = left // 2, share / 2
    return found


@dataclass(frozen=True)
class Needle:
    """Secret numbers of cities in real text.

    Attributes:
        name: name of the task.
        keys: needles in one prefix; each is asked for, so a prefix has as many requests.
        tokens: tokens of the prefix.
        data_dir: local data.
    """

    name: str
    keys: int
    tokens: int = 2048
    data_dir: Path | str | None = None
    metric: str = "needle_recall"

    def requests(self, tokenizer: Any, count: int, seed: int = 0) -> list[Request]:
        """The first `count` requests; `count / keys` prefixes, rounded up.

        Depths are spread evenly over the text: each prefix has one needle in each of `keys` equal parts, at a place
        that follows van der Corput's sequence.
        """
        haystack = Haystack(tokenizer, self.data_dir)
        chance = random.Random(f"{self.name} {seed}")
        prefixes = -(-count // self.keys)
        found: list[Request] = []
        for prefix in range(prefixes):
            mine = [(part + evenly(prefix)) / self.keys for part in range(self.keys)]
            cities = chance.sample(CITIES, self.keys)
            numbers = [str(chance.randint(10000, 99999)) for _ in cities]
            needles = [
                (depth, f"The secret number of {city} is {number}. Remember it.")
                for depth, city, number in zip(mine, cities, numbers, strict=True)
            ]
            prefix_ids = haystack.hide(needles, self.tokens, _BEGIN, chance)
            for depth, city, number in zip(mine, cities, numbers, strict=True):
                asked = answer_turn(f"What is the secret number of {city}?", f"The secret number of {city} is")
                found.append(
                    Request(
                        self.name,
                        len(found),
                        prefix_ids,
                        prefix,
                        encode(tokenizer, asked),
                        (number,),
                        max_new_tokens=8,
                        about=(("depth", round(depth, 4)),),
                    )
                )
        return found[:count]


def needle(data_dir: Path | str | None = None) -> Needle:
    """One needle in 2,048 tokens."""
    return Needle("needle", NEEDLES["needle"], data_dir=data_dir)


def needle_multikey(data_dir: Path | str | None = None) -> Needle:
    """Four needles in 2,048 tokens, of which one is asked for."""
    return Needle("needle_multikey", NEEDLES["needle_multikey"], data_dir=data_dir)


def needles_in(name: str, data_dir: Path | str | None = None) -> Needle:
    """The task that `needle:TOKENS` or `needle_multikey:TOKENS` stands for: needles in a prefix of that length.

    Raises:
        ValueError: no whole number from 256 on follows the colon.
    """
    kind, _, tokens = name.partition(":")
    if not (tokens.isascii() and tokens.isdecimal() and int(tokens) >= _LEAST_TOKENS):
        raise ValueError(f"{name!r}: tokens of the prefix, at least {_LEAST_TOKENS}, must follow {kind}:")
    return Needle(f"{kind}:{int(tokens)}", NEEDLES[kind], int(tokens), data_dir)
