"""The figures of a report, from its rows. Functions return `None` if the rows do not have the data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import statistics
from ..statistics import Estimate, Values
from .names import Rival, Setting, answering, ordered, written
from .rows import PAIR, REQUEST, Table

# Combines the two values of a pair into one.
Combine = Callable[[Any, Any], Any]


def settings(rows: Table) -> list[Setting]:
    """Settings that occur in the rows, in the order of tables."""
    known = rows[["system", "budget", "options"]].drop_duplicates().itertuples(index=False)
    return ordered(
        Setting(system, float(budget), tuple(options.split("+")) if options else ())
        for system, budget, options in known
    )


def tasks(rows: Table) -> list[str]:
    """Tasks that occur in the rows, in their order."""
    return list(dict.fromkeys(rows["task"]))


def of(rows: Table, setting: Setting, task: str | None = None) -> Table:
    """The rows of a setting, of all tasks or of one."""
    chosen = rows["setting"] == written(setting)
    return rows[chosen if task is None else chosen & (rows["task"] == task)]


def at_budget(rows: Table, system: str, budget: float, options: tuple[str, ...] = ()) -> Setting | None:
    """A system's setting at a budget. A system with rows of the whole prefix only is exact, and has no other setting.

    Returns:
        The setting; `None` if it has no rows.
    """
    known = {one.budget for one in settings(rows) if (one.system, one.options) == (system, options)}
    if budget in known:
        return Setting(system, budget, options)
    return Setting(system, 1.0, options) if known == {1.0} else None


def rival_of(rows: Table, setting: Setting, rival: Rival) -> Setting | None:
    """The setting that times of `setting` are divided by; `None` if it has no rows or is `setting` itself."""
    budget = setting.budget if rival.budget is None else rival.budget
    found = at_budget(rows, rival.system, budget, rival.options)
    return None if found == setting else found


def shared(rows: Table, others: Table) -> Table:
    """Rows of requests that `others` has too, made in the same run and session."""
    return rows[rows[PAIR].isin(others[PAIR])]


def _clusters(rows: Table) -> list[Any]:
    return list(zip(rows["task"], rows["prefix_key"], strict=True))


def time(rows: Table, setting: Setting, task: str | None = None) -> Estimate | None:
    """Time to the first token in seconds: geometric mean over tasks of each task's geometric mean."""
    found = of(rows, setting, task)
    if not len(found):
        return None
    return statistics.geometric_mean(found["ttft_s"].to_numpy(), _clusters(found), found["task"].tolist())


def percentile(rows: Table, setting: Setting, task: str, share: float) -> Estimate | None:
    """Percentile of one task's times in seconds; `None` if there are too few rows for one to lie beyond it."""
    found = of(rows, setting, task)
    if not len(found) or not statistics.enough_beyond(len(found), share):
        return None
    return statistics.quantile(found["ttft_s"].to_numpy(), _clusters(found), share)


def paired(
    rows: Table, mine: Setting, other: Setting, field: str, combine: Combine, task: str | None = None, by: str = PAIR
) -> Table:
    """`value`, which is `combine(mine, other)` of a field, for each request that both settings answered.

    Args:
        rows: rows of one state (and references).
        mine, other: the two settings.
        field: a column; rows without it are left out.
        combine: makes one value of two.
        task: of one task only.
        by: the column that is equal in both rows: `PAIR` for times, `REQUEST` for answers.
    """
    narrow = rows[[by, "setting", "task", "prefix_key", field]].dropna(subset=[field])
    left, right = (of(narrow, one, task) for one in (mine, other))
    others = left[by].map(right.set_index(by)[field])
    return left.assign(value=combine(left[field], others))[others.notna()]


def ratio(
    rows: Table, mine: Setting, other: Setting, task: str | None = None, field: str = "ttft_s"
) -> Estimate | None:
    """Time to the first token divided by another setting's, of the same requests of the same run and session.

    The geometric mean over tasks of each task's geometric mean over its pairs. `requests` is the number of pairs.

    Args:
        rows, mine, other, task: see `paired`.
        field: another positive field than the time.
    """
    found = paired(rows, mine, other, field, lambda a, b: a / b, task)
    found = found[(found["value"] > 0) & np.isfinite(found["value"])]
    if not len(found):
        return None
    return statistics.geometric_mean(found["value"].to_numpy(), _clusters(found), found["task"].tolist())


def mean_of(rows: Table, setting: Setting, field: str, task: str | None = None) -> Estimate | None:
    """Mean over tasks of each task's mean of a field."""
    found = of(rows, setting, task)
    found = found[found[field].notna()]
    if not len(found):
        return None
    return statistics.mean(found[field].to_numpy(), _clusters(found), found["task"].tolist())


