"""Mean ROUGE-L F1 with the best-matching right answer (Lin 2004)."""

from __future__ import annotations

try:
    from contiguouskv_eval.metrics import base, scores
except ModuleNotFoundError:  # (A checkout: the package is the folder `eval`.)
    from eval.metrics import base, scores


class RougeL(base.MeanScore):
    """Mean ROUGE-L F1 with the best-matching right answer (Lin 2004)."""

    score = staticmethod(scores.rouge_l)
