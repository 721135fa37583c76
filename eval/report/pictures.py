"""The other pictures of a report. Each function writes one PNG, or none if the rows do not have the data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.patches import Rectangle

from ..statistics import Estimate
from . import measures, paper
from .cells import share
from .charts import chart, dots, is_ours, logarithmic, new_figure, plain, save
from .names import MEMORY, Setting, colour, label, marker, states_in_order
from .rows import Results
from .states import Cut

_PHASES = {
    "lookup": "#c9b36b",
    "identify": "#8e6bb0",
    "wait": "#c8553d",
    "gather": "#e0a03c",
    "attention": "#5b8db8",
    "rest": "#c9c9c9",
}
_OTHER_PHASES = ("#2fa3a3", "#7a5230", "#4b4ba8", "#a3a32a")
_PHASES_SAID = {"wait": "wait for reads"}


def times(cut: Cut, path: Path) -> bool:
    """Time to the first token with intervals; the dashed line is in memory."""
    rows = cut.comparable
    found = {setting: time.scaled(1e3) for setting in cut.settings if (time := measures.time(rows, setting))}
    if not found:
        return False
    figure, (axis,), places = chart(list(found), 9)
    dots(axis, places, found, f"time to the first token, ms: {cut.state}, with 95% intervals")
    if MEMORY in found:
        axis.axvline(found[MEMORY].value, color=colour(MEMORY, []), linestyle="--", linewidth=1, zorder=0)
    save(figure, path)
    return True


def phases(cut: Cut, path: Path) -> bool:
    """Mean milliseconds of each phase, stacked."""
    rows = cut.comparable
    found = {setting: seconds for setting in cut.settings if (seconds := measures.phases(rows, setting))}
    if not found:
        return False
    known = {name for seconds in found.values() for name in seconds}
    others = sorted(known - set(_PHASES))
    colours = _PHASES | {name: _OTHER_PHASES[place % len(_OTHER_PHASES)] for place, name in enumerate(others)}
    figure, (axis,), places = chart(list(found), 9, room=1.3)
    wholes = {setting: sum(seconds.values()) * 1e3 for setting, seconds in found.items()}
    # Recomputing the prefix can take so long that the other bars would be invisible.
    longest = max(wholes.values())
    stored = max((whole for one, whole in wholes.items() if one.system != "recompute"), default=longest)
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
    axis.set_xlabel(f"mean of a request, ms: {cut.state}")
    axis.set_xlim(0, limit)
    plain(axis.xaxis)
    save(figure, path)
    return True


def stream(results: Results, name: str, path: Path) -> bool:
    """Mean and 95th percentile of a stream's times in its coldest state, with intervals."""
    rows = results.streamed
    rows = rows[rows["stream"] == name]
    for state in states_in_order(rows["state"])[:1]:
        rows = rows[rows["state"] == state]
    means: dict[Setting, Estimate] = {}
    tails: dict[Setting, Estimate] = {}
    for setting in measures.settings(rows):
        mean = measures.mean_of(rows, setting, "ttft_s")
        task, *others = measures.tasks(measures.of(rows, setting))
        tail = None if others else measures.percentile(rows, setting, task, 0.95)
        if mean is not None:
            means[setting] = mean.scaled(1e3)
        if tail is not None:
            tails[setting] = tail.scaled(1e3)
    shown = [(found, text) for found, text in ((means, "mean TTFT, ms"), (tails, "P95 TTFT, ms")) if found]
    if not shown:
        return False
    figure, axes, places = chart(list(means), 4 + 4 * len(shown), len(shown))
    for axis, (found, text) in zip(axes, shown, strict=True):
        dots(axis, places, found, f"{text} (95% interval)")
    save(figure, path)
    return True


