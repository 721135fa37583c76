"""Our figures beside those of the paper (arXiv 2601.13631), and what our rows show about the difference."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..statistics import Estimate
from . import measures
from .cells import at, columns_used, counted, listed, named, number, share, shown, table
from .names import ATTENTIONSTORE, MEMORY, OURS, PAPER, Rival, Setting, label
from .quality import telling
from .rows import Results, Table
from .states import Cut, cut

BUDGET = 0.05
# The state of the paper's requests.
STATE = "cold"
# Time to the first token of these systems divided by that of the paper's own system, at that budget.
SPEED_UPS = {ATTENTIONSTORE: 6.16, "attentionstore_h2o": 5.83, "impress": 3.85}
# Of IMPRESS: bytes read / bytes used, and tokens loaded from the SSD divided by those of the paper's own system.
AMPLIFICATION = 12.0
TOKENS_LOADED = 16.33
# The paper's tasks.
TASKS = ("sst2", "subj", "trec", "rte")
# Maximum loss of accuracy in the paper, in points.
ACCURACY_LOSS = 2.94
DISK = "Samsung 990 Pro"
BASELINES = (ATTENTIONSTORE, "attentionstore_h2o", "impress")
_TAIL = 0.95


@dataclass(frozen=True)
class SpeedUp:
    """How many times faster one of our systems is than a baseline at the same budget.

    Attributes:
        baseline: the setting that it is compared with.
        ours: our setting.
        measured: the baseline's time divided by ours, with interval and number of pairs.
        paper: the paper's figure; `None` if the paper has no such comparison.
    """

    baseline: Setting
    ours: Setting
    measured: Estimate
    paper: float | None

    @property
    def verdict(self) -> str:
        """Whether the measured ratio is above or below the paper's."""
        return "" if self.paper is None else compared(self.measured, self.paper)


def compared(measured: Estimate, paper: float, above: str = "above", below: str = "below") -> str:
    """The side of the paper's figure on which the whole interval lies."""
    if not measured.has_interval:
        return f"{above if measured.value > paper else below} (no interval)"
    return above if measured.low > paper else below if measured.high < paper else "not told apart"


def papers_rows(rows: Table) -> Table:
    """The rows of the paper's tasks, if there are any; else all."""
    own = rows[rows["task"].isin(TASKS)]
    return own if len(own) else rows


def cold_cut(results: Results) -> Cut:
    """The cold rows of the paper's tasks."""
    return cut(papers_rows(results.timed), STATE, Rival())


def _ours(rows: Table) -> list[Setting]:
    return [one for one in measures.settings(rows) if one.system in (PAPER, OURS) and not one.options]


def speed_ups(rows: Table) -> list[SpeedUp]:
    """All comparisons that the rows of one state allow."""
    variants = dict.fromkeys((one.system, one.options) for one in measures.settings(rows) if one.system in BASELINES)
    found = []
    for ours in _ours(rows):
        for system, options in variants:
            other = measures.at_budget(rows, system, ours.budget, options)
            measured = measures.ratio(rows, other, ours) if other else None
            if other is None or measured is None:
                continue
            known = math.isclose(ours.budget, BUDGET) and not options
            found.append(SpeedUp(other, ours, measured, SPEED_UPS.get(system) if known else None))
    return found


def losses(results: Results) -> list[tuple[Setting, str, Estimate]]:
    """Points of score lost against in memory: over tasks judged by accuracy and, if there are others, over all
    tasks."""
    rows = telling(results)
    metrics = results.metrics
    accuracy = [task for task in measures.tasks(rows) if metrics.get(task) == "accuracy"]
    groups = {f"accuracy ({', '.join(accuracy)})": rows[rows["task"].isin(accuracy)]} if accuracy else {}
    if len(accuracy) < len(measures.tasks(rows)):
        groups["all tasks' scores"] = rows
    found = []
    for name, chosen in groups.items():
        for setting in _ours(chosen):
            lost = measures.difference(chosen, MEMORY, setting)
            if lost is not None:
                found.append((setting, name, lost.scaled(100)))
    return found


