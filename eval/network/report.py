"""The measured requests as a table and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..timing import median_spread

_COLOURS = {
    "recompute": "#8a8a8a",
    "exact": "#5b8db8",
    "published, 5%": "#d08a2e",
    "published, 5%, layers in groups": "#e8bf7d",
    "default, 25%": "#2a7f4f",
    "2-bit index, 25%": "#8fc7a5",
}


def _figures(rows: list[dict[str, Any]], system: str, tokens: int, link: str) -> list[dict[str, Any]]:
    # (What reads nothing does not depend on the link.)
    return [
        row
        for row in rows
        if row["system"] == system and row["tokens"] == tokens and (system == "recompute" or row["link"] == link)
    ]


def break_even(lengths: list[int], computed: list[float], read: list[float]) -> str:
    """From which prefix length on reading is faster than computing, in words; between two lengths by a straight line
    in logarithms.

    Args:
        lengths: ascending, tokens.
        computed, read: seconds at each length.
    """
    faster = [two < one for one, two in zip(computed, read, strict=True)]
    if all(faster):
        return f"below {lengths[0]:,}"
    if not faster[-1]:
        return f"above {lengths[-1]:,}"
    last = max(number for number, wins in enumerate(faster) if not wins)
    gaps = [np.log(computed[number] / read[number]) for number in (last, last + 1)]
    low, high = np.log(lengths[last]), np.log(lengths[last + 1])
    return f"about {round(float(np.exp(low + (high - low) * -gaps[0] / (gaps[1] - gaps[0]))), -1):,.0f}"


def write_report(results: dict[str, Any], out: Path) -> None:
    """Write the Markdown file `out` and a picture beside it."""
    rows, links = results["rows"], results["links"]
    lengths = sorted({row["tokens"] for row in rows})
    measured = {row["system"] for row in rows}
    systems = [system for system in _COLOURS if system in measured]
    about = results["machine"]
    lines = [
        "# A prefix from another machine",
        "",
        f"{results['model']}, {results['dtype']}, a suffix of {results['suffix_tokens']} tokens, {about['cpu']} with "
        f"{about['cores']} cores. A real object server (SeaweedFS) on loopback, behind a proxy that delays each "
        "answer and limits their bytes. Nothing of the prefix is on the machine that asks; opening its store is inside "
        "the timer. Client, server and proxy share the processor, so on the fastest link it is what decides. Medians "
        "and quartiles of interleaved requests.",
        "",
        "```bash",
        "python -m eval.network run docs/results/network.json",
        "python -m eval.network report docs/results/network.json --out docs/results/network.md",
        "```",
        "",
        "Time to the first token in ms, and MB that crossed the link:",
        "",
        "| link | system | "
        + " | ".join(f"{tokens:,} tokens" for tokens in lengths)
        + " | faster than computing from |",
        "|---|---|" + "---|" * (len(lengths) + 1),
    ]
    for link, told in links.items():
        computed = [
            median_spread(row["seconds"] for row in _figures(rows, "recompute", n, link)).median for n in lengths
        ]
        for system in systems:
            cells, medians = [], []
            for tokens in lengths:
                found = _figures(rows, system, tokens, link)
                spread = median_spread(1000 * row["seconds"] for row in found)
                medians.append(spread.median / 1000)
                crossed = np.median([row["wire_bytes"] for row in found]) / 1e6
                bytes_read = "" if system == "recompute" else f"; {crossed:.1f} MB"
                cells.append(f"{spread.median:,.0f} ({spread.low:,.0f} - {spread.high:,.0f}){bytes_read}")
            even = "" if system == "recompute" else break_even(lengths, computed, medians) + " tokens"
            name = f"{told['gbps']:g} Gb/s, {told['delay_ms']:g} ms"
            lines.append(f"| {name} | {system} | {' | '.join(cells)} | {even} |")
    tokens_of = {
        (system, tokens): {row["token"] for row in rows if row["system"] == system and row["tokens"] == tokens}
        for system in systems
        for tokens in lengths
    }
    same = sum(tokens_of["exact", tokens] == tokens_of["recompute", tokens] for tokens in lengths)
    lines += ["", f"The first token of exact requests is that of computing at {same} of {len(lengths)} lengths.", ""]
    lines += _requests(rows, systems, lengths)
    lines += [f"![Time to the first token by link]({out.with_suffix('.png').name})", ""]
    out.write_text("\n".join(lines))
    _draw(rows, links, lengths, systems, out.with_suffix(".png"))


def _requests(rows: list[dict[str, Any]], systems: list[str], lengths: list[int]) -> list[str]:
    """How many requests the server was sent, as a table; empty for rows that do not say."""
    asking = [system for system in systems if any("gets" in row for row in rows if row["system"] == system)]
    asking = [system for system in asking if system != "recompute"]
    if not asking:
        return []
    found = ["Requests to the server for one of these, reads and listings:", ""]
    found += ["| system | " + " | ".join(f"{tokens:,} tokens" for tokens in lengths) + " |"]
    found += ["|---|" + "---|" * len(lengths)]
    for system in asking:
        cells = []
        for tokens in lengths:
            own = [row for row in rows if row["system"] == system and row["tokens"] == tokens]
            cells.append(" + ".join(f"{np.median([row[kind] for row in own]):,.0f}" for kind in ("gets", "lists")))
        found.append(f"| {system} | {' | '.join(cells)} |")
    return [*found, ""]


def _draw(
    rows: list[dict[str, Any]], links: dict[str, Any], lengths: list[int], systems: list[str], path: Path
) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    size = 4 * len(links), 4.1
    figure, axes = plt.subplots(1, len(links), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, (link, told) in zip(axes[0], links.items(), strict=True):
        for system in systems:
            times = [
                median_spread(row["seconds"] for row in _figures(rows, system, tokens, link)).median
                for tokens in lengths
            ]
            axis.plot(lengths, times, "o-", label=system, color=_COLOURS.get(system))
        axis.set(
            xscale="log", yscale="log", title=f"{told['gbps']:g} Gb/s, {told['delay_ms']:g} ms", xlabel="prefix, tokens"
        )
        axis.set_xticks(lengths, [f"{tokens:,}" for tokens in lengths])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("time to the first token, s")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
