"""Draw `how_it_works.png`: python docs/pictures/draw.py (needs the `eval` extra)."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, PALE, BLUE, ORANGE, GREEN = "#1f2937", "#e5e7eb", "#2563eb", "#f59e0b", "#10b981"
CHOSEN = (1, 5, 6, 11)
CHUNKS = 14


def box(
    ax: Axes, x: float, y: float, width: float, height: float, colour: str, text: str = "", ink: str = "white"
) -> None:
    """A rounded box with a text in its middle."""
    shape = FancyBboxPatch(
        (x, y),
        width,
        height,
        boxstyle="round,pad=0,rounding_size=0.06",
        facecolor=colour,
        edgecolor="white",
        linewidth=1,
    )
    ax.add_patch(shape)
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", color=ink, fontsize=9)


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = INK) -> None:
    """A thin arrow between two points."""
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=colour, linewidth=1.2))


def label(ax: Axes, y: float, title: str, text: str) -> None:
    """What a row shows, at its left."""
    ax.text(0, y, title, fontsize=11, fontweight="bold", color=INK, va="bottom")
    ax.text(0, y - 0.08, text, fontsize=8.6, color=INK, va="top", linespacing=1.35)


def draw(path: Path) -> None:
    """Three rows: the chunks on disk, the choice, and the reads beside the compute."""
    figure, ax = plt.subplots(figsize=(11, 6.2))
    ax.set_xlim(0, 14)
    ax.set_ylim(0, 8)
    ax.axis("off")
    left, step = 4.1, 0.7

    label(
        ax,
        7.0,
        "1  On disk",
        "The prefix in chunks of 16 tokens.\nK and V of a chunk in a layer lie\nside by side: one chunk, one read.",
    )
    for chunk in range(CHUNKS):
        chosen = chunk in CHOSEN
        box(
            ax,
            left + chunk * step,
            6.5,
            step - 0.07,
            0.75,
            BLUE if chosen else PALE,
            str(chunk),
            "white" if chosen else INK,
        )
    ax.text(left, 7.4, "stored prefix (one segment file, safetensors)", fontsize=8.6, color=INK)

    label(
        ax,
        4.75,
        "2  Choose",
        "The queries of the new tokens score\nevery chunk with its keys (or their int8\nindex). The best few are kept.",
    )
    weights = (0.12, 0.78, 0.2, 0.1, 0.24, 0.7, 0.95, 0.3, 0.16, 0.08, 0.2, 0.62, 0.14, 0.1)
    for chunk, weight in enumerate(weights):
        colour = BLUE if chunk in CHOSEN else "#9ca3af"
        ax.bar(left + chunk * step + (step - 0.07) / 2, weight, width=step - 0.2, bottom=4.15, color=colour)
    for chunk in CHOSEN:
        x = left + chunk * step + (step - 0.07) / 2
        arrow(ax, (x, 4.15 + weights[chunk] + 0.08), (x, 6.42), BLUE)
    ax.text(left, 3.8, "attention mass $A_j$ of each chunk, from the suffix queries", fontsize=8.6, color=INK)
    ax.plot([left, left + CHUNKS * step - 0.07], [4.15, 4.15], color=INK, linewidth=0.8)

    waits = "Layers wait for their own chunks only."
    ahead = "Reads for later layers, and a guess\nfor the next period, run meanwhile."
    label(ax, 2.5, "3  Read while computing", f"{waits}\n{ahead}")
    width = CHUNKS * step / 9
    read_top, read_low, compute_top, compute_low = 2.75, 2.05, 1.5, 0.8

    def read(slot: int, colour: str, text: str) -> None:
        box(ax, left + slot * width, read_low, width - 0.07, read_top - read_low, colour, text)

    def compute(slot: int, colour: str, text: str) -> None:
        box(ax, left + slot * width, compute_low, width - 0.07, compute_top - compute_low, colour, text)

    def hand_over(slot: int, down: bool) -> None:
        ends = [(left + slot * width - 0.25, read_low - 0.03), (left + slot * width + 0.2, compute_top + 0.03)]
        if not down:
            ends = [(left + slot * width - 0.25, compute_top + 0.03), (left + slot * width + 0.2, read_low - 0.03)]
        arrow(ax, ends[0], ends[1])

    ax.text(left, read_top + 0.12, "disk", fontsize=8.6, color=INK)
    ax.text(left, compute_low + 0.25, "compute", fontsize=8.6, color=INK)
    read(0, ORANGE, "keys")
    compute(1, ORANGE, "choose")
    hand_over(1, down=True)
    hand_over(2, down=False)
    for layer in range(4):
        read(2 + layer, BLUE, f"layer {layer}")
        compute(3 + layer, GREEN, f"layer {layer}")
        hand_over(3 + layer, down=True)
    read(6, "#93c5fd", "guess")
    compute(7, ORANGE, "choose")
    hand_over(8, down=False)
    read(8, BLUE, "missing")
    arrow(ax, (left, 0.45), (left + CHUNKS * step - 0.07, 0.45))
    ax.text(left + CHUNKS * step - 0.07, 0.1, "time", fontsize=8.6, ha="right", color=INK)
    figure.savefig(path, dpi=130, bbox_inches="tight", facecolor="white")
    plt.close(figure)


if __name__ == "__main__":
    draw(Path(__file__).with_name("how_it_works.png"))