def section(results: Results) -> str:
    """The section, as Markdown."""
    cold = cold_cut(results)
    times, lost = speed_ups(cold.rows), losses(results)
    if not times and not lost:
        return "Nothing to compare: no run has a ContiguousKV system together with one that the paper compares with."
    parts = [_setup(results)]
    if times:
        parts.append(_times_table(times))
        if not any(math.isclose(found.ours.budget, BUDGET) for found in times):
            parts.append(f"No run has the paper's budget of {share(BUDGET)}, so its figures stand beside none of ours.")
        parts += [_reads(cold.rows), _tails(cold.rows), *_why(cold.rows)]
    if lost:
        parts.append(_loss_table(lost))
    return "\n\n".join(part for part in parts if part)


def _setup(results: Results) -> str:
    machines = {str(run.machine.get("accelerator") or run.machine.get("cpu") or "unknown") for run in results.runs}
    models = {str(run.config.get("model", "unknown")) for run in results.runs}
    return (
        f"The paper (arXiv 2601.13631) reports, at a budget of {share(BUDGET)}: "
        + listed([f"{figure}x over {label(Setting(name, 1.0))}" for name, figure in SPEED_UPS.items()])
        + f" in time to the first token, with accuracy within {ACCURACY_LOSS} points of the full KV. It ran Qwen2.5 "
        f"7B, 14B and 32B on an A800 GPU with a {DISK}, its AttentionStore kept an LRU cache, and its "
        "baselines do not overlap loading with compute. "
        f"Here: {', '.join(sorted(models))} on {', '.join(sorted(machines))}; both sides of each ratio are {STATE}."
    )


def _times_table(found: list[SpeedUp]) -> str:
    lines = [
        [
            *named(one.ours),
            label(one.baseline),
            counted(one.measured),
            str(one.measured.prefixes),
            shown(one.measured),
            number(one.paper),
            one.verdict,
        ]
        for one in found
    ]
    head = [
        "system",
        "budget",
        "faster than",
        "pairs",
        "prefixes",
        "measured, x",
        "paper, x",
        "above / below the paper",
    ]
    return f"Speed-ups are over requests of the paper's tasks, where a run has any.\n\n{table(head, lines, 3)}"


def _loss_table(found: list[tuple[Setting, str, Estimate]]) -> str:
    lines = []
    for setting, name, lost in found:
        at_budget = math.isclose(setting.budget, BUDGET) and name.startswith("accuracy")
        verdict = compared(lost, ACCURACY_LOSS, "above (loses more)", "below (loses less)") if at_budget else ""
        paper = number(ACCURACY_LOSS) if at_budget else ""
        lines.append([*named(setting), name, counted(lost), shown(lost, digits=1, sign=True), paper, verdict])
    head = ["system", "budget", "of", "pairs", "points lost", "paper, at most", "above / below the paper"]
    return table(head, lines, 3)


def _reads(rows: Table) -> str:
    """What IMPRESS reads, beside the paper's figures."""
    lines = []
    for other in (one for one in measures.settings(rows) if one.system == "impress"):
        volume = measures.volume(rows, other)
        agreed = measures.mean_of(rows, other, "agreed")
        if volume is None:
            continue
        # The paper has figures for its budget and for IMPRESS as published.
        known = math.isclose(other.budget, BUDGET) and not other.options
        over = [_loaded(rows, other, system) for system in (PAPER, OURS)]
        lines.append(
            [
                *named(other),
                number(volume.amplification, 1),
                number(AMPLIFICATION, 0) if known else "",
                shown(over[0], digits=1),
                number(TOKENS_LOADED) if known else "",
                shown(over[1], digits=1),
                shown(agreed, 100, 0),
                counted(agreed),
            ]
        )
    if not lines:
        return ""
    published, ours = (label(Setting(system, 1.0)) for system in (PAPER, OURS))
    head = ["system", "budget", "read / used", "paper, about", f"KV loaded over {published}", "paper, x"]
    head += [f"KV loaded over {ours}", "layers in which probe heads agreed, %", "n"]
    text = (
        "What IMPRESS reads. KV loaded is what was read from disk except to identify chunks or tokens, in "
        "tokens' worth of exact K and V: ours packs its chunks, so it loads fewer tokens' worth of bytes. Where the "
        "probe heads of IMPRESS do not agree, it loads all keys of the layer."
    )
    return f"{text}\n\n{table(*columns_used(head, lines))}"


