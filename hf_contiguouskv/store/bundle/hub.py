"""Bundles on the Hugging Face Hub: fetched at one commit, the list first, and of the rest only what it lists.

The owner of a repository decides what it holds and how large that is. So the revision is resolved to a commit once, the
list is fetched and checked, and before anything else is fetched, the sizes that the Hub tells must be those of the list
and fit in a bound.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub

from ...errors import ContiguousKVError, StoreError, StoreFormatError, StoreFullError
from ...wording import shown
from ..directory import Directory, require_trusted
from .manifest import MANIFEST, MAX_MANIFEST_BYTES, SEGMENTS, BundledSegment, BundleError, read_manifest

_COMMIT = re.compile(r"[0-9a-f]{40}")
_PREFIX = "contiguouskv-download-"
_DOWNLOAD = re.compile(_PREFIX + r"[0-9a-f]{16}")
_PATHS_AT_ONCE = 500
# What a download leaves free where nobody said how much it may take.
_RESERVE_BYTES = 2**30
_RESERVE_SHARE = 0.05
# The client's own notes about a download lie so deep in `.cache`.
_NOTES, _NOTES_DEPTH = ".cache", 5


@dataclass(frozen=True)
class FetchedBundle:
    """A bundle that was fetched.

    Attributes:
        folder: where it is.
        commit: of the repository, 40 hex digits.
        bytes: of its segments.
    """

    folder: Path
    commit: str
    bytes: int


def fetch_bundle(name: str, revision: str | None, folder: Path, max_bytes: int | None = None) -> FetchedBundle:
    """Fetch a bundle from the Hub. What was fetched into `folder` before is not fetched again.

    Args:
        name: of the repository, `owner/name`.
        revision: branch, tag or commit; `None`: the newest.
        folder: where it goes.
        max_bytes: bound on its segments; `None`: what is free on the disk, less a reserve of 5% of it (at most 1 GiB).

    Raises:
        StoreFormatError: the repository holds no bundle.
        BundleError: its list makes no sense, or is not what the repository holds.
        StoreFullError: it is larger than the bound.
        StoreError: it could not be fetched.
    """
    try:
        return _fetch(huggingface_hub.HfApi(), name, revision, folder, max_bytes)
    except ContiguousKVError:
        raise
    except Exception as error:
        # Every way in which a download can fail, in one line.
        words = " ".join(str(error).split())
        raise StoreError(f"{name} could not be fetched from the Hub: {type(error).__name__}: {words}") from error


def _fetch(
    api: huggingface_hub.HfApi, name: str, revision: str | None, folder: Path, max_bytes: int | None
) -> FetchedBundle:
    commit = api.repo_info(name, repo_type="model", revision=revision).sha
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise StoreError(f"{name}: the Hub names no commit for revision {shown(revision)}")
    listed = _sizes(api, name, commit, [MANIFEST]).get(MANIFEST)
    if listed is None:
        raise StoreFormatError(f"{name} is not a bundle: it has no {MANIFEST} at commit {commit}")
    if listed[0] > MAX_MANIFEST_BYTES:
        raise BundleError(f"{name}: {MANIFEST} has more than {MAX_MANIFEST_BYTES:,} bytes")
    api.hf_hub_download(name, MANIFEST, repo_type="model", revision=commit, local_dir=folder)
    segments = read_manifest(folder)
    _require_as_listed(name, segments, _sizes(api, name, commit, [segment.file for segment in segments]))
    total = sum(segment.bytes for segment in segments)
    bound = _room(folder) if max_bytes is None else max_bytes
    if total > bound:
        why = "what is free on the disk, less a reserve" if max_bytes is None else "the bound (--max-bytes)"
        raise StoreFullError(f"{name}: its segments take up {total:,} bytes, more than {why}: {bound:,} bytes")
    for segment in segments:
        api.hf_hub_download(name, segment.file, repo_type="model", revision=commit, local_dir=folder)
    return FetchedBundle(folder, commit, total)


def _sizes(api: huggingface_hub.HfApi, name: str, commit: str, paths: list[str]) -> dict[str, tuple[int, str | None]]:
    """Of those paths that are files of the repository: length in bytes, and SHA-256 where the Hub knows it."""
    found: dict[str, tuple[int, str | None]] = {}
    for start in range(0, len(paths), _PATHS_AT_ONCE):
        some = paths[start : start + _PATHS_AT_ONCE]
        for entry in api.get_paths_info(name, some, revision=commit, repo_type="model"):
            size: Any = getattr(entry, "size", None)  # (A folder has none.)
            if entry.path in some and type(size) is int:
                large = getattr(entry, "lfs", None)
                found[entry.path] = size, None if large is None else large.sha256
    return found


def _require_as_listed(name: str, segments: list[BundledSegment], there: dict[str, tuple[int, str | None]]) -> None:
    """Raises BundleError where a file that is listed is missing, or has another length or digest."""
    for segment in segments:
        if segment.file not in there:
            raise BundleError(f"{name}: {segment.file} is listed, and the repository does not hold it")
        size, sha256 = there[segment.file]
        if size != segment.bytes or sha256 not in (None, segment.sha256):
            raise BundleError(
                f"{name}: {segment.file} has {size:,} bytes on the Hub, and {MANIFEST} tells {segment.bytes:,}, or "
                "another SHA-256"
            )


def _room(folder: Path) -> int:
    space = shutil.disk_usage(folder)
    return max(0, space.free - min(_RESERVE_BYTES, int(_RESERVE_SHARE * space.total)))


@contextlib.contextmanager
def download_folder(beside: Path) -> Iterator[Path]:
    """A folder for one download, in the folder `beside`, which is gone afterwards.

    It is for this user only. The process holds a lock on it: what a killed one left is deleted by the next that comes.

    Raises:
        OSError: it cannot be made.
    """
    with Directory.open(beside, follow=True, trust_owner=True) as above:
        _collect(above)
        name, folder = _locked_folder(above)
        try:
            yield above.path_of(name)
        finally:
            _delete(above, name, folder)
            folder.close()


def _locked_folder(above: Directory) -> tuple[str, Directory]:
    while True:
        name = _PREFIX + secrets.token_hex(8)
        folder = above.sub(name, create=True)
        require_trusted(os.fstat(folder.fd), folder.name)
        with contextlib.suppress(OSError):  # (Without locks on this file system, nothing that is left is collected.)
            fcntl.flock(folder.fd, fcntl.LOCK_EX)
        # A `collect` that came between the two calls has deleted it.
        if _is_at(above, name, folder):
            return name, folder
        folder.close()


def _is_at(above: Directory, name: str, folder: Directory) -> bool:
    there, own = above.stat(name), os.fstat(folder.fd)
    return there is not None and (there.st_dev, there.st_ino) == (own.st_dev, own.st_ino)


def _collect(above: Directory) -> None:
    """Delete downloads that nobody works on any more. Never fails."""
    with contextlib.suppress(OSError):
        for name in above.names():
            if _DOWNLOAD.fullmatch(name):
                with contextlib.suppress(OSError, StoreError), above.sub(name) as folder:
                    require_trusted(os.fstat(folder.fd), folder.name)
                    fcntl.flock(folder.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _delete(above, name, folder)


def _delete(above: Directory, name: str, folder: Directory) -> None:
    """Delete a download, as far as it is one: only names that a download makes, so that nothing else can be lost."""
    with contextlib.suppress(OSError):
        if not _is_at(above, name, folder) or not {*folder.names()} <= {MANIFEST, SEGMENTS, _NOTES}:
            return
        folder.remove(MANIFEST)
        _empty(folder, SEGMENTS, 1)
        _empty(folder, _NOTES, _NOTES_DEPTH)
        above.remove(name)


def _empty(folder: Directory, name: str, depth: int) -> None:
    """Delete `name`, and what is in it if it is a folder, `depth` folders deep."""
    if folder.remove(name) or not depth:
        return
    with folder.sub(name) as inner:
        for below in inner.names():
            _empty(inner, below, depth - 1)
    folder.remove(name)
