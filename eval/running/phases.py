"""How the time of one request divides into phases."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from hf_contiguouskv.timeline import Span

PHASES = ("lookup", "identify", "wait", "gather", "attention", "rest")


class Stopwatch:
    """Accumulates the seconds spent inside `running`."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """A context whose time is added."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - began


@contextmanager
def attention_timed(watch: Stopwatch, device: torch.device) -> Iterator[None]:
    """A context in which `watch` runs while torch computes attention.

    Only on a CPU: on other devices a call returns before it has finished, so nothing is timed.
    """
    if device.type != "cpu":
        yield
        return
    attend = torch.nn.functional.scaled_dot_product_attention

    def timed(*arguments: Any, **options: Any) -> torch.Tensor:
        with watch.running():
            return attend(*arguments, **options)

    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", timed):
        yield


def phases_of(
    seconds: float, lookup_s: float, attention_s: float, wait_s: float, spans: Sequence[Span] | None
) -> dict[str, float]:
    """The phases of one request in seconds; they add up to `seconds`.

    Args:
        seconds: time to the first token.
        lookup_s: time until the cache was made: opening the store, finding the prefix, issuing the first reads.
        attention_s: time in attention.
        wait_s: time that compute waited for reads.
        spans: the request's timeline; `None` if nothing was identified or gathered.

    Returns:
        `lookup`, `identify` (scoring and choosing), `wait` (compute waits for reads), `gather` (copies into attention's
        buffer), `attention` and `rest` (the model's other compute), in seconds.
    """

    def spent(kind: str) -> float:
        return sum(span.end - span.start for span in spans or () if span.kind == kind)

    found = {
        # A system without a timeline reads while its cache is made, which is not part of the look-up.
        "lookup": max(0.0, lookup_s - (wait_s if spans is None else 0.0)),
        "identify": spent("identify"),
        "wait": wait_s,
        "gather": spent("copy"),
        "attention": attention_s,
    }
    return found | {"rest": max(0.0, seconds - sum(found.values()))}
