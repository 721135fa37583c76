"""NQ-Open with several documents (lost in the middle): a question, the passage that answers it, and others."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .base import Request, answer_turn, encode, sample, user_turn
from .rows import load_rows

_BEGIN = user_turn("Answer the question with what these documents say, in a few words.\n\n")


@dataclass(frozen=True)
class NQOpen:
    """Questions of NQ-Open; passages of other questions are the distractors.

    Attributes:
        documents: documents in one prefix.
        data_dir: local data.
    """

    documents: int = 10
    data_dir: Path | str | None = None
    name: str = "nq_open"
    metric: str = "qa_f1"

    def requests(self, tokenizer: Any, count: int, seed: int = 0) -> list[Request]:
        """The first `count` requests; every request has its own prefix, so there are `count`."""
        chance = random.Random(f"{self.name} {seed}")
        rows = load_rows(self.name, "test", self.data_dir, None)
        found = []
        for number, row in enumerate(sample(rows, count, chance)):
            others = sample([other for other in rows if other is not row], self.documents - 1, chance)
            shown = [other["documents"][0] for other in others]
            place = chance.randrange(self.documents)
            shown.insert(place, row["documents"][0])
            text = "\n\n".join(
                f"Document [{place}] (Title: {one['title']}) {one['text']}" for place, one in enumerate(shown, 1)
            )
            found.append(
                Request(
                    self.name,
                    number,
                    encode(tokenizer, _BEGIN + text),
                    number,
                    encode(tokenizer, answer_turn(f"\n\nQuestion: {row['question']}?", "Answer:")),
                    tuple(row["answers"]),
                    max_new_tokens=24,
                    about=(("depth", round((place + 0.5) / self.documents, 4)),),
                )
            )
        return found


def nq_open(data_dir: Path | str | None = None) -> NQOpen:
    """Ten documents, about 1,500 tokens."""
    return NQOpen(data_dir=data_dir)
