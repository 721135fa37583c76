"""The replays as a table, a picture and JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..statistics import Estimate, geometric_mean, mean, quantile

NAMES = {"lru": "LRU", "lfu": "LFU", "published": "published, I·F", "expected-use": "expected use (ours)"}
_COLOURS = {"lru": "#8a8a8a", "lfu": "#5b8db8", "published": "#d08a2e", "expected-use": "#2a7f4f"}

# A figure and the ends of its interval.
Shown = tuple[float, float, float]
Rows = list[dict[str, Any]]
Times = npt.NDArray[np.float64]


def mean_of(rows: Rows, field: str) -> float:
    """Of one policy at one size, over rounds."""
    return float(np.mean([row[field] for row in rows]))


def times_of(rows: Rows) -> Times:
    """Seconds to the first token of all timed requests, float64 `(n,)`, in the same order for every policy."""
    return np.concatenate([row["ttft_s"] for row in rows])


def mean_time(times: Times) -> Estimate:
    """Mean time to the first token, seconds."""
    return mean(times, range(len(times)))


def tail_time(times: Times) -> Estimate:
    """95th percentile of the time to the first token, seconds."""
    return quantile(times, range(len(times)), 0.95)


def ratio_of_times(times: Times, others: Times) -> Estimate:
    """Geometric mean over requests of the time of one policy, divided by that of another for the same request."""
    return geometric_mean(times / others, range(len(times)))


def _timed(rows: Rows) -> Rows:
    return [row for row in rows if row["reads"]]


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _select(rows: Rows, **wanted: Any) -> Rows:
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def _percent(rows: Rows, policy: str, field: str) -> str:
    """The rate of a policy; bold if no other is better."""
    rates = {name: mean_of(_select(rows, policy=name), field) for name in _unique(row["policy"] for row in rows)}
    text = f"{rates[policy]:.1%}"
    return f"**{text}**" if rates[policy] == max(rates.values()) else text


def _shown(figure: Estimate, scale: float = 1e3, digits: int = 1) -> str:
    value, low, high = (f"{one * scale:.{digits}f}" for one in figure[:3])
    return f"{value} ({low} - {high})"


def main_table(results: dict[str, Any]) -> str:
    """Markdown: every size and policy of the timed scenario."""
    rows = _timed(results["rows"])
    lines = [
        "| memory | policy | chunk hits | byte hits, keys too | MB read | mean TTFT, ms | over LRU's | P95 TTFT, ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size in sorted(_unique(row["host_bytes"] for row in rows)):
        here = _select(rows, host_bytes=size)
        for policy in (name for name in NAMES if _select(here, policy=name)):
            mine, lru = _select(here, policy=policy), _select(here, policy="lru")
            times = times_of(mine)
            against = "" if policy == "lru" or not lru else _shown(ratio_of_times(times, times_of(lru)), 1.0, 3)
            cells = (
                f"{size / 2**20:.0f} MiB ({here[0]['share']:.0%})",
                NAMES[policy],
                _percent(here, policy, "chunk_hit_rate"),
                _percent(here, policy, "byte_hit_rate"),
                f"{mean_of(mine, 'bytes_read') / 1e6:.2f}",
                _shown(mean_time(times)),
                against,
                _shown(tail_time(times)),
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _side_by_side(columns: list[str], policies: list[str]) -> list[str]:
    """The head of a table in which policies stand side by side, after some columns."""
    names = [*columns, *(NAMES[name] for name in policies)]
    return [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]


def scenario_table(results: dict[str, Any]) -> str:
    """Markdown: hit rates of all scenarios (drift, seed), chunks and bytes, policies side by side."""
    rows = results["rows"]
    policies = [name for name in NAMES if _select(rows, policy=name)]
    lines = _side_by_side(["drift", "seed", "memory"], policies)
    scenarios = sorted(_unique((row["drift"], row["seed"], row["host_bytes"]) for row in rows))
    for drift, seed, size in scenarios:
        here = _select(rows, drift=drift, seed=seed, host_bytes=size)
        cells = [
            f"{_percent(here, name, 'chunk_hit_rate')} / {_percent(here, name, 'byte_hit_rate')}" for name in policies
        ]
        share = f"{size / 2**20:.0f} MiB ({here[0]['share']:.0%})"
        lines.append(f"| {'yes' if drift else 'no'} | {seed} | {share} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tiers_table(results: dict[str, Any]) -> str:
    """Markdown: hit rates with a device and the host both bounded, policies side by side."""
    rows = results["rows"]
    policies = [name for name in NAMES if _select(rows, policy=name)]
    lines = _side_by_side(["device", "host"], policies)
    for device, host in sorted(_unique((row["device_bytes"], row["host_bytes"]) for row in rows)):
        here = _select(rows, device_bytes=device, host_bytes=host)
        cells = [
            " / ".join(_percent(here, name, field) for field in ("device_hit_rate", "chunk_hit_rate", "byte_hit_rate"))
            for name in policies
        ]
        shares = [
            f"{size / 2**20:.0f} MiB ({share:.0%})"
            for size, share in zip((device, host), here[0]["shares"], strict=True)
        ]
        lines.append(f"| {' | '.join(shares + cells)} |")
    return "\n".join(lines)


def picture(results: dict[str, Any], path: Path) -> None:
    """Hit rates, mean and P95 TTFT by memory size, one line for each policy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = _timed(results["rows"])

    def rate(field: str) -> Callable[[Rows], Shown]:
        return lambda mine: (mean_of(mine, field),) * 3

    panels: tuple[tuple[Callable[[Rows], Shown], float, str], ...] = (
        (rate("chunk_hit_rate"), 100.0, "chunks found in memory, %"),
        (rate("byte_hit_rate"), 100.0, "bytes found in memory, keys included, %"),
        (lambda mine: mean_time(times_of(mine))[:3], 1e3, "mean TTFT, ms"),
        (lambda mine: tail_time(times_of(mine))[:3], 1e3, "P95 TTFT, ms"),
    )
    figure, axes = pyplot.subplots(1, 4, figsize=(15, 3.8), constrained_layout=True)
    sizes = sorted(_unique(row["host_bytes"] for row in rows))
    for axis, (figure_of, scale, label) in zip(axes, panels, strict=True):
        for policy in (name for name in NAMES if _select(rows, policy=name)):
            found = [figure_of(_select(rows, policy=policy, host_bytes=size)) for size in sizes]
            middle = [value * scale for value, _, _ in found]
            below = [(value - low) * scale for value, low, _ in found]
            above = [(high - value) * scale for value, _, high in found]
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


