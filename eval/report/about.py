"""The description of the runs, as Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import tables
from .cells import listed, share
from .rows import Results, Run


def warnings(results: Results) -> list[str]:
    """Warnings that a reader must see before any figure."""
    found = []
    processes = int(results.table["processes"].max())
    if processes > 1:
        found.append(
            f"Times were taken with up to {processes} processes side by side on one machine. They disturb each other: "
            "**times and their ratios in this report are not comparable** with each other or with other reports. "
            "Scores and bytes are not affected."
        )
    for what, values in (
        ("models", _unique(run.config.get("model") for run in results.runs)),
        ("machines", _unique(run.machine for run in results.runs)),
    ):
        if len(values) > 1:
            found.append(
                f"The runs are of {len(values)} {what}. Medians and means mix them; ratios and differences are taken "
                "within each run before they are averaged."
            )
    found += [
        f"{_name(run.folder)} was made while the machine did other work: its times and bytes are left out."
        for run in results.runs
        if run.untimed
    ]
    found += [
        f"A crash cut off the last row of {_name(run.folder)}; that row is left out."
        for run in results.runs
        if run.torn
    ]
    return found


def what_was_run(results: Results) -> str:
    """The first section: what was run."""
    parts = [f"> {warning}" for warning in warnings(results)]
    parts += [_of_run(run, len(results.table[results.table["run"] == place])) for place, run in enumerate(results.runs)]
    alone = results.alone
    left_out = int((alone["cold"] == "warm").sum())
    cold = (
        f"{left_out} of {len(alone)} rows were not cold: pages of their files were in the page cache when the "
        "request began. Their times and bytes are left out of all figures below; their scores count."
        if left_out
        else "Every request that reads files was cold: no page of them was in the page cache when it began."
    )
    if len(alone):
        parts += [cold, tables.cold_rows(results)]
    return "\n\n".join(parts)


def _of_run(run: Run, rows: int) -> str:
    config = run.config
    lines = [f"Run `{_name(run.folder)}`, {rows} rows:", ""]
    lines += [f"- {name}: {text}" for name, text in _facts(config) if text]
    lines.append(f"- machine: {_machine(run.machine)}")
    if config.get("command"):
        lines += ["", "```", str(config["command"]), "```"]
    return "\n".join(lines)


def _facts(config: dict[str, Any]) -> list[tuple[str, str]]:
    model = ", ".join(str(config[name]) for name in ("model", "source", "dtype") if config.get(name))
    requests = f"{config['requests']} of each task" if config.get("tasks") and config.get("requests") else ""
    if requests and config.get("timed_requests", config["requests"]) < config["requests"]:
        requests += f"; {config['timed_requests']} of them also in systems that are measured only for time"
    streams = listed([str(stream) for stream in config.get("streams") or []])
    if streams:
        streams += (
            f": {config.get('stream_requests')} requests, {config.get('documents')} documents (or chats); a system may "
            f"keep {share(config.get('memory_share', 0.0))} of their KV in memory"
        )
    return [
        ("model", model),
        ("tasks", listed([str(task) for task in config.get("tasks") or []])),
        ("requests", requests),
        ("streams", streams),
        ("budgets", listed([share(budget) for budget in config.get("budgets") or []])),
        ("seed", str(config.get("seed", ""))),
        ("processes", str(config.get("processes", ""))),
        ("version", str(config.get("version", ""))),
    ]


def _machine(machine: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in machine.items() if value is not None) or "not recorded"


def _name(folder: Path) -> str:
    return folder.resolve().name


def _unique(values: Any) -> list[Any]:
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found