def _loaded(rows: Table, impress: Setting, system: str) -> Estimate | None:
    """How many times as much KV a variant of IMPRESS loads as one of our systems at the same budget."""
    ours = measures.at_budget(rows, system, impress.budget)
    if ours is None:
        return None
    loaded = rows["bytes_read"] - rows["bytes_identified"].fillna(0)
    return measures.ratio(rows.assign(loaded=loaded), impress, ours, field="loaded")


def _tails(rows: Table) -> str:
    """How many times faster the 95th percentile is, per task."""
    lines = []
    for ours in _ours(rows):
        for baseline in BASELINES:
            other = measures.at_budget(rows, baseline, ours.budget)
            for task in measures.tasks(rows) if other else []:
                assert other is not None
                mine, theirs = (measures.percentile(rows, one, task, _TAIL) for one in (ours, other))
                if mine is not None and theirs is not None:
                    counts = f"{mine.requests}, {theirs.requests}"
                    lines.append([*named(ours), label(other), task, counts, number(theirs.value / mine.value)])
    head = ["system", "budget", "faster at P95 than", "task", "n", "measured, x"]
    return table(head, lines, 4) if lines else ""


def _why(rows: Table) -> list[str]:
    """Explanations that the phases support."""
    ours = _ours(rows)
    budget = min((one.budget for one in ours), key=lambda one: abs(one - BUDGET))
    variants = [Setting(name, 1.0) for name in (*BASELINES, PAPER, OURS)]
    variants.insert(1, Setting(ATTENTIONSTORE, 1.0, ("overlap",)))
    chosen = [measures.at_budget(rows, one.system, budget, one.options) for one in variants]
    shares = {setting: measures.waiting(rows, setting) for setting in chosen if setting is not None}
    known = {setting: waited for setting, waited in shares.items() if waited is not None}
    parts = []
    if known:
        each = listed([f"{at(setting)} {waited:.0%}" for setting, waited in known.items()])
        parts.append(f"Waiting for reads (phase `wait`) takes this much of the time to the first token: {each}.")
    base = Setting(ATTENTIONSTORE, 1.0)
    if base in known:
        parts.append(_ceiling(rows, base, known[base], [one for one in known if one.system in (PAPER, OURS)]))
    overlapped = measures.at_budget(rows, ATTENTIONSTORE, 1.0, ("overlap",))
    gain = measures.ratio(rows, base, overlapped) if overlapped else None
    if gain is not None:
        parts.append(
            f"With loading overlapped with compute, which the paper's baselines do not do, AttentionStore is "
            f"{shown(gain)} times as fast as without ({gain.requests} pairs)."
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
    same = rows
    for setting in (base, *ours):
        same = measures.shared(same, measures.of(rows, setting))
    if not ours or not len(same):
        return text
    rest = [f"{at(one)} {_without_waiting(same, one) * 1e3:,.0f} ms" for one in (base, *ours)]
    return (
        f"{text} The time that is not waiting, on average over the requests that all of these answered: {listed(rest)}."
    )


def _without_waiting(rows: Table, setting: Setting) -> float:
    found = measures.phases(rows, setting)
    return sum(found.values()) - found["wait"]
