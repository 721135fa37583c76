"""Our figures beside those of the paper (arXiv 2601.13631), and what our rows show about the difference."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..statistics import Interval
from . import measures
from .cells import listed, named, number, share, shown, table
from .names import ATTENTIONSTORE, IN_MEMORY, OURS, PAPER, Setting, label
from .rows import Results, Table

BUDGET = 0.05
# Time to the first token of these systems divided by that of the paper's own system, at that budget.
SPEED_UPS = {ATTENTIONSTORE: 6.16, "attentionstore_h2o": 5.83, "impress": 3.85}
# The paper's tasks.
TASKS = ("sst2", "subj", "trec", "rte")
# Maximum loss of accuracy in the paper, in points.
ACCURACY_LOSS = 2.94
BASELINES = (
    ATTENTIONSTORE,
    "attentionstore_overlapped",
    "attentionstore_h2o",
    "attentionstore_h2o_overlapped",
    "impress",
    "impress_overlapped",
    "impress_groups",
)


@dataclass(frozen=True)
class SpeedUp:
    """How many times faster one of our systems is than a baseline at the same budget.

    Attributes:
        baseline: the system that it is compared with.
        ours: our system, with its budget.
        measured: the baseline's time divided by ours, geometric mean over requests, with interval.
        requests: number of requests.
        paper: the paper's figure; `None` if the paper has no such comparison.
    """

    baseline: str
    ours: Setting
    measured: Interval
    requests: int
    paper: float | None

    @property
    def verdict(self) -> str:
        """Whether the measured ratio is above or below the paper's."""
        return "" if self.paper is None else compared(self.measured, self.paper)


def compared(measured: Interval, paper: float, above: str = "above", below: str = "below") -> str:
    """The side of the paper's figure on which the whole interval lies."""
    value, low, high = measured
    if math.isnan(low):
        return f"{above if value > paper else below} (no interval)"
    return above if low > paper else below if high < paper else "not told apart"


def speed_ups(rows: Table) -> list[SpeedUp]:
    """All comparisons that the timed rows allow, over the paper's tasks if there are any."""
    own = rows[rows["task"].isin(TASKS)]
    rows = own if len(own) else rows
    found = []
    for system, budget in measures.settings(rows):
        for baseline in BASELINES if system in (PAPER, OURS) else ():
            other = measures.setting_of(rows, baseline, budget)
            measured = measures.ratio(rows, other, (system, budget)) if other else None
            if other is None or measured is None:
                continue
            pairs = measures.paired(rows, other, (system, budget), "ttft_s", lambda a, b: a / b)
            paper = SPEED_UPS.get(baseline) if math.isclose(budget, BUDGET) else None
            found.append(SpeedUp(baseline, (system, budget), measured, len(pairs), paper))
    return found


def losses(results: Results) -> list[tuple[Setting, str, Interval]]:
    """Points of score lost against in memory: over tasks judged by accuracy and, if there are others, over all
    tasks."""
    rows = results.judged
    metrics = results.metrics
    accuracy = [task for task in measures.tasks(rows) if metrics.get(task) == "accuracy"]
    groups = {f"accuracy ({', '.join(accuracy)})": rows[rows["task"].isin(accuracy)]} if accuracy else {}
    if len(accuracy) < len(measures.tasks(rows)):
        groups["all tasks' scores"] = rows
    found = []
    for name, chosen in groups.items():
        reference = measures.setting_of(chosen, IN_MEMORY)
        for setting in measures.settings(chosen):
            if setting[0] not in (PAPER, OURS) or reference is None:
                continue
            lost = measures.difference(chosen, reference, setting)
            if lost is not None:
                value, low, high = (one * 100 for one in lost)
                found.append((setting, name, (value, low, high)))
    return found


def section(results: Results) -> str:
    """The section, as Markdown."""
    rows = results.timed
    times, lost = speed_ups(rows), losses(results)
    if not times and not lost:
        return "Nothing to compare: no run has a ContiguousKV system together with one that the paper compares with."
    parts = [_setup(results)]
    if times:
        parts.append(_times_table(times))
        if not any(math.isclose(found.ours[1], BUDGET) for found in times):
            parts.append(f"No run has the paper's budget of {share(BUDGET)}, so its figures stand beside none of ours.")
        parts += _why(rows)
    if lost:
        parts.append(_loss_table(lost))
    return "\n\n".join(part for part in parts if part)


