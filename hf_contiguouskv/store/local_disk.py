"""The local disk as a backend: one file per segment, published by rename, read past the page cache.

segments/ab/abcdef….safetensors   published
partial/abcdef….1a2b3c4d.partial  being written; its writer holds a lock on it, which goes with the process
damaged/abcdef….safetensors       out of service

Every file is reached through the open folder that it lies in (`directory.py`), so nothing outside the store is opened,
moved or deleted, whatever is put in the place of a folder meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import secrets
import stat
import time
import weakref
from collections.abc import Hashable, Iterable, Iterator
from functools import cached_property, partial
from pathlib import Path

from ..errors import SegmentMissingError, UntrustedOwnerError
from ..hardware.aligned_memory import PAGE, aligned_buffer, as_memoryview
from .backend import BlobInfo, Leftovers, checked_key
from .directory import Directory
from .files import SUFFIX, FileBlob, identity_of
from .partial_file import FileBlobWriter

__all__ = ["SUFFIX", "FileBlob", "FileBlobWriter", "LocalDisk", "remove_unlocked"]

logger = logging.getLogger("hf_contiguouskv")

_FILE = re.compile(r"([0-9a-f]{32})\.safetensors")
# What lies where a folder or a file of ours was, if that is nothing, or something else.
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
# Where the file system has no locks, only age tells a leftover from a file that is being written.
_YOUNG_S = 3600.0


class LocalDisk:
    """Segments as files in a folder of a local file system; threads and processes may share it.

    It has a method for each operation of the protocol `SegmentBackend`.

    Args:
        folder: of the store: a path, which must exist, or the open folder, which stays the caller's to close.
        direct: read past the page cache where the file system can, and leave nothing that was written in it.
        trust_owner: accept folders and files that other users own, or may write; of an open folder: what it says.

    Raises:
        UntrustedOwnerError: others own the folder, or may write it, and not `trust_owner`.
        OSError: it cannot be opened, or what is missing in it cannot be made.
    """

    lists_cheaply = True

    def __init__(
        self, folder: str | os.PathLike[str] | Directory, *, direct: bool = True, trust_owner: bool = False
    ) -> None:
        self._owns_root = not isinstance(folder, Directory)
        self._root = (
            folder if isinstance(folder, Directory) else Directory.open(folder, follow=True, trust_owner=trust_owner)
        )
        self.folder = self._root.path
        self.name = self._root.name
        self._want_direct = direct
        self._open: weakref.WeakSet[FileBlob] = weakref.WeakSet()
        self._segments = self._root.sub("segments", create=True)
        self._partial = self._root.sub("partial", create=True)

    @cached_property
    def direct(self) -> bool:
        return self._want_direct and _can_read_directly(self._partial)

    def path_of(self, key: str) -> Path:
        """Where the segment `key` lies, or would: for messages, for what lies there may be something else by now."""
        return self.folder / "segments" / checked_key(key)[:2] / f"{key}{SUFFIX}"

    def create(self, key: str, nbytes: int) -> FileBlobWriter:
        """Start a blob. The space is taken now, so a full disk shows before anything is done."""
        return FileBlobWriter(self._partial, self._segments, checked_key(key), nbytes, drop_cached=self._want_direct)

    def open(self, key: str) -> FileBlob:
        path = self.path_of(key)
        try:
            blob = FileBlob(path, direct=self._want_direct, folder=partial(self._segments.sub, key[:2]))
        except FileNotFoundError:
            raise SegmentMissingError(f"{path}: there is no such segment") from None
        self._open.add(blob)
        return blob

    def identity(self, key: str) -> Hashable:
        try:
            # One call, since every look-up asks for each segment of its chain. A link in the place of the folder could
            # lead it out of the store: then it sees another file than the one that is open, and nothing else happens.
            path = f"{checked_key(key)[:2]}/{key}{SUFFIX}"
            return identity_of(os.stat(path, dir_fd=self._segments.fd, follow_symlinks=False))
        except OSError as error:
            if error.errno in _NOT_THERE:
                return None
            raise

    def delete(self, key: str) -> bool:
        name = f"{checked_key(key)}{SUFFIX}"
        try:
            with self._segments.sub(key[:2]) as folder:
                if folder.stat(name) is None:
                    return False
                if not folder.remove(name):
                    raise OSError(errno.ENOTEMPTY, "a folder that holds something is left alone", folder.path_of(name))
        except OSError as error:
            if error.errno in _NOT_THERE:
                return False
            raise
        return True

    def list_blobs(self) -> Iterable[BlobInfo]:
        for key, entry in self._files():
            with contextlib.suppress(FileNotFoundError):
                yield _info(key, entry.stat(follow_symlinks=False))

    def list_keys(self) -> set[str]:
        """The keys of all blobs. Only folders are read, so ten thousand take milliseconds."""
        return {key for key, _ in self._files()}

    def _files(self) -> Iterator[tuple[str, os.DirEntry[str]]]:
        for inner in self._segments.names():
            if len(inner) != 2:
                continue
            try:
                with self._segments.scan_sub(inner) as entries:
                    for entry in entries:
                        match = _FILE.fullmatch(entry.name)
                        if match and entry.name.startswith(inner):
                            yield match[1], entry
            except UntrustedOwnerError as error:
                logger.warning("left alone: %s", error)
            except OSError as error:
                if error.errno not in _NOT_THERE:
                    raise

    def quarantine(self, key: str, identity: Hashable) -> bool:
        name = f"{checked_key(key)}{SUFFIX}"
        try:
            with self._segments.sub(key[:2]) as folder:
                status = folder.stat(name)
                if status is None or identity_of(status) != identity:
                    return False
                if stat.S_ISDIR(status.st_mode) and folder.remove(name):
                    return True
                with self._root.sub("damaged", create=True) as aside:
                    aside.make_free(name)
                    folder.rename(name, aside, name)
                    if stat.S_ISDIR(status.st_mode):
                        logger.warning("%s is a folder that holds something; it is left there", aside.path_of(name))
        except OSError as error:
            if error.errno in _NOT_THERE:
                return False
            raise
        return True

    @contextlib.contextmanager
    def _damaged(self) -> Iterator[Iterator[os.DirEntry[str]]]:
        try:
            with self._root.sub("damaged") as aside, aside.scan() as entries:
                yield entries
        except FileNotFoundError:
            yield iter(())

    def quarantined(self) -> Iterable[BlobInfo]:
        with self._damaged() as entries:
            for entry in entries:
                match = _FILE.fullmatch(entry.name)
                if match and not entry.is_dir(follow_symlinks=False):
                    with contextlib.suppress(FileNotFoundError):
                        yield _info(match[1], entry.stat(follow_symlinks=False))

    def drop_quarantined(self, key: str) -> int:
        name = f"{checked_key(key)}{SUFFIX}"
        try:
            with self._root.sub("damaged") as aside:
                status = aside.stat(name)
                if status is None:
                    return 0
                if aside.remove(name):
                    return status.st_blocks * 512
                logger.warning("%s is a folder that holds something; it is left alone", aside.path_of(name))
        except FileNotFoundError:
            pass
        return 0

    def collect(self, dry_run: bool = False) -> Leftovers:
        """Remove what crashes left. A folder that holds something, and files of others, are left alone."""
        removed, in_use, freed = [], [], 0
        for name in self._partial.names():
            if not name.endswith(".partial"):
                continue
            nbytes = remove_unlocked(self._partial, name, dry_run=dry_run)
            if nbytes is None:
                in_use.append(f"partial/{name}")
            else:
                removed.append(f"partial/{name}")
                freed += nbytes
        # A link in the place of a folder leads out of the store. What was in the folder is stored again.
        for name in self._segments.names():
            status = self._segments.stat(name)
            if status is not None and stat.S_ISLNK(status.st_mode):
                removed.append(f"segments/{name}")
                if not dry_run:
                    self._segments.remove(name)
        return Leftovers(tuple(removed), freed, tuple(in_use))

    def overhead_bytes(self) -> int:
        total = sum(info.stored_bytes for info in self.quarantined())
        with self._partial.scan() as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    total += entry.stat(follow_symlinks=False).st_blocks * 512
        for folder in (self._root, self._segments, self._partial):
            total += os.fstat(folder.fd).st_blocks * 512
        for status in (self._root.stat("damaged"), *map(self._segments.stat, self._segments.names())):
            total += status.st_blocks * 512 if status is not None else 0
        return total

    def close(self) -> None:
        for blob in list(self._open):
            blob.close()
        self._segments.close()
        self._partial.close()
        if self._owns_root:
            self._root.close()


def _info(key: str, status: os.stat_result) -> BlobInfo:
    return BlobInfo(key, status.st_size, status.st_blocks * 512, status.st_mtime)


def remove_unlocked(folder: Directory, name: str, *, dry_run: bool) -> int | None:
    """Delete a file that no process is writing.

    Returns:
        what it took up, in bytes, or `None` when it was left alone: it is in use, or another user's, or a folder that
        holds something.
    """
    try:
        status = folder.stat(name)
        if status is None:
            return 0
        if not stat.S_ISREG(status.st_mode):
            if _is_empty(folder, name) if dry_run else folder.remove(name):
                return 0
            logger.warning("%s is a folder that holds something; it is left alone", folder.path_of(name))
            return None
        fd, status = folder.open_checked(name, os.O_RDWR)
    except FileNotFoundError:
        return 0
    except UntrustedOwnerError as error:
        logger.warning("left alone: %s", error)
        return None
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        except OSError:
            if time.time() - status.st_mtime < _YOUNG_S:
                return None
        if not dry_run:
            folder.remove(name)
        return status.st_blocks * 512
    finally:
        os.close(fd)


def _is_empty(folder: Directory, name: str) -> bool:
    """Whether `remove` would delete it: it is no folder, or one that holds nothing."""
    try:
        with folder.sub(name) as inner:
            return not inner.names()
    except (OSError, UntrustedOwnerError):
        return True


def _can_read_directly(folder: Directory) -> bool:
    """Whether the file system of `folder` serves reads that bypass the page cache."""
    if not hasattr(os, "O_DIRECT"):
        return False
    probe = f".probe-{secrets.token_hex(4)}"
    buffer = as_memoryview(aligned_buffer(PAGE))
    try:
        with open(folder.create_file(probe), "wb") as file:
            file.write(bytes(PAGE))
        fd = folder.open_file(probe, os.O_RDONLY | os.O_DIRECT)
        try:
            return os.preadv(fd, (buffer,), 0) > 0
        finally:
            os.close(fd)
    except OSError:
        return False
    finally:
        with contextlib.suppress(OSError):
            folder.remove(probe)
