"""Rows of data sets: from local JSON Lines files, or from the Hub."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]

# Digests of the data that were loaded inside `data_noted`.
_noted: ContextVar[dict[str, str] | None] = ContextVar("data_noted", default=None)


@dataclass(frozen=True)
class HubSource:
    """Location of a data set on the Hub.

    Attributes:
        path, config, revision: identify the data set, which must need no script.
        splits: names of its splits, by our names ("train", "test").
        row: converts one of its rows to our fields.
        archive: zip file in the repository with the rows as JSON Lines, for a data set that is loaded by a script;
            `splits` then names files in it.
    """

    path: str
    row: Callable[[Row], Row]
    config: str | None = None
    revision: str | None = None
    splits: tuple[tuple[str, str], ...] = (("train", "train"), ("test", "test"))
    archive: str | None = None


class DataMissingError(Exception):
    """A data set is not in the data folder and cannot be loaded from the Hub."""


def data_folder(chosen: Path | str | None) -> Path | None:
    """The folder with local data: `chosen`, else `$CONTIGUOUSKV_DATA`, else `None`."""
    found = chosen or os.environ.get("CONTIGUOUSKV_DATA")
    return Path(found) if found else None


@contextmanager
def data_noted() -> Iterator[dict[str, str]]:
    """A context that fills the dictionary: a digest of all rows for each name of data that is loaded inside."""
    found: dict[str, str] = {}
    token = _noted.set(found)
    try:
        yield found
    finally:
        _noted.reset(token)


def note_rows(name: str, rows: Sequence[Any]) -> None:
    """Enter the digest of `rows` (ready for JSON) under `name`, if `data_noted` wants it."""
    noted = _noted.get()
    if noted is not None:
        digest = hashlib.blake2b(digest_size=8)
        for row in rows:
            digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
        noted[name] = digest.hexdigest()


def load_rows(name: str, split: str, data_dir: Path | str | None, hub: HubSource | None) -> list[Row]:
    """All rows of a split, from `<data_dir>/<name>/<split>.jsonl` if there is a data folder, else from the Hub.

    Raises:
        DataMissingError: the rows cannot be read.
    """
    rows = _loaded(name, split, data_folder(data_dir), hub)
    note_rows(f"{name}/{split}", rows)
    return rows


def _loaded(name: str, split: str, folder: Path | None, hub: HubSource | None) -> list[Row]:
    if folder is not None:
        path = folder / name / f"{split}.jsonl"
        if not path.is_file():
            raise DataMissingError(f"{name}: there is no {path}")
        with path.open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines if line.strip()]
    if hub is None:
        raise DataMissingError(f"{name}: only local files are supported; pass --data-dir")
    theirs = dict(hub.splits)[split]
    try:
        if hub.archive is not None:
            return [hub.row(row) for row in _of_archive(hub, hub.archive, theirs)]
        from datasets import load_dataset

        found = load_dataset(hub.path, hub.config, split=theirs, revision=hub.revision)
    except Exception as error:
        raise DataMissingError(
            f"{name}: {hub.path} could not be loaded from the Hub; pass --data-dir with {name}/{split}.jsonl"
        ) from error
    return [hub.row(row) for row in found]


def _of_archive(hub: HubSource, archive: str, member: str) -> list[Row]:
    from huggingface_hub import hf_hub_download

    path = hf_hub_download(hub.path, archive, repo_type="dataset", revision=hub.revision)
    with zipfile.ZipFile(path) as files, files.open(member) as lines:
        return [json.loads(line) for line in lines if line.strip()]
