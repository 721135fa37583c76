"""Many replays: every policy at every size, in all scenarios."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..timing import machine
from .imitated_device import imitated_device
from .replay import Outcome, Replay, footprint, replay, replay_together
from .trace import Trace, Workload


def plan(seeds: list[int], rounds: int, base: Workload) -> list[tuple[Workload, int]]:
    """Scenarios, and how often each is timed: the first seed without drift `rounds` times, all others for hits only."""
    steady = replace(base, drift=0.0)
    others = [replace(steady, seed=seed) for seed in seeds[1:]] + [replace(base, seed=seed) for seed in seeds]
    return [(replace(steady, seed=seeds[0]), rounds)] + [(other, 0) for other in others]


def _hits_only(trace: Path, store: Path, warm_up: int, load: Workload, policy: str, size: int) -> Outcome:
    """One replay without reads and compute, in a process of its own."""
    torch.set_num_threads(1)
    found = Trace.load(trace)
    return replay(found, load.draw(found), store, policy, size, warm_up=warm_up)


def run_replays(
    path: Path,
    store: Path,
    scenarios: list[tuple[Workload, int]],
    policies: list[str],
    shares: list[float],
    more_shares: list[float],
    warm_up: int,
    timed: int,
    pace: float,
    progress: bool = True,
) -> dict[str, Any]:
    """All replays of the trace at `path`: the timed ones side by side, the others on all cores; ready for JSON.

    Args:
        path, store: the trace, and the store that it is replayed on.
        scenarios: see `plan`.
        policies: names.
        shares: sizes of memory, of everything that the first scenario touches.
        more_shares: the same, for hit rates only.
        warm_up, timed, pace: see `replay_together`.
        progress: whether to show bars.
    """
    trace = Trace.load(path)
    first, _ = scenarios[0]
    whole = footprint(trace, first.draw(trace))
    variants = _variants(policies, shares, sum(whole.values()))
    more = _variants(policies, more_shares, sum(whole.values()))
    rows: list[dict[str, Any]] = []

    def add(load: Workload, reads: bool, variant: tuple[str, float, int], outcome: Outcome) -> None:
        policy, share, size = variant
        about = {"policy": policy, "share": share, "host_bytes": size, "drift": load.drift, "seed": load.seed}
        rows.append(about | {"reads": reads} | outcome.as_dict())

    for load, rounds in scenarios:
        for number in range(rounds):
            with ExitStack() as stack:
                replays = [stack.enter_context(Replay(trace, store, policy, size)) for policy, _, size in variants]
                outcomes = replay_together(
                    replays,
                    load.draw(trace),
                    warm_up=warm_up,
                    timed=timed,
                    pace=pace,
                    seed=number,
                    progress=progress,
                )
            for variant, outcome in zip(variants, outcomes, strict=True):
                add(load, True, variant, outcome)
    untimed = [(load, variant) for load, rounds in scenarios for variant in ([] if rounds else variants) + more]
    found = _in_processes(partial(_hits_only, path, store, warm_up), untimed)
    for (load, variant), outcome in zip(
        untimed, tqdm(found, "hits only", len(untimed), disable=not progress, leave=False), strict=True
    ):
        add(load, False, variant, outcome)
    return {
        "about": trace.about,
        "workload": asdict(first),
        "footprint": whole,
        "warm_up": warm_up,
        "timed": timed,
        "pace": pace,
        "machine": machine(),
        "rows": rows,
    }


def _of_both_tiers(
    trace: Path, store: Path, warm_up: int, load: Workload, policy: str, sizes: tuple[int, int]
) -> Outcome:
    """As `_hits_only`, with memory of an imitated device above the host's."""
    torch.set_num_threads(1)
    found = Trace.load(trace)
    with imitated_device() as device:
        return replay(found, load.draw(found), store, policy, sizes[1], device, sizes[0], warm_up=warm_up)


def run_tiers(
    path: Path,
    store: Path,
    load: Workload,
    policies: list[str],
    shares: list[tuple[float, float]],
    warm_up: int,
    progress: bool = True,
) -> dict[str, Any]:
    """Hit rates of the trace at `path` where a device and the host bound what they keep; ready for JSON.

    Args:
        path, store: the trace, and the store that it is replayed on.
        load: the requests.
        policies: names.
        shares: of everything that the requests touch, of the device and of the host.
        warm_up: requests that are not counted.
        progress: whether to show a bar.
    """
    trace = Trace.load(path)
    whole = footprint(trace, load.draw(trace))
    variants = [(policy, pair) for pair in shares for policy in policies]
    sizes = [tuple(int(share * sum(whole.values())) for share in pair) for _, pair in variants]
    rows = []
    with _processes() as pool:
        found = pool.map(
            partial(_of_both_tiers, path, store, warm_up), [load] * len(variants), [name for name, _ in variants], sizes
        )
        bar = tqdm(found, "both tiers", len(variants), disable=not progress, leave=False)
        for (policy, pair), (device, host), outcome in zip(variants, sizes, bar, strict=True):
            about = {"policy": policy, "shares": pair, "device_bytes": device, "host_bytes": host}
            rows.append(about | outcome.as_dict())
    return {
        "about": trace.about,
        "workload": asdict(load),
        "footprint": whole,
        "warm_up": warm_up,
        "machine": machine(),
        "rows": rows,
    }


def _variants(policies: list[str], shares: list[float], whole: int) -> list[tuple[str, float, int]]:
    return [(policy, share, int(share * whole)) for policy in policies for share in shares]


def _processes() -> ProcessPoolExecutor:
    # Started, not forked: a fork would inherit the threads of torch without their stacks.
    return ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"))


def _in_processes(run: Any, untimed: list[tuple[Workload, tuple[str, float, int]]]) -> Iterator[Outcome]:
    with _processes() as pool:
        loads = [load for load, _ in untimed]
        yield from pool.map(run, loads, [policy for _, (policy, _, _) in untimed], [size for _, (*_, size) in untimed])
