"""Draw `ttft_by_length.png`: cold time to first token against prefix length.

    python -m eval run RUN --preset lengths
    python docs/pictures/ttft_by_length.py RUN docs/pictures/ttft_by_length.png

A packed run (`docs/results/data/smollm2-lengths`) will do. The script needs the `eval` extra.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import typer
from matplotlib.ticker import FuncFormatter, NullFormatter

from eval.report.files import rows_of
from eval.run_files import CONFIG, MACHINE
from eval.timing import median_spread

# System and budget of the rows: name in the picture, colour.
OURS = ("contiguouskv", 0.25)
LINES: dict[tuple[str, float], tuple[str, str]] = {
    ("recompute", 1.0): ("recompute", "#6b7280"),
    ("reload", 1.0): ("reload a saved DynamicCache", "#a16207"),
    ("attentionstore", 1.0): ("load layer by layer, overlapped", "#dc2626"),
    ("contiguouskv", 1.0): ("exact, budget 1.0", "#10b981"),
    ("contiguouskv_paper", 0.05): ("published method, 5%", "#f59e0b"),
    OURS: ("ours, budget 0.25 (default)", "#2563eb"),
}
# All that load the whole prefix.
EVERYTHING = (("reload", 1.0), ("attentionstore", 1.0), ("contiguouskv", 1.0))

Medians = dict[tuple[str, float], dict[int, float]]


def medians_of(rows: list[dict[str, Any]]) -> Medians:
    """Median time to first token in ms, by system with its budget, and length of the prefix.

    Raises:
        ValueError: a system of the picture has no cold, timed row.
    """
    found: defaultdict[tuple[str, float], defaultdict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["ttft_s"] is not None and row["state"] == "cold" and not row["departure"]:
            found[row["system"], row["budget"]][row["prefix_tokens"]].append(1e3 * row["ttft_s"])
    missing = [name for key, (name, _) in LINES.items() if key not in found]
    if missing:
        raise ValueError(f"the run has no cold, timed row of {', '.join(missing)}: {sorted(found)}")
    return {key: {length: median_spread(found[key][length]).median for length in sorted(found[key])} for key in LINES}


def crossover(ours: dict[int, float], rival: dict[int, float]) -> float | None:
    """The shortest length from which `ours` stays below `rival`, interpolated; `None` where it never does."""
    lengths = sorted(ours)
    gains = [rival[length] - ours[length] for length in lengths]
    for i in range(len(lengths) - 1, 0, -1):
        if gains[i] <= 0:
            return None
        if gains[i - 1] <= 0:
            share = -gains[i - 1] / (gains[i] - gains[i - 1])
            return lengths[i - 1] + share * (lengths[i] - lengths[i - 1])
    return None


def main(run: Path, picture: Path) -> None:
    """Draw the rows of a run."""
    medians = medians_of(rows_of(run)[0])
    config, machine = (json.loads((run / name).read_text()) for name in (CONFIG, MACHINE))
    figure, ax = plt.subplots(figsize=(8.4, 4.6), dpi=130)
    for key, (name, colour) in LINES.items():
        by_length = medians[key]
        ax.plot(
            list(by_length), list(by_length.values()), color=colour, marker="o", markersize=4, label=name, linewidth=1.8
        )
        print(f"{name:32}", *(f"{length:6,}: {value:8,.0f}" for length, value in by_length.items()))
    everything = {length: min(medians[key][length] for key in EVERYTHING) for length in medians[OURS]}
    at = crossover(medians[OURS], everything)
    print("the default stays below every load of everything from", at)
    if at is not None:
        ax.axvline(at, color=LINES[OURS][1], linestyle=":", linewidth=1.2)
        ax.annotate(
            f"the default is faster than loading\neverything from about {round(at, -2):,.0f} tokens",
            (at, 0.97),
            xycoords=("data", "axes fraction"),
            xytext=(-6, 0),
            textcoords="offset points",
            fontsize=8.5,
            color=LINES[OURS][1],
            va="top",
            ha="right",
        )
    lengths = sorted(medians[OURS])
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(lengths, [f"{length:,}" for length in lengths])
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("prefix length, tokens")
    ax.set_ylabel("time to first token, ms (log)")
    ax.grid(alpha=0.25, which="both", linewidth=0.5)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    dtype = {"bfloat16": "bf16", "float32": "fp32", "float16": "fp16"}[config["dtype"]]
    ax.set_title(
        f"{config['model'].split('/')[-1]}, {dtype}, {machine['cpu']}, {machine['cores']} cores. Prefix cold on a "
        "local disk.\nMedians of interleaved requests.",
        fontsize=9,
        loc="left",
    )
    figure.savefig(picture, bbox_inches="tight")


if __name__ == "__main__":
    typer.run(main)
