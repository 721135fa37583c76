"""The replays as a table, a picture and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..timing import Spread, median_spread

NAMES = {"lru": "LRU", "lfu": "LFU", "published": "published, I·F", "expected-use": "expected use (ours)"}
_COLOURS = {"lru": "#8a8a8a", "lfu": "#5b8db8", "published": "#d08a2e", "expected-use": "#2a7f4f"}
_FIELDS = ("chunk_hit_rate", "byte_hit_rate", "key_hit_rate", "bytes_read", "ttft_mean_s", "ttft_p95_s", "io_wait_s")

Rows = list[dict[str, Any]]


def medians(rows: Rows) -> dict[str, Spread]:
    """Over rounds, of every figure of one policy at one size."""
    return {field: median_spread([row[field] for row in rows]) for field in _FIELDS}


def _timed(rows: Rows) -> Rows:
    return [row for row in rows if row["reads"]]


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _select(rows: Rows, **wanted: Any) -> Rows:
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def main_table(results: dict[str, Any]) -> str:
    """Markdown: every size and policy of the timed scenario."""
    rows = _timed(results["rows"])
    lines = [
        "| memory | policy | chunk hits | byte hits, keys included | MB read | mean TTFT, ms | P95 TTFT, ms | rounds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size in sorted(_unique(row["host_bytes"] for row in rows)):
        here = _select(rows, host_bytes=size)
        best = max(row["chunk_hit_rate"] for row in here)
        for policy in (name for name in NAMES if _select(here, policy=name)):
            found = medians(_select(here, policy=policy))
            hits = f"{found['chunk_hit_rate'].median:.1%}"
            hits = f"**{hits}**" if found["chunk_hit_rate"].median == best else hits
            mean, tail = found["ttft_mean_s"], found["ttft_p95_s"]
            lines.append(
                f"| {size / 2**20:.0f} MiB ({here[0]['share']:.0%}) | {NAMES[policy]} | {hits} "
                f"| {found['byte_hit_rate'].median:.1%} | {found['bytes_read'].median / 1e6:.2f} "
                f"| {mean.median * 1e3:.1f} ({mean.low * 1e3:.1f} - {mean.high * 1e3:.1f}) "
                f"| {tail.median * 1e3:.1f} ({tail.low * 1e3:.1f} - {tail.high * 1e3:.1f}) | {mean.count} |"
            )
    return "\n".join(lines)


def scenario_table(results: dict[str, Any]) -> str:
    """Markdown: chunk hit rates of all scenarios (drift, seed), policies side by side."""
    rows = results["rows"]
    policies = [name for name in NAMES if _select(rows, policy=name)]
    lines = [
        "| drift | seed | memory | " + " | ".join(NAMES[name] for name in policies) + " |",
        "|---" * (3 + len(policies)) + "|",
    ]
    scenarios = sorted(
        _unique((row["drift"], row["seed"], row["host_bytes"]) for row in rows), key=lambda one: (-one[0], *one[1:])
    )
    for drift, seed, size in scenarios:
        here = _select(rows, drift=drift, seed=seed, host_bytes=size)
        rates = {name: _select(here, policy=name)[0]["chunk_hit_rate"] for name in policies}
        cells = [f"**{rate:.1%}**" if rate == max(rates.values()) else f"{rate:.1%}" for rate in rates.values()]
        share = f"{size / 2**20:.0f} MiB ({here[0]['share']:.0%})"
        lines.append(f"| {'yes' if drift else 'no'} | {seed} | {share} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(results: dict[str, Any], path: Path) -> None:
    """Hit rates, mean and P95 TTFT by memory size, one line for each policy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = _timed(results["rows"])
    panels = (
        ("chunk_hit_rate", 100.0, "chunks found in memory, %"),
        ("byte_hit_rate", 100.0, "bytes found in memory, keys included, %"),
        ("ttft_mean_s", 1e3, "mean TTFT, ms"),
        ("ttft_p95_s", 1e3, "P95 TTFT, ms"),
    )
    figure, axes = pyplot.subplots(1, 4, figsize=(15, 3.8), constrained_layout=True)
    sizes = sorted(_unique(row["host_bytes"] for row in rows))
    for axis, (field, scale, label) in zip(axes, panels, strict=True):
        for policy in (name for name in NAMES if _select(rows, policy=name)):
            spreads = [medians(_select(rows, policy=policy, host_bytes=size))[field] for size in sizes]
            middle = [spread.median * scale for spread in spreads]
            below = [(spread.median - spread.low) * scale for spread in spreads]
            above = [(spread.high - spread.median) * scale for spread in spreads]
            axis.errorbar(
                [size / 2**20 for size in sizes],
                middle,
                yerr=[below, above],
                label=NAMES[policy],
                color=_COLOURS[policy],
                marker="o",
                markersize=4,
                capsize=2,
                linewidth=2 if policy == "expected-use" else 1.4,
            )
        axis.set_xscale("log")
        axis.set_xticks([size / 2**20 for size in sizes], [f"{size / 2**20:.0f}" for size in sizes])
        axis.minorticks_off()
        axis.set_xlabel("host memory, MiB")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write(results: dict[str, Any], folder: Path) -> list[Path]:
    """`policies.md`, `.png` and `.json` in `folder`; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"policies.{ending}" for ending in ("md", "png", "json")]
    about, load = results["about"], results["workload"]
    whole = sum(results["footprint"].values())
    text = f"""# Which chunks to keep

`make policies`. {len(about["prefix_tokens"])} prefixes of real text ({about["text"]}), {min(about["prefix_tokens"])} to
{max(about["prefix_tokens"])} tokens; {about["recorded_requests"]} requests recorded with {about["model"]}, default
configuration, budget {about["budget"]:.0%}. Replayed without the model, through the real store, reader and memory
tiers: {load["requests"]} requests, of which the first {results["warm_up"]} are not counted; popularity follows Zipf's
law (exponent {load["exponent"]}); every {load["drift_every"]} requests {load["drift"]:.0%} of the prefixes swap ranks,
except where drift is "no". All that a replay touches is {whole / 2**20:.0f} MiB
({results["footprint"]["keys"] / whole:.0%} of it key index); shares are of that.

Time to first token is from the request's start until the last layer is through, over the last {results["timed"]}
requests, with recorded compute times (times {results["pace"]}) slept where the model would compute; medians over rounds
with quartiles (of fewer than four: extremes), policies in random order in each round. Hit rates do not depend on time.

{main_table(results)}

![Hit rate and time to first token by memory size](policies.png)

Chunk hit rates with other seeds, and without drift:

{scenario_table(results)}

Machine: {results["machine"]}.
"""
    paths[0].write_text(text)
    picture(results, paths[1])
    paths[2].write_text(json.dumps(results, indent=2) + "\n")
    return paths
