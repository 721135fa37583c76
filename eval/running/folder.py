"""The folder of a run: its configuration, the machine, and one row per request and system."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..timing import machine

ROWS, CONFIG, MACHINE = "rows.jsonl", "config.json", "machine.json"
# Configuration fields that may change when a run is continued; machine fields that do not identify a machine.
_MAY_CHANGE = ("systems", "budgets", "tasks", "streams", "processes", "command", "questions")
_MAY_DIFFER = ("torch_threads",)
# Lists that grow when a run is continued.
_UNITED = ("systems", "budgets", "tasks", "streams")

Row = dict[str, Any]
# Identifies a row: task, number, stream, system, budget.
Key = tuple[Any, ...]


class RunFolderError(Exception):
    """A folder holds another run, or no run."""


def key_of(row: Mapping[str, Any]) -> Key:
    """The key of a row."""
    return tuple(row[name] for name in ("task", "number", "stream", "system", "budget"))


def recorded_dtype(path: Path) -> str | None:
    """The dtype of the run in a folder, for example `"bfloat16"`; `None` if there is no run."""
    file = path / CONFIG
    return json.loads(file.read_text()).get("dtype") if file.exists() else None


class RunFolder:
    """Holds the results of a run. Each process appends to its own file; `gather` merges the files.

    Args:
        path: the folder; it is made if necessary.
        process: number of this process.
    """

    def __init__(self, path: Path, process: int = 0) -> None:
        self.path = path
        self._part = path / f"rows-{process}.jsonl"
        path.mkdir(parents=True, exist_ok=True)

    def begin(self, config: Mapping[str, Any]) -> None:
        """Record the run's configuration, and gather rows of earlier processes. One process calls this.

        Raises:
            RunFolderError: the folder has rows of a run that differs in more than systems, budgets and tasks, or that
                was made on another machine.
        """
        here = machine()
        before = self._require_same(CONFIG, config, _MAY_CHANGE)
        self._require_same(MACHINE, here, _MAY_DIFFER)
        self.gather()
        for left in self.path.glob("work-*"):
            shutil.rmtree(left, ignore_errors=True)
        for name, document in ((CONFIG, _united(before, config)), (MACHINE, here)):
            _replace(self.path / name, json.dumps(document, indent=2) + "\n")

    def _require_same(self, name: str, now: Mapping[str, Any], except_for: tuple[str, ...]) -> dict[str, Any]:
        """The content of the file; raises `RunFolderError` if it belongs to another run."""
        path = self.path / name
        if not path.exists():
            return {}
        before: dict[str, Any] = json.loads(path.read_text())
        as_json = json.loads(json.dumps(now))
        differing = [
            f"{field} is {as_json.get(field)!r}, was {before.get(field)!r}"
            for field in sorted({*before, *as_json})
            if field not in except_for and before.get(field) != as_json.get(field)
        ]
        known = before.get("questions", {})
        for task, digest in as_json.get("questions", {}).items():
            if known.get(task, digest) != digest:
                differing.append(f"{task} asks other questions (other data?)")
        if differing:
            raise RunFolderError(f"{self.path} has rows of another run ({'; '.join(differing)}): choose another folder")
        return before

    def done(self) -> set[Key]:
        """Keys of all rows."""
        return {key_of(row) for path in self._files() for row in _rows(path)}

    def add(self, row: Row) -> None:
        """Append a row. Once this returns, the row survives a crash of this process."""
        with self._part.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def gather(self) -> None:
        """Merge the rows of all processes into one file. One process calls this while no other adds rows."""
        parts = [path for path in self._files() if path.name != ROWS]
        rows = {key_of(row): row for path in self._files() for row in _rows(path)}
        _replace(self.path / ROWS, "".join(json.dumps(row) + "\n" for row in rows.values()))
        for part in parts:
            part.unlink()

    def _files(self) -> list[Path]:
        gathered = self.path / ROWS
        return ([gathered] if gathered.exists() else []) + sorted(self.path.glob("rows-*.jsonl"))


def _rows(path: Path) -> Iterator[Row]:
    """The completely written rows; a crash may have cut off the last row of each process."""
    for line in path.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise RunFolderError(f"{path} has a line that is no row: {line[:80]!r}") from error


def _united(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a continued run, which includes everything that ran before."""
    united = {name: list(dict.fromkeys([*before.get(name, ()), *now.get(name, ())])) for name in _UNITED}
    command = now.get("command", "")
    if before.get("command") not in (None, "", command):
        command = f"{before['command']}\n{command}"
    questions = {**before.get("questions", {}), **now.get("questions", {})}
    return {**now, **united, "command": command, "questions": questions}


def _replace(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
