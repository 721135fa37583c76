"""Spans of one request, per layer: reading, waiting, identifying, copying and computing."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any, Protocol

KINDS = ("read keys", "read", "wait", "identify", "copy", "compute")


@dataclass(frozen=True)
class Span:
    """One piece of work.

    Attributes:
        kind: one of `KINDS`: reads of keys or of chunks (by reader threads), compute waiting for a read,
            identification, copies into attention's buffer (on an accelerator: the host's part of queueing them), the
            model's compute.
        layer: number of the layer.
        start: seconds on `time.perf_counter`.
        end: seconds on `time.perf_counter`.
    """

    kind: str
    layer: int
    start: float
    end: float


class SpanRecorder(Protocol):
    """What a request reports its work to: a `Timeline`, or `NO_TIMELINE`."""

    def add(self, kind: str, layer: int, start: float, end: float) -> None:
        """Record a span of `kind` for `layer`, `start` and `end` in seconds on `time.perf_counter`."""
        ...

    def layer_reached(self, layer: int) -> None:
        """The model reached the attention of `layer`; the time since the last layer was compute."""
        ...

    def layer_ready(self, layer: int) -> None:
        """Attention of `layer` has what it needs: the model computes on."""
        ...

    def model_done(self) -> None:
        """The forward is over."""
        ...


class NoTimeline:
    """A recorder that records nothing."""

    def add(self, kind: str, layer: int, start: float, end: float) -> None:
        pass

    def layer_reached(self, layer: int) -> None:
        pass

    def layer_ready(self, layer: int) -> None:
        pass

    def model_done(self) -> None:
        pass


NO_TIMELINE = NoTimeline()


class Timeline:
    """Spans of one request, recorded as it goes (`ContiguousKVConfig(timeline=True)`)."""

    def __init__(self) -> None:
        self.begun = time.perf_counter()
        self.spans: list[Span] = []
        self._computing: tuple[int, float] | None = None

    def add(self, kind: str, layer: int, start: float, end: float) -> None:
        """Record a span, unless it is empty."""
        if end > start:
            self.spans.append(Span(kind, layer, start, end))

    def layer_reached(self, layer: int) -> None:
        """The model reached the attention of `layer`; the time since the last layer was compute."""
        since = self.begun if self._computing is None else self._computing[1]
        self.add("compute", layer, since, time.perf_counter())

    def layer_ready(self, layer: int) -> None:
        """Attention of `layer` has its chunks; the model computes."""
        self._computing = layer, time.perf_counter()

    def model_done(self) -> None:
        """The forward is over."""
        if self._computing is not None:
            layer, since = self._computing
            self.add("compute", layer, since, time.perf_counter())
            self._computing = None

    def as_dicts(self) -> list[dict[str, Any]]:
        """The spans in order, times in seconds since the timeline began, ready for JSON."""
        ordered = sorted(self.spans, key=lambda span: span.start)
        return [asdict(span) | {"start": span.start - self.begun, "end": span.end - self.begun} for span in ordered]
