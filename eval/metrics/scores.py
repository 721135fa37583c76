"""Scores of one answer, between 0 and 1; the `evaluate` modules beside this file average them."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NUMBER = re.compile(r"\d+")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """`text` in lower case, without punctuation, articles and extra white space (as in SQuAD and NQ-Open)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction equals one of the answers after `normalised`."""
    return float(normalised(prediction) in {normalised(answer) for answer in answers})


def qa_f1(prediction: str, answers: Sequence[str]) -> float:
    """F1 of the words of prediction and answer, for the best-matching answer."""
    return max((_f1(normalised(prediction).split(), normalised(answer).split()) for answer in answers), default=0.0)


def _f1(found: list[str], wanted: list[str]) -> float:
    if not found or not wanted:
        return float(found == wanted)
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted))


def needle_recall(prediction: str, answers: Sequence[str]) -> float:
    """Share of the answers that the prediction contains; other text and case are ignored."""
    said = prediction.lower()
    return sum(answer.lower() in said for answer in answers) / len(answers)


def contains_any(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction contains one of the answers (questions of RULER); other text and case are ignored."""
    said = prediction.lower()
    return float(any(answer.lower() in said for answer in answers))


def right_numbers(prediction: str, answers: Sequence[str]) -> float:
    """Share of the prediction's numbers that equal the first number of the best answer (LongBench's counting)."""
    said = _NUMBER.findall(prediction)
    wanted = [number for answer in answers for number in _NUMBER.findall(answer)[:1]]
    return max((said.count(number) / len(said) for number in wanted if said), default=0.0)


def accuracy(prediction: str, answers: Sequence[str]) -> float:
    """1 if the label is right."""
    return float(prediction in answers)


def rouge_l(prediction: str, answers: Sequence[str]) -> float:
    """ROUGE-L F1 for the best-matching answer."""
    return float(_rouge().score_multi(answers, prediction)["rougeL"].fmeasure)


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"])
