"""The picture of quality against time and bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import NullLocator

from ..statistics import Estimate
from . import measures
from .charts import is_ours, logarithmic, new_figure, plain, save
from .names import MEMORY, RECOMPUTE, Setting, answering, colour, label, marker
from .quality import telling
from .rows import Results, Table
from .states import Cut


def figures(judged: Table, setting: Setting) -> dict[str, Estimate | None]:
    """KL at the answer (nats) and the points of score from in memory, of what a setting answers."""
    own = measures.judged_as(judged, setting)
    lost = measures.difference(judged, own, MEMORY)
    return {
        "KL at the answer, nats": measures.mean_of(judged, own, "kl_answer"),
        "score, points from in memory": None if lost is None else lost.scaled(100),
    }


def frontier(results: Results, cut: Cut, path: Path) -> bool:
    """KL at the answer and score against time and the share of bytes read; one line through a system's budgets.

    Exact systems stand where the whole cache in memory does: at no KL, and no points.

    Returns:
        Whether there was anything to draw.
    """
    rows, judged = cut.rows, telling(results)
    for setting in cut.settings:
        common = measures.shared(rows, measures.of(rows, setting))
        # Requests that all settings answered, unless one of them shares none with the others.
        rows = common if set(common["setting"]) == set(rows["setting"]) else rows
    points: dict[str, dict[Setting, Estimate]] = {}
    exact = Estimate(0.0, 0.0, 0.0, 0, 0, 0)
    for setting in cut.settings:
        for name, found in figures(judged, setting).items():
            figure = exact if answering(setting) == MEMORY else found
            if figure is not None:
                points.setdefault(name, {})[setting] = figure
    # Exact systems alone would be a line at zero.
    points = {name: own for name, own in points.items() if any(one is not exact for one in own.values())}
    if not points:
        return False
    times: dict[Setting, float] = {}
    shares: dict[Setting, float] = {}
    for setting in cut.settings:
        time, volume = measures.time(rows, setting), measures.volume(rows, setting)
        if time is not None:
            times[setting] = time.value * 1e3
        if volume is not None and np.isfinite(volume.share):
            shares[setting] = volume.share
    # Recomputing the prefix can take so long that all other points would be in one place.
    stored = [time for setting, time in times.items() if setting.system != RECOMPUTE]
    if stored:
        times = {one: time for one, time in times.items() if one.system != RECOMPUTE or time <= 2 * max(stored)}
    across = [(times, "time to the first token, ms", 1.0, "")]
    across += [(shares, "bytes read, share of the prefix's", 100.0, "%")] if shares else []
    drawn, axes = new_figure(5.8 * len(points), 4.4 * len(across) + 1, len(across), len(points))
    axes = np.reshape(axes, (len(across), len(points)))
    for row, (places, below, scale, unit) in zip(axes, across, strict=True):
        for axis, (name, own) in zip(row, points.items(), strict=True):
            _panel(axis, {setting: one for setting, one in own.items() if setting in places}, places, cut.settings)
            plain(axis.xaxis, scale, unit)
            axis.set_xlabel(below)
            axis.set_ylabel(name)
    handles = {
        text: handle for axis in axes.flat for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    drawn.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    save(drawn, path)
    return True


def _panel(axis: Any, points: dict[Setting, Estimate], places: dict[Setting, float], known: list[Setting]) -> None:
    """Draw figures with intervals at `places` along a logarithmic axis."""
    for system, options in dict.fromkeys((one.system, one.options) for one in points):
        # From the smallest budget to the largest: what more of the prefix costs, and what it gives.
        own = (one for one in points if (one.system, one.options) == (system, options))
        line = sorted(own, key=lambda one: one.budget)
        spans = [
            [max(0.0, one.value - one.low), max(0.0, one.high - one.value)] for one in map(points.get, line) if one
        ]
        ours = is_ours(line[0])
        axis.errorbar(
            [places[one] for one in line],
            [points[one].value for one in line],
            yerr=np.nan_to_num(np.array(spans)).T,
            label=label(line[0]),
            color=colour(line[0], known),
            marker=marker(line[0]),
            markersize=8 if ours else 6.5,
            linewidth=2.4 if ours else 1.4,
            elinewidth=1,
            capsize=2,
            alpha=1.0 if ours else 0.85,
            zorder=3 if ours else 2,
        )
    inside = [places[one] for one in points] or list(places.values())
    logarithmic(axis, min(inside), max(inside))
    axis.axhline(0, color="#999999", linestyle="--", linewidth=1, zorder=0)
    _scale_of_distances(axis, points)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def _scale_of_distances(axis: Any, points: dict[Setting, Estimate]) -> None:
    """Distances span orders of magnitude down to zero; differences of scores have both signs."""
    positive = [one.value for one in points.values() if one.value > 0]
    if not positive or any(one.value < 0 for one in points.values()) or max(positive) <= 30 * min(positive):
        return
    smallest = max(min(positive), 1e-4)
    largest = max(end for one in points.values() for end in one[:3] if np.isfinite(end))
    axis.set_yscale("symlog", linthresh=smallest)
    axis.set_ylim(-0.2 * smallest, 1.4 * largest)
    ticks = [step * 10.0**power for power in range(-4, 3) for step in (1, 3)]
    axis.set_yticks([0.0, *(tick for tick in ticks if smallest <= tick <= largest)])
    axis.yaxis.set_minor_locator(NullLocator())
    plain(axis.yaxis)
