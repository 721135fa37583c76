"""The file system of a folder, and whether its files are on a disk."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOUNTS = Path("/proc/self/mounts")
IN_MEMORY = frozenset({"tmpfs", "ramfs", "devtmpfs", "hugetlbfs", "rootfs"})


class InMemoryError(Exception):
    """Files of a folder lie in memory, where no request is cold."""


@dataclass(frozen=True)
class Mount:
    """One line of `/proc/self/mounts`.

    Attributes:
        device: the mounted device.
        point: the mount point.
        kind: the kind of file system.
        options: the options as listed there, separated by commas.
    """

    device: str
    point: str
    kind: str
    options: str

    @property
    def upper(self) -> str | None:
        """The folder to which an overlay writes, or `None`."""
        found = re.search(r"(?:^|,)upperdir=([^,]*)", self.options)
        return found[1] if found and self.kind == "overlay" else None


def read_mounts(text: str) -> list[Mount]:
    """The lines of `/proc/self/mounts`, in order."""
    lines = [line.split() for line in text.splitlines()]
    return [Mount(*(_unescaped(field) for field in line[:4])) for line in lines if len(line) >= 4]


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)


def mount_of(folder: Path | str, mounts: list[Mount]) -> Mount | None:
    """The mount that holds a folder; of several at one mount point, the last one hides the others."""
    parts = Path(os.path.realpath(folder)).parts
    best: Mount | None = None
    for mount in mounts:
        own = Path(mount.point).parts
        if parts[: len(own)] == own and (best is None or len(own) >= len(Path(best.point).parts)):
            best = mount
    return best


def memory_behind(folder: Path | str, mounts: list[Mount]) -> str | None:
    """What keeps the files of a folder in memory, in words; `None` if no mount shows it."""
    mount = mount_of(folder, mounts)
    if mount is None:
        return None
    if mount.kind in IN_MEMORY:
        return f"{mount.point} is {mount.kind}"
    if mount.upper is not None:
        below = mount_of(mount.upper, mounts)
        if below is not None and below.kind in IN_MEMORY:
            return f"{mount.point} is an overlay whose upper folder {mount.upper} is on {below.kind}"
    return None


def describe(folder: Path | str) -> dict[str, Any]:
    """Kind, device and room of a folder's file system."""
    mounts = read_mounts(MOUNTS.read_text())
    mount = mount_of(folder, mounts)
    free = shutil.disk_usage(folder)
    return {
        "folder": str(folder),
        "kind": mount and mount.kind,
        "device": mount and mount.device,
        "mounted_at": mount and mount.point,
        "options": mount and mount.options[:300],
        "in_memory": memory_behind(folder, mounts),
        "free_bytes": free.free,
        "bytes": free.total,
    }


def choose_folder(candidates: list[Path], any_file_system: bool = False) -> Path:
    """The folder with the most room among those on a disk.

    Args:
        candidates: existing folders.
        any_file_system: whether a folder in memory is accepted if there is no other.

    Raises:
        InMemoryError: all of them are in memory.
    """
    mounts = read_mounts(MOUNTS.read_text())
    reasons = {folder: memory_behind(folder, mounts) for folder in candidates}
    on_disk = [folder for folder, reason in reasons.items() if reason is None]
    writable = [folder for folder in on_disk or (candidates if any_file_system else []) if os.access(folder, os.W_OK)]
    if not writable:
        said = "; ".join(f"{folder}: {reason or 'cannot be written to'}" for folder, reason in reasons.items())
        raise InMemoryError(
            f"stores must lie on a disk, or no request would be cold, but {said}. Name a folder on a disk with "
            "--store, or use --any-file-system to go on anyway."
        )
    return max(writable, key=lambda folder: shutil.disk_usage(folder).free)