def _about(results: dict[str, Any]) -> str:
    about, load = results["about"], results["workload"]
    whole = sum(results["footprint"].values())
    return f"""{len(about["prefix_tokens"])} prefixes of real text ({about["text"]}), {min(about["prefix_tokens"])} to
{max(about["prefix_tokens"])} tokens; {about["recorded_requests"]} requests recorded with {about["model"]}, default
configuration, budget {about["budget"]:.0%}. Replayed without the model, through the real store, reader and memory
tiers: {load["requests"]} requests, of which the first {results["warm_up"]} are not counted; popularity follows Zipf's
law (exponent {load["exponent"]}). All that a replay touches is {whole / 2**20:.0f} MiB
({results["footprint"]["keys"] / whole:.0%} of it key index); shares are of that."""


def write_tiers(results: dict[str, Any], folder: Path) -> list[Path]:
    """`tiers.md` and `.json` in `folder`; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"tiers.{ending}" for ending in ("md", "json")]
    text = f"""# Which chunks to keep, on a device and on the host

`python -m eval.policies tiers`. {_about(results)}

Memory of an accelerator lies above the host's, and both are bounded. The device is imitated by host memory: what each
tier holds is what it would hold on an accelerator, and no time is measured. Chunks found on the device / found on
either / bytes found on either, keys included:

{tiers_table(results)}

Machine: {results["machine"]}.
"""
    paths[0].write_text(text)
    paths[1].write_text(json.dumps(results, indent=2) + "\n")
    return paths


def write(results: dict[str, Any], folder: Path) -> list[Path]:
    """`policies.md`, `.png` and `.json` in `folder`; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"policies.{ending}" for ending in ("md", "png", "json")]
    load, drift = results["workload"], max(row["drift"] for row in results["rows"])
    text = f"""# Which chunks to keep

`make policies`. {_about(results)}

Time to first token is from the request's start until the last layer is through, over the last {results["timed"]}
requests: these read from disk (`O_DIRECT`), with recorded compute times (times {results["pace"]}) slept where the model
would compute. The requests before them only move what is in memory. Every request is made in all replays, in random
order, before the next one. "Over LRU's" is the geometric mean of the ratios of the same request. In brackets: 95%
intervals, bootstrap over requests. MB read are those of timed requests.

{main_table(results)}

![Hit rate and time to first token by memory size](policies.png)

Hits of chunks / of bytes also with more memory, and with drift (every {load["drift_every"]} requests {drift:.0%} of the
prefixes swap their ranks):

{scenario_table(results)}

Machine: {results["machine"]}.
"""
    paths[0].write_text(text)
    picture(results, paths[1])
    paths[2].write_text(json.dumps(results, indent=2) + "\n")
    return paths
