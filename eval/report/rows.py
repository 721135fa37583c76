"""The rows of one or several runs as one table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas

# Untyped: pandas has no types of its own.
Table = Any

# Identifies a request of one run and session, within which systems are compared in pairs.
PAIR = ["run", "session", "task", "number", "stream", "occurrence"]
# Identifies a question across runs; intervals draw these.
REQUEST = ["identity", "task", "number"]

_NEEDED = ("task", "number", "system", "budget")
_PLAIN = (
    *("prefix_tokens", "suffix_tokens", "prefix_bytes", "ttft_s"),
    *("score", "kl", "agreement", "kl_answer", "perplexity"),
)
_STATS = ("bytes_read", "bytes_used", "bytes_identified", "prefetch_wasted_bytes")


class RunError(Exception):
    """A run folder cannot be read as one."""


@dataclass(frozen=True)
class Run:
    """Information about a run beside its rows.

    Attributes:
        folder: the run's folder.
        config: the run's configuration.
        machine: the machine that made it.
        torn: whether a crash cut off its last row, which is then not in the table.
        untimed: whether only its answers count.
    """

    folder: Path
    config: dict[str, Any]
    machine: dict[str, Any]
    torn: bool
    untimed: bool = False


@dataclass(frozen=True)
class Results:
    """All runs of a report.

    Attributes:
        runs: the runs, in the order given.
        table: one row per request and system, of all runs. Missing fields are NaN. `stream` is "" for requests outside
            streams. `cold` is "cold", "warm" (files were in the page cache) or "none" (no files). `memory_hits` and
            `all_hits` are chunks; `phase:<name>` are seconds.
    """

    runs: list[Run]
    table: Table

    @property
    def metrics(self) -> dict[str, str]:
        """Metric of each task ("" if no row has one), in the order of the rows."""
        found: dict[str, str] = {}
        for task, metric in zip(self.table["task"], self.table["metric"], strict=True):
            found[task] = found.get(task) or metric
        return found

    @property
    def alone(self) -> Table:
        """Rows of requests outside streams that have a time, cold or not."""
        return self.table[(self.table["stream"] == "") & self.table["ttft_s"].notna()]

    @property
    def timed(self) -> Table:
        """Rows whose times and bytes count: requests outside streams without files in the page cache."""
        return self.alone[self.alone["cold"] != "warm"]

    @property
    def judged(self) -> Table:
        """Rows of requests outside streams that have a score or a distance from the whole cache, cold or not."""
        rows = self.table
        known = rows[["score", "kl", "agreement", "perplexity"]].notna().any(axis=1)
        return rows[(rows["stream"] == "") & known]

    @property
    def streamed(self) -> Table:
        """Rows of streams whose times and bytes count."""
        rows = self.table
        return rows[(rows["stream"] != "") & (rows["cold"] != "warm") & rows["ttft_s"].notna()]


def load(folders: Sequence[Path], untimed: Sequence[Path] = ()) -> Results:
    """Read runs.

    Args:
        folders: each with `config.json`, `machine.json` and `rows.jsonl`.
        untimed: more such folders, made while the machine did other work; only their answers count.

    Raises:
        RunError: a file is missing or broken, no run has a row, or models ran in different dtypes.
    """
    runs, flat = [], []
    for number, folder in enumerate([*folders, *untimed]):
        config, machine = _document(folder / "config.json"), _document(folder / "machine.json")
        rows, torn = read_rows(folder / "rows.jsonl")
        runs.append(Run(folder, config, machine, torn, folder in untimed))
        # Runs with the same model, source and seed ask the same questions if these were made from the same data.
        identity = json.dumps([config.get(name) for name in ("model", "source", "seed", "questions")], sort_keys=True)
        if folder in untimed:
            rows = [row | {"ttft_s": None, "stats": None, "phases": None} for row in rows]
        flat += [_flat(row) | {"run": number, "identity": identity} for row in rows]
    dtypes = {str(run.config["dtype"]) for run in runs if run.config.get("dtype")}
    if len(dtypes) > 1:
        raise RunError(f"runs in {' and '.join(sorted(dtypes))} cannot be compared: make a report of each")
    if not flat:
        raise RunError(
            f"no row in {', '.join(map(str, [*folders, *untimed])) or 'no run'}: let a run finish one request at least"
        )
    table = pandas.DataFrame(flat)
    for name in (*_PLAIN, *_STATS, "memory_hits", "all_hits", "budget"):
        table[name] = pandas.to_numeric(table[name]).astype("float64")
    setting = ["run", "task", "number", "stream", "system", "budget"]
    table["occurrence"] = table.groupby(setting).cumcount()
    return Results(runs, table)


def read_rows(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """The rows of a file, and whether a crash cut off the last row (which is then left out).

    Raises:
        RunError: the file does not exist, or another line is broken.
    """
    if not path.is_file():
        raise RunError(f"{path} is missing: a run folder holds config.json, machine.json and rows.jsonl")
    whole, _, rest = path.read_bytes().rpartition(b"\n")
    lines = whole.split(b"\n") if whole else []
    rows = list(_parsed(lines, path))
    # A last row without a line end may have been cut off; it counts if it is complete.
    try:
        rows += _parsed([rest], path, len(lines))
    except RunError:
        return rows, True
    return rows, False


def _parsed(lines: Sequence[bytes], path: Path, before: int = 0) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, before + 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise RunError(f"{path}, line {number}: not JSON ({error})") from error
        missing = [name for name in _NEEDED if not isinstance(row, dict) or row.get(name) is None]
        if missing:
            raise RunError(f"{path}, line {number}: a row needs {', '.join(missing)}")
        yield row


def _document(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise RunError(f"{path} must hold an object, got {type(found).__name__}")
    return found


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    stats = row.get("stats") or {}
    hits = stats.get("hits") or {}
    cold = row.get("cold")
    flat = {name: row[name] for name in _NEEDED} | {name: row.get(name) for name in _PLAIN}
    return (
        flat
        | {name: stats.get(name) for name in _STATS}
        | {
            "stream": row.get("stream") or "",
            "session": row.get("session") or "",
            "processes": row.get("processes") or 1,
            "cold": "none" if cold is None else "cold" if cold else "warm",
            "metric": row.get("metric") or "",
            "prediction": row.get("prediction"),
            "memory_hits": sum(hits.get(tier, 0) for tier in ("device", "host")) if hits else None,
            "all_hits": sum(hits.values()) if hits else None,
        }
        | {f"phase:{name}": seconds for name, seconds in (row.get("phases") or {}).items()}
    )
