"""The pictures of a report. Each function writes one PNG, or none if the rows do not have the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from ..statistics import Interval
from . import measures, paper
from .cells import share
from .names import IN_MEMORY, OURS, Setting, answering, colour, label, marker
from .rows import Results, Table

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, NullLocator

_PHASES = {
    "lookup": "#c9b36b",
    "identify": "#8e6bb0",
    "wait": "#c8553d",
    "gather": "#e0a03c",
    "attention": "#5b8db8",
    "rest": "#c9c9c9",
}
_OTHER_PHASES = ("#2fa3a3", "#7a5230", "#4b4ba8", "#a3a32a")
_ROW = 0.27
_PHASES_SAID = {"wait": "wait for reads"}


def _lines(settings: Sequence[Setting]) -> tuple[dict[Setting, float], list[tuple[float, str, bool]], float]:
    """Heights of a chart's rows, the row labels (and whether ours), and the full height; one group per budget."""
    places: dict[Setting, float] = {}
    labels: list[tuple[float, str, bool]] = []
    height, group = 0.0, None
    for system, budget in settings:
        if budget != group:
            height += 0.4 if group is not None else 0.0
            labels.append((height, "whole prefix" if budget >= 1 else f"budget {share(budget)}", False))
            height, group = height + 1, budget
        labels.append((height, label(system), system == OURS))
        places[system, budget] = height
        height += 1
    return places, labels, height


def _chart(settings: Sequence[Setting], width: float, panels: int = 1, room: float = 0.9) -> tuple[Any, Any, Any]:
    """A figure with one row per system, grouped by budget: the figure, its axes and the rows' heights."""
    places, labels, height = _lines(settings)
    figure, axes = pyplot.subplots(
        1, panels, figsize=(width, _ROW * height + room), sharey=True, squeeze=False, constrained_layout=True
    )
    first = axes[0][0]
    first.set_yticks([at for at, _, _ in labels], [name for _, name, _ in labels])
    names = {name for system, _ in settings for name in [label(system)]}
    for text, (_, name, ours) in zip(first.get_yticklabels(), labels, strict=True):
        text.set_fontsize(9)
        if name not in names:
            text.set_color("#555555")
            text.set_style("italic")
        if ours:
            text.set_fontweight("bold")
    first.set_ylim(height - 0.4, -0.7)
    for axis in axes[0]:
        axis.tick_params(axis="y", length=0)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
    return figure, axes[0], places


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _plain(axis: Any, scale: float = 1.0, unit: str = "") -> None:
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * scale:,.10g}{unit}"))


def _scaled(axis: Any, low: float, high: float) -> None:
    """Scale a time axis: logarithmic if times differ by more than a factor of eight, else from zero."""
    if high > 8 * low:
        axis.set_xscale("log")
        ticks = [t * 10.0**p for p in range(-3, 8) for t in (1, 2, 5)]
        axis.set_xlim(low / 1.3, high * 1.9)
        axis.set_xticks([tick for tick in ticks if low / 1.3 <= tick <= high * 1.9])
        axis.xaxis.set_minor_locator(NullLocator())
    else:
        axis.set_xlim(0, high * 1.15)
    _plain(axis.xaxis)


