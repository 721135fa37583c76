"""Parts that pictures share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from ..statistics import Estimate
from .cells import share
from .names import OURS, Setting, colour, is_reference, label

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import FuncFormatter, NullLocator

ROW = 0.27


def is_ours(setting: Setting) -> bool:
    """Whether a setting is drawn stronger than others."""
    return setting.system == OURS and not setting.options


def _rows(settings: Sequence[Setting]) -> tuple[dict[Setting, float], list[tuple[float, str, bool, bool]], float]:
    """Heights of a chart's rows, the row labels (height, text, whether a title, whether ours), and the full height."""
    places: dict[Setting, float] = {}
    labels: list[tuple[float, str, bool, bool]] = []
    height, group = 0.0, None
    for setting in settings:
        if setting.budget != group:
            height += 0.4 if group is not None else 0.0
            title = "whole prefix" if setting.budget >= 1 else f"budget {share(setting.budget)}"
            labels.append((height, title, True, False))
            height, group = height + 1, setting.budget
        name = label(setting) + (" (reference)" if is_reference(setting) else "")
        labels.append((height, name, False, is_ours(setting)))
        places[setting] = height
        height += 1
    return places, labels, height


def chart(settings: Sequence[Setting], width: float, panels: int = 1, room: float = 0.9) -> tuple[Any, Any, Any]:
    """A figure with one row per setting, grouped by budget: the figure, its axes and the rows' heights."""
    places, labels, height = _rows(settings)
    figure, axes = pyplot.subplots(
        1, panels, figsize=(width, ROW * height + room), sharey=True, squeeze=False, constrained_layout=True
    )
    first = axes[0][0]
    first.set_yticks([at for at, *_ in labels], [name for _, name, *_ in labels])
    for text, (_, _, title, ours) in zip(first.get_yticklabels(), labels, strict=True):
        text.set_fontsize(9)
        if title:
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


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """A figure and its axes: an array of `rows` times `columns`, or one axis."""
    axes: Any
    figure, axes = pyplot.subplots(rows, columns, figsize=(width, height), layout="constrained")
    return figure, axes


def save(figure: Any, path: Path) -> None:
    """Write a figure and forget it."""
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def plain(axis: Any, scale: float = 1.0, unit: str = "") -> None:
    """Label an axis with plain numbers."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * scale:,.10g}{unit}"))


def logarithmic(axis: Any, low: float, high: float, below: float = 1.3, beyond: float = 1.3) -> None:
    """Scale the x axis logarithmically from `low / below` to `high * beyond`, with round ticks that do not collide."""
    first, last = low / below, high * beyond
    # In this order: a scale cannot be set while both limits are equal.
    axis.set_xlim(first, last)
    axis.set_xscale("log")
    for steps in ((1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [tick for power in range(-6, 9) for one in steps if first <= (tick := one * 10.0**power) <= last]
        if len(ticks) <= 7:
            break
    axis.set_xticks(ticks)
    axis.xaxis.set_minor_locator(NullLocator())


def scaled(axis: Any, low: float, high: float) -> None:
    """Scale a time axis: logarithmic if times differ by more than a factor of eight, else from zero."""
    if high > 8 * low:
        logarithmic(axis, low, high, beyond=1.9)
    else:
        axis.set_xlim(0, high * 1.15)
    plain(axis.xaxis)


def dots(axis: Any, places: dict[Setting, float], found: dict[Setting, Estimate], text: str) -> None:
    """Draw milliseconds as dots with intervals and values."""
    ends = [one for estimate in found.values() for one in estimate[:3] if np.isfinite(one)]
    for setting, (value, low, high, *_) in found.items():
        own, ours = colour(setting, places), is_ours(setting)
        if np.isfinite(low):
            axis.plot([low, high], [places[setting]] * 2, color=own, linewidth=4 if ours else 2.5, alpha=0.55)
        axis.plot(value, places[setting], "o", color=own, markersize=8 if ours else 6)
        axis.annotate(
            f"{value:,.{0 if value >= 100 else 1}f}",
            (high if np.isfinite(high) else value, places[setting]),
            (7, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            fontweight="bold" if ours else "normal",
        )
    scaled(axis, min(ends), max(ends))
    axis.set_xlabel(text)
