"""The predictions as a picture: a panel for each machine, a row for each method, a mark for each state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

from ..systems import State
from .machines import MACHINES
from .predict import LENGTHS, Prediction
from .shapes import shape_of

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

_MARKS = {
    State.COLD: ("v", "#1b4b75", "cold"),
    State.OPEN: ("o", "#2b6ca3", "store open"),
    State.KEYS_RESIDENT: ("D", "#e0a03c", "keys resident"),
    State.WARM_HOST: ("s", "#8e6bb0", "in host memory"),
    State.WARM_DEVICE: ("^", "#1f7a45", "in HBM"),
}


def draw(predictions: Sequence[Prediction], path: Path, tokens: int = LENGTHS[1]) -> None:
    """Write the picture for prefixes of `tokens` tokens."""
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8.2), sharey=True, constrained_layout=True)
    for machine, axis in zip(MACHINES, axes.flat, strict=True):
        own = [one for one in predictions if one.machine is machine and one.tokens == tokens]
        titles = list(dict.fromkeys(one.method.title for one in own if one.method.label != "floor"))
        floor = next(one.timing.ttft for one in own if one.method.label == "floor") * 1e3
        axis.axvline(floor, color="#c8553d", linewidth=1.2, zorder=1)
        for one in own:
            if one.method.label == "floor":
                continue
            mark, colour, _ = _MARKS[one.state]
            place = titles.index(one.method.title)
            axis.plot(one.timing.ttft * 1e3, place, mark, color=colour, markersize=7, alpha=0.9, zorder=3)
        axis.set_xscale("log")
        axis.set_xlim(left=floor * 0.8)
        axis.set_yticks(range(len(titles)), titles)
        axis.set_title(f"{machine.name}: {shape_of(machine).name}", fontsize=10)
        axis.grid(True, axis="x", which="both", alpha=0.25)
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axis.set_xlabel("ms to the first token", fontsize=9)
    axes[0][0].invert_yaxis()
    handles = [
        Line2D([], [], marker=mark, color=colour, linestyle="none", label=name)
        for mark, colour, name in _MARKS.values()
    ]
    handles.append(Line2D([], [], color="#c8553d", label="floor: no prefix"))
    figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False)
    figure.suptitle(f"Computed, not measured: a prefix of {tokens // 1024}K tokens, a suffix of 32", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
