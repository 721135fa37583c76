"""Summarises a profiler trace: launches, copies, waits, allocations, and what took the time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

# One entry of `traceEvents`: `ph`, `cat`, `name`, `ts` and `dur` (microseconds), `tid`, `args`.
Event = dict[str, Any]
TOP = 15
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
RUNTIME = ("cuda_runtime", "cuda_driver")
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize", "cudaMemcpy", "cudaMemcpy2D")
ALLOCATIONS = (
    "cudaMalloc",
    "cudaFree",
    "cudaHostAlloc",
    "cudaMallocHost",
    "cudaFreeHost",
    "cudaHostRegister",
    "cudaHostUnregister",
    "cuMemCreate",
    "cuMemMap",
)


def summarise(events: Iterable[Event], seconds: float) -> dict[str, Any]:
    """The numbers of one request, ready for JSON.

    Args:
        events: events of the profiler.
        seconds: time of the traced request.
    """
    spans = [one for one in events if one.get("ph") == "X" and "dur" in one]
    by_kind: dict[str, list[Event]] = defaultdict(list)
    for one in spans:
        by_kind[one.get("cat", "")].append(one)
    runtime = [one for kind in RUNTIME for one in by_kind[kind]]
    on_device = [one for kind in ON_DEVICE for one in by_kind[kind]]
    return {
        "seconds_traced": seconds,
        "kernels": _total(by_kind["kernel"]),
        "launches": _total([one for one in runtime if "LaunchKernel" in one["name"]]),
        "copies": _copies(by_kind["gpu_memcpy"]),
        "waits": _by_name([one for one in runtime if one["name"] in WAITS]),
        "allocations": _by_name([one for one in runtime if one["name"] in ALLOCATIONS]),
        "runtime_calls": _by_name(runtime, TOP),
        "device_busy_ms": covered(on_device) / 1e3,
        "device_computes_ms": covered(by_kind["kernel"]) / 1e3,
        "top_kernels": _by_name(by_kind["kernel"], TOP),
        "top_host_ops": own_time(by_kind["cpu_op"], TOP),
        "events": len(spans),
    }


def _total(events: list[Event]) -> dict[str, float]:
    return {"count": len(events), "ms": sum(one["dur"] for one in events) / 1e3}


def _copies(events: list[Event]) -> dict[str, Any]:
    """By direction and kind of memory ("HtoD (Pinned -> Device)"): count, bytes and milliseconds."""
    found: dict[str, dict[str, float]] = {}
    for one in events:
        row = found.setdefault(one["name"].removeprefix("Memcpy "), {"count": 0, "bytes": 0, "ms": 0.0})
        row["count"] += 1
        row["bytes"] += one.get("args", {}).get("bytes", 0)
        row["ms"] += one["dur"] / 1e3
    return found


def _by_name(events: list[Event], most: int | None = None) -> list[dict[str, Any]]:
    """Names with count and milliseconds, longest first."""
    rows: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for one in events:
        rows[one["name"]][0] += 1
        rows[one["name"]][1] += one["dur"] / 1e3
    ordered = sorted(rows.items(), key=lambda row: -row[1][1])
    return [{"name": name[:160], "count": int(count), "ms": ms} for name, (count, ms) in ordered[:most]]


def covered(events: list[Event]) -> float:
    """Microseconds during which at least one of the events was running."""
    total, end = 0.0, float("-inf")
    for one in sorted(events, key=lambda one: one["ts"]):
        begin, stop = float(one["ts"]), float(one["ts"]) + float(one["dur"])
        total += max(0.0, stop - max(begin, end))
        end = max(end, stop)
    return total


def own_time(events: list[Event], most: int) -> list[dict[str, Any]]:
    """Operators of the host with their own time, without nested operators, longest first."""
    rows: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    by_thread: dict[Any, list[Event]] = defaultdict(list)
    for one in events:
        by_thread[one.get("tid")].append(one)
    for own in by_thread.values():
        running: list[tuple[str, float]] = []
        # Of two events that begin together, the longer one contains the other.
        for one in sorted(own, key=lambda one: (one["ts"], -one["dur"])):
            begin, spent = float(one["ts"]), float(one["dur"])
            while running and running[-1][1] <= begin:
                running.pop()
            if running:
                rows[running[-1][0]][1] -= spent / 1e3
            rows[one["name"]][0] += 1
            rows[one["name"]][1] += spent / 1e3
            running.append((one["name"], begin + spent))
    ordered = sorted(rows.items(), key=lambda row: -row[1][1])
    return [{"name": name[:160], "count": int(count), "own_ms": ms} for name, (count, ms) in ordered[:most]]
