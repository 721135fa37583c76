"""Many replays: every policy at every size, in random order, in all scenarios."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..timing import interleave, machine
from .replay import footprint
from .replay import replay as replay_once
from .trace import Trace, Workload


def plan(seeds: list[int], rounds: int, base: Workload) -> list[tuple[Workload, int]]:
    """Scenarios, and how often each is timed: the first seed with drift `rounds` times, all others for hits only."""
    others = [replace(base, seed=seed) for seed in seeds[1:]] + [replace(base, drift=0.0, seed=seed) for seed in seeds]
    return [(replace(base, seed=seeds[0]), rounds)] + [(other, 0) for other in others]


def run_replays(
    trace: Trace,
    store: Path,
    scenarios: list[tuple[Workload, int]],
    policies: list[str],
    shares: list[float],
    warm_up: int,
    timed: int,
    pace: float,
    progress: bool = True,
) -> dict[str, Any]:
    """All replays, in random order within each round; numbers ready for JSON."""
    first, _ = scenarios[0]
    whole = footprint(trace, first.draw(trace))
    rows = []
    runs = [
        (load, bool(rounds), policy, share)
        for load, rounds in scenarios
        for _, (policy, share) in interleave([(p, s) for p in policies for s in shares], max(1, rounds), load.seed)
    ]
    for load, reads, policy, share in tqdm(runs, "replays", disable=not progress, leave=False):
        size = int(share * sum(whole.values()))
        label = f"{policy}, {share:.0%}" if progress else None
        outcome = replay_once(
            trace,
            load.draw(trace),
            store,
            policy,
            size,
            warm_up=warm_up,
            timed=timed if reads else 0,
            pace=pace if reads else 0.0,
            reads=reads,
            progress=label,
        )
        about = {"policy": policy, "share": share, "host_bytes": size, "drift": load.drift, "seed": load.seed}
        rows.append(about | {"reads": reads} | outcome.as_dict())
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
