"""One request in one system: brought into its state, timed, with its statistics."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_contiguouskv import RequestStats

from ..systems import State, System, departure
from ..tasks import Request
from ..timing import drop_page_cache, ready_memory, resident_pages, time_to_first_token
from .phases import Stopwatch, attention_timed, phases_of


@dataclass
class Timed:
    """A request that has its first token.

    Attributes:
        cache: holds the whole prompt; `None` when the request is over.
        seconds: time to the first token.
        first_token: id of the first token.
        resident_pages: pages of the system's files in the page cache when the request began.
        departure: evidence that the request did not find its state; known when the request is over.
        stats: statistics; known when the request is over.
        phases: time by phase (see `phases_of`); known when the request is over.
        details: what else the system tells of the request; known when the request is over.
    """

    cache: Any
    seconds: float
    first_token: int
    resident_pages: int
    departure: str | None = None
    stats: RequestStats = field(default_factory=RequestStats)
    phases: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def fields(self) -> dict[str, Any]:
        """The request's fields of a row."""
        return {
            "ttft_s": self.seconds,
            "departure": self.departure,
            "resident_pages": self.resident_pages,
            "first_token": self.first_token,
            "stats": self.stats.as_dict(),
            "phases": self.phases,
            "details": self.details,
        }


def prompt_of(request: Request) -> torch.Tensor:
    """Prefix and suffix, int64 `(1, n + q)`."""
    return torch.cat([request.prefix_ids, request.suffix_ids])[None]


@contextmanager
def timed_request(
    model: Any, system: System, request: Request, state: State | None = State.COLD, ready_bytes: int = 0
) -> Iterator[Timed]:
    """Bring a system into a state, and time one request to its first token.

    Inside the context the cache may be used further; afterwards the request is over. Python collects its garbage
    before the timed part and not in it: a collection takes 0.2 s after transformers was imported, and would hit one
    system or another. Memory is made ready before it, too (see `ready_memory`).

    Args:
        model: the causal language model.
        system: the system; it has stored the request's prefix.
        request: the request.
        state: see `System.enter`. `None`: memory is as earlier requests left it, and only the system's files are
            dropped from the page cache.
        ready_bytes: of free memory that are made ready: more than a request maps (see `bytes_to_ready`).
    """
    if state is None:
        drop_page_cache(system.files())
    else:
        system.enter(state, request.prefix_ids, request.suffix_ids)
    resident = sum(resident_pages(file) for file in system.files())
    looking, attending = Stopwatch(), Stopwatch()

    def make_cache() -> Any:
        with looking.running():
            return system.cache(request.prefix_ids)

    with attention_timed(attending, model.device), garbage_left():
        ready_memory(ready_bytes)
        seconds, token, cache = time_to_first_token(model, prompt_of(request), make_cache)
    timed = Timed(cache, seconds, token, resident)
    timeline = system.timeline(cache)
    # Copy the spans now: only those before the first token count.
    spans = None if timeline is None else list(timeline.spans)
    try:
        yield timed
    finally:
        timed.cache = None
        timed.stats = system.finish(cache)
        timed.departure = _departure(state, timed)
        timed.phases = phases_of(seconds, looking.seconds, attending.seconds, timed.stats.io_wait_s, spans)
        timed.details = system.details()


def _departure(state: State | None, timed: Timed) -> str | None:
    """Evidence that a request did not find its state; `None`: there is none."""
    warm = state in (State.WARM_HOST, State.WARM_DEVICE)
    if timed.resident_pages and not warm:
        return f"{timed.resident_pages} pages of its files were in the page cache"
    return None if state is None else departure(state, timed.stats)


@contextmanager
def garbage_left() -> Iterator[None]:
    """A context in which Python collects no garbage; what there is is collected before."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
