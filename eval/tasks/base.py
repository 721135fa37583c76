"""What a task is: prefixes that requests share, the requests, and what counts as a right answer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class Request:
    """One question about a prefix.

    Attributes:
        task: name of the task.
        number: of the request within its task; the same for the same seed.
        prefix_ids: int64 `(n,)`, shared by all requests with the same `prefix`.
        prefix: number of the prefix within its task.
        suffix_ids: int64 `(q,)`, what the request adds.
        answers: texts that are right. For a classification: the right label.
        choices: labels, of which the most likely one is the answer; empty: the answer is generated.
        max_new_tokens: how much is generated at most.
        about: particulars of the request (depth of a needle, say), for the run's rows.
    """

    task: str
    number: int
    prefix_ids: torch.Tensor
    prefix: int
    suffix_ids: torch.Tensor
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    max_new_tokens: int = 1
    about: tuple[tuple[str, Any], ...] = ()

    @property
    def key(self) -> str:
        """Names the request in a run."""
        return f"{self.task}/{self.number}"


class Task(Protocol):
    """A source of requests."""

    @property
    def name(self) -> str:
        """On the command line and in reports."""
        ...

    @property
    def metric(self) -> str:
        """By which answers are judged (a module of `eval.metrics`)."""
        ...

    def requests(self, tokenizer: Any, count: int, seed: int = 0) -> list[Request]:
        """The first `count` requests; the same ones for the same seed and tokenizer."""
        ...


def encode(tokenizer: Any, text: str) -> torch.Tensor:
    """Token ids of `text`, int64 `(n,)`, nothing added."""
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)


def user_turn(text: str) -> str:
    """The beginning of a chat in which the user says `text`, and goes on: the shared prefix."""
    return f"<|im_start|>user\n{text}"


def answer_turn(question: str, begin: str = "") -> str:
    """The end of what the user says, and how the assistant begins."""
    return f"{question}<|im_end|>\n<|im_start|>assistant\n{begin}"


def sample(rows: Sequence[Any], count: int, chance: random.Random) -> list[Any]:
    """`count` different rows in random order.

    Raises:
        ValueError: there are fewer.
    """
    if count > len(rows):
        raise ValueError(f"{count} rows were asked for, but the data set has {len(rows)}")
    return chance.sample(list(rows), count)
