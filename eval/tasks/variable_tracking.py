"""Variable tracking, in the manner of RULER: assignments are scattered over a text; which variables share a value?"""

from __future__ import annotations

import random
import string
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from .base import Request, answer_turn, encode, user_turn
from .haystack import Haystack

_BEGIN = user_turn("Memorize the chains of variable assignments that are hidden in this text.\n\n")


@dataclass(frozen=True)
class VariableTracking:
    """Chains "VAR ABCDE = 12345", "VAR FGHIJ = VAR ABCDE" and so on.

    Attributes:
        chains: chains in one prefix; each is asked for.
        hops: assignments after the first, per chain.
        tokens: tokens of the prefix.
        data_dir: local data.
    """

    chains: int = 2
    hops: int = 2
    tokens: int = 2048
    data_dir: Path | str | None = None
    name: str = "variable_tracking"
    metric: str = "needle_recall"

    def requests(self, tokenizer: Any, count: int, seed: int = 0) -> list[Request]:
        """The first `count` requests; `count / chains` prefixes, rounded up."""
        haystack = Haystack(tokenizer, self.data_dir)
        chance = random.Random(f"{self.name} {seed}")
        found: list[Request] = []
        while len(found) < count:
            prefix = len(found) // self.chains
            chains, needles = [], []
            for _ in range(self.chains):
                names = ["".join(chance.choices(string.ascii_uppercase, k=5)) for _ in range(self.hops + 1)]
                value = str(chance.randint(10000, 99999))
                chains.append((value, names))
                # In text order, each assignment comes after the one that it refers to.
                depths = sorted(chance.random() for _ in names)
                lines = [f"VAR {names[0]} = {value}"]
                lines += [f"VAR {new} = VAR {old}" for old, new in pairwise(names)]
                needles += list(zip(depths, lines, strict=True))
            prefix_ids = haystack.hide(needles, self.tokens, _BEGIN, chance)
            for value, names in chains:
                question = f"Which variables are assigned the value {value} in the text above?"
                begin = f"The {len(names)} variables that are assigned the value {value} are"
                found.append(
                    Request(
                        self.name,
                        len(found),
                        prefix_ids,
                        prefix,
                        encode(tokenizer, answer_turn(question, begin)),
                        tuple(names),
                        max_new_tokens=10 * len(names),
                    )
                )
        return found[:count]


def variable_tracking(data_dir: Path | str | None = None) -> VariableTracking:
    """Two chains of three variables in 2,048 tokens."""
    return VariableTracking(data_dir=data_dir)
