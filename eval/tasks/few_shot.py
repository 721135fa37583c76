"""Few-shot classification, as in the paper: labelled examples are the prefix, one text is the suffix.

The answers to one prefix say little about another draw of examples, so a task has several prefixes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .base import Request, encode, sample
from .rows import HubSource, Row, load_rows


@dataclass(frozen=True)
class FewShot:
    """A text classification with examples in the prompt.

    Attributes:
        name: name of the task, and of its folder in a data folder.
        shots: examples in the prefix (as many as in the paper).
        labels: names of the labels, by number.
        template: text of a row, up to its label.
        hub: location of the data on the Hub.
        data_dir: local data.
        prefixes: different prefixes, each with examples of its own. Requests take them in turn.
    """

    name: str
    shots: int
    labels: tuple[str, ...]
    template: str
    hub: HubSource
    data_dir: Path | str | None = None
    metric: str = "accuracy"
    prefixes: int = 5

    def __post_init__(self) -> None:
        if self.prefixes < 1:
            raise ValueError(f"prefixes must be 1 at least, got {self.prefixes}")

    def requests(self, tokenizer: Any, count: int, seed: int = 0) -> list[Request]:
        """The first `count` requests; labels of a prefix are as frequent as in the data. No question comes twice."""
        asked = sample(
            load_rows(self.name, "test", self.data_dir, self.hub), count, random.Random(f"{self.name} {seed}")
        )
        train = load_rows(self.name, "train", self.data_dir, self.hub)
        prefixes = [self._prefix(tokenizer, train, number, seed) for number in range(min(count, self.prefixes))]
        return [
            Request(
                self.name,
                number,
                prefixes[number % self.prefixes],
                number % self.prefixes,
                encode(tokenizer, self._shown(row)),
                (self._label(row),),
                self.labels,
            )
            for number, row in enumerate(asked)
        ]

    def _prefix(self, tokenizer: Any, train: Sequence[Row], number: int, seed: int) -> torch.Tensor:
        examples = sample(train, self.shots, random.Random(f"{self.name} {seed} prefix {number}"))
        return encode(tokenizer, "".join(f"{self._shown(row)} {self._label(row)}\n\n" for row in examples))

    def _shown(self, row: Row) -> str:
        return self.template.format(**row)

    def _label(self, row: Row) -> str:
        return self.labels[row["label"]]
