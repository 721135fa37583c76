"""The quality of an answer, and its distance from the answer of the whole cache."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hf_contiguouskv import RequestStats
from hf_contiguouskv.model.transformers_internals import cache_argument

from ..metrics import scores
from ..metrics.fidelity import agreement, divergence
from ..tasks import Request
from ..tasks.base import encode
from .readings import Cropped, Held, Reading, Repeated, Serving, forward, has_windows
from .timed import prompt_of


@dataclass
class Decoding:
    """What an answer took after its first token.

    Attributes:
        tokens: tokens generated.
        seconds: they took.
        bytes_read: from disk.
        reselections: how often chunks were chosen again.
    """

    tokens: int = 0
    seconds: float = 0.0
    bytes_read: int = 0
    reselections: int = 0

    @contextmanager
    def measured(self, cache: Any) -> Iterator[None]:
        """Measure what happens with `cache`."""
        stats = getattr(cache, "stats", None)
        read, chosen = (stats.bytes_read, stats.reselections) if isinstance(stats, RequestStats) else (0, 0)
        began = time.perf_counter()
        yield
        self.seconds = time.perf_counter() - began
        stats = getattr(cache, "stats", None)
        if isinstance(stats, RequestStats):
            self.bytes_read, self.reselections = stats.bytes_read - read, stats.reselections - chosen


class Judge:
    """Judges one request in several systems.

    Args:
        model, tokenizer: the model that answers, and its tokenizer.
        request: the request to judge.
        metric: name of a function in `metrics.scores`.

    Attributes:
        reference: the reading of the whole cache, if fidelity is to be judged.

    Raises:
        ValueError: the suffix has fewer than two tokens.
    """

    def __init__(self, model: Any, tokenizer: Any, request: Request, metric: str) -> None:
        if len(request.suffix_ids) < 2:
            raise ValueError(f"{request.key}: a suffix needs two tokens at least")
        self._model = model
        self._tokenizer = tokenizer
        self._request = request
        self._score = getattr(scores, metric)
        self._prompt = prompt_of(request)
        self._answer = self._encoded(request.answers[0]) if request.answers else torch.zeros(0).long()
        self.reference: Reading | None = None

    def refer_to(self, whole: Serving) -> Reading:
        """Compute `reference` with whole caches."""
        if has_windows(self._model):
            self.reference = Repeated(self._model, self._request, whole).reading(self._answer)
            return self.reference
        cache = whole.cache(self._request.prefix_ids)
        try:
            forward(self._model, cache, self._request.suffix_ids)
            self.reference = Cropped(self._model, self._request, cache).reading(self._answer)
        finally:
            whole.finish(cache)
        return self.reference

    def judge(self, held: Held, first_token: int) -> dict[str, Any]:
        """The quality fields of a row.

        These are `prediction`, `score`, `perplexity`, and compared with the whole cache: `kl` and `agreement`, means
        over the suffix, and `kl_answer`, the mean over the tokens of the right answer. `decoding` says what the answer
        took after its first token.

        Args:
            held: the request in some system.
            first_token: the model's first new token.
        """
        request = self._request
        decoding = Decoding()
        prediction = None if request.choices else self._generated(held, first_token, decoding)
        reading = held.reading(self._answer)
        if prediction is None:
            prediction = self._likeliest(held, reading.logits[reading.suffix - 1])
        found: dict[str, Any] = {
            "prediction": prediction,
            "score": self._score(prediction, request.answers),
            "perplexity": self._perplexity(reading),
            "decoding": asdict(decoding),
        }
        if self.reference is not None:
            mine, theirs = (one.logits[: one.suffix] for one in (reading, self.reference))
            found |= {
                "kl": float(divergence(theirs, mine).mean()),
                "agreement": float(agreement(theirs, mine).mean()),
                "kl_answer": self._kl_answer(reading, self.reference),
            }
        return found

    def _encoded(self, text: str) -> torch.Tensor:
        return encode(self._tokenizer, f"{self._request.before_answer}{text}")

    def _generated(self, held: Held, first_token: int, decoding: Decoding) -> str:
        tokens = [first_token]
        left = self._request.max_new_tokens - 1
        ends = self._model.generation_config.eos_token_id
        ended = first_token in (ends if isinstance(ends, list) else [ends])
        if left > 0 and not ended:
            prompt = torch.cat([self._prompt, torch.tensor([[first_token]])], dim=1)
            with held.prompt() as cache, decoding.measured(cache):
                output = self._model.generate(
                    prompt.to(self._model.device), max_new_tokens=left, do_sample=False, **{cache_argument(): cache}
                )
            tokens += output[0, prompt.shape[1] :].tolist()
            decoding.tokens = len(tokens) - 1
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text.strip()

    def _likeliest(self, held: Held, logits: torch.Tensor) -> str:
        """The choice whose tokens together have the highest log-likelihood."""
        likelihoods = [self._likelihood(held, logits, choice) for choice in self._request.choices]
        return self._request.choices[likelihoods.index(max(likelihoods))]

    def _likelihood(self, held: Held, logits: torch.Tensor, choice: str) -> float:
        ids = self._encoded(choice)
        rows = [logits]
        if len(ids) > 1:
            with held.prompt() as cache:
                rows += forward(self._model, cache, ids[:-1])
        return float(sum(row.log_softmax(-1)[token] for row, token in zip(rows, ids, strict=True)))

    def _kl_answer(self, reading: Reading, reference: Reading) -> float | None:
        if not len(self._answer):
            return None
        mine, theirs = (one.logits[one.suffix - 1 :] for one in (reading, reference))
        return float(divergence(theirs, mine).mean())

    def _perplexity(self, reading: Reading) -> float | None:
        """Perplexity of the right answer, or `None` without one."""
        if not len(self._answer):
            return None
        rows = reading.logits[reading.suffix - 1 :]
        return perplexity(rows, self._answer)


def perplexity(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """Perplexity of tokens `(a,)`, given the logits `(a, vocabulary)` before each of them."""
    return float(logits.log_softmax(-1).gather(1, ids[:, None]).mean().neg().exp())
