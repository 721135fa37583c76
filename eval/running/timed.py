"""One request in one system: made cold, timed, with its statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_contiguouskv import RequestStats

from ..systems import State, System, departure
from ..tasks import Request
from ..timing import drop_page_cache, resident_pages, time_to_first_token
from .phases import Stopwatch, attention_timed, phases_of


@dataclass
class Timed:
    """A request that has its first token.

    Attributes:
        cache: holds the whole prompt; `None` when the request is over.
        seconds: time to the first token.
        first_token: id of the first token.
        cold: whether none of the system's files was in the page cache; `None` if it has no files.
        resident_pages: pages of these files in the page cache.
        departure: evidence that the request did not find the intended state; known when the request is over.
        stats: statistics; known when the request is over.
        phases: time by phase (see `phases_of`); known when the request is over.
    """

    cache: Any
    seconds: float
    first_token: int
    cold: bool | None
    resident_pages: int
    departure: str | None = None
    stats: RequestStats = field(default_factory=RequestStats)
    phases: dict[str, float] = field(default_factory=dict)

    def fields(self) -> dict[str, Any]:
        """The request's fields of a row."""
        return {
            "ttft_s": self.seconds,
            "cold": self.cold,
            "resident_pages": self.resident_pages,
            "first_token": self.first_token,
            "stats": self.stats.as_dict(),
            "phases": self.phases,
        }


def prompt_of(request: Request) -> torch.Tensor:
    """Prefix and suffix, int64 `(1, n + q)`."""
    return torch.cat([request.prefix_ids, request.suffix_ids])[None]


@contextmanager
def timed_request(
    model: Any, system: System, request: Request, *, forget: bool = True, state: State | None = None
) -> Iterator[Timed]:
    """Drop the system's files from the page cache, and time one request to its first token.

    Inside the context the cache may be used further; afterwards the request is over.

    Args:
        model: the causal language model.
        system: the system; it has stored the request's prefix.
        request: the request.
        forget: whether the system first drops what earlier requests left in this process.
        state: if given, the system is brought into this state instead, for what the request needs (see `System.enter`).
    """
    if state is not None:
        system.enter(state, request.prefix_ids, request.suffix_ids)
    elif forget:
        system.forget()
    files = system.files()
    if state is None:
        drop_page_cache(files)
    resident = sum(resident_pages(file) for file in files)
    looking, attending = Stopwatch(), Stopwatch()

    def make_cache() -> Any:
        with looking.running():
            return system.cache(request.prefix_ids)

    with attention_timed(attending, model.device):
        seconds, token, cache = time_to_first_token(model, prompt_of(request), make_cache)
    timed = Timed(cache, seconds, token, resident == 0 if files else None, resident)
    timeline = system.timeline(cache)
    # Copy the spans now: only those before the first token count.
    spans = None if timeline is None else list(timeline.spans)
    try:
        yield timed
    finally:
        timed.cache = None
        timed.stats = system.finish(cache)
        if state is not None:
            timed.departure = departure(state, timed.stats)
        timed.phases = phases_of(seconds, looking.seconds, attending.seconds, timed.stats.io_wait_s, spans)
