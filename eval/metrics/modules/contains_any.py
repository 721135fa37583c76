"""Share of requests whose text contains one of the answers."""

from __future__ import annotations

try:
    from contiguouskv_eval.metrics import base, scores
except ModuleNotFoundError:  # (A checkout: the package is the folder `eval`.)
    from eval.metrics import base, scores


class ContainsAny(base.MeanScore):
    """Share of requests whose text contains one of the answers."""

    score = staticmethod(scores.contains_any)