def _setup(results: Results) -> str:
    machines = {str(run.machine.get("accelerator") or run.machine.get("cpu") or "unknown") for run in results.runs}
    models = {str(run.config.get("model", "unknown")) for run in results.runs}
    return (
        f"The paper (arXiv 2601.13631) reports, at a budget of {share(BUDGET)}: "
        + listed([f"{figure}x over {label(name)}" for name, figure in SPEED_UPS.items()])
        + f" in time to the first token, with accuracy within {ACCURACY_LOSS} points of the full KV. It ran Qwen2.5 "
        "7B, 14B and 32B on an A800 GPU with a Samsung 990 Pro, its AttentionStore kept an LRU cache, and its "
        "baselines do not overlap loading with compute. "
        f"Here: {', '.join(sorted(models))} on {', '.join(sorted(machines))}."
    )


def _times_table(found: list[SpeedUp]) -> str:
    lines = [
        [
            *named(one.ours),
            label(one.baseline),
            str(one.requests),
            shown(one.measured),
            number(one.paper),
            one.verdict,
        ]
        for one in found
    ]
    head = ["system", "budget", "faster than", "n", "measured, x", "paper, x", "above / below the paper"]
    return f"Speed-ups are over requests of the paper's tasks, where a run has any.\n\n{table(head, lines, 3)}"


def _loss_table(found: list[tuple[Setting, str, Interval]]) -> str:
    lines = []
    for setting, name, lost in found:
        at_budget = math.isclose(setting[1], BUDGET) and name.startswith("accuracy")
        verdict = compared(lost, ACCURACY_LOSS, "above (loses more)", "below (loses less)") if at_budget else ""
        paper = number(ACCURACY_LOSS) if at_budget else ""
        lines.append([*named(setting), name, shown(lost, digits=1, sign=True), paper, verdict])
    head = ["system", "budget", "of", "points lost", "paper, at most", "above / below the paper"]
    return table(head, lines, 3)


def _why(rows: Table) -> list[str]:
    """Explanations that the phases support."""
    budgets = [budget for system, budget in measures.settings(rows) if system in (PAPER, OURS)]
    budget = min(budgets, key=lambda one: abs(one - BUDGET))
    chosen = [measures.setting_of(rows, name, budget) for name in (*BASELINES, PAPER, OURS)]
    shares = {setting: measures.waiting(rows, setting) for setting in chosen if setting is not None}
    known = {setting: waited for setting, waited in shares.items() if waited is not None}
    parts = []
    if known:
        each = listed([f"{label(system)} {waited:.0%}" for (system, _), waited in known.items()])
        parts.append(
            f"Waiting for reads (phase `wait`) takes this much of the time to the first token, at a budget of "
            f"{share(budget)} where there is one: {each}."
        )
    base = (ATTENTIONSTORE, 1.0)
    if base in known:
        parts.append(_ceiling(rows, base, known[base], [one for one in known if one[0] in (PAPER, OURS)]))
    overlapped = measures.setting_of(rows, "attentionstore_overlapped")
    gain = measures.ratio(rows, base, overlapped) if overlapped else None
    if gain is not None:
        parts.append(
            f"Overlapping loading with compute, which the paper's baselines do not do, makes AttentionStore "
            f"{shown(gain)} times as fast by itself."
        )
    return parts


def _ceiling(rows: Table, base: Setting, waited: float, ours: list[Setting]) -> str:
    """The possible gain over AttentionStore from not waiting, and the rest of its time."""
    paper = SPEED_UPS[ATTENTIONSTORE]
    most = 1 / (1 - waited) if waited < 1 else math.inf
    verdict = (
        f"less than the paper's {paper}x: reading less cannot reach that figure here by itself"
        if most < paper
        else f"no less than the paper's {paper}x: its reads leave room for that here"
    )
    text = (
        f"If AttentionStore never waited and the rest of its time stayed as it is, it would be {most:.2f} times as "
        f"fast, {verdict}."
    )
    # Only requests that all of them answered, because times depend on prefix lengths.
    same = measures.shared(rows, [base, *ours])
    if not ours or not len(same):
        return text
    rest = [f"{label(one[0])} {_without_waiting(same, one) * 1e3:,.0f} ms" for one in (base, *ours)]
    return (
        f"{text} The time that is not waiting, on average over the requests that all of these answered: {listed(rest)}."
    )


def _without_waiting(rows: Table, setting: Setting) -> float:
    found = measures.phases(rows, setting)
    return sum(found.values()) - found["wait"]
