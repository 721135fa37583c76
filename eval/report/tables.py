"""The tables of a report, as Markdown; "" if there is nothing to show."""

from __future__ import annotations

from collections.abc import Callable

from . import measures
from .cells import columns_used, milliseconds, named, number, quoted, share, shown, table
from .names import ATTENTIONSTORE, IN_MEMORY, Setting, label
from .rows import Results, Table


def _shown_as_ratio(rows: Table, setting: Setting, other: str, task: str | None = None) -> str:
    reference = measures.setting_of(rows, other)
    if reference is None or reference == setting:
        return ""
    return shown(measures.ratio(rows, setting, reference, task))


def times(results: Results) -> str:
    """Median time to the first token, and ratios, for every system and budget."""
    rows = results.timed
    lines = [
        [
            *named(setting),
            str(len(measures.of(rows, setting))),
            milliseconds(measures.spread(rows, setting)),
            _shown_as_ratio(rows, setting, IN_MEMORY),
            _shown_as_ratio(rows, setting, ATTENTIONSTORE),
        ]
        for setting in measures.settings(rows)
    ]
    head = ["system", "budget", "n", "TTFT, ms", f"over {label(IN_MEMORY)}", f"over {label(ATTENTIONSTORE)}"]
    return table(*columns_used(head, lines)) if lines else ""


# Number of requests of each task whose answers are shown.
ANSWERS = 5


def _by_task(rows: Table, cell: Callable[[Setting, str], str], first: list[str] | None = None, note: str = "") -> str:
    """One row per system and budget, one column per task; "" if all cells are empty."""
    names = measures.tasks(rows)
    lines = [[*named(setting), *(cell(setting, task) for task in names)] for setting in measures.settings(rows)]
    lines = [line for line in lines if any(line[2:])]
    if not lines:
        return ""
    return table(["system", "budget", *names], [[note, "", *first], *lines] if first else lines)


def times_by_task(results: Results) -> str:
    """Median time of each task, and its ratio to in memory; the first row has the lengths of prefixes."""
    rows = results.timed

    def cell(setting: Setting, task: str) -> str:
        spread = measures.spread(rows, setting, task)
        if spread is None:
            return ""
        reference = measures.setting_of(rows, IN_MEMORY)
        ratio = measures.ratio(rows, setting, reference, task) if reference not in (None, setting) else None
        return number(spread.median, 0, 1e3) + (f" (x{ratio[0]:.2f})" if ratio else "")

    def tokens(task: str) -> str:
        found = rows[rows["task"] == task]["prefix_tokens"].dropna()
        if not len(found):
            return ""
        low, high = int(found.min()), int(found.max())
        return f"{low:,}" if low == high else f"{low:,} - {high:,}"

    return _by_task(rows, cell, [tokens(task) for task in measures.tasks(rows)], "prefix tokens")


def tails(results: Results) -> str:
    """P50, P95 and P99 of the time to the first token."""
    return _percentiles(results.timed)


def _percentiles(rows: Table) -> str:
    lines = [
        [
            *named(setting),
            str(len(measures.of(rows, setting))),
            *(shown(measures.percentile(rows, setting, level), 1e3, 0) for level in (0.5, 0.95, 0.99)),
        ]
        for setting in measures.settings(rows)
    ]
    head = ["system", "budget", "n", "P50, ms", "P95, ms", "P99, ms"]
    # With only enough rows for a median, this table would add nothing to the first one.
    return table(*columns_used(head, lines)) if any(line[4] for line in lines) else ""


def quality(results: Results) -> str:
    """Mean of the tasks' scores, the difference from in memory, and distances from the whole cache."""
    rows = results.judged
    reference = measures.setting_of(rows, IN_MEMORY)
    lines = []
    for setting in measures.settings(rows):
        mine = measures.of(rows, setting)
        against = measures.difference(rows, setting, reference) if reference not in (None, setting) else None
        lines.append(
            [
                *named(setting),
                str(len(measures.per_request(mine, "score"))),
                str(mine["task"].nunique()),
                shown(measures.mean_of(rows, setting, "score"), 100, 1),
                shown(against, 100, 1, sign=True),
                shown(measures.mean_of(rows, setting, "kl"), digits=4),
                shown(measures.mean_of(rows, setting, "kl_answer"), digits=4),
                shown(measures.mean_of(rows, setting, "agreement"), 100, 1),
                number(measures.perplexity(rows, setting), 3),
            ]
        )
    head = [
        "system",
        "budget",
        "n",
        "tasks",
        "score",
        "points from in memory",
        "KL, nats",
        "KL at the answer",
        "agreement, %",
        "perplexity",
    ]
    return table(*columns_used(head, lines)) if lines else ""


def scores_by_task(results: Results) -> str:
    """Mean score of each task; the first row has the metrics."""
    rows = results.judged

    def cell(setting: Setting, task: str) -> str:
        return shown(measures.mean_of(rows, setting, "score", task), 100, 1)

    metrics = results.metrics
    return _by_task(rows, cell, [metrics.get(task, "") for task in measures.tasks(rows)], "metric")


