"""Which share of the chunks do your questions need? Their answers at several shares, beside those of the whole cache.

A run of `eval.running` with one task, the user's own questions, and one system, ours; the whole cache in memory and a
saved cache that is loaded stand beside it. Figures and intervals are those of the reports.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .report import measures
from .report.cells import FEW, FEW_NOTE, number, share, shown
from .report.names import MEMORY, OURS, RELOAD, Setting
from .report.rows import Results, load
from .running import RunConfig
from .statistics import Estimate
from .summary import WIDTH

SHARES = (0.05, 0.1, 0.25, 0.5, 1.0)
# In nats, at the tokens of the right answer. At 0.05 the tokens that the whole cache expects there keep 95% of their
# probability (the geometric mean, weighted as the whole cache does).
TOLERANCE = 0.05
LOADED = Setting(RELOAD, 1.0)


@dataclass(frozen=True)
class ShareFigures:
    """What one share does with the questions.

    Attributes:
        share: of the chunks; 1.0 is exact.
        seconds: time to the first token.
        speed: times faster than a saved cache that is loaded as a whole.
        apart: KL divergence from the whole cache at the right answer, in nats; `None`: no answer was judged.
        agreement: share of the question's tokens at which the most likely next token is that of the whole cache.
        score: of the answers.
        bytes_read: from disk, per request.
    """

    share: float
    seconds: Estimate | None
    speed: Estimate | None
    apart: Estimate | None
    agreement: Estimate | None
    score: Estimate | None
    bytes_read: float | None

    def is_within(self, tolerance: float) -> bool:
        """Whether the answers are as close to those of the whole cache as asked for, with 95% certainty.

        The upper end of the interval counts. Where there is none, since there is a single question, the figure itself
        does.
        """
        if self.share >= 1.0:
            return True  # It is exact.
        if self.apart is None:
            return False
        return (self.apart.high if self.apart.has_interval else self.apart.value) <= tolerance


def config_for(
    questions: Path,
    *,
    shares: Sequence[float] = SHARES,
    requests: int = 50,
    model: str | None = None,
    dtype: str = "auto",
    state: str = "cold",
    device: str | None = None,
    seed: int = 0,
) -> RunConfig:
    """The run that answers.

    Args:
        questions: JSON Lines (see `eval.tasks.own_data`).
        shares: to try; the whole prefix is always tried as well.
        requests: questions to ask at most.
        model, dtype, device, seed: see `RunConfig`.
        state: where the prefix is when a request begins.

    Raises:
        ValueError: a value is out of its range, or a line of the file is wrong.
    """
    return RunConfig(
        model=model,
        dtype=dtype,
        tasks=(f"file:{questions}",),
        systems=(MEMORY.system, RELOAD, OURS),
        states=(state,),
        budgets=tuple(sorted({*shares, 1.0})),
        requests=requests,
        timed_requests=requests,
        device=device,
        seed=seed,
    )


def figures(run: Path) -> list[ShareFigures]:
    """The figures of each share in a run's folder, ascending.

    Raises:
        RunError: the folder has no run, or no rows.
    """
    results = load([run])
    ours = sorted((one for one in measures.settings(results.timed) if one.system == OURS), key=lambda one: one.budget)
    return [_figures(results, one) for one in ours]


def _figures(results: Results, setting: Setting) -> ShareFigures:
    timed, judged = results.timed, results.judged
    answers = measures.judged_as(judged, setting)
    volume = measures.volume(timed, setting)
    return ShareFigures(
        share=setting.budget,
        seconds=measures.time(timed, setting),
        speed=measures.ratio(timed, LOADED, setting),
        apart=measures.mean_of(judged, answers, "kl_answer"),
        agreement=measures.mean_of(judged, answers, "agreement"),
        score=measures.mean_of(judged, answers, "score"),
        bytes_read=None if volume is None else volume.read,
    )


def smallest_within(found: Sequence[ShareFigures], tolerance: float) -> ShareFigures:
    """The smallest share from which on every share tried is within the tolerance (1.0, which is exact, always is)."""
    best = max(found, key=lambda one: one.share)
    for one in sorted(found, key=lambda one: -one.share):
        if not one.is_within(tolerance):
            break
        best = one
    return best


def fastest_within(found: Sequence[ShareFigures], tolerance: float) -> ShareFigures:
    """The share with the least time to the first token, of those from the smallest that is within the tolerance on."""
    least = smallest_within(found, tolerance).share
    timed = [one for one in found if one.share >= least and one.seconds is not None]
    return min(timed, key=lambda one: one.seconds.value if one.seconds else 0.0) if timed else found[-1]


_HEAD = ("share", "TTFT, ms", f"x {RELOAD}", "MB read", "KL at the answer", "same next token", "score", "within")


def print_calibration(run: Path, tolerance: float, console: Console | None = None) -> None:
    """Print the table of a run, and which share to take."""
    results, found = load([run]), figures(run)
    # (Of what is not a terminal, a file or a pipe, rich takes 80 columns.)
    console = console or Console(width=None if sys.stdout.isatty() else WIDTH)
    whole = measures.mean_of(results.judged, MEMORY, "score")
    lines = [_line(one, tolerance) for one in found]
    noted = FEW_NOTE if any(FEW in cell for line in lines for cell in line) else None
    table = Table(caption=noted, caption_justify="left")
    for name in _HEAD:
        table.add_column(name, justify="right")
    for line in lines:
        table.add_row(*line)
    console.print(table)
    small, fast = smallest_within(found, tolerance), fastest_within(found, tolerance)
    questions = next((one.apart.requests for one in found if one.apart is not None), 0)
    console.print(f"{questions} questions; the whole cache scores {shown(whole, 100, 1) or 'nothing known'}.")
    if small.share >= 1.0:
        console.print(f"No smaller share is within {tolerance:g} nats with 95% certainty: use budget=1.0, or ask more.")
    else:
        console.print(f"Smallest share within {tolerance:g} nats with 95% certainty: budget={small.share:g}.")
    if fast.share != small.share:
        console.print(f"Fastest of those within, in this state on this machine: budget={fast.share:g}.")


def calibration(run: Path, tolerance: float) -> dict[str, Any]:
    """What `print_calibration` says, for programs: seconds, nats and bytes; an end of an interval that is not known is
    `None`."""
    results, found = load([run]), figures(run)
    whole = measures.mean_of(results.judged, MEMORY, "score")
    return {
        "tolerance": tolerance,
        "smallest_within": smallest_within(found, tolerance).share,
        "fastest_within": fastest_within(found, tolerance).share,
        "whole_cache_score": None if whole is None else _interval(whole),
        "shares": [
            {
                "share": one.share,
                "within": one.is_within(tolerance),
                "ttft_s": _interval(one.seconds),
                f"times_faster_than_{RELOAD}": _interval(one.speed),
                "bytes_read": one.bytes_read,
                "kl_answer": _interval(one.apart),
                "agreement": _interval(one.agreement),
                "score": _interval(one.score),
            }
            for one in found
        ],
    }


def _interval(one: Estimate | None) -> dict[str, float | int | None] | None:
    if one is None:
        return None
    low, high = (one.low, one.high) if one.has_interval else (None, None)
    return {"value": one.value, "low": low, "high": high, "requests": one.requests, "prefixes": one.prefixes}


def _line(one: ShareFigures, tolerance: float) -> list[str]:
    return [
        share(one.share),
        shown(one.seconds, 1e3, 0),
        shown(one.speed),
        number(one.bytes_read, 1, 1e-6),
        shown(one.apart, digits=4),
        shown(one.agreement, 100, 1),
        shown(one.score, 100, 1),
        "yes" if one.is_within(tolerance) else "no",
    ]
