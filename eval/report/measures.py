"""The figures of a report, from its rows. Functions return `None` if the rows do not have the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas

from ..statistics import Interval, Values, geometric_mean, mean_interval, mean_of_groups, quantile_interval
from ..timing import Spread, median_spread
from .names import EXACT, Setting, ordered
from .rows import PAIR, REQUEST, Table

# Combines the two values of a pair into one.
Combine = Callable[[Any, Any], Any]


def settings(rows: Table) -> list[Setting]:
    """Systems and budgets that occur in the rows."""
    return ordered(zip(rows["system"], rows["budget"], strict=True))


def tasks(rows: Table) -> list[str]:
    """Tasks that occur in the rows, in their order."""
    return list(dict.fromkeys(rows["task"]))


def of(rows: Table, setting: Setting, task: str | None = None) -> Table:
    """The rows of a system at a budget, of all tasks or of one."""
    chosen = (rows["system"] == setting[0]) & (rows["budget"] == setting[1])
    return rows[chosen if task is None else chosen & (rows["task"] == task)]


def setting_of(rows: Table, system: str, budget: float = 1.0) -> Setting | None:
    """A system's setting at a budget; exact systems always serve the whole prefix. `None` if it has no rows."""
    wanted = (system, 1.0 if system in EXACT else budget)
    return wanted if len(of(rows, wanted)) else None


def spread(rows: Table, setting: Setting, task: str | None = None) -> Spread | None:
    """Median time to the first token (seconds) with its quartiles, over all rows."""
    times = of(rows, setting, task)["ttft_s"]
    return median_spread(times) if len(times) else None


def percentile(rows: Table, setting: Setting, share: float) -> Interval | None:
    """Percentile of the time to the first token in seconds; `None` if there are too few rows for one to lie beyond
    it."""
    times = of(rows, setting)["ttft_s"].to_numpy()
    return quantile_interval(times, share) if len(times) * (1 - share) >= 1 - 1e-9 else None


def mean_time(rows: Table, setting: Setting) -> Interval | None:
    """Mean time to the first token in seconds, over all rows."""
    times = of(rows, setting)["ttft_s"].to_numpy()
    return mean_interval(times) if len(times) else None


def per_request(rows: Table, field: str) -> Table:
    """One value per request and task. Repetitions of a request, for example in several runs, are averaged.

    Repetitions are not new requests, so intervals must not draw them separately.
    """
    return rows[rows[field].notna()].groupby(REQUEST, sort=False)[field].mean().reset_index()


def paired(rows: Table, mine: Setting, other: Setting, field: str, combine: Combine, task: str | None = None) -> Table:
    """`value`, which is `combine(mine, other)` of a field, per request that two systems answered in the same run."""
    both = of(rows, mine, task)[[*PAIR, "identity", field]].merge(
        of(rows, other, task)[[*PAIR, field]], on=PAIR, suffixes=("", " other")
    )
    both["value"] = combine(both[field], both[f"{field} other"])
    return per_request(both, "value")


def shared(rows: Table, chosen: Sequence[Setting]) -> Table:
    """The rows of requests that all of these systems answered in the same run."""
    keys = pandas.MultiIndex.from_frame(rows[PAIR])
    common = np.ones(len(rows), dtype=bool)
    for setting in chosen:
        common &= keys.isin(pandas.MultiIndex.from_frame(of(rows, setting)[PAIR]))
    return rows[common]


def same_requests(rows: Table) -> bool:
    """Whether all systems answered the same requests."""
    return len(shared(rows, settings(rows))) == len(rows)


def ratio(rows: Table, mine: Setting, other: Setting, task: str | None = None) -> Interval | None:
    """Time to the first token divided by another system's: geometric mean of the requests' ratios."""
    found = paired(rows, mine, other, "ttft_s", lambda a, b: np.log(a / b), task)["value"]
    return geometric_mean(np.exp(found.to_numpy())) if len(found) else None


def mean_of(rows: Table, setting: Setting, field: str, task: str | None = None) -> Interval | None:
    """Mean of a field over a task's requests; for several tasks, the mean of their means."""
    found = per_request(of(rows, setting, task), field)
    return mean_of_groups(found[field].to_numpy(), found["task"].tolist()) if len(found) else None


def difference(rows: Table, mine: Setting, other: Setting, task: str | None = None) -> Interval | None:
    """Score minus another system's, request by request; for several tasks, the mean of their means."""
    found = paired(rows, mine, other, "score", lambda a, b: a - b, task)
    return mean_of_groups(found["value"].to_numpy(), found["task"].tolist()) if len(found) else None


def perplexity(rows: Table, setting: Setting, task: str | None = None) -> float | None:
    """Geometric mean over requests (over tasks, if there are several), from the mean loss."""
    found = of(rows, setting, task).copy()
    found["loss"] = np.log(found["perplexity"])
    loss = mean_of(found, setting, "loss", task)
    return None if loss is None else float(np.exp(loss[0]))


@dataclass(frozen=True)
class Volume:
    """Mean bytes of a request.

    Attributes:
        read: bytes read from storage.
        used: bytes that attention used.
        identified: bytes read to choose chunks; part of `read`.
        wasted: bytes read ahead and not used; part of `read`.
        share: bytes read as a share of the prefix (mean over requests); NaN if the prefix's bytes are unknown.
        amplification: bytes read / bytes used.
        payload: the same without `identified` and `wasted`.
    """

    read: float
    used: float
    identified: float
    wasted: float
    share: float
    amplification: float
    payload: float


def volume(rows: Table, setting: Setting) -> Volume | None:
    """Mean bytes of a system's requests; `None` if it read nothing."""
    mine = of(rows, setting)
    mine = mine[mine["bytes_read"].notna()]
    if not mine["bytes_read"].sum():
        return None
    names = ("bytes_read", "bytes_used", "bytes_identified", "prefetch_wasted_bytes")
    read, used, identified, wasted = (float(mine[name].fillna(0).mean()) for name in names)
    share = float((mine["bytes_read"] / mine["prefix_bytes"]).mean())
    payload = read - identified - wasted
    return Volume(
        read, used, identified, wasted, share, read / used if used else np.nan, payload / used if used else np.nan
    )


def phases(rows: Table, setting: Setting) -> dict[str, float]:
    """Mean seconds of each phase, in the order of the rows; empty if no row has phases."""
    names = [name for name in rows.columns if name.startswith("phase:")]
    mine = of(rows, setting)[names].dropna(how="all").fillna(0.0)
    return {name.removeprefix("phase:"): float(mine[name].mean()) for name in names} if len(mine) else {}


def waiting(rows: Table, setting: Setting) -> float | None:
    """Share of the time to the first token that a system waited for reads."""
    found = phases(rows, setting)
    whole = sum(found.values())
    return found["wait"] / whole if "wait" in found and whole > 0 else None


def hit_rate(rows: Table, setting: Setting) -> float | None:
    """Share of chunks that were in host or device memory."""
    mine = of(rows, setting)
    served = mine["all_hits"].sum()
    return float(mine["memory_hits"].sum() / served) if served else None


def values(rows: Table, setting: Setting, field: str) -> Values:
    """A field of a system's rows, float64 `(n,)`, without rows that lack it."""
    found: Values = of(rows, setting)[field].dropna().to_numpy()
    return found
