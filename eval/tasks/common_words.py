"""Common words, in the manner of RULER: a long list of words, of which a few occur far more often than the others."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .base import Request, answer_turn, encode, user_turn
from .haystack import paragraphs

_BEGIN = user_turn("This is a list of words. Some of them come more often than others. Memorize these.\n\n")


@dataclass(frozen=True)
class CommonWords:
    """Words of real text in random order.

    Attributes:
        common, often: number of common words, and how often each occurs.
        rare: how often every other word occurs.
        tokens: maximum tokens of the prefix.
        data_dir: local data.
    """

    common: int = 3
    often: int = 30
    rare: int = 3
    tokens: int = 2048
    data_dir: Path | str | None = None
    name: str = "common_words"
    metric: str = "needle_recall"

    def requests(self, tokenizer: Any, count: int, seed: int = 0) -> list[Request]:
        """The first `count` requests; every request has its own prefix, so there are `count`."""
        words = self._words()
        chance = random.Random(f"{self.name} {seed}")
        found = []
        for number in range(count):
            mine = chance.sample(words, len(words))
            common = mine[: self.common]
            listed = common * self.often
            room = self.tokens - 64 - sum(self._cost(tokenizer, word) for word in listed)
            for word in mine[self.common :]:
                room -= self.rare * self._cost(tokenizer, word)
                if room < 0:
                    break
                listed += [word] * self.rare
            chance.shuffle(listed)
            text = "\n".join(f"{place}. {word}" for place, word in enumerate(listed, 1))
            question = f"\n\nWhat are the {self.common} most common words in the list above?"
            begin = f"The {self.common} most common words are"
            found.append(
                Request(
                    self.name,
                    number,
                    encode(tokenizer, _BEGIN + text),
                    number,
                    encode(tokenizer, answer_turn(question, begin)),
                    tuple(common),
                    max_new_tokens=8 * self.common,
                )
            )
        return found

    def _words(self) -> list[str]:
        counts = Counter(re.findall(r"\b[a-z]{5,9}\b", " ".join(paragraphs(self.data_dir)[:2000])))
        return sorted(word for word, times in counts.items() if times >= 3)

    @staticmethod
    def _cost(tokenizer: Any, word: str) -> int:
        # The word with its number, full stop and line end.
        return len(encode(tokenizer, f"1000. {word}\n"))


def common_words(data_dir: Path | str | None = None) -> CommonWords:
    """Three common words in at most 2,048 tokens."""
    return CommonWords(data_dir=data_dir)
