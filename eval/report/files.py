"""The files of a run's folder: rows as a run writes them, or packed to be kept."""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..run_files import CONFIG, MACHINE, PACKED, ROWS
from .checks import RunError

NEEDED = ("task", "number", "prefix_key", "system", "budget", "state")
# What each process of a run writes, until the run is complete.
_PARTS = "rows-*.jsonl"
_PLAIN_FILES = (CONFIG, MACHINE)


def rows_of(folder: Path) -> tuple[list[dict[str, Any]], bool]:
    """The rows of a run, complete or not, and whether a crash cut off a row (which is then left out).

    Rows are in `rows.jsonl`, and those of an interrupted run in `rows-0.jsonl` and so on, too. A packed run has
    `rows.jsonl.xz` instead.

    Raises:
        RunError: there is no such file, a line is broken, or a row is of an earlier version.
    """
    plain, packed = folder / ROWS, folder / PACKED
    if packed.is_file() and plain.is_file():
        raise RunError(f"{folder} has both {ROWS} and {PACKED}: remove one")
    files = [one for one in (plain, packed, *sorted(folder.glob(_PARTS))) if one.is_file()]
    if not files:
        raise RunError(f"{folder} has no {ROWS}: a run folder holds config.json, machine.json and {ROWS}")
    found: list[dict[str, Any]] = []
    torn = False
    for file in files:
        rows, cut_off = _read_rows(file)
        if found:  # A crash while parts are gathered leaves rows in two files.
            before = {_text(row) for row in found}
            rows = [row for row in rows if _text(row) not in before]
        found += rows
        torn |= cut_off
    return found, torn


def pack(run: Path, folder: Path) -> list[Path]:
    """Copy a run with its rows compressed, a tenth of their size or less, so that they can be kept beside a report.

    Args:
        run: folder of the run, complete or not. A row that a crash cut off is left out.
        folder: the new folder. A report is made of it as of `run`.

    Returns:
        The files written.

    Raises:
        RunError: see `rows_of`; or a file of `run` is missing, or `folder` holds a run already.
    """
    rows, _ = rows_of(run)
    if not rows:
        raise RunError(f"{run} has no row: let a run finish one request at least")
    documents = {name: document(run / name) for name in _PLAIN_FILES}
    if folder.exists() and any(folder.iterdir()):
        raise RunError(f"{folder} is not empty: name a new folder for {run}")
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in documents.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    lines = "".join(f"{json.dumps(row)}\n" for row in rows)
    (folder / PACKED).write_bytes(lzma.compress(lines.encode(), preset=9 | lzma.PRESET_EXTREME))
    return [folder / name for name in (*_PLAIN_FILES, PACKED)]


def _text(row: dict[str, Any]) -> str:
    return json.dumps(row, sort_keys=True)


def _read_rows(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """The rows of a file, and whether a crash cut off the last row (which is then left out)."""
    content = path.read_bytes()
    if path.suffix == ".xz":
        try:
            content = lzma.decompress(content)
        except lzma.LZMAError as error:
            raise RunError(f"{path} cannot be unpacked: {error}") from error
    whole, _, rest = content.rpartition(b"\n")
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
        if isinstance(row, dict) and "cold" in row and "state" not in row:
            raise RunError(
                f"{path}, line {number}: the row names no state. An earlier version wrote it, whose systems began "
                "requests in different states. Make the run again in a new folder"
            )
        missing = [name for name in NEEDED if not isinstance(row, dict) or row.get(name) is None]
        if missing:
            raise RunError(f"{path}, line {number}: a row needs {', '.join(missing)}")
        yield row


def document(path: Path) -> dict[str, Any]:
    """An object of a JSON file.

    Raises:
        RunError: the file is missing, or holds something else.
    """
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise RunError(f"{path} must hold an object, got {type(found).__name__}")
    return found