def _dots(axis: Any, places: dict[Setting, float], found: dict[Setting, Interval], label_text: str) -> None:
    """Draw milliseconds as dots with whiskers and values."""
    systems = [system for system, _ in places]
    ends = [one for value in found.values() for one in value if np.isfinite(one)]
    for setting, (value, low, high) in found.items():
        own, ours = colour(setting[0], systems), setting[0] == OURS
        if np.isfinite(low):
            axis.plot([low, high], [places[setting]] * 2, color=own, linewidth=4 if ours else 2.5, alpha=0.55)
        axis.plot(value, places[setting], "o", color=own, markersize=8 if ours else 6)
        digits = 0 if value >= 100 else 1
        axis.annotate(
            f"{value:,.{digits}f}",
            (high if np.isfinite(high) else value, places[setting]),
            (7, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            fontweight="bold" if ours else "normal",
        )
    _scaled(axis, min(ends), max(ends))
    axis.set_xlabel(label_text)


def times(results: Results, path: Path) -> bool:
    """Median time to the first token with quartiles; the dashed line is in memory."""
    rows = results.timed
    settings = measures.settings(rows)
    if not settings:
        return False
    figure, (axis,), places = _chart(settings, 9)
    found = {}
    for setting in settings:
        spread = measures.spread(rows, setting)
        assert spread is not None
        found[setting] = (spread.median * 1e3, spread.low * 1e3, spread.high * 1e3)
    _dots(axis, places, found, "time to the first token, ms: median and quartiles of cold requests")
    if (IN_MEMORY, 1.0) in found:
        axis.axvline(found[IN_MEMORY, 1.0][0], color=colour(IN_MEMORY, []), linestyle="--", linewidth=1, zorder=0)
    _save(figure, path)
    return True


def phases(results: Results, path: Path) -> bool:
    """Mean milliseconds of each phase, stacked."""
    rows = results.timed
    found = {setting: measures.phases(rows, setting) for setting in measures.settings(rows)}
    found = {setting: seconds for setting, seconds in found.items() if seconds}
    if not found:
        return False
    known = {name for seconds in found.values() for name in seconds}
    others = sorted(known - set(_PHASES))
    colours = _PHASES | {name: _OTHER_PHASES[place % len(_OTHER_PHASES)] for place, name in enumerate(others)}
    figure, (axis,), places = _chart(list(found), 9, room=1.3)
    wholes = {setting: sum(seconds.values()) * 1e3 for setting, seconds in found.items()}
    # Recomputing the prefix can take so long that the other bars would be invisible.
    longest = max(wholes.values())
    stored = max((whole for (system, _), whole in wholes.items() if system != "recompute"), default=longest)
    limit = 1.15 * (stored if longest > 2 * stored else longest)
    for setting, seconds in found.items():
        left = 0.0
        for name in (name for name in colours if name in seconds):
            wide = seconds[name] * 1e3
            axis.barh(places[setting], wide, left=left, height=0.72, color=colours[name])
            left += wide
        text, end = (f"{left:,.0f}", left) if left <= limit else (f"{left:,.0f}: cut off here", limit)
        axis.annotate(
            text,
            (end, places[setting]),
            (5 if left <= limit else -5, 0),
            textcoords="offset points",
            va="center",
            ha="left" if left <= limit else "right",
            fontsize=8,
        )
    handles = [Rectangle((0, 0), 1, 1, color=colours[name]) for name in colours if name in known]
    names = [_PHASES_SAID.get(name, name) for name in colours if name in known]
    figure.legend(handles, names, loc="outside upper center", ncols=len(names), frameon=False, fontsize=9)
    axis.set_xlabel("mean of cold requests, ms")
    axis.set_xlim(0, limit)
    _plain(axis.xaxis)
    _save(figure, path)
    return True


def frontier(results: Results, path: Path) -> bool:
    """Score and KL against the observed share of bytes read, and against time; one line per system through its budgets.

    A system that differs from another only in time is judged by the other's answers.
    """
    timed, judged = results.timed, results.judged
    # If some systems made fewer requests, use times and bytes of requests that all systems made.
    common = measures.shared(timed, measures.settings(timed))
    timed = common if len(common) else timed
    reference = measures.setting_of(judged, IN_MEMORY)
    shares: dict[Setting, float] = {}
    times: dict[Setting, float] = {}
    in_memory = measures.setting_of(timed, IN_MEMORY)
    for setting in measures.settings(timed):
        volume = measures.volume(timed, setting)
        if volume is not None and np.isfinite(volume.share):
            shares[setting] = volume.share
        ratio = measures.ratio(timed, setting, in_memory) if in_memory else None
        if ratio is not None and setting in shares:
            times[setting] = ratio[0]

    def lost(setting: Setting) -> Interval | None:
        found = measures.difference(judged, answering(setting), reference) if reference else None
        return None if found is None else (found[0] * 100, found[1] * 100, found[2] * 100)

    panels: list[tuple[Callable[[Setting], Interval | None], str]] = [
        (lost, "score, points from in memory"),
        (lambda setting: measures.mean_of(judged, answering(setting), "kl"), "KL from in memory, nats"),
    ]
    found = [{setting: one for setting in shares if (one := figure_of(setting))} for figure_of, _ in panels]
    shown = [(points, text) for points, (_, text) in zip(found, panels, strict=True) if points]
    if not shown:
        return False
    across = [(shares, "bytes read, share of the prefix's", 100, "%")]
    across += [(times, "time to the first token, over in memory", 1, "x")] if times else []
    figure, axes = pyplot.subplots(
        len(across), len(shown), figsize=(5.6 * len(shown), 4.7 * len(across)), squeeze=False, constrained_layout=True
    )
    for row, (places, below, scale, unit) in zip(axes, across, strict=True):
        for axis, (points, text) in zip(row, shown, strict=True):
            _frontier_panel(axis, {setting: one for setting, one in points.items() if setting in places}, places)
            _plain(axis.xaxis, scale, unit)
            axis.set_xlabel(below)
            axis.set_ylabel(text)
        row[0].axhline(0, color=colour(IN_MEMORY, []), linestyle="--", linewidth=1, zorder=0)
    handles = {text: handle for axis in axes[0] for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    _save(figure, path)
    return True


def _frontier_panel(axis: Any, points: dict[Setting, Interval], places: dict[Setting, float]) -> None:
    """Draw figures with intervals at `places` along a logarithmic axis."""
    systems = [system for system, _ in places]
    for system in dict.fromkeys(name for name, _ in points):
        line = [
            (places[setting], budget_of, points[setting]) for setting in points if (budget_of := setting)[0] == system
        ]
        line.sort(key=lambda point: point[0])
        x = [place for place, _, _ in line]
        y = [value for _, _, (value, _, _) in line]
        spans = [[max(0.0, value - low), max(0.0, high - value)] for _, _, (value, low, high) in line]
        ours = system == OURS
        axis.errorbar(
            x,
            y,
            yerr=np.nan_to_num(np.array(spans)).T,
            label=label(system),
            color=colour(system, systems),
            marker=marker(system),
            markersize=7 if ours else 6,
            linewidth=2.4 if ours else 1.4,
            elinewidth=1,
            capsize=2,
            alpha=1.0 if ours else 0.85,
            zorder=3 if ours else 2,
        )
    positive = [value for value, _, _ in points.values() if value > 0]
    axis.set_xscale("log")
    low, high = min(places.values()), max(places.values())
    steps = (1, 2, 5) if high > 4 * low else (1, 1.5, 2, 3, 4, 5, 7)
    ticks = [tick for p in range(-4, 2) for t in steps if low / 1.3 <= (tick := t * 10.0**p) <= high * 1.3]
    axis.set_xlim(low / 1.3, high * 1.3)
    axis.set_xticks(ticks)
    axis.xaxis.set_minor_locator(NullLocator())
    # Distances span orders of magnitude down to zero; differences of scores have both signs.
    if all(value >= 0 for value, _, _ in points.values()) and positive and max(positive) > 30 * min(positive):
        smallest, largest = (
            max(min(positive), 1e-4),
            max(one for point in points.values() for one in point if np.isfinite(one)),
        )
        axis.set_yscale("symlog", linthresh=smallest)
        axis.set_ylim(-0.2 * smallest, 1.4 * largest)
        axis.set_yticks(
            [0.0, *(t * 10.0**p for p in range(-4, 3) for t in (1, 3) if smallest <= t * 10.0**p <= largest)]
        )
        axis.yaxis.set_minor_locator(NullLocator())
        _plain(axis.yaxis)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def stream(results: Results, name: str, path: Path) -> bool:
    """Mean and 95th percentile of a stream's times, with intervals."""
    rows: Table = results.streamed
    rows = rows[rows["stream"] == name]
    settings = measures.settings(rows)
    if not settings:
        return False
    means, tails = {}, {}
    for setting in settings:
        mean, tail = measures.mean_time(rows, setting), measures.percentile(rows, setting, 0.95)
        if mean is not None:
            means[setting] = (mean[0] * 1e3, mean[1] * 1e3, mean[2] * 1e3)
        if tail is not None:
            tails[setting] = (tail[0] * 1e3, tail[1] * 1e3, tail[2] * 1e3)
    shown = [(means, "mean TTFT, ms"), (tails, "P95 TTFT, ms")]
    shown = [one for one in shown if one[0]]
    figure, axes, places = _chart(settings, 4 + 4 * len(shown), len(shown))
    for axis, (found, text) in zip(axes, shown, strict=True):
        _dots(axis, places, found, f"{text} (95% interval)")
    _save(figure, path)
    return True


def beside_the_paper(results: Results, path: Path) -> bool:
    """Speed-ups over each baseline, beside the paper's."""
    found = paper.speed_ups(results.timed)
    # One budget is enough: the paper's, or the nearest to it.
    nearest = min((one.ours[1] for one in found), key=lambda budget: abs(budget - paper.BUDGET), default=None)
    found = [one for one in found if one.ours[1] == nearest]
    if nearest is None:
        return False
    baselines = [name for name in paper.BASELINES if any(one.baseline == name for one in found)]
    systems = list(dict.fromkeys(one.ours[0] for one in found))
    figure, axis = pyplot.subplots(figsize=(8.5, 0.66 * len(baselines) + 1.6), constrained_layout=True)
    for one in found:
        step = (systems.index(one.ours[0]) - (len(systems) - 1) / 2) * 0.34
        value, low, high = one.measured
        height = baselines.index(one.baseline) + step
        own = colour(one.ours[0], systems)
        axis.barh(height, value, height=0.3, color=own, label=label(one.ours[0]))
        if np.isfinite(low):
            axis.plot([low, high], [height] * 2, color="#222222", linewidth=1.2)
        end = high if np.isfinite(high) else value
        axis.annotate(
            f"{value:.2f}x",
            (end, height),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            # Drawn over the paper's mark.
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
            zorder=5,
        )
        if one.paper is not None:
            middle = baselines.index(one.baseline)
            axis.plot([one.paper] * 2, [middle - 0.4, middle + 0.4], color="#c2458a", linewidth=2.5, label="paper")
            axis.annotate(
                f"{one.paper}x",
                (one.paper, middle - 0.4),
                (0, 4),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color="#c2458a",
            )
    axis.axvline(1, color="#777777", linewidth=0.8, linestyle="--")
    axis.set_yticks(range(len(baselines)), [f"over {label(name)}" for name in baselines])
    axis.tick_params(axis="y", length=0)
    axis.invert_yaxis()
    axis.margins(x=0.1)
    axis.set_xlabel(f"times faster to the first token, budget {share(nearest)} (95% interval)")
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    handles = {text: handle for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    _save(figure, path)
    return True
