"""The tables of the check, for the terminal and for `docs/howto/plan.md`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..generated import put_between
from ..report.cells import share, table
from ..report.names import label
from .measured import Checked, CheckedRun
from .paper import LENGTHS, PaperRow

BEGIN, END = "<!-- begin: python -m eval.plan_check --markdown -->", "<!-- end -->"
Section = tuple[str, list[str], list[list[str]], int]
"""A sentence before the table, its head, its rows, and how many of its columns are words."""

_WITHIN = (0.15, 0.3, 0.5)


def summary(runs: Sequence[CheckedRun]) -> str:
    """How far predictions are off, over all settings from which no speed was taken."""
    errors = [one.error for run in runs for one in run.settings if not one.known]
    if not errors:
        return "Nothing was compared."
    parts = [f"{sum(error <= limit for error in errors)} by at most {limit:.0%}" for limit in _WITHIN]
    bytes_off = [abs(one.bytes_ratio - 1) for run in runs for one in run.settings if one.bytes_ratio is not None]
    return (
        f"Of {len(errors)} times that were predicted, the median is off by {statistics.median(errors):.0%}: "
        f"{', '.join(parts)}; the worst by {max(errors):.0%}. "
        f"Bytes per request: the median is off by {statistics.median(bytes_off):.1%}, the worst by "
        f"{max(bytes_off):.0%}."
    )


def by_system(runs: Sequence[CheckedRun]) -> Section:
    """One line per system and budget, over all runs."""
    groups: dict[tuple[str, str], list[Checked]] = {}
    for run in runs:
        for one in run.settings:
            groups.setdefault((label(one.setting), _budget(one)), []).append(one)
    rows = []
    for (name, budget), found in groups.items():
        ratios = [one.ratio for one in found if not one.known]
        read = [one.bytes_ratio for one in found if one.bytes_ratio is not None]
        rows.append(
            [
                name,
                budget,
                str(len(ratios)),
                _range(ratios),
                f"{statistics.mean(abs(ratio - 1) for ratio in ratios):.0%}" if ratios else "",
                _range(read),
            ]
        )
    head = ["system", "budget", "runs", "predicted / measured time", "mean error", "predicted / measured bytes"]
    return "Each system, over the runs below: the smallest and the largest ratio of a run.", head, rows, 2


def of_run(run: CheckedRun) -> Section:
    """One line per setting of a run."""
    rows = [
        [
            label(one.setting),
            _budget(one),
            str(one.requests),
            f"{one.shortest:,}" if one.shortest == one.longest else f"{one.shortest:,} to {one.longest:,}",
            f"{one.measured_s * 1e3:,.0f}",
            f"{one.predicted_s * 1e3:,.0f}",
            f"{one.ratio:.2f}" + ("*" if one.known else ""),
            f"{one.low:.2f} to {one.high:.2f}",
            "" if one.bytes_ratio is None else f"{one.bytes_ratio:.2f}",
        ]
        for one in run.settings
    ]
    head = ["system", "budget", "n", "prefix", "measured, ms", "predicted, ms", "ratio", "8 of 10 requests", "bytes"]
    commit = f", commit {run.commit}" if run.commit else ""
    text = (
        f"**{run.name}**: {run.model}{commit}; disk {run.disk_gbps:g} GB/s. Speeds: "
        f"{run.speeds.flops_s / 1e9:,.0f} GFLOP/s of products and {run.speeds.attention_flops_s / 1e9:,.0f} of "
        f"attention, from {run.speeds.source}; calls that cost {run.host:.2f} times the planner's, from "
        f"{run.host_source}."
    )
    return text, head, rows, 2


def of_paper(rows: Sequence[PaperRow]) -> Section:
    """The paper's ratios beside predicted ones."""
    names = [f"{tokens // 1024}K" for tokens in LENGTHS]
    head = ["model", "faster than", "paper"] + [f"well, {name}" for name in names] + [f"slow, {name}" for name in names]
    lines = [
        [row.model, row.baseline, f"{row.paper:.2f}"]
        + [f"{found[tokens]:.2f}" for found in (row.well_read, row.one_by_one) for tokens in LENGTHS]
        for row in rows
    ]
    text = (
        "How many times faster the published method is at 5%, on an A800 with a Samsung 990 Pro. *well*: the baseline "
        "reads a megabyte at a time, eight at once. *slow*: it reads one block of 64 tokens after the other."
    )
    return text, head, lines, 2


def print_all(runs: Sequence[CheckedRun], paper: Sequence[PaperRow], console: Console) -> None:
    """Print what the page shows."""
    console.print(summary(runs))
    for text, head, rows, words in [by_system(runs), *map(of_run, runs), of_paper(paper)]:
        shown = Table(title=text.replace("*", ""), title_justify="left")
        for place, name in enumerate(head):
            shown.add_column(name, justify="left" if place < words else "right")
        for row in rows:
            shown.add_row(*row)
        console.print(shown)


def markdown(runs: Sequence[CheckedRun], paper: Sequence[PaperRow]) -> str:
    """The generated part of the page."""
    parts = [summary(runs), _written(by_system(runs)), "### Run by run"]
    if any(one.known for run in runs for one in run.settings):
        parts.append("\\* Speeds were taken from these rows.")
    parts += [_written(of_run(run)) for run in runs]
    return "\n\n".join([*parts, "### Beside the paper", _written(of_paper(paper))])


def rewrite(page: Path, runs: Sequence[CheckedRun], paper: Sequence[PaperRow]) -> None:
    """Write the generated part of the page.

    Raises:
        ValueError: the page has no markers.
    """
    put_between(page, BEGIN, END, markdown(runs, paper))


def _written(section: Section) -> str:
    text, head, rows, words = section
    return "\n\n".join(filter(None, (text, table(head, rows, words))))


def _budget(one: Checked) -> str:
    return share(one.setting.budget)


def _range(values: Sequence[float]) -> str:
    if not values:
        return ""
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"
