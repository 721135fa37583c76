"""Key-value retrieval (lost in the middle): the value of one random key among many."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .base import Request, answer_turn, encode, sample, user_turn
from .rows import load_rows

_BEGIN = user_turn("These are keys and their values:\n\n")


@dataclass(frozen=True)
class KVRetrieval:
    """UUIDs and their values, as JSON.

    Attributes:
        pairs: pairs kept of each record (of 75), including the one that is asked for.
        data_dir: local data; every copy on the Hub needs a script.
    """

    pairs: int = 25
    data_dir: Path | str | None = None
    name: str = "kv_retrieval"
    metric: str = "needle_recall"

    def requests(self, tokenizer: Any, count: int, seed: int = 0) -> list[Request]:
        """The first `count` requests; every request has its own prefix, so there are `count`."""
        chance = random.Random(f"{self.name} {seed}")
        found = []
        for number, row in enumerate(sample(load_rows(self.name, "test", self.data_dir, None), count, chance)):
            others = [pair for pair in row["ordered_kv_records"] if pair[0] != row["key"]]
            kept = sample(others, self.pairs - 1, chance)
            place = chance.randrange(self.pairs)
            kept.insert(place, [row["key"], row["value"]])
            text = "\n".join(f'"{key}": "{value}"' for key, value in kept)
            question = f'\n\nWhat is the value of "{row["key"]}"?'
            found.append(
                Request(
                    self.name,
                    number,
                    encode(tokenizer, _BEGIN + text),
                    number,
                    encode(tokenizer, answer_turn(question, f'The value of "{row["key"]}" is "')),
                    (row["value"],),
                    max_new_tokens=36,
                    about=(("depth", round((place + 0.5) / self.pairs, 4)),),
                )
            )
        return found


def kv_retrieval(data_dir: Path | str | None = None) -> KVRetrieval:
    """25 pairs, about 2,000 tokens."""
    return KVRetrieval(data_dir=data_dir)
