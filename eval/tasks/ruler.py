"""RULER (Hsieh et al. 2024): needles, chains of variables, frequent words and questions, made for one length.

The Hub has all 13 tasks in `simonjegou/ruler` (500 rows each; the configuration is the length: 4096, 8192 or 16384
tokens of Llama's tokenizer). Local files are `<data_dir>/ruler/<length>.jsonl` with the same fields: `context`,
`question`, `answer_prefix`, `answer` (a list), `task` and `max_new_tokens`. Nothing is cut, so choose a length that
fits the model with its own tokenizer.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .base import Request, answer_turn, encode, sample, user_turn
from .rows import DataMissingError, HubSource, load_rows

# RULER requires all answers (`string_match_all`), but for questions only one (`string_match_part`).
METRICS = {
    **dict.fromkeys(("niah_single_1", "niah_single_2", "niah_single_3"), "needle_recall"),
    **dict.fromkeys(("niah_multikey_1", "niah_multikey_2", "niah_multikey_3"), "needle_recall"),
    **dict.fromkeys(("niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe"), "needle_recall"),
    **dict.fromkeys(("qa_1", "qa_2"), "contains_any"),
}


@dataclass(frozen=True)
class Ruler:
    """One of RULER's 13 tasks.

    Attributes:
        task: its name in the data.
        length: length of the rows, question and answer included, in tokens of Llama.
        data_dir: local data.
    """

    task: str
    length: int = 4096
    data_dir: Path | str | None = None

    def __post_init__(self) -> None:
        if self.task not in METRICS:
            raise ValueError(f"task must be one of {sorted(METRICS)}, got {self.task!r}")

    @property
    def name(self) -> str:
        return f"ruler_{self.task}"

    @property
    def metric(self) -> str:
        return METRICS[self.task]

    @property
    def hub(self) -> HubSource:
        """Location of the rows on the Hub."""
        length = str(self.length)
        return HubSource("simonjegou/ruler", lambda row: row, config=length, splits=((length, "test"),))

    def requests(self, tokenizer: Any, count: int, seed: int = 0) -> list[Request]:
        """The first `count` requests; they share a prefix if their rows have the same context.

        Raises:
            DataMissingError: the data has no rows of this task.
        """
        chance = random.Random(f"{self.name} {seed}")
        rows = load_rows("ruler", str(self.length), self.data_dir, self.hub)
        mine = [row for row in rows if row["task"] == self.task]
        if not mine:
            tasks = sorted({row["task"] for row in rows})
            raise DataMissingError(f"ruler, length {self.length}: there are rows of {tasks}, but none of {self.task!r}")
        prefixes: dict[str, tuple[int, torch.Tensor]] = {}
        found = []
        for number, row in enumerate(sample(mine, count, chance)):
            context = row["context"]
            if context not in prefixes:
                prefixes[context] = (len(prefixes), encode(tokenizer, user_turn(context)))
            prefix, prefix_ids = prefixes[context]
            found.append(
                Request(
                    self.name,
                    number,
                    prefix_ids,
                    prefix,
                    encode(tokenizer, answer_turn(row["question"], row["answer_prefix"])),
                    tuple(row["answer"]),
                    max_new_tokens=row["max_new_tokens"],
                    about=(("length", self.length),),
                )
            )
        return found


def ruler(task: str, data_dir: Path | str | None = None) -> Ruler:
    """One task of 4,096 tokens.

    Raises:
        ValueError: no task has this name.
    """
    return Ruler(task, data_dir=data_dir)