def differences_by_task(results: Results) -> str:
    """Difference in points of score from in memory, per task."""
    rows = results.judged
    reference = measures.setting_of(rows, IN_MEMORY)

    def cell(setting: Setting, task: str) -> str:
        if reference in (None, setting):
            return ""
        return shown(measures.difference(rows, setting, reference, task), 100, 1, sign=True)

    return _by_task(rows, cell)


def distances_by_task(results: Results) -> str:
    """KL and agreement, per task."""
    rows = results.judged

    def cell(setting: Setting, task: str) -> str:
        found = [measures.mean_of(rows, setting, field, task) for field in ("kl", "agreement")]
        divergence, agreement = (None if one is None else one[0] for one in found)
        return " / ".join(one for one in (number(divergence, 4), number(agreement, 1, 100, "%")) if one)

    return _by_task(rows, cell)


def answers(results: Results) -> list[tuple[str, str]]:
    """For every task with generated answers: each system's answers to the first few requests."""
    found = []
    rows = results.judged[results.judged["prediction"].notna()]
    for task in (task for task in measures.tasks(rows) if results.metrics.get(task) != "accuracy"):
        mine = rows[rows["task"] == task]
        numbers = sorted(mine["number"].unique())[:ANSWERS]
        lines = []
        for setting in measures.settings(mine):
            own = measures.of(mine, setting).drop_duplicates("number").set_index("number")["prediction"]
            lines.append([*named(setting), *(quoted(own.get(number)) for number in numbers)])
        head = ["system", "budget", *(f"request {number}" for number in numbers)]
        found.append((f"Answers to the first requests of {task}:", table(head, lines, len(head))))
    return found


def amplification(results: Results) -> str:
    """Mean bytes of a request, read and used, by purpose."""
    rows = results.timed
    lines = []
    for setting in measures.settings(rows):
        found = measures.volume(rows, setting)
        if found is not None:
            lines.append(
                [
                    *named(setting),
                    number(found.read, 2, 1e-6),
                    number(found.share, 1, 100, "%"),
                    number(found.used, 2, 1e-6),
                    number(found.identified, 2, 1e-6),
                    number(found.wasted, 2, 1e-6),
                    number(found.amplification),
                    number(found.payload),
                ]
            )
    head = ["system", "budget", "MB read", "of the prefix", "MB used", "MB to identify", "MB wasted", "read / used"]
    return table([*head, "payload / used"], lines) if lines else ""


def phases(results: Results) -> str:
    """Mean milliseconds of each phase, and the share of time spent waiting for reads."""
    rows = results.timed
    found = {setting: measures.phases(rows, setting) for setting in measures.settings(rows)}
    names = list(dict.fromkeys(name for seconds in found.values() for name in seconds))
    lines = [
        [
            *named(setting),
            *(number(seconds.get(name), 1, 1e3) for name in names),
            number(measures.waiting(rows, setting), 0, 100, "%"),
        ]
        for setting, seconds in found.items()
        if seconds
    ]
    return table(["system", "budget", *names, "waiting"], lines) if lines else ""


def stream(results: Results, name: str) -> str:
    """One stream: times, hits in memory and bytes read of a request."""
    rows = results.streamed
    rows = rows[rows["stream"] == name]
    lines = []
    for setting in measures.settings(rows):
        read = measures.values(rows, setting, "bytes_read")
        levels = [measures.percentile(rows, setting, level) for level in (0.5, 0.95, 0.99)]
        lines.append(
            [
                *named(setting),
                str(len(measures.of(rows, setting))),
                shown(measures.mean_time(rows, setting), 1e3, 0),
                *(shown(level, 1e3, 0) for level in levels),
                number(measures.hit_rate(rows, setting), 1, 100, "%"),
                number(float(read.mean()) if len(read) else None, 2, 1e-6),
            ]
        )
    head = ["system", "budget", "n", "mean, ms", "P50, ms", "P95, ms", "P99, ms", "hits in memory", "MB read"]
    return table(*columns_used(head, lines)) if lines else ""


def cold_rows(results: Results) -> str:
    """Rows of each system that were timed cold, and rows that are left out (without streams)."""
    rows = results.alone
    lines = []
    for system in dict.fromkeys(system for system, _ in measures.settings(rows)):
        mine = rows[rows["system"] == system]
        counts = mine["cold"].value_counts()
        budgets = ", ".join(share(budget) for budget in sorted(mine["budget"].unique()))
        kinds = [str(int(counts.get(kind, 0))) for kind in ("cold", "none", "warm")]
        lines.append([label(system), f"`{system}`", budgets, str(len(mine)), *kinds])
    return table(["system", "name", "budgets", "rows", "cold", "no files", "not cold, left out"], lines, 3)
