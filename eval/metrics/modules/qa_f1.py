"""Mean F1 of the words of an answer and the best-matching right answer (as in SQuAD)."""

from __future__ import annotations

try:
    from contiguouskv_eval.metrics import base, scores
except ModuleNotFoundError:  # (A checkout: the package is the folder `eval`.)
    from eval.metrics import base, scores


class QaF1(base.MeanScore):
    """Mean F1 of the words of an answer and the best-matching right answer (as in SQuAD)."""

    score = staticmethod(scores.qa_f1)
