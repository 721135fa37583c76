"""Share of requests whose text is one of the answers, ignoring case, punctuation, articles and white space."""

from __future__ import annotations

try:
    from contiguouskv_eval.metrics import base, scores
except ModuleNotFoundError:  # (A checkout: the package is the folder `eval`.)
    from eval.metrics import base, scores


class ExactMatch(base.MeanScore):
    """Share of requests whose text is one of the answers, ignoring case, punctuation, articles and white space."""

    score = staticmethod(scores.exact_match)
