"""Where in a long answer is what it says right? Recall by position, of tasks that ask for many things at once.

A row of such a task has the wanted texts under `about`, in the order in which the answer was to give them. A text
counts at its position wherever the answer says it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .report.files import rows_of
from .report.names import Setting, written

PARTS = 3


@dataclass(frozen=True)
class PositionFigures:
    """The answers of one setting.

    Attributes:
        setting: as it is written.
        answers: number of answers.
        recall: share of answers that say the wanted text, per position.
        seconds: per generated token after the first; the median of the answers.
        bytes_read: from disk after the first token, per answer.
        reselections: how often chunks were chosen again, per answer.
    """

    setting: str
    answers: int
    recall: tuple[float, ...]
    seconds: float
    bytes_read: float
    reselections: float

    def parts(self, count: int) -> list[float]:
        """Mean recall of `count` parts of the answer, as equal as possible."""
        ends = [round(part * len(self.recall) / count) for part in range(count + 1)]
        return [_mean(self.recall[begin:end]) for begin, end in pairwise(ends)]


def figures(rows: Iterable[dict[str, Any]]) -> list[PositionFigures]:
    """The figures of each setting, in the order of the rows. Rows without wanted texts, or unjudged, do not count."""
    by_setting: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row.get("prediction") is not None and "answers" in (row.get("about") or {}):
            name = written(Setting(row["system"], float(row["budget"]), tuple(sorted(row.get("options") or ()))))
            by_setting.setdefault(name, []).append(row)
    return [_figures(name, mine) for name, mine in by_setting.items()]


def _figures(setting: str, rows: Sequence[dict[str, Any]]) -> PositionFigures:
    said = [[float(text in row["prediction"]) for text in row["about"]["answers"]] for row in rows]
    decoding = [row.get("decoding") or {} for row in rows]
    paces = sorted(one["seconds"] / one["tokens"] for one in decoding if one.get("tokens"))
    return PositionFigures(
        setting,
        len(rows),
        tuple(_mean(position) for position in zip(*said, strict=True)),
        paces[len(paces) // 2] if paces else 0.0,
        _mean([one.get("bytes_read", 0) for one in decoding]),
        _mean([one.get("reselections", 0) for one in decoding]),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def print_positions(runs: Sequence[Path], console: Console | None = None) -> None:
    """Print the table of runs' folders, or of packed ones.

    Raises:
        RunError: a folder has no run.
    """
    found = figures(row for run in runs for row in rows_of(run)[0])
    table = Table("setting", "answers", "recall", "begin", "middle", "end", "ms per token", "MB read", "chosen again")
    for one in found:
        shares = [_mean(one.recall), *one.parts(PARTS)]
        table.add_row(
            one.setting,
            str(one.answers),
            *(f"{100 * share:.0f}%" for share in shares),
            f"{1e3 * one.seconds:.1f}",
            f"{one.bytes_read / 1e6:.1f}",
            f"{one.reselections:.0f}",
        )
    (console or Console(width=120)).print(table)
