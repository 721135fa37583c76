"""Base classes of the metric modules: means over requests, or over positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np


class MeanScore(evaluate.Metric):
    """The mean of `score` over pairs of a prediction (a text) and its right answers (texts)."""

    score: Callable[[str, Sequence[str]], float]

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=str(type(self).__doc__),
            citation="",
            inputs_description="predictions: texts; references: for each of them, the texts that are right",
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Sequence(datasets.Value("string")),
                }
            ),
        )

    def _compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        score = type(self).score
        return {self.name: float(np.mean([score(*pair) for pair in zip(predictions, references, strict=True)]))}


class MeanOfLogits(evaluate.Metric):
    """The mean of `of_positions` over all positions of two tables of logits, `(positions, vocabulary)`."""

    of_positions: Callable[[Any, Any], Any]

    def _info(self) -> evaluate.MetricInfo:
        table = datasets.Sequence(datasets.Sequence(datasets.Value("float32")))
        return evaluate.MetricInfo(
            description=str(type(self).__doc__),
            citation="",
            inputs_description="predictions, references: logits of each request, (positions, vocabulary)",
            features=datasets.Features({"predictions": table, "references": table}),
        )

    def _compute(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        import torch

        found = [
            type(self).of_positions(torch.tensor(np.array(theirs)), torch.tensor(np.array(ours)))
            for ours, theirs in zip(predictions, references, strict=True)
        ]
        return {self.name: float(torch.cat(found).mean())}
