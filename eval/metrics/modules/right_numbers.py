"""Mean share of an answer's numbers that are right (as LongBench judges counts and paragraph numbers)."""

from __future__ import annotations

try:
    from contiguouskv_eval.metrics import base, scores
except ModuleNotFoundError:  # (A checkout: the package is the folder `eval`.)
    from eval.metrics import base, scores


class RightNumbers(base.MeanScore):
    """Mean share of an answer's numbers that are right (as LongBench judges counts and paragraph numbers)."""

    score = staticmethod(scores.right_numbers)
