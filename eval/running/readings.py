"""Logits of one request, computed more than once: with a cache that is cropped, or with several equal caches."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import DynamicCache

from hf_contiguouskv.model.served_model import ServedModel
from hf_contiguouskv.model.transformers_internals import cache_argument

from ..systems.base import key_of
from ..systems.in_memory import prefill
from ..tasks import Request


@dataclass(frozen=True)
class Reading:
    """A model's logits for a request, with some cache.

    Attributes:
        logits: `(rows, vocabulary)` float32: after each suffix token from the second on, and after each token of the
            right answer except its last. (The first suffix token is not computed again, because a cache that goes back
            to its prefix would select again.)
        suffix: number of rows that belong to the suffix.
    """

    logits: torch.Tensor
    suffix: int


class Serving(Protocol):
    """A source of caches of one prefix, such as an `eval.systems.System`."""

    def cache(self, prefix_ids: torch.Tensor) -> Any:
        """A cache for one request."""
        ...

    def finish(self, cache: Any) -> Any:
        """The request is over."""
        ...


class Held(Protocol):
    """A cache, or a source of caches, with which one request can be computed more than once."""

    def prompt(self) -> AbstractContextManager[Any]:
        """A context with a cache that holds prefix and suffix, and nothing else."""
        ...

    def reading(self, answer: torch.Tensor) -> Reading:
        """The logits of the suffix and of the tokens of `answer`, int64 `(a,)`."""
        ...


class Cropped:
    """The cache of one request, which holds at least the prompt: what was added is cropped away.

    Args:
        model: the causal language model.
        request: the request.
        cache: its cache.
    """

    def __init__(self, model: Any, request: Request, cache: Any) -> None:
        self._model, self._request, self._cache = model, request, cache

    @contextmanager
    def prompt(self) -> Iterator[Any]:
        """See `Held`."""
        self._crop(len(self._request.suffix_ids))
        yield self._cache

    def reading(self, answer: torch.Tensor) -> Reading:
        """See `Held`."""
        suffix = self._request.suffix_ids
        self._crop(1)
        parts = (
            [suffix[1:], *answer[:-1].split(1)]
            if chooses_again(self._cache)
            else [torch.cat([suffix[1:], answer[:-1]])]
        )
        return Reading(torch.cat([forward(self._model, self._cache, part) for part in parts]), len(suffix) - 1)

    def _crop(self, kept: int) -> None:
        """Leave the prefix and `kept` tokens."""
        added = self._cache.get_seq_length() - len(self._request.prefix_ids)
        if added > kept:
            self._cache.crop(kept - added)


class Repeated:
    """A new cache for each computation: for models with sliding windows, whose caches cannot be cropped.

    Args:
        model: the causal language model.
        request: the request.
        serving: makes the caches.
    """

    def __init__(self, model: Any, request: Request, serving: Serving) -> None:
        self._model, self._request, self._serving = model, request, serving

    @contextmanager
    def prompt(self) -> Iterator[Any]:
        """See `Held`."""
        with self._suffix_computed() as (cache, _):
            yield cache

    def reading(self, answer: torch.Tensor) -> Reading:
        """See `Held`. The suffix is one forward, so that a system chooses by the suffix and not by the answer."""
        with self._suffix_computed() as (cache, logits):
            rows = [logits[1:]]
            parts = answer[:-1].split(1 if chooses_again(cache) else max(1, len(answer)))
            rows += [forward(self._model, cache, part) for part in parts if len(part)]
        return Reading(torch.cat(rows), len(self._request.suffix_ids) - 1)

    @contextmanager
    def _suffix_computed(self) -> Iterator[tuple[Any, torch.Tensor]]:
        cache = self._serving.cache(self._request.prefix_ids)
        try:
            yield cache, forward(self._model, cache, self._request.suffix_ids)
        finally:
            self._serving.finish(cache)


class WholeCaches:
    """Whole caches of prefixes in memory, one copy for each request: the reference of models with sliding windows."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._caches: dict[bytes, DynamicCache] = {}

    def store(self, prefix_ids: torch.Tensor) -> None:
        """Compute the cache of a prefix, int64 `(n,)`."""
        key = key_of(prefix_ids)
        if key not in self._caches:
            self._caches[key] = prefill(self._model, prefix_ids)

    def cache(self, prefix_ids: torch.Tensor) -> DynamicCache:
        """A copy of the cache of a stored prefix."""
        return copy.deepcopy(self._caches[key_of(prefix_ids)])

    def finish(self, cache: DynamicCache) -> None:
        """Nothing is left to do."""


def chooses_again(cache: Any) -> bool:
    """Whether a cache may choose other chunks in mid-answer. It must then get the answer as `generate` passes it, token
    by token: passed as a whole, the right answer would choose the chunks with which it is read."""
    return getattr(getattr(cache, "config", None), "reselect_every", None) is not None


def has_windows(model: Any) -> bool:
    """Whether layers of the model have sliding windows."""
    return any(window is not None for window in ServedModel(model).windows)


def forward(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    """The logits after each of the tokens `(n,)`, which the cache then holds: `(n, vocabulary)` float32 on the CPU."""
    with torch.no_grad():
        found = model(input_ids=ids[None].to(model.device), use_cache=True, **{cache_argument(model): cache})
    logits: torch.Tensor = found.logits[0].float().cpu()
    return logits
