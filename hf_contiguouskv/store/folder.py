"""The folder of a store: its marker, and what else lies in it besides segments and index."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import time

from ..errors import StoreFormatError
from .backend import checked_key
from .directory import Directory, require_trusted
from .strict_json import once_each

STORE_FORMAT = 2
MARKER = "contiguouskv-store.json"
_MARK = json.dumps({"format": STORE_FORMAT}).encode()
_MAX_MARK = 4096
_INNER = ("segments", "partial", "damaged", "pins")


def open_folder(path: str | os.PathLike[str], *, create: bool, trust_owner: bool = False) -> Directory:
    """Check that `path` is a store, or make it one where that is harmless (missing, or an empty folder of this user).

    Args:
        path: of the folder, or of a link to it.
        create: whether it may be made.
        trust_owner: accept a store that other users own, or may write.

    Returns:
        the open folder; `Directory.trust_owner` holds for all that is reached through it.

    Raises:
        StoreFormatError: a file, a folder with other things in it, another format, or missing and `create` is false.
            Nothing has been changed then.
        UntrustedOwnerError: others own it or a folder in it, or may write them, and not `trust_owner`.
        OSError: what the system refuses.
    """
    try:
        folder = Directory.open(path, create=create, follow=True, trust_owner=trust_owner, check=False)
    except FileNotFoundError:
        raise StoreFormatError(f"{os.fspath(path)}: there is no store here") from None
    except NotADirectoryError:
        raise StoreFormatError(f"{os.fspath(path)} is a file; a store is a folder") from None
    try:
        if folder.stat(MARKER) is None:
            if not create:
                raise StoreFormatError(f"{folder.name} is not a store: it has no {MARKER}")
            _make_marker(folder)
        folder.require_trusted()
        version = _marked_version(folder)
        for inner in _INNER:
            _check_inner(folder, inner)
        if version < STORE_FORMAT:
            # Earlier releases refuse the folder from now on: they would not find what is stored in it.
            _mark_again(folder, version)
    except BaseException:
        folder.close()
        raise
    return folder


def _make_marker(folder: Directory) -> None:
    _require_empty(folder)
    status = os.fstat(folder.fd)
    if status.st_uid == os.geteuid() and not folder.trust_owner and status.st_mode & 0o077:
        # From here on nobody else puts anything in it. What others have put there meanwhile is looked for once more.
        os.fchmod(folder.fd, 0o700)
        _require_empty(folder)
    folder.require_trusted()
    # The marker comes first: whatever else a process puts here, another one that looks finds a marker beside it.
    try:
        descriptor = folder.create_file(MARKER)
    except FileExistsError:
        return  # Another process was faster.
    _write_mark(descriptor)
    folder.sync()


def _mark_again(folder: Directory, version: int) -> None:
    try:
        folder.write_file(MARKER, _MARK)
    except OSError as error:
        raise StoreFormatError(
            f"{folder.name} has store format {version}, of an earlier release, and cannot be marked as format "
            f"{STORE_FORMAT} ({error.strerror}). Open it once where it may be written."
        ) from error


def _require_empty(folder: Directory) -> None:
    names = folder.names()
    if names and MARKER not in names:
        raise StoreFormatError(
            f"{folder.name} is not a store: it holds other files and no {MARKER}. Use an empty folder."
        )


def _write_mark(descriptor: int) -> None:
    with open(descriptor, "wb", buffering=0) as file:
        file.write(_MARK)
        os.fsync(descriptor)


def _marked_version(folder: Directory) -> int:
    """The format that the marker names: this library's, or an earlier one."""
    marker = f"{folder.name}/{MARKER}"
    try:
        for _ in range(100):
            text = folder.read_file(MARKER, _MAX_MARK)
            if text:
                break
            time.sleep(0.01)  # Another process has created it and is about to write it.
        else:
            if folder.names() != [MARKER]:
                raise StoreFormatError(f"{marker} is empty; expected {_MARK.decode()}")
            _write_mark(folder.open_file(MARKER, os.O_WRONLY))  # Left by a crash before anything else was stored.
            return STORE_FORMAT
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EINVAL, errno.EFBIG, errno.ENXIO):
            raise StoreFormatError(
                f"{marker} does not mark a store: expected an ordinary file with {_MARK.decode()} ({error.strerror})"
            ) from None
        raise
    try:
        mark = json.loads(text, object_pairs_hook=once_each)
        version = mark["format"] if isinstance(mark, dict) else None
    except (ValueError, KeyError, RecursionError):
        version = None
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise StoreFormatError(f"{marker} does not mark a store: expected {_MARK.decode()}, found {text[:80]!r}")
    if version > STORE_FORMAT:
        raise StoreFormatError(
            f"{folder.name} has store format {version}; this library knows {STORE_FORMAT}. Update it."
        )
    return version


def _check_inner(folder: Directory, inner: str) -> None:
    status = folder.stat(inner)
    if status is None:
        return
    path = f"{folder.name}/{inner}"
    if stat.S_ISLNK(status.st_mode):
        raise StoreFormatError(f"{path} is a link; a store's folders must be its own. Move the whole store instead.")
    if not stat.S_ISDIR(status.st_mode):
        raise StoreFormatError(f"{path} is no folder, as it must be in a store. Move it elsewhere.")
    require_trusted(status, path, folder.trust_owner)


class Pins:
    """Which segments are pinned: an empty file each, so that a pin outlives the index.

    Args:
        folder: of the store, open.
    """

    def __init__(self, folder: Directory) -> None:
        self._root = folder

    def keys(self) -> set[str]:
        """Keys of all pinned segments."""
        try:
            with self._root.sub("pins") as pins:
                return set(pins.names())
        except FileNotFoundError:
            return set()

    def holds(self, key: str) -> bool:
        """Whether the segment `key` is pinned."""
        try:
            with self._root.sub("pins") as pins:
                return pins.stat(checked_key(key)) is not None
        except FileNotFoundError:
            return False

    def set(self, key: str, pinned: bool) -> None:
        """Pin or unpin."""
        try:
            with self._root.sub("pins", create=pinned) as pins:
                pins.make_free(checked_key(key))
                if pinned:
                    os.close(pins.create_file(key))
        except FileNotFoundError:
            if pinned:
                raise


def folder_bytes(folder: Directory) -> int:
    """What a store's own files take up besides its segments: the marker, the index, the pins."""
    total = _file_bytes(folder)
    with contextlib.suppress(FileNotFoundError), folder.sub("pins") as pins:
        total += _file_bytes(pins) + os.fstat(pins.fd).st_blocks * 512
    return total


def _file_bytes(folder: Directory) -> int:
    total = 0
    with folder.scan() as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                if entry.is_file(follow_symlinks=False):
                    total += entry.stat(follow_symlinks=False).st_blocks * 512
    return total
