"""Prefixes and questions of real text: the built-in reference, or passages and questions of Natural Questions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..documents import reference_text

# What is asked about a piece of the text.
_ABOUT = (
    "{}",
    "What does the text say about this: {}?",
    "Explain: {}",
    "Where is this mentioned, and what follows from it: {}?",
)
_GENERAL = (
    "Summarise the text above in one sentence, please.",
    "What is the most important point of the text above?",
    "Who should read the text above, and why should they?",
    "List three facts that the text above mentions.",
    "What example does the text above give first?",
    "Is there any exception that the text above mentions?",
)
_SHARE_GENERAL = 0.1
_SHARE_REAL = 0.5


@dataclass(frozen=True)
class Document:
    """A prefix, int64 `(tokens,)`, and questions that people really asked about it, if there are any."""

    ids: torch.Tensor
    real_questions: list[str] = field(default_factory=list)


def documents(
    tokenizer: Any, count: int, tokens: tuple[int, int], seed: int, data_dir: Path | None = None
) -> list[Document]:
    """`count` prefixes of real text that do not overlap.

    Args:
        tokens: shortest and longest; lengths in between are equally likely.
        seed: of the lengths.
        data_dir: folder with `nq_open/test.jsonl` (fields `question` and `documents`); `None`: the built-in text.

    Raises:
        ValueError: there is not enough text.
    """
    lengths = np.random.default_rng([seed, 2]).integers(tokens[0], tokens[1] + 1, count).tolist()
    pieces = _built_in() if data_dir is None else _natural_questions(data_dir)
    found: list[Document] = []
    ids: list[int] = []
    questions: list[str] = []
    for length in lengths:
        while len(ids) < length:
            text, question = next(pieces, (None, None))
            if text is None:
                raise ValueError(f"text for {len(found)} prefixes only, {count} were asked for")
            ids += tokenizer(text + "\n\n", add_special_tokens=False, verbose=False)["input_ids"]
            questions += [question] if question else []
        found.append(Document(torch.tensor(ids[:length]), questions))
        # A piece that was cut is nobody else's beginning.
        ids, questions = [], []
    return found


def _built_in() -> Iterator[tuple[str, None]]:
    for paragraph in reference_text().split("\n\n"):
        yield paragraph, None


def _natural_questions(data_dir: Path) -> Iterator[tuple[str, str]]:
    with (data_dir / "nq_open" / "test.jsonl").open() as lines:
        for line in lines:
            row = json.loads(line)
            passages = "\n\n".join(f"{one['title']}\n{one['text']}" for one in row["documents"])
            yield passages, row["question"]


def questions(document: Document, count: int, tokenizer: Any, chance: np.random.Generator) -> list[torch.Tensor]:
    """`count` questions about a document, int64 `(tokens,)` each: most of them about 8 to 24 tokens of it."""
    made = []
    for _ in range(count):
        if document.real_questions and chance.random() < _SHARE_REAL:
            text = document.real_questions[chance.integers(len(document.real_questions))] + "?"
        elif chance.random() < _SHARE_GENERAL:
            text = _GENERAL[chance.integers(len(_GENERAL))]
        else:
            length = int(chance.integers(8, 25))
            start = int(chance.integers(0, max(1, len(document.ids) - length)))
            piece = tokenizer.decode(document.ids[start : start + length]).strip()
            text = _ABOUT[chance.integers(len(_ABOUT))].format(piece)
        ids = tokenizer("\n" + text, add_special_tokens=False)["input_ids"]
        made.append(torch.tensor(ids))
    return made
