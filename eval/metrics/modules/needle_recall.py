"""Mean share of the wanted texts that an answer contains."""

from __future__ import annotations

try:
    from contiguouskv_eval.metrics import base, scores
except ModuleNotFoundError:  # (A checkout: the package is the folder `eval`.)
    from eval.metrics import base, scores


class NeedleRecall(base.MeanScore):
    """Mean share of the wanted texts that an answer contains."""

    score = staticmethod(scores.needle_recall)
