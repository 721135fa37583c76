"""Mean share of an answer's numbers that are right (as LongBench judges counts and paragraph numbers)."""

from __future__ import annotations

from eval.metrics import base, scores


class RightNumbers(base.MeanScore):
    """Mean share of an answer's numbers that are right (as LongBench judges counts and paragraph numbers)."""

    score = staticmethod(scores.right_numbers)
