"""What was run, as Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import tables
from .cells import listed, share
from .rows import Results, Run


def warnings(results: Results) -> list[str]:
    """What a reader must know before any figure."""
    found = []
    processes = max(_number(run.config.get("processes")) for run in results.runs)
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
        f"A crash cut off the last row of {_name(run.folder)}; that row is left out."
        for run in results.runs
        if run.torn
    ]
    return found


def what_was_run(results: Results) -> str:
    """The first section."""
    parts = [f"> {warning}" for warning in warnings(results)]
    parts += [_of_run(run, len(results.table[results.table["run"] == place])) for place, run in enumerate(results.runs)]
    left_out = int((results.table["cold"] == "warm").sum())
    cold = (
        f"{left_out} of {len(results.table)} rows were not cold: pages of their files were in the page cache when the "
        "request began. Their times and bytes are left out of all figures below; their scores count."
        if left_out
        else "Every request that reads files was cold: no page of them was in the page cache when it began."
    )
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
    requests = str(config.get("requests", ""))
    if requests and config.get("exact_requests") not in (None, config["requests"]):
        requests += f" of each task ({config['exact_requests']} of them with systems that serve the whole prefix)"
    elif requests:
        requests += " of each task"
    return [
        ("model", model),
        ("tasks", listed([str(task) for task in config.get("tasks") or []])),
        ("requests", requests),
        ("budgets", listed([share(budget) for budget in config.get("budgets") or []])),
        ("seed", str(config.get("seed", ""))),
        ("processes", str(config.get("processes", ""))),
        ("version", str(config.get("version", ""))),
    ]


def _machine(machine: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in machine.items() if value is not None) or "not recorded"


def _name(folder: Path) -> str:
    return folder.resolve().name


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 1


def _unique(values: Any) -> list[Any]:
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found
