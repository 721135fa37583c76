"""Which runs may stand in one report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Facts of which a difference changes times. The dtype of an untimed run must be that of the others, too.
_OF_CONFIG = ("dtype", "version")
_OF_MACHINE = ("cpu", "accelerator", "instruction_sets", "torch_threads", "commit")
# Ends the commit of a checkout with changes that are in no commit.
CHANGES = "+changes"


class RunError(Exception):
    """A run folder cannot be read as one, or runs cannot be compared."""


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

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.folder.resolve().name


def model_of(run: Run) -> tuple[str, str]:
    """Name and source of a run's model; a report has a section for each."""
    return str(run.config.get("model") or "unknown"), str(run.config.get("source") or "")


def require_comparable(runs: Sequence[Run]) -> None:
    """Raise if runs cannot stand in one report.

    Timed runs need the same processor, accelerator, instruction sets, threads, commit, version and dtype. Runs made
    while the machine did other work need the model, source and dtype of a timed run, if there is one.

    Raises:
        RunError: they differ; the message names what differs.
    """
    timed = [run for run in runs if not run.untimed]
    for first, other in ((timed[0], other) for other in timed[1:]):
        found = _facts(other)
        differing = [
            f"{name} is {found[name]!r} in {other.name} and {value!r} in {first.name}"
            for name, value in _facts(first).items()
            if found[name] != value
        ]
        if differing:
            raise RunError(f"runs cannot be compared: {'; '.join(differing)}. Make a report of each")
    known = [(*model_of(run), run.config.get("dtype")) for run in timed or runs[:1]]
    for run in runs:
        if (*model_of(run), run.config.get("dtype")) not in known:
            raise RunError(
                f"{run.name} has another model, source or dtype than the other runs: "
                f"{', '.join(str(one) for one in (*model_of(run), run.config.get('dtype')) if one)}. "
                "Make a report of its own"
            )


def _facts(run: Run) -> dict[str, Any]:
    facts = {name: run.config.get(name) for name in _OF_CONFIG} | {name: run.machine.get(name) for name in _OF_MACHINE}
    facts["commit"] = str(facts["commit"] or "none").removesuffix(CHANGES)
    return {name: json.loads(json.dumps(value)) for name, value in facts.items()}


def refuse_repetitions(runs: Sequence[Run], table: Any, key: Sequence[str]) -> None:
    """Raise if two rows of a run, or of two timed runs of one model, are of the same request.

    A repetition is no further sample, so it must not narrow an interval. Of an untimed run, a request that another
    run has judged is left out instead (see `Results.judged`).

    Args:
        runs: the runs.
        table: their rows, with `run`, the number of each row's run.
        key: columns that identify a request in a setting and a state.

    Raises:
        RunError: there is a repetition.
    """
    models = {place: model_of(run) for place, run in enumerate(runs)}
    marked = table[[*key, "run"]].assign(model=table["run"].map(models))
    within = marked.duplicated([*key, "run"])
    if within.any():
        row = marked[within].iloc[0]
        raise RunError(f"{runs[int(row['run'])].name} has two rows of one request: {_request(row)}")
    timed = marked[~marked["run"].isin([place for place, run in enumerate(runs) if run.untimed])]
    across = timed.duplicated([*key, "model"], keep=False)
    if across.any():
        rows = timed[across]
        same = rows[(rows[[*key, "model"]] == rows.iloc[0][[*key, "model"]]).all(axis=1)]
        names = " and ".join(dict.fromkeys(runs[int(place)].name for place in same["run"]))
        raise RunError(
            f"{names} made the same request: {_request(rows.iloc[0])}. A repetition is no new sample: leave one run "
            "out, or take only its answers (--untimed)"
        )


def _request(row: Any) -> str:
    return f"{row['task']} {row['number']} in {row['setting']}, {row['state']}"
