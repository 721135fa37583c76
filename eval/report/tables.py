"""The tables of times and bytes, as Markdown; "" if there is nothing to show."""

from __future__ import annotations

from collections.abc import Callable

from ..statistics import Estimate
from . import measures
from .cells import columns_used, counted, named, number, share, shown, table
from .names import MEMORY, Setting, label, states_in_order
from .rows import Results, Table
from .states import Cut

LEVELS = (0.5, 0.95, 0.99)


def _milliseconds(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    return shown(estimate, 1e3, 1 if estimate.value < 0.1 else 0)


def times(cut: Cut) -> str:
    """Time to the first token of every setting in a state, with its ratios and the counts of their pairs."""
    rows = cut.comparable
    lines = []
    for setting in cut.settings:
        time = measures.time(rows, setting)
        ratios = [cut.over_rival(setting, rival=rival) for rival in cut.rivals] + [cut.over_memory(setting)]
        lines.append(
            [
                *named(setting, references=True),
                counted(time),
                str(time.prefixes) if time else "",
                _milliseconds(time),
                *(cell for ratio in ratios for cell in (shown(ratio), counted(ratio))),
            ]
        )
    head = ["system", "budget", "n", "prefixes", "TTFT, ms"]
    for name in (*(rival.label for rival in cut.rivals), f"{label(MEMORY)} (reference)"):
        head += [f"over {name}", "pairs"]
    return table(*columns_used(head, lines)) if lines else ""


def by_task(rows: Table, cell: Callable[[Setting, str], str], first: list[str] | None = None, note: str = "") -> str:
    """One row per setting, one column per task; "" if all cells are empty.

    Args:
        rows: the rows.
        cell: the text of a setting and a task.
        first: cells of a first row.
        note: the name of the first row.
    """
    names = measures.tasks(rows)
    lines = [[*named(setting), *(cell(setting, task) for task in names)] for setting in measures.settings(rows)]
    lines = [line for line in lines if any(line[2:])]
    if not lines:
        return ""
    return table(["system", "budget", *names], [[note, "", *first], *lines] if first else lines)


def times_by_task(cut: Cut) -> str:
    """Time of each task, with its ratio to the rival and the number of pairs; the first row has prefix lengths."""
    rows = cut.comparable

    def cell(setting: Setting, task: str) -> str:
        time, ratio = measures.time(rows, setting, task), cut.over_rival(setting, task)
        if time is None:
            return ""
        return number(time.value, 0, 1e3) + (f" (x{ratio.value:.2f}, {ratio.requests})" if ratio else "")

    def tokens(task: str) -> str:
        found = rows[rows["task"] == task]["prefix_tokens"].dropna()
        if not len(found):
            return ""
        low, high = int(found.min()), int(found.max())
        return f"{low:,}" if low == high else f"{low:,} - {high:,}"

    return by_task(rows, cell, [tokens(task) for task in measures.tasks(rows)], "prefix tokens")


def tails(cut: Cut) -> str:
    """P50, P95 and P99 of each task that has enough rows for one of the latter to be known."""
    lines = []
    for task in measures.tasks(cut.rows):
        for setting in cut.settings:
            found = [measures.percentile(cut.rows, setting, task, level) for level in LEVELS]
            if found[1] is None:
                continue
            lines.append([task, *named(setting), counted(found[0]), *(shown(one, 1e3, 0) for one in found)])
    head = ["task", "system", "budget", "n", *(f"P{level * 100:.0f}, ms" for level in LEVELS)]
    return table(*columns_used(head, lines), words=3) if lines else ""


def amplification(cut: Cut) -> str:
    """Mean bytes of a request, read and used, by purpose."""
    rows = cut.comparable
    lines = []
    for setting in cut.settings:
        found = measures.volume(rows, setting)
        if found is not None:
            lines.append(
                [
                    *named(setting),
                    str(len(measures.of(rows, setting))),
                    number(found.read, 2, 1e-6),
                    number(found.share, 1, 100, "%"),
                    number(found.used, 2, 1e-6),
                    number(found.identified, 2, 1e-6),
                    number(found.wasted, 2, 1e-6),
                    number(found.amplification),
                    number(found.payload),
                ]
            )
    head = ["system", "budget", "n", "MB read", "of the prefix", "MB used", "MB to identify", "MB wasted"]
    return table(*columns_used([*head, "read / used", "payload / used"], lines)) if lines else ""


def phases(cut: Cut) -> str:
    """Mean milliseconds of each phase, and the share of time spent waiting for reads."""
    rows = cut.comparable
    found = {setting: measures.phases(rows, setting) for setting in cut.settings}
    names = list(dict.fromkeys(name for seconds in found.values() for name in seconds))
    lines = [
        [
            *named(setting),
            str(len(measures.of(rows, setting))),
            *(number(seconds.get(name), 1, 1e3) for name in names),
            number(measures.waiting(rows, setting), 0, 100, "%"),
        ]
        for setting, seconds in found.items()
        if seconds
    ]
    return table(*columns_used(["system", "budget", "n", *names, "waiting"], lines)) if lines else ""


def stream(results: Results, name: str) -> str:
    """One stream: times, hits in memory and bytes read of a request."""
    rows = results.streamed
    rows = rows[rows["stream"] == name]
    lines = []
    for state in states_in_order(rows["state"]):
        own = rows[rows["state"] == state]
        for setting in measures.settings(own):
            (task, *others) = measures.tasks(measures.of(own, setting))
            score, distance = (measures.mean_of(own, setting, field) for field in ("score", "kl_answer"))
            read = measures.values(own, setting, "bytes_read")
            levels = [None if others else measures.percentile(own, setting, task, level) for level in LEVELS]
            lines.append(
                [
                    *named(setting),
                    "" if state == "stream" else state,
                    str(len(measures.of(own, setting))),
                    shown(measures.mean_of(own, setting, "ttft_s"), 1e3, 0),
                    *(shown(level, 1e3, 0) for level in levels),
                    number(measures.hit_rate(own, setting), 1, 100, "%"),
                    number(float(read.mean()) if len(read) else None, 2, 1e-6),
                    counted(score or distance),
                    shown(score, 100, 1),
                    shown(distance, digits=4),
                ]
            )
    head = ["system", "budget", "state", "n", "mean, ms", "P50, ms", "P95, ms", "P99, ms", "hits in memory", "MB read"]
    head += ["judged", "score", "KL at the answer, nats"]
    return table(*columns_used(head, lines)) if lines else ""


def found_states(results: Results) -> str:
    """Rows of each setting and state that were timed, and those that did not find their state."""
    rows = results.alone
    lines = []
    for state in states_in_order(rows["state"]):
        own = rows[rows["state"] == state]
        for name in dict.fromkeys((one.system, one.options) for one in measures.settings(own)):
            mine = own[(own["system"] == name[0]) & (own["options"] == "+".join(name[1]))]
            budgets = ", ".join(share(budget) for budget in sorted(mine["budget"].unique()))
            departed = int((mine["departure"] != "").sum())
            text = f"`{'+'.join((name[0], *name[1]))}`"
            lines.append([text, state, budgets, str(len(mine)), str(departed) if departed else ""])
    return table(*columns_used(["system", "state", "budgets", "rows timed", "left out"], lines), words=3)


def departures(results: Results, most: int = 5) -> list[str]:
    """The commonest reasons why requests did not find their state, with their numbers."""
    rows = results.alone
    counts = rows.loc[rows["departure"] != "", "departure"].value_counts()
    return [f"{count} x {reason}" for reason, count in counts.head(most).items()]
