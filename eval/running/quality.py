"""The quality of an answer, and its distance from the answer of the whole cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hf_contiguouskv.model.transformers_internals import cache_argument

from ..metrics import scores
from ..metrics.fidelity import agreement, divergence
from ..systems import InMemory
from ..tasks import Request
from ..tasks.base import encode
from .timed import prompt_of


@dataclass(frozen=True)
class Reading:
    """A model's logits for a request, with some cache.

    Attributes:
        logits: `(q - 1 + a, vocabulary)` float32: after each suffix token from the second on, and after each token of
            the right answer except its last. (The first suffix token is not computed again, because a cache that goes
            back to its prefix would select again.)
        suffix: number of rows that belong to the suffix.
    """

    logits: torch.Tensor
    suffix: int


class Judge:
    """Judges one request in several systems. Caches already hold the whole prompt, and possibly an answer.

    Args:
        model, tokenizer: the model that answers, and its tokenizer.
        request: the request to judge.
        metric: name of a function in `metrics.scores`.
    """

    def __init__(self, model: Any, tokenizer: Any, request: Request, metric: str) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._request = request
        self._score = getattr(scores, metric)
        self._prompt = prompt_of(request)
        self._answer = encode(tokenizer, f" {request.answers[0]}") if request.answers else torch.zeros(0).long()
        self._reference: Reading | None = None

    def refer_to(self, in_memory: InMemory) -> None:
        """Compute the reference logits of the request with the whole cache."""
        cache = in_memory.cache(self._request.prefix_ids)
        try:
            self._forward(cache, self._request.suffix_ids)
            self._reference = self._read(cache)
        finally:
            in_memory.finish(cache)

    def judge(self, cache: Any, first_token: int) -> dict[str, Any]:
        """The quality fields of a row.

        These are `prediction`, `score`, `perplexity`, and compared with the whole cache: `kl` and `agreement`, means
        over the suffix, and `kl_answer`, the mean over the tokens of the right answer.

        Args:
            cache: holds the prompt; added tokens are not removed again.
            first_token: the model's first new token.
        """
        request = self._request
        prediction = None if request.choices else self._generated(cache, first_token)
        reading = self._read(cache)
        if prediction is None:
            prediction = self._likeliest(cache, reading.logits[reading.suffix - 1])
        found: dict[str, Any] = {
            "prediction": prediction,
            "score": self._score(prediction, request.answers),
            "perplexity": self._perplexity(reading),
        }
        if self._reference is not None:
            mine, theirs = (one.logits[: one.suffix] for one in (reading, self._reference))
            found |= {
                "kl": float(divergence(theirs, mine).mean()),
                "agreement": float(agreement(theirs, mine).mean()),
                "kl_answer": self._kl_answer(reading, self._reference),
            }
        return found

    def _forward(self, cache: Any, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            found = self._model(
                input_ids=ids[None].to(self._model.device), use_cache=True, **{cache_argument(self._model): cache}
            )
        logits: torch.Tensor = found.logits[0].float().cpu()
        return logits

    def _read(self, cache: Any) -> Reading:
        suffix = self._request.suffix_ids
        if len(suffix) < 2:
            raise ValueError(f"{self._request.key}: a suffix needs two tokens at least")
        added = cache.get_seq_length() - len(self._request.prefix_ids)
        if added > 1:
            cache.crop(1 - added)
        return Reading(self._forward(cache, torch.cat([suffix[1:], self._answer[:-1]])), len(suffix) - 1)

    def _generated(self, cache: Any, first_token: int) -> str:
        tokens = [first_token]
        left = self._request.max_new_tokens - 1
        ends = self._model.generation_config.eos_token_id
        ended = first_token in (ends if isinstance(ends, list) else [ends])
        if left > 0 and not ended:
            prompt = torch.cat([self._prompt, torch.tensor([[first_token]])], dim=1)
            output = self._model.generate(
                prompt.to(self._model.device), max_new_tokens=left, do_sample=False, **{cache_argument(): cache}
            )
            tokens += output[0, prompt.shape[1] :].tolist()
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text.strip()

    def _likeliest(self, cache: Any, logits: torch.Tensor) -> str:
        """The choice whose tokens together have the highest log-likelihood."""
        likelihoods = [self._likelihood(cache, logits, choice) for choice in self._request.choices]
        return self._request.choices[likelihoods.index(max(likelihoods))]

    def _likelihood(self, cache: Any, logits: torch.Tensor, choice: str) -> float:
        ids = encode(self._tokenizer, f" {choice}")
        rows = [logits]
        if len(ids) > 1:
            extra = cache.get_seq_length() - self._prompt.shape[1]
            if extra > 0:
                cache.crop(-extra)
            rows += self._forward(cache, ids[:-1])
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
