"""A task of the user: a JSON Lines file with prefixes, questions and right answers."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .base import Request, encode, sample
from .chat import Turn, turn_of
from .rows import note_rows

FILE = "file:"
FIELDS = ("prefix", "question", "answers", "choices", "max_new_tokens")
MAX_NEW_TOKENS = 32
_SHORTEST_PREFIX, _SHORTEST_SUFFIX = 16, 2


class OwnDataError(ValueError):
    """The file of a task is missing, or a line of it is wrong."""


@dataclass(frozen=True)
class Line:
    """One line of the file.

    Attributes:
        number: number of the line, from 1.
        prefix, question: the text that several requests share, and the text that follows it.
        answers: right answers.
        choices: if not empty, the answer is the most likely one of these.
        max_new_tokens: limit on the tokens of a generated answer.
    """

    number: int
    prefix: str
    question: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    max_new_tokens: int = MAX_NEW_TOKENS


@dataclass(frozen=True)
class OwnData:
    """The lines of a file, in random order. Lines with the same prefix share it.

    If the tokenizer has a chat template, the prefix is the beginning of a user message and the question its end.
    Otherwise the model continues prefix and question as they are.

    Attributes:
        path: the file.
        lines: its lines.
    """

    path: Path
    lines: tuple[Line, ...]

    @property
    def name(self) -> str:
        """For example `"file:my.jsonl"`."""
        return f"{FILE}{self.path.name}"

    @property
    def metric(self) -> str:
        """`accuracy` if the lines have choices, else `contains_any`."""
        return "accuracy" if self.lines[0].choices else "contains_any"

    def requests(self, tokenizer: Any, count: int, seed: int = 0) -> list[Request]:
        """The first `count` requests, or all if there are fewer lines.

        Raises:
            OwnDataError: a prefix or a question is too short in this tokenizer.
        """
        note_rows(self.name, [vars(line) for line in self.lines])
        turn = turn_of(tokenizer)
        chosen = sample(self.lines, min(count, len(self.lines)), random.Random(f"own data {seed}"))
        prefixes: dict[str, tuple[int, torch.Tensor]] = {}
        found = []
        for number, line in enumerate(chosen):
            if line.prefix not in prefixes:
                ids = encode(tokenizer, turn.begin + line.prefix)
                if len(ids) < _SHORTEST_PREFIX:
                    raise self._wrong(line.number, f"the prefix has {len(ids)} tokens, {_SHORTEST_PREFIX} are needed")
                prefixes[line.prefix] = (len(prefixes), ids)
            prefix, prefix_ids = prefixes[line.prefix]
            suffix_ids = suffix_of(tokenizer, turn, line.prefix, prefix_ids, line.question)
            if len(suffix_ids) < _SHORTEST_SUFFIX:
                raise self._wrong(line.number, f"the question has fewer than {_SHORTEST_SUFFIX} tokens")
            found.append(
                Request(
                    self.name,
                    number,
                    prefix_ids,
                    prefix,
                    suffix_ids,
                    line.answers,
                    line.choices,
                    1 if line.choices else line.max_new_tokens,
                    turn.before_answer,
                    about=(("line", line.number),),
                )
            )
        return found

    def _wrong(self, number: int, what: str) -> OwnDataError:
        return OwnDataError(f"{self.path}, line {number}: {what}")


def suffix_of(tokenizer: Any, turn: Turn, prefix: str, prefix_ids: torch.Tensor, question: str) -> torch.Tensor:
    """Token ids that follow the prefix, int64 `(q,)`.

    Prefix and suffix together are the tokens of the whole prompt, unless a token of it reaches across the seam: then
    both parts are tokenized apart, because the prefix is stored without knowledge of the question.
    """
    whole = encode(tokenizer, turn.begin + prefix + question + turn.end)
    seam = len(prefix_ids)
    if torch.equal(whole[:seam], prefix_ids):
        return whole[seam:]
    return encode(tokenizer, question + turn.end)


def own_data(path: Path | str) -> OwnData:
    """The task of a file.

    Raises:
        OwnDataError: the file cannot be read or has no line, or a line is wrong; the message has its number.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OwnDataError(f"{path} cannot be read: {error}") from error
    lines = []
    for number, raw in enumerate(text.splitlines(), 1):
        if not raw.strip():
            continue
        try:
            lines.append(_line(number, json.loads(raw)))
        except ValueError as error:
            raise OwnDataError(f"{path}, line {number}: {error}") from error
        if bool(lines[-1].choices) != bool(lines[0].choices):
            raise OwnDataError(
                f"{path}, line {number}: either all lines have choices or none, and line {lines[0].number} differs"
            )
    if not lines:
        raise OwnDataError(f"{path} has no line")
    return OwnData(path, tuple(lines))


def _line(number: int, found: Any) -> Line:
    """A line, checked.

    Raises:
        ValueError: a field is missing, unknown or of another type.
    """
    if not isinstance(found, Mapping):
        raise ValueError(f"an object with {', '.join(FIELDS[:3])} is needed, got {type(found).__name__}")
    if unknown := [name for name in found if name not in FIELDS]:
        raise ValueError(f"the field {unknown[0]!r} is unknown; a line may have {', '.join(FIELDS)}")
    for name in ("prefix", "question"):
        if not isinstance(found.get(name), str) or not found[name]:
            raise ValueError(f"{name!r} must be a text, got {found.get(name)!r}")
    answers = _texts(found, "answers")
    if not answers:
        raise ValueError("'answers' must have one right answer at least")
    choices = _texts(found, "choices") if "choices" in found else ()
    if choices and (len(set(choices)) < 2 or not set(answers) <= set(choices)):
        raise ValueError(f"'choices' must be two different texts at least and have all answers, got {list(choices)}")
    limit = found.get("max_new_tokens", MAX_NEW_TOKENS)
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise ValueError(f"'max_new_tokens' must be a whole number from 1 on, got {limit!r}")
    return Line(number, found["prefix"], found["question"], answers, choices, limit)


def _texts(found: Mapping[str, Any], name: str) -> tuple[str, ...]:
    texts = found.get(name)
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"{name!r} must be a list of texts, got {texts!r}")
    return tuple(texts)
