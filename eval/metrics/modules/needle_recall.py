"""Mean share of the wanted texts that an answer contains."""

from __future__ import annotations

from eval.metrics import base, scores


class NeedleRecall(base.MeanScore):
    """Mean share of the wanted texts that an answer contains."""

    score = staticmethod(scores.needle_recall)
