"""How well a variant answers one request."""

from __future__ import annotations

from typing import Any

import torch

from ..metrics.fidelity import divergence
from ..tasks.base import Request, encode
from .simulated import Simulation
from .variants import FULL, Variant


class VariantJudge:
    """Judges one request in variants of selection.

    A choice is right if the right label is the most likely one. A generated answer is right if each of its tokens is
    the most likely one after the tokens before it, as in greedy decoding.
    """

    def __init__(self, simulation: Simulation, tokenizer: Any, request: Request) -> None:
        self._simulation = simulation
        self._suffix = request.suffix_ids
        texts = request.choices or request.answers[:1]
        self._answers = [encode(tokenizer, f" {text}") for text in texts]
        self._right = [text in request.answers for text in texts]
        longest = max(len(ids) for ids in self._answers)
        self._rows = torch.zeros(len(texts), longest, dtype=torch.int64)
        for row, ids in zip(self._rows, self._answers, strict=True):
            row[: len(ids)] = ids
        self._reference = self._logits(FULL)

    def _logits(self, variant: Variant) -> torch.Tensor:
        # The logits after the last token of a row are not needed.
        return self._simulation.logits(variant, self._suffix, self._rows[:, :-1])

    def judge(self, variant: Variant) -> dict[str, float]:
        """`score` (0 or 1), and the divergence from the full cache in nats: `kl`, the mean over the suffix without its
        first token, and `kl_answer`, the mean over the tokens of the right answer."""
        logits = self._logits(variant)
        length = len(self._suffix)
        kl = divergence(self._reference[0, 1:length], logits[0, 1:length])
        right = self._right.index(True)
        until = length - 1 + len(self._answers[right])
        answer = divergence(self._reference[right, length - 1 : until], logits[right, length - 1 : until])
        behind = logits[:, length - 1 :].log_softmax(-1)
        if len(self._answers) == 1:
            ids = self._answers[0]
            score = bool((behind[0, : len(ids)].argmax(-1) == ids).all())
        else:
            likelihoods = [
                float(row[: len(ids)].gather(1, ids[:, None]).sum())
                for row, ids in zip(behind, self._answers, strict=True)
            ]
            score = self._right[likelihoods.index(max(likelihoods))]
        return {"score": float(score), "kl": float(kl.mean()), "kl_answer": float(answer.mean())}