def judged_as(judged: Table, setting: Setting) -> Setting:
    """The setting whose rows have the answers of `setting`.

    Of settings that answer alike, a run judges one: that without options for speed, if it is there.
    """
    own = answering(setting)
    alike = [one for one in settings(judged) if answering(one) == own]
    return own if own in alike or not alike else alike[0]


def difference(judged: Table, mine: Setting, other: Setting, task: str | None = None) -> Estimate | None:
    """Score minus another setting's, request by request; for several tasks, the mean of their means."""
    found = paired(judged, mine, other, "score", lambda a, b: a - b, task, REQUEST)
    if not len(found):
        return None
    return statistics.mean(found["value"].to_numpy(), _clusters(found), found["task"].tolist())


def perplexity(rows: Table, setting: Setting, task: str | None = None) -> float | None:
    """Geometric mean over requests (over tasks, if there are several), from the mean loss."""
    found = of(rows, setting, task).copy()
    found["loss"] = np.log(found["perplexity"])
    loss = mean_of(found, setting, "loss", task)
    return None if loss is None else float(np.exp(loss.value))


@dataclass(frozen=True)
class Volume:
    """Mean bytes of a request; tasks count equally.

    Attributes:
        read: bytes read from storage.
        used: bytes that attention used.
        identified: bytes read to choose chunks or tokens; part of `read`.
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
    """Mean bytes of a setting's requests; `None` if it read nothing."""
    mine = of(rows, setting)
    mine = mine[mine["bytes_read"].notna()]
    if not mine["bytes_read"].sum():
        return None
    names = ["bytes_read", "bytes_used", "bytes_identified", "prefetch_wasted_bytes"]
    mine = mine.assign(share=mine["bytes_read"] / mine["prefix_bytes"])
    means = mine.assign(**{name: mine[name].fillna(0) for name in names}).groupby("task")[[*names, "share"]].mean()
    read, used, identified, wasted, share = (float(means[name].mean()) for name in [*names, "share"])
    payload = read - identified - wasted
    return Volume(
        read, used, identified, wasted, share, read / used if used else np.nan, payload / used if used else np.nan
    )


def phases(rows: Table, setting: Setting) -> dict[str, float]:
    """Mean seconds of each phase (tasks count equally), in the order of the rows; empty if no row has phases."""
    names = [name for name in rows.columns if name.startswith("phase:")]
    mine = of(rows, setting)
    mine = mine[mine[names].notna().any(axis=1)] if names else mine[:0]
    if not len(mine):
        return {}
    means = mine[[*names, "task"]].fillna(0.0).groupby("task")[names].mean().mean()
    return {name.removeprefix("phase:"): float(means[name]) for name in names}


def waiting(rows: Table, setting: Setting) -> float | None:
    """Share of the time to the first token that a setting waited for reads."""
    found = phases(rows, setting)
    whole = sum(found.values())
    return found["wait"] / whole if "wait" in found and whole > 0 else None


def hit_rate(rows: Table, setting: Setting) -> float | None:
    """Share of the chunks served that were in memory; `None` if none was served."""
    mine = of(rows, setting)
    served = mine["all_hits"].sum()
    return float(mine["memory_hits"].sum() / served) if served else None


def values(rows: Table, setting: Setting, field: str) -> Values:
    """A field of a setting's rows that have it."""
    found: Values = of(rows, setting)[field].dropna().to_numpy()
    return found


# A task tells systems apart only if the model answers it with different labels.
ONE_LABEL_SHARE = 0.95
# With fewer requests, one label may be chance.
ONE_LABEL_REQUESTS = 10


def one_label_tasks(judged: Table, metrics: dict[str, str], reference: Setting) -> dict[str, str]:
    """Tasks that the model answers with one label whatever it is asked, and that label.

    The reference predicts the label for at least `ONE_LABEL_SHARE` of at least `ONE_LABEL_REQUESTS` requests, although
    the right answers are not all the same. Rows hold no right answers, but show that they differ: some setting was
    right about one request with a label with which some setting was wrong about another.

    Args:
        judged: rows that have a score.
        metrics: metric of each task; tasks with labels have `"accuracy"`.
        reference: the setting that attends to the whole prefix in memory.
    """
    found = {}
    for task in (task for task in tasks(judged) if metrics.get(task) == "accuracy"):
        own = of(judged, reference, task)["prediction"].dropna()
        if len(own) < ONE_LABEL_REQUESTS:
            continue
        counts = own.value_counts()
        rows = judged[(judged["task"] == task) & judged["prediction"].notna()]
        right, wrong = (set(rows.loc[rows["score"] == score, "prediction"]) for score in (1.0, 0.0))
        if counts.iloc[0] / len(own) >= ONE_LABEL_SHARE and (right & wrong or len(right) > 1):
            found[task] = str(counts.index[0])
    return found