def crossings(found: dict[Setting, tuple[list[float], list[Estimate]]], rival: str, path: Path) -> bool:
    """Ratios of time by the speed of reads; below the dashed line a system is faster than the rival.

    Args:
        found: each setting's speeds in GB/s, ascending, and its ratios (see `crossings.lines`).
        rival: the name of the rival.
        path: where to write.
    """
    if not found:
        return False
    # A panel for each budget; systems that use the whole prefix are in all of them.
    budgets = sorted({setting.budget for setting in found if setting.budget < 1}) or [1.0]
    figure, axes = new_figure(1.2 + 4.6 * len(budgets), 5.2, 1, len(budgets))
    every = [speed for speeds, _ in found.values() for speed in speeds]
    ends = [end for _, ratios in found.values() for one in ratios for end in one[:3] if np.isfinite(end)]
    low, high = min(*ends, 1.0) / 1.1, max(*ends, 1.0) * 1.1
    steps = (1, 1.5, 2, 3, 5, 7) if high / low > 3 else (1, 1.1, 1.2, 1.3, 1.5, 1.75, 2, 3, 5, 6, 7, 8, 9)
    ticks = [tick for power in range(-4, 4) for one in steps if low <= (tick := one * 10.0**power) <= high]
    for axis, budget in zip(np.ravel(axes), budgets, strict=True):
        for setting, (speeds, ratios) in found.items():
            if setting.budget not in (budget, 1.0):
                continue
            spans = np.array([[one.value - one.low, one.high - one.value] for one in ratios]).T
            axis.errorbar(
                speeds,
                [one.value for one in ratios],
                yerr=np.nan_to_num(spans).clip(0),
                label=label(setting),
                color=colour(setting, found),
                marker=marker(setting),
                linestyle="-" if setting.budget < 1 else "--",
                linewidth=2.4 if is_ours(setting) else 1.4,
                markersize=8 if is_ours(setting) else 6.5,
                elinewidth=1,
                capsize=2,
                zorder=3 if is_ours(setting) else 2,
            )
        axis.axhline(1, color="#777777", linewidth=1, linestyle=":", zorder=0)
        logarithmic(axis, min(every), max(every), 1.15, 1.15)
        axis.set_yscale("log")
        axis.set_ylim(low, high)
        axis.set_yticks(ticks)
        axis.yaxis.minorticks_off()
        plain(axis.xaxis)
        plain(axis.yaxis, unit="x")
        axis.set_xlabel("speed of reads, GB/s")
        axis.set_title("whole prefix" if budget >= 1 else f"budget {share(budget)}", fontsize=10)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    first = np.ravel(axes)[0]
    first.set_ylabel(f"time over that of {rival}")
    handles = {
        text: handle for axis in np.ravel(axes) for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    columns = 3 if len(budgets) > 1 else 2
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    save(figure, path)
    return True


def beside_the_paper(cut: Cut, path: Path) -> bool:
    """Speed-ups over each baseline, beside the paper's."""
    found = paper.speed_ups(cut.rows)
    # One budget is enough: the paper's, or the nearest to it.
    nearest = min((one.ours.budget for one in found), key=lambda budget: abs(budget - paper.BUDGET), default=None)
    found = [one for one in found if one.ours.budget == nearest]
    if nearest is None:
        return False
    baselines = sorted(
        {one.baseline for one in found}, key=lambda one: (paper.BASELINES.index(one.system), one.options)
    )
    systems = list(dict.fromkeys(one.ours for one in found))
    figure, axis = new_figure(8.5, 0.66 * len(baselines) + 1.6)
    for one in found:
        step = (systems.index(one.ours) - (len(systems) - 1) / 2) * 0.34
        value, low, high, *_ = one.measured
        height = baselines.index(one.baseline) + step
        axis.barh(height, value, height=0.3, color=colour(one.ours, systems), label=label(one.ours))
        if np.isfinite(low):
            axis.plot([low, high], [height] * 2, color="#222222", linewidth=1.2)
        axis.annotate(
            f"{value:.2f}x",
            (high if np.isfinite(high) else value, height),
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
    axis.set_xlabel(f"times faster to the first token, {cut.state}, budget {share(nearest)} (95% interval)")
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    handles = {text: handle for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    save(figure, path)
    return True
