"""Estimates how long a model will take for a prompt: it times a short forward and scales up its work."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from .timing import time_to_first_token

SAMPLE_TOKENS = 256


@dataclass(frozen=True)
class Pace:
    """How fast a model computes on this machine.

    Attributes:
        weights: parameters that each token is multiplied with.
        attended: multiplications of attention per pair of tokens, over all layers.
        seconds_per_multiplication: seconds per multiplication in a prompt of many tokens.
        token_s: seconds for a single token, mostly for reading the weights.
    """

    weights: int
    attended: int
    seconds_per_multiplication: float
    token_s: float

    @classmethod
    def of(cls, model: Any, ids: torch.Tensor) -> Pace:
        """Time two short prompts, each a few times because first calls of kernels are slow.

        Args:
            model: a causal language model.
            ids: a prompt, int64 `(1, n)`; its beginning is computed.
        """
        config = model.config.get_text_config()
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        # The products of queries and keys, and of weights and values.
        attended = 2 * config.num_hidden_layers * config.num_attention_heads * width
        weights = model.num_parameters(exclude_embeddings=True)
        sample = ids[:, :SAMPLE_TOKENS]
        seconds = [_seconds(model, part) for part in (sample, ids[:, :1])]
        return cls(weights, attended, seconds[0] / _work(weights, attended, sample.shape[1], 0), seconds[1])

    def forward_s(self, tokens: int, before: int = 0) -> float:
        """Estimated seconds for a forward of `tokens` tokens after `before` cached tokens."""
        return max(self.token_s, self.seconds_per_multiplication * _work(self.weights, self.attended, tokens, before))

    def answer_s(self, tokens: int) -> float:
        """Estimated seconds to generate `tokens` tokens one by one."""
        return tokens * self.token_s


def _work(weights: int, attended: int, tokens: int, before: int) -> float:
    return tokens * (weights + attended * (before + tokens / 2))


def _seconds(model: Any, ids: torch.Tensor) -> float:
    """Seconds for a short prompt: the best of two calls, and at most the processor time of a single thread.

    If other programs keep the cores busy, the threads of a short prompt wait for each other most of the time. The
    threads of a long prompt do not, because their pieces of work are larger.
    """
    best = min(time_to_first_token(model, ids, DynamicCache)[0] for _ in range(2))
    if model.device.type != "cpu":
        return best
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        start = time.thread_time()
        time_to_first_token(model, ids, DynamicCache)
        return min(best, time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)


def about(seconds: float) -> str:
    """`about 12 s`, `about 3 min`: with few digits, because it is an estimate."""
    if seconds < 1.5:
        return "about a second"
    if seconds < 20:
        return f"about {seconds:.0f} s"
    if seconds < 100:
        return f"about {5 * round(seconds / 5)} s"
    return f"about {seconds / 60:.0f} min"
