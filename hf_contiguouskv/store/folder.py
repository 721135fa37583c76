"""The folder of a store: its marker, and what else lies in it besides segments and index."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path

from ..errors import StoreFormatError
from .backend import checked_key
from .local_disk import remove_anything

STORE_FORMAT = 1
MARKER = "contiguouskv-store.json"
_MARK = json.dumps({"format": STORE_FORMAT}).encode()


def open_folder(path: str | os.PathLike[str], *, create: bool) -> Path:
    """Check that `path` is a store, or make it one where that is harmless (missing, or an empty folder).

    Raises:
        StoreFormatError: a file, a folder with other things in it, a newer format, or missing and `create` is false.
            Nothing has been changed then.
    """
    folder = Path(path).absolute()
    if folder.exists() and not folder.is_dir():
        raise StoreFormatError(f"{folder} is a file; a store is a folder")
    if not folder.exists() and not create:
        raise StoreFormatError(f"{folder}: there is no store here")
    marker = folder / MARKER
    if not marker.exists():
        if not create and folder.exists():
            raise StoreFormatError(f"{folder} is not a store: it has no {MARKER}")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _make_marker(folder, marker)
    _check_marker(marker)
    for inner in ("segments", "partial", "damaged", "pins"):
        if (folder / inner).is_symlink():
            raise StoreFormatError(
                f"{folder / inner} is a link; a store's folders must be its own. Move the whole store instead."
            )
    return folder


def _make_marker(folder: Path, marker: Path) -> None:
    # The marker comes first: whatever else a process puts here, another one that looks finds a marker beside it.
    if os.listdir(folder) and not marker.exists():
        raise StoreFormatError(f"{folder} is not a store: it holds other files and no {MARKER}. Use an empty folder.")
    try:
        fd = os.open(marker, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return  # Another process was faster.
    try:
        os.write(fd, _MARK)
        os.fsync(fd)
    finally:
        os.close(fd)


def _check_marker(marker: Path) -> None:
    for _ in range(100):
        text = marker.read_bytes()
        if text:
            break
        time.sleep(0.01)  # Another process has created it and is about to write it.
    else:
        if os.listdir(marker.parent) != [marker.name]:
            raise StoreFormatError(f"{marker} is empty; expected {_MARK.decode()}")
        marker.write_bytes(_MARK)  # Left by a crash before anything else was stored.
        return
    try:
        mark = json.loads(text)
        version = mark["format"] if isinstance(mark, dict) else None
    except (ValueError, KeyError, RecursionError):
        version = None
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise StoreFormatError(f"{marker} does not mark a store: expected {_MARK.decode()}, found {text[:80]!r}")
    if version > STORE_FORMAT:
        raise StoreFormatError(
            f"{marker.parent} has store format {version}; this library knows {STORE_FORMAT}. Update it."
        )


class Pins:
    """Which segments are pinned: an empty file each, so that a pin outlives the index.

    Args:
        folder: of the store.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "pins"

    def keys(self) -> set[str]:
        """Keys of all pinned segments."""
        try:
            return set(os.listdir(self._folder))
        except FileNotFoundError:
            return set()

    def holds(self, key: str) -> bool:
        """Whether the segment `key` is pinned."""
        return (self._folder / checked_key(key)).exists()

    def set(self, key: str, pinned: bool) -> None:
        """Pin or unpin."""
        path = self._folder / checked_key(key)
        remove_anything(path)
        if pinned:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))


def folder_bytes(folder: Path) -> int:
    """What a store's own files take up besides its segments: the marker, the index, the pins."""
    total = 0
    for path in (folder, folder / "pins"):
        with contextlib.suppress(FileNotFoundError), os.scandir(path) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    if entry.is_file(follow_symlinks=False):
                        total += entry.stat(follow_symlinks=False).st_blocks * 512
    with contextlib.suppress(FileNotFoundError):
        total += os.stat(folder / "pins").st_blocks * 512
    return total
