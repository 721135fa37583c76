"""The stage `time`: times requests on prefixes of several lengths, and with suffixes of many lengths."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ..systems.states import State
from .blocks import Block
from .cases import FLOOR, Case
from .device import alive_on, device_ready, memory_in_use
from .prefixes import make_model, request
from .requests import LastLogits, timed_floor, timed_request, watched
from .results import Clock, Record, Results
from .settings import Settings

# Systems of the run in which every request has another suffix length. All are warm, so no disk is involved.
VARIED = ("in_memory", "exact", "published 5%", "default 25%")
VARIED_SHARE = 0.15


def run(settings: Settings, results: Results, clock: Clock) -> None:
    """Run the stage."""
    with device_ready(settings):
        record = Record(results, "time", clock, settings.folder, alive_on(settings))
        began = time.time()
        model = make_model(settings)
        parameters = sum(one.numel() for one in model.parameters())
        record.found["model"] = {
            "kind": type(model).__name__,
            "shape": dict(settings.shape),
            "dtype": settings.dtype,
            "parameters": parameters,
            "seconds_to_make": time.time() - began,
            "memory": memory_in_use(settings),
        }
        record.found |= {"suffix_tokens": settings.suffix_tokens, "rounds_planned": settings.rounds}
        results.flush()
        with watched(model) as last:
            _lengths(settings, model, record, clock, last)


def _lengths(settings: Settings, model: Any, record: Record, clock: Clock, last: LastLogits) -> None:
    skipped: list[dict[str, Any]] = record.found.setdefault("skipped", [])
    speed: float | None = None
    before: Block | None = None
    for tokens, share in zip(settings.lengths, settings.shares, strict=True):
        known = record.found.get("prefixes", {}).get(str(tokens), {})
        if known.get("status") == "complete":
            continue  # An earlier process has measured this length.
        own_clock = clock.share(share)
        why = _too_long(before, tokens, own_clock)
        if why is not None:
            skipped.append({"what": f"{tokens} tokens", "why": why})
            record.results.flush()
            continue
        block = Block(settings, model, tokens, Path(settings.folder) / str(tokens), record, own_clock, last, speed)
        try:
            block.run()
            speed, before = block.write_speed, block
            if tokens == settings.lengths[0]:
                _varied(settings, model, block, record, clock.share(VARIED_SHARE), last)
        finally:
            block.close(keep=("chunks",) if tokens == settings.trace_length else ())


def _too_long(before: Block | None, tokens: int, clock: Clock) -> str | None:
    """Why there is no time for prefixes of this length, estimated from a shorter one; `None` if there is."""
    if clock.left <= 0:
        return "no time was left"
    needed = 0.0 if before is None else before.predicted(tokens)
    if needed <= clock.left:
        return None
    return f"storing it and two rounds would take about {needed:.0f} s, and {clock.left:.0f} s are left"


def _varied(settings: Settings, model: Any, block: Block, record: Record, clock: Clock, last: LastLogits) -> None:
    """Time requests with different suffix lengths, each length twice, because attention of a new shape may be slow
    once."""
    found: list[dict[str, Any]] = record.found.setdefault("varied", [])
    cases: list[Case | None] = [None, *(_warmest(block, label) for label in VARIED if _warmest(block, label))]
    low, high = settings.varied_suffixes
    lengths = range(low, high + 1)
    # No two systems share a length, because the second system would find the shape known.
    for turn in range(len(lengths) // len(cases)):
        for place, case in enumerate(cases):
            if clock.left <= 0:
                return
            tokens = lengths[turn * len(cases) + place]
            for time_of_shape in (1, 2):
                found.extend(_one_varied(settings, model, block, record, last, case, tokens, time_of_shape))
                record.results.flush()


def _one_varied(
    settings: Settings,
    model: Any,
    block: Block,
    record: Record,
    last: LastLogits,
    case: Case | None,
    suffix_tokens: int,
    time_of_shape: int,
) -> list[dict[str, Any]]:
    asked = request(settings, block.own["tokens"], suffix_tokens)
    own = {"suffix_tokens": suffix_tokens, "time_of_shape": time_of_shape}
    if case is None:
        floor = record.attempt("varied floor", lambda: timed_floor(model, asked, last))
        return [] if floor is None else [{"label": FLOOR, "state": None, "seconds": floor[0]} | own]
    timed = record.attempt(
        f"varied {case.name}",
        # The whole prefix is made warm, because finding out what this suffix needs would make its shape known.
        lambda: timed_request(model, block.systems[case], case, asked, last, whole_prefix=True),
    )
    return [] if timed is None else [{"label": case.measured.label, "state": str(case.state)} | timed | own]


def _warmest(block: Block, label: str) -> Case | None:
    """The case of this label whose prefix is nearest to the device."""
    own = {case.state: case for case in block.systems if case.measured.label == label}
    return next((own[state] for state in (State.WARM_DEVICE, State.WARM_HOST) if state in own), None)
