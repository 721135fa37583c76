"""Share of requests whose label is right."""

from __future__ import annotations

from eval.metrics import base, scores


class Accuracy(base.MeanScore):
    """Share of requests whose label is right."""

    score = staticmethod(scores.accuracy)
