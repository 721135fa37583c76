"""Waiting for reads, and counting the time."""

from __future__ import annotations

import time

from ..stats import RequestStats
from ..store.reader import Ticket
from ..timeline import SpanRecorder


def wait_for(ticket: Ticket, stats: RequestStats, timeline: SpanRecorder, layer: int, kind: str = "read") -> None:
    """Wait for the reads of `ticket`. The time counts as `io_wait_s`, and goes into the timeline.

    Raises:
        SegmentCorruptError, SegmentReadError, StoreClosedError: see `Ticket.wait`.
    """
    started = time.perf_counter()
    waited = not ticket.done
    try:
        ticket.wait()
    finally:
        ended = time.perf_counter()
        if waited:
            stats.io_wait_s += ended - started
        timeline.add(kind, layer, ticket.started, ticket.ended)
        if waited:
            timeline.add("wait", layer, started, ended)
