"""A run in a few lines, for the terminal: figures of the report, as `python -m eval report` computes them."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .report import RunError, about, measures
from .report.cells import FEW, FEW_NOTE, columns_used, counted, number, share, shown
from .report.names import FLOOR, RELOAD, Rival, Setting, is_reference, label
from .report.rows import Results, load
from .report.states import Cut, cuts

_HEAD = ["requests", "system", "budget", "state", "n", "TTFT, ms", f"x {label(FLOOR)}", f"speed-up over {RELOAD}"]
_HEAD += ["MB read", "score", "KL at the answer"]
_TEXT = 4
# Columns of a table that goes to a file or a pipe.
WIDTH = 160


def print_summary(run: Path) -> None:
    """Print the table of the run in a folder, if it has a row whose time counts."""
    try:
        results = load([run])
    except RunError:
        return  # No request was made.
    lines = [line for name, tasks in _groups(results) for line in _lines(results, name, tasks)]
    if not lines:
        return
    head, lines = columns_used(_HEAD, lines)
    noted = FEW_NOTE if any(FEW in cell for line in lines for cell in line) else None
    table = Table(title=_title(results), caption=noted, title_justify="left", caption_justify="left")
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    for name in head:
        table.add_column(name, justify="left" if name in _HEAD[:_TEXT] else "right")
    for line in lines:
        table.add_row(*line)
    console.print(table)
    for warning in about.warnings(results):
        console.print(warning, markup=False)


def _title(results: Results) -> str:
    run = results.runs[0]
    known = run.config.get("model"), run.config.get("dtype"), run.machine.get("cpu")
    return ", ".join(str(one) for one in known if one)


def _groups(results: Results) -> list[tuple[str, list[str]]]:
    """Tasks whose figures are averaged: those with answers together, of the others each by itself."""
    tasks = measures.tasks(results.timed)
    judged = [task for task in tasks if results.metrics[task]]
    together = [(judged[0] if len(judged) == 1 else f"{len(judged)} tasks", judged)] if judged else []
    return together + [(task, [task]) for task in tasks if task not in judged]


def _lines(results: Results, name: str, tasks: list[str]) -> list[list[str]]:
    """Each setting in each state; references once, although they stand beside every state."""
    timed, answers = (rows[rows["task"].isin(tasks)] for rows in (results.timed, results.judged))
    found = []
    references: set[Setting] = set()
    for cut in cuts(timed, Rival()):
        for setting in cut.settings:
            if setting in references:
                continue
            if is_reference(setting):
                references.add(setting)
            own = measures.judged_as(answers, setting)
            score, apart = (measures.mean_of(answers, own, field) for field in ("score", "kl_answer"))
            found.append([name, *_timed(cut, setting), shown(score, 100, 1), shown(apart, digits=4)])
    return found


def _timed(cut: Cut, setting: Setting) -> list[str]:
    time, volume = measures.time(cut.rows, setting), measures.volume(cut.rows, setting)
    return [
        label(setting),
        share(setting.budget),
        measures.of(cut.rows, setting)["state"].iloc[0],
        counted(time),
        shown(time, 1e3, 1),
        "" if setting == FLOOR else shown(measures.ratio(cut.rows, setting, FLOOR)),
        "" if setting.system == RELOAD else shown(measures.ratio(cut.rows, Setting(RELOAD, 1.0), setting)),
        "" if volume is None else number(volume.read, 1, 1e-6),
    ]
