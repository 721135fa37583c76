"""The protocol of a task: prefixes that requests share, the requests, and their right answers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

# The metric of tasks whose answers are not judged.
UNJUDGED = ""


@dataclass(frozen=True)
class Request:
    """One question about a prefix.

    Attributes:
        task: name of the task.
        number: number of the request within its task; equal for equal seeds.
        prefix_ids: int64 `(n,)`, shared by all requests with the same `prefix`.
        prefix: number of the prefix within its task.
        suffix_ids: the tokens that the request adds, int64 `(q,)`.
        answers: right answers; for a classification, the right label.
        choices: labels, of which the most likely one is the answer; empty if the answer is generated.
        max_new_tokens: limit on generated tokens.
        before_answer: text between the prompt and an answer or a choice.
        about: details of the request for the run's rows, such as the depth of a needle.
        computed: whether the model computes K and V of the prefix. Else random ones stand for them, and only the time
            of the request says anything.
    """

    task: str
    number: int
    prefix_ids: torch.Tensor
    prefix: int
    suffix_ids: torch.Tensor
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    max_new_tokens: int = 1
    before_answer: str = " "
    about: tuple[tuple[str, Any], ...] = ()
    computed: bool = True

    @property
    def key(self) -> str:
        """The request's name in a run."""
        return f"{self.task}/{self.number}"


class Task(Protocol):
    """A source of requests."""

    @property
    def name(self) -> str:
        """The name on the command line and in reports."""
        ...

    @property
    def metric(self) -> str:
        """The metric that judges answers (a module of `eval.metrics`); `UNJUDGED`: only the time of requests counts."""
        ...

    def requests(self, tokenizer: Any, count: int, seed: int = 0) -> list[Request]:
        """The first `count` requests, or all if a task of the user has fewer.

        They are equal for equal seeds and tokenizers, and more requests begin with the same ones. So a run can make
        the requests from number 50 on that another run has not made.

        Raises:
            TooFewRowsError: the data set has fewer rows.
        """
        ...


def encode(tokenizer: Any, text: str) -> torch.Tensor:
    """Token ids of `text`, int64 `(n,)`, without special tokens."""
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)


def user_turn(text: str) -> str:
    """The beginning of a chat whose user message starts with `text` and is not complete: the shared prefix."""
    return f"<|im_start|>user\n{text}"


def answer_turn(question: str, begin: str = "") -> str:
    """The end of the user's message, and the beginning of the assistant's answer."""
    return f"{question}<|im_end|>\n<|im_start|>assistant\n{begin}"


class TooFewRowsError(ValueError):
    """A data set has fewer rows than requests were asked for."""


def sample(rows: Sequence[Any], count: int, chance: random.Random) -> list[Any]:
    """The first `count` rows of a random order of all rows; a larger `count` gives the same rows first.

    Raises:
        TooFewRowsError: there are fewer rows.
    """
    if count > len(rows):
        raise TooFewRowsError(f"{count} rows were asked for, but the data set has {len(rows)}")
    return chance.sample(list(rows), len(rows))[:count]
