"""The folder of a run: its configuration, the machine, and one row per request and system."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..run_files import CONFIG, MACHINE, PACKED, ROWS
from .stamp import probe_disk, same_commit, stamp

# Lists that grow when a run is continued, and documents by task or stream that grow.
_UNITED = ("systems", "budgets", "tasks", "streams", "states", "skipped")
_BY_TASK = {"questions": "asks other questions (other data?)", "data": "has other data"}
# Configuration fields that may change when a run is continued; machine fields that do not identify a machine.
_MAY_CHANGE = (*_UNITED, *_BY_TASK, "processes", "command")
_MAY_DIFFER = ("disk_gbps",)

Row = dict[str, Any]
# Identifies a row: task, number, stream, system, options, budget, state.
Key = tuple[Any, ...]


class RunFolderError(Exception):
    """A folder holds another run, or no run."""


def key_of(row: Mapping[str, Any]) -> Key:
    """The key of a row."""
    options = tuple(row["options"])
    return row["task"], row["number"], row["stream"], row["system"], options, row["budget"], row["state"]


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
        self._notes = path / f"skipped-{process}.jsonl"
        path.mkdir(parents=True, exist_ok=True)

    def begin(self, config: Mapping[str, Any]) -> None:
        """Record the run's configuration and the machine, and gather rows of earlier processes. One process calls this.

        Raises:
            RunFolderError: the folder holds a packed run, or rows of a run that differs in more than systems, states,
                budgets and tasks, that another machine or another commit made, or that is older than states.
        """
        if (self.path / PACKED).exists():
            raise RunFolderError(f"{self.path} holds a packed run, which is kept as it is: choose another folder")
        here = stamp()
        before = self._require_same(CONFIG, config, _MAY_CHANGE)
        machine = self._require_same(MACHINE, here, _MAY_DIFFER)
        here["disk_gbps"] = machine.get("disk_gbps") or probe_disk(self.path)
        if same_commit(machine.get("commit"), here["commit"]):
            # If any part of the rows was made with changes, the run was.
            here["commit"] = max(machine.get("commit") or "", here["commit"] or "") or None
        _replace(self.path / CONFIG, json.dumps(_united(before, config), indent=2) + "\n")
        _replace(self.path / MACHINE, json.dumps(here, indent=2) + "\n")
        self.gather()
        for left in self.path.glob("work-*"):
            shutil.rmtree(left, ignore_errors=True)

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
            if field not in except_for and not _same(field, before.get(field), as_json.get(field))
        ]
        for field, what in _BY_TASK.items():
            known = before.get(field, {})
            for task, digest in as_json.get(field, {}).items():
                if known.get(task, digest) != digest:
                    differing.append(f"{task} {what}")
        if differing:
            raise RunFolderError(f"{self.path} has rows of another run ({'; '.join(differing)}): choose another folder")
        return before

    def done(self) -> set[Key]:
        """Keys of all rows."""
        return {self._key_of(row) for path in self._files() for row in _rows(path)}

    def add(self, row: Row) -> None:
        """Append a row. Once this returns, the row survives a crash of this process."""
        with self._part.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def skip(self, note: str) -> None:
        """Note what the run leaves out; `gather` moves it to `skipped` of the configuration."""
        with self._notes.open("a", encoding="utf-8") as file:
            file.write(json.dumps(note) + "\n")

    def gather(self) -> None:
        """Merge the rows of all processes into one file. One process calls this while no other adds rows."""
        notes = sorted(self.path.glob("skipped-*.jsonl"))
        if notes:
            config = json.loads((self.path / CONFIG).read_text())
            found = [note for path in notes for note in _rows(path)]
            config["skipped"] = list(dict.fromkeys([*config.get("skipped", ()), *found]))
            _replace(self.path / CONFIG, json.dumps(config, indent=2) + "\n")
            for path in notes:
                path.unlink()
        parts = [path for path in self._files() if path.name != ROWS]
        rows = {self._key_of(row): row for path in self._files() for row in _rows(path)}
        _replace(self.path / ROWS, "".join(json.dumps(row) + "\n" for row in rows.values()))
        for part in parts:
            part.unlink()

    def _key_of(self, row: Row) -> Key:
        if "state" not in row:
            raise RunFolderError(f"{self.path} has rows of an older version, without a state: choose another folder")
        return key_of(row)

    def _files(self) -> list[Path]:
        gathered = self.path / ROWS
        return ([gathered] if gathered.exists() else []) + sorted(self.path.glob("rows-*.jsonl"))


def _same(field: str, before: Any, now: Any) -> bool:
    return same_commit(before, now) if field == "commit" else bool(before == now)


def _rows(path: Path) -> Iterator[Any]:
    """The completely written rows (or notes); a crash may have cut off the last one of each process."""
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
    by_task = {name: {**before.get(name, {}), **now.get(name, {})} for name in _BY_TASK}
    return {**now, **united, "command": command, **by_task}


def _replace(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
