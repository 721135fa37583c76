"""Share of requests whose label is right."""

from __future__ import annotations

try:
    from contiguouskv_eval.metrics import base, scores
except ModuleNotFoundError:  # (A checkout: the package is the folder `eval`.)
    from eval.metrics import base, scores


class Accuracy(base.MeanScore):
    """Share of requests whose label is right."""

    score = staticmethod(scores.accuracy)
