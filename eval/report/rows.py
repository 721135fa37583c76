"""The rows of one or several runs as one table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas

from .checks import Run, RunError, model_of, refuse_repetitions, require_comparable
from .files import NEEDED, document, rows_of
from .names import Setting, written

# Untyped: pandas has no types of its own.
Table = Any

_REQUEST = ["seed", "stream", "task", "prefix_key", "number"]
_PAIR = ["run", "session", "read_gbps", *_REQUEST]
# Column with the number of a request of one run and session, within which times are compared in pairs.
PAIR = "pair"
# Column with the number of a request across runs of one model: answers are compared in pairs of these.
REQUEST = "request"

_PLAIN = (
    *("prefix_tokens", "suffix_tokens", "prefix_bytes", "ttft_s"),
    *("score", "kl", "agreement", "kl_answer", "perplexity"),
)
_STATS = ("bytes_read", "bytes_used", "bytes_identified", "prefetch_wasted_bytes")
_JUDGED = ("score", "kl", "kl_answer", "agreement", "perplexity")
# Stands for no limit on reads.
UNLIMITED = math.inf


@dataclass(frozen=True)
class Results:
    """Runs of one report.

    Attributes:
        runs: the runs, in the order given; timed runs come first.
        table: one row per request, setting and state, of all runs. Missing fields are NaN. `stream` is "" for requests
            outside streams. `read_gbps` is `UNLIMITED` where reads had no limit. `departure` is "" for a request that
            found its state. `setting` names system, budget and options. `memory_hits` and `all_hits` are chunks;
            `phase:<name>` are seconds. `agreed` is a share of layers.
    """

    runs: list[Run]
    table: Table

    @property
    def models(self) -> list[tuple[str, str]]:
        """Name and source of each model, in the order of the runs."""
        return list(dict.fromkeys(model_of(run) for run in self.runs))

    def of_model(self, model: tuple[str, str]) -> Results:
        """The runs of one model, with their rows."""
        places = [place for place, run in enumerate(self.runs) if model_of(run) == model]
        table = self.table[self.table["run"].isin(places)].reset_index(drop=True)
        table["run"] = table["run"].map({place: new for new, place in enumerate(places)})
        return Results([self.runs[place] for place in places], table)

    @property
    def metrics(self) -> dict[str, str]:
        """Metric of each task ("" if no row has one), in the order of the rows."""
        found: dict[str, str] = {}
        for task, metric in zip(self.table["task"], self.table["metric"], strict=True):
            found[task] = found.get(task) or metric
        return found

    @property
    def alone(self) -> Table:
        """Rows of requests outside streams that have a time, whether they found their state or not."""
        return self.table[(self.table["stream"] == "") & self.table["ttft_s"].notna()]

    @property
    def at_all_speeds(self) -> Table:
        """Rows whose times and bytes count: requests outside streams that found their state."""
        return self.alone[self.alone["departure"] == ""]

    @property
    def speeds(self) -> list[float]:
        """Limits on reads of rows whose times count, in GB/s, ascending; `UNLIMITED` comes last."""
        return sorted(self.at_all_speeds["read_gbps"].unique().tolist())

    @property
    def speed(self) -> float:
        """The limit on reads of all times outside the section about crossings: none, or the highest, in GB/s."""
        return max(self.table["read_gbps"], default=UNLIMITED)

    @property
    def timed(self) -> Table:
        """Rows whose times and bytes count, at `speed`."""
        rows = self.at_all_speeds
        return rows[rows["read_gbps"] == self.speed]

    @property
    def judged(self) -> Table:
        """Rows of requests outside streams that have a score or a distance from the whole cache.

        Each request counts once in a setting, whatever its state and the limit on reads: answers do not depend on them.
        """
        rows = self.table
        known = rows[list(_JUDGED)].notna().any(axis=1) & (rows["stream"] == "")
        return rows[known].drop_duplicates([REQUEST, "setting"])

    @property
    def streamed(self) -> Table:
        """Rows of streams whose times and bytes count, at `speed`."""
        rows = self.table[(self.table["stream"] != "") & self.table["ttft_s"].notna()]
        return rows[(rows["departure"] == "") & (rows["read_gbps"] == self.speed)]


def load(folders: Sequence[Path], untimed: Sequence[Path] = ()) -> Results:
    """Read runs.

    Args:
        folders: each with `config.json`, `machine.json` and rows (see `files.rows_of`).
        untimed: more such folders, made while the machine did other work; only their answers count.

    Raises:
        RunError: a file is missing or broken, no run has a row, runs cannot be compared, or two of them made the same
            request (see `checks`).
    """
    runs, flat = [], []
    for number, (folder, timed) in enumerate([*((one, True) for one in folders), *((one, False) for one in untimed)]):
        config, machine = document(folder / "config.json"), document(folder / "machine.json")
        rows, torn = rows_of(folder)
        runs.append(Run(folder, config, machine, torn, not timed))
        if not timed:
            rows = [row | {"ttft_s": None, "stats": None, "phases": None} for row in rows]
        flat += [_flat(row) | {"run": number, "seed": config.get("seed") or 0} for row in rows]
    require_comparable(runs)
    if not flat:
        raise RunError(
            f"no row in {', '.join(map(str, [*folders, *untimed])) or 'no run'}: let a run finish one request at least"
        )
    table = pandas.DataFrame(flat)
    for name in (*_PLAIN, *_STATS, "memory_hits", "all_hits", "budget", "agreed"):
        table[name] = pandas.to_numeric(table[name]).astype("float64")
    refuse_repetitions(runs, table, [*_REQUEST, "setting", "state", "read_gbps"])
    table[PAIR], table[REQUEST] = (table.groupby(names).ngroup() for names in (_PAIR, _REQUEST))
    return Results(runs, table)


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    stats = row.get("stats") or {}
    hits = stats.get("hits") or {}
    speed = row.get("read_gbps")
    setting = Setting(row["system"], float(row["budget"]), tuple(sorted(row.get("options") or ())))
    flat = {name: row[name] for name in NEEDED} | {name: row.get(name) for name in _PLAIN}
    return (
        flat
        | {name: stats.get(name) for name in _STATS}
        | {
            "options": "+".join(setting.options),
            "setting": written(setting),
            "stream": row.get("stream") or "",
            "session": row.get("session") or "",
            "processes": row.get("processes") or 1,
            "read_gbps": UNLIMITED if speed is None else float(speed),
            "departure": row.get("departure") or "",
            "metric": row.get("metric") or "",
            "prediction": row.get("prediction"),
            "agreed": (row.get("details") or {}).get("agreed"),
            "memory_hits": sum(hits.get(tier, 0) for tier in ("device", "host")) if hits else None,
            "all_hits": sum(hits.values()) if hits else None,
        }
        | {f"phase:{name}": seconds for name, seconds in (row.get("phases") or {}).items()}
    )
