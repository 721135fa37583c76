"""Few-shot classification, as in the paper: labelled examples are the prefix, one text is the suffix."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """

    name: str
    shots: int
    labels: tuple[str, ...]
    template: str
    hub: HubSource
    data_dir: Path | str | None = None
    metric: str = "accuracy"

    def requests(self, tokenizer: Any, count: int, seed: int = 0) -> list[Request]:
        """The first `count` requests; all share one prefix, whose labels are as frequent as in the data."""
        chance = random.Random(f"{self.name} {seed}")
        examples = sample(load_rows(self.name, "train", self.data_dir, self.hub), self.shots, chance)
        asked = sample(load_rows(self.name, "test", self.data_dir, self.hub), count, chance)
        prefix_ids = encode(tokenizer, "".join(f"{self._shown(row)} {self._label(row)}\n\n" for row in examples))
        return [
            Request(
                self.name,
                number,
                prefix_ids,
                0,
                encode(tokenizer, self._shown(row)),
                (self._label(row),),
                self.labels,
            )
            for number, row in enumerate(asked)
        ]

    def _shown(self, row: Row) -> str:
        return self.template.format(**row)

    def _label(self, row: Row) -> str:
        return self.labels[row["label"]]
