"""The description of the runs, as Markdown."""

from __future__ import annotations

from typing import Any

from ..tasks import RANDOM, TEXT
from . import tables
from .cells import listed, share
from .checks import CHANGES, Run
from .names import STATES, states_in_order
from .rows import UNLIMITED, Results


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
    for run in results.runs:
        if run.untimed:
            found.append(f"{run.name} was made while the machine did other work: its times and bytes are left out.")
        if str(run.machine.get("commit") or "").endswith(CHANGES):
            found.append(f"{run.name} ran code with changes that are in no commit.")
        if run.torn:
            found.append(f"A crash cut off the last row of {run.name}; that row is left out.")
    return found


def speed_said(speed: float) -> str:
    """A limit on reads, in words."""
    return "as fast as the disk" if speed == UNLIMITED else f"{speed:.4g} GB/s"


def what_was_run(results: Results) -> str:
    """The section: what was run."""
    parts = [f"> {warning}" for warning in warnings(results)]
    parts += [_of_run(run, len(results.table[results.table["run"] == place])) for place, run in enumerate(results.runs)]
    if len(results.speeds) > 1:
        parts.append(
            f"Reads were limited to {listed([speed_said(one) for one in results.speeds])}. All figures outside the "
            f"section about crossings are of reads {_at(results.speed)}."
        )
    elif results.speed != UNLIMITED:
        parts.append(f"Reads were limited to {speed_said(results.speed)}.")
    if len(results.alone):
        parts.append(_states(results))
    return "\n\n".join(parts)


def _at(speed: float) -> str:
    return "without a limit" if speed == UNLIMITED else f"at {speed_said(speed)}"


def _states(results: Results) -> str:
    rows = results.alone
    known = [
        f"- `{state}`: {STATES.get(state, 'a state that is not known here')}"
        for state in states_in_order(rows["state"])
    ]
    left_out = int((rows["departure"] != "").sum())
    text = (
        f"{left_out} of {len(rows)} timed requests did not find their state. Their times and bytes are left out of all "
        f"figures; their answers count. The commonest reasons: {listed(tables.departures(results))}."
        if left_out
        else "Every timed request found its state."
    )
    states = "States, which are never mixed in a figure:\n\n" + "\n".join(known)
    return "\n\n".join([states, text, tables.found_states(results)])


def _of_run(run: Run, rows: int) -> str:
    config = run.config
    lines = [f"Run `{run.name}`, {rows} rows:", ""]
    lines += [f"- {name}: {text}" for name, text in _facts(config) if text]
    lines.append(f"- machine: {_machine(run.machine)}")
    lines += [f"- note: {note}" for note in config.get("skipped") or []]
    if config.get("command"):
        lines += ["", "```", str(config["command"]), "```"]
    return "\n".join(lines)


def _facts(config: dict[str, Any]) -> list[tuple[str, str]]:
    model = ", ".join(str(config[name]) for name in ("model", "source", "dtype") if config.get(name))
    requests = f"{config['requests']} of each task" if config.get("tasks") and config.get("requests") else ""
    timed_only = all(str(name).startswith((TEXT, RANDOM)) for name in config.get("tasks") or ())
    if requests and timed_only and config.get("timed_requests"):
        requests = f"{config['timed_requests']} of each task, for their time alone"
    elif requests and config.get("timed_requests", config["requests"]) < config["requests"]:
        requests += f"; {config['timed_requests']} of them where only the time matters"
    streams = listed([str(stream) for stream in config.get("streams") or []])
    if streams:
        streams += (
            f": {config.get('stream_requests')} requests, {config.get('documents')} documents (or chats); a system may "
            f"keep {share(config.get('memory_share', 0.0))} of their KV in memory"
        )
    speed = config.get("read_gbps")
    return [
        ("model", model),
        ("tasks", listed([str(task) for task in config.get("tasks") or []])),
        ("requests", requests),
        ("streams", streams),
        ("budgets", listed([share(budget) for budget in config.get("budgets") or []])),
        ("reads", "" if speed is None else f"limited to {speed:.4g} GB/s"),
        ("seed", str(config.get("seed", ""))),
        ("processes", str(config.get("processes", ""))),
        ("version", str(config.get("version", ""))),
    ]


def _machine(machine: dict[str, Any]) -> str:
    known = {name: value for name, value in machine.items() if value is not None}
    said = (
        f"{name} {' '.join(map(str, value)) if isinstance(value, list) else value}" for name, value in known.items()
    )
    return ", ".join(said) or "not recorded"
