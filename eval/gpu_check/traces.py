"""The stage `trace`: shows with torch's profiler where the time of three requests goes."""

from __future__ import annotations

import gzip
import json
import re
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from hf_contiguouskv import PrefixStore

from ..systems.states import State
from .cases import MEASURED, Case, make_system
from .device import alive_on, device_ready
from .outputs import LARGEST_FILE
from .prefixes import make_model, random_states, request
from .requests import LastLogits, timed_request, watched
from .results import Clock, Record, Results
from .settings import Settings
from .trace_summary import Event, summarise

# An escape sequence, or a lone backslash.
_ESCAPE = re.compile(r'\\(["\\/bfnrt]|u[0-9a-fA-F]{4})|\\')
HUNG_S = 25.0
# Number of requests before the traced one.
BEFORE = 2
TRACED = {
    "default-open": ("default 25%", State.OPEN),
    "default-warm": ("default 25%", State.WARM_DEVICE),
    "published-open": ("published 5%", State.OPEN),
}


def run(settings: Settings, results: Results, clock: Clock) -> None:
    """Run the stage."""
    with device_ready(settings):
        record = Record(results, "trace", clock, settings.folder, alive_on(settings))
        began = time.time()
        model = make_model(settings)
        tokens = _stored(settings, model)
        record.found |= {"tokens": tokens, "seconds_to_prepare": time.time() - began}
        results.flush()
        # The profiler's first run takes seconds.
        record.attempt("profiler", partial(_profiled, settings, lambda: torch.zeros(1, device=settings.device) + 1))
        with watched(model) as last:
            for name, (label, state) in TRACED.items():
                if clock.left <= 0:
                    record.failed.setdefault(name, "not traced: no time was left")
                    continue
                measured = next(one for one in MEASURED if one.label == label)
                case = Case(measured, state)
                record.step(name, partial(_traced, settings, model, tokens, case, last, name), HUNG_S)


def _stored(settings: Settings, model: Any) -> int:
    """A prefix length whose chunks are stored: by an earlier stage, or else the shortest prefix, stored now."""
    for tokens in (settings.trace_length, settings.lengths[0]):
        ids = request(settings, tokens).prefix_ids
        folder = Path(settings.folder) / str(tokens) / "chunks"
        if folder.exists():
            with PrefixStore(folder) as store:
                if store.match(model, ids) == tokens:
                    return tokens
    case = Case(next(one for one in MEASURED if one.folder == "chunks"), None)
    with make_system(settings, model, case, Path(settings.folder) / str(tokens), tokens) as system:
        system.store(ids, random_states(model, tokens))
    return tokens


def _traced(settings: Settings, model: Any, tokens: int, case: Case, last: LastLogits, name: str) -> dict[str, Any]:
    asked = request(settings, tokens)
    events: list[Event] = []

    def around(action: Callable[[], Any]) -> Any:
        value, found = _profiled(settings, action)
        events.extend(found)
        return value

    with ExitStack() as stack:
        system = make_system(settings, model, case, Path(settings.folder) / str(tokens), tokens)
        stack.enter_context(system)
        before = [timed_request(model, system, case, asked, last) for _ in range(BEFORE)]
        found = timed_request(model, system, case, asked, last, around=around)
    file = write_trace(events, Path(settings.out) / f"trace-{name}.json.gz")
    return {
        "label": case.measured.label,
        "state": str(case.state),
        "seconds_untraced": before[-1]["seconds"],
        "request": found,
        "summary": summarise(events, found["seconds"]),
        "file": file,
    }


def _profiled(settings: Settings, action: Callable[[], Any]) -> tuple[Any, list[Event]]:
    """The result of an action, and the profiler's events."""
    activities = [ProfilerActivity.CPU]
    if not settings.rehearse:
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        value = action()
        if not settings.rehearse:
            torch.cuda.synchronize()
    path = Path(settings.folder) / "trace.json"
    profiler.export_chrome_trace(str(path))
    return value, read_events(path)


def read_events(path: Path) -> list[Event]:
    """The events of an exported trace. The profiler may write names with escapes that JSON does not allow."""
    text = path.read_text(errors="replace")
    try:
        events: list[Event] = json.loads(text, strict=False)["traceEvents"]
    except json.JSONDecodeError:
        mended = _ESCAPE.sub(lambda found: found[0] if found[1] else "\\\\", text)
        events = json.loads(mended, strict=False)["traceEvents"]
    return events


def write_trace(events: list[Event], path: Path, limit: int = LARGEST_FILE) -> dict[str, Any]:
    """Write events as a compressed file that `chrome://tracing` and Perfetto open; all events, if they fit.

    Args:
        events: events of the profiler.
        path: path of the file.
        limit: maximum size in bytes. If all events need more, those of the host's operators are left out, then all
            but the device's own events.

    Returns:
        `name`, `bytes`, and the kinds of events that are `left_out`.
    """
    drops: tuple[frozenset[str], ...] = (
        frozenset(),
        frozenset({"cpu_op", "ac2g", "fwdbwd"}),
        frozenset({"cpu_op", "ac2g", "fwdbwd", "cuda_runtime", "cuda_driver", "user_annotation"}),
    )
    for left_out in drops:
        some = [one for one in events if one.get("cat") not in left_out]
        packed = gzip.compress(json.dumps({"traceEvents": some}).encode(), 6)
        if len(packed) <= limit:
            path.write_bytes(packed)
            return {"name": path.name, "bytes": len(packed), "left_out": sorted(left_out)}
    return {"name": None, "bytes": 0, "left_out": ["everything: too large"]}
