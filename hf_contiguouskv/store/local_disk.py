"""The local disk as a backend: one file per segment, published by rename, read past the page cache.

segments/ab/abcdef….safetensors   published
partial/abcdef….1a2b3c4d.partial  being written; its writer holds a lock on it, which goes with the process
damaged/abcdef….safetensors       out of service
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import re
import secrets
import shutil
import stat
import time
import weakref
from collections.abc import Hashable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

from ..errors import SegmentMissingError
from .backend import BlobInfo, Extent, Leftovers, checked_key
from .pread import PAGE, aligned_buffer, as_memoryview, read_joined, read_range, read_scattered

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SUFFIX = ".safetensors"
# A link in a store is not ours: it could lead out of it. And opening a pipe must not wait for its other end.
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_FILE = re.compile(r"([0-9a-f]{32})\.safetensors")
# Where the file system has no locks, only age tells a leftover from a file that is being written.
_YOUNG_S = 3600.0


class FileBlob:
    """A file that is open for reading. See `backend.Blob`.

    Attributes:
        path: where it was opened.
        fd_direct: descriptor with `O_DIRECT`, or `None` where the file system refuses it.
        fd_buffered: ordinary descriptor; -1 once closed.
    """

    extents_per_read = 1

    def __init__(self, path: Path, *, direct: bool = True) -> None:
        self.path = path
        self.name = str(path)
        self.fd_direct: int | None = None
        self.fd_buffered = -1
        self.fd_buffered = os.open(path, _READ)
        status = os.fstat(self.fd_buffered)
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise OSError(errno.EINVAL, "not an ordinary file", str(path))
        self.nbytes = status.st_size
        self.stored_bytes = status.st_blocks * 512
        self.identity: Hashable = _identity(status)
        self.created = status.st_mtime
        if direct and hasattr(os, "O_DIRECT"):
            # tmpfs of older kernels, some network and overlay file systems refuse: reads go through the page cache.
            with contextlib.suppress(OSError):
                self.fd_direct = os.open(path, _READ | os.O_DIRECT)
                if _identity(os.fstat(self.fd_direct)) != self.identity:
                    # Replaced between the two calls: the descriptors must mean the same file.
                    os.close(self.fd_direct)
                    self.fd_direct = None

    def read_into(self, extents: Sequence[Extent]) -> int:
        """See `backend.Blob.read_into`."""
        if len(extents) > 1:
            gaps = [two[0] - one[0] - one[1].nbytes for one, two in itertools.pairwise(extents)]
            pages = all(offset % PAGE == into.nbytes % PAGE == 0 for offset, into in extents)
            if pages and not any(gaps):
                buffers = [into for _, into in extents]
                return read_scattered(self.fd_direct, self.fd_buffered, extents[0][0], buffers)
            if min(gaps) >= 0:
                return read_joined(self.fd_direct, self.fd_buffered, extents)
        physical = 0
        for offset, into in extents:
            physical += read_range(self.fd_direct, self.fd_buffered, offset, into)
        return physical

    def close(self) -> None:
        """See `backend.Blob.close`."""
        buffered, direct = self.fd_buffered, self.fd_direct
        self.fd_buffered, self.fd_direct = -1, None
        for fd in (buffered, direct):
            if fd is not None and fd >= 0:
                os.close(fd)

    def __del__(self) -> None:
        if getattr(self, "fd_buffered", -1) >= 0:
            self.close()


def _identity(status: os.stat_result) -> Hashable:
    # An inode is used again only when nobody has the file open any more, so whoever compares has the right one.
    return status.st_ino, status.st_size


class FileBlobWriter:
    """A partial file, locked while its writer lives. See `backend.BlobWriter`."""

    def __init__(self, folder: Path, final: Path, key: str, nbytes: int, *, drop_cached: bool) -> None:
        self.nbytes = nbytes
        self._final = final
        self._drop_cached = drop_cached
        self._fd, self.path = _open_partial(folder, key)
        self.name = str(self.path)
        try:
            _reserve(self._fd, nbytes)
        except BaseException:
            self.discard()
            raise
        self.stored_bytes = nbytes

    def write(self, offset: int, octets: memoryview) -> None:
        """See `backend.BlobWriter.write`."""
        done = 0
        while done < octets.nbytes:
            done += os.pwrite(self._fd, octets[done:], offset + done)

    def read(self, offset: int, nbytes: int) -> bytes:
        """See `backend.BlobWriter.read`."""
        return os.pread(self._fd, nbytes, offset)

    def seal(self) -> None:
        """See `backend.BlobWriter.seal`."""
        os.fsync(self._fd)
        self.stored_bytes = os.fstat(self._fd).st_blocks * 512

    def publish(self) -> None:
        """See `backend.BlobWriter.publish`: rename, then make the folder durable."""
        if not self._final.parent.exists():
            self._final.parent.mkdir(mode=0o700, exist_ok=True)
            sync_folder(self._final.parent.parent)
        os.replace(self.path, self._final)
        self.path = self._final
        sync_folder(self._final.parent)
        self._close()

    def discard(self) -> None:
        """See `backend.BlobWriter.discard`."""
        if self._fd >= 0 and self.path != self._final:
            with contextlib.suppress(OSError):  # What cannot be removed now is collected later.
                self.path.unlink(missing_ok=True)
        self._close()

    def _close(self) -> None:
        if self._fd >= 0:
            if self._drop_cached and hasattr(os, "posix_fadvise"):
                with contextlib.suppress(OSError):
                    os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(self._fd)
            self._fd = -1


class LocalDisk:
    """Segments as files in a folder of a local file system; threads and processes may share it.

    Args:
        folder: of the store; it must exist.
        direct: read past the page cache where the file system can, and leave nothing that was written in it.
    """

    lists_cheaply = True

    def __init__(self, folder: str | os.PathLike[str], *, direct: bool = True) -> None:
        self.folder = Path(folder)
        self.name = str(self.folder)
        self._segments = str(self.folder / "segments")
        self._want_direct = direct
        self._open: weakref.WeakSet[FileBlob] = weakref.WeakSet()
        for inner in ("segments", "partial"):
            (self.folder / inner).mkdir(mode=0o700, exist_ok=True)

    @cached_property
    def direct(self) -> bool:
        """See `backend.SegmentBackend.direct`."""
        return self._want_direct and _can_read_directly(self.folder)

    def path_of(self, key: str) -> Path:
        """Where the segment `key` lies, or would.

        Raises:
            OSError: the folder that it belongs in is a link.
        """
        folder = self.folder / "segments" / checked_key(key)[:2]
        if folder.is_symlink():
            raise OSError(errno.ELOOP, "a link in the place of a folder of the store", str(folder))
        return folder / f"{key}{SUFFIX}"

    def create(self, key: str, nbytes: int) -> FileBlobWriter:
        """See `backend.SegmentBackend.create`: the space is taken now, so a full disk shows before anything is done."""
        final = self.path_of(key)
        return FileBlobWriter(self.folder / "partial", final, key, nbytes, drop_cached=self._want_direct)

    def open(self, key: str) -> FileBlob:
        """See `backend.SegmentBackend.open`."""
        path = self.path_of(key)
        try:
            blob = FileBlob(path, direct=self._want_direct)
        except FileNotFoundError:
            raise SegmentMissingError(f"{path}: there is no such segment") from None
        self._open.add(blob)
        return blob

    def identity(self, key: str) -> Hashable:
        """See `backend.SegmentBackend.identity`."""
        try:
            # (Without pathlib: every look-up asks for each segment of its chain.)
            path = f"{self._segments}/{checked_key(key)[:2]}/{key}{SUFFIX}"
            return _identity(os.stat(path, follow_symlinks=False))
        except FileNotFoundError:
            return None

    def delete(self, key: str) -> bool:
        """See `backend.SegmentBackend.delete`."""
        try:
            os.unlink(self.path_of(key))
        except FileNotFoundError:
            return False
        return True

    def list_blobs(self) -> Iterable[BlobInfo]:
        """See `backend.SegmentBackend.list_blobs`."""
        for key, entry in self._files():
            with contextlib.suppress(FileNotFoundError):
                yield _info(key, entry.stat(follow_symlinks=False))

    def list_keys(self) -> set[str]:
        """See `backend.SegmentBackend.list_keys`: only folders are read, so ten thousand take milliseconds."""
        return {key for key, _ in self._files()}

    def _files(self) -> Iterator[tuple[str, os.DirEntry[str]]]:
        root = self.folder / "segments"
        for inner in sorted(os.listdir(root)):
            if len(inner) == 2 and not (root / inner).is_symlink():
                with contextlib.suppress(NotADirectoryError, FileNotFoundError), os.scandir(root / inner) as entries:
                    for entry in entries:
                        match = _FILE.fullmatch(entry.name)
                        if match and entry.name.startswith(inner):
                            yield match[1], entry

    def quarantine(self, key: str, identity: Hashable) -> bool:
        """See `backend.SegmentBackend.quarantine`."""
        path = self.path_of(key)
        if self.identity(key) != identity:
            return False
        aside = self.folder / "damaged"
        aside.mkdir(mode=0o700, exist_ok=True)
        remove_anything(aside / path.name)
        try:
            os.replace(path, aside / path.name)
        except FileNotFoundError:
            return False
        return True

    def quarantined(self) -> Iterable[BlobInfo]:
        """See `backend.SegmentBackend.quarantined`."""
        with contextlib.suppress(FileNotFoundError), os.scandir(self.folder / "damaged") as entries:
            for entry in entries:
                if match := _FILE.fullmatch(entry.name):
                    with contextlib.suppress(FileNotFoundError):
                        yield _info(match[1], entry.stat(follow_symlinks=False))

    def drop_quarantined(self, key: str) -> int:
        """See `backend.SegmentBackend.drop_quarantined`."""
        path = self.folder / "damaged" / f"{checked_key(key)}{SUFFIX}"
        try:
            freed = path.stat(follow_symlinks=False).st_blocks * 512
        except FileNotFoundError:
            return 0
        remove_anything(path)
        return freed

    def collect(self, dry_run: bool = False) -> Leftovers:
        """See `backend.SegmentBackend.collect`."""
        removed, in_use, freed = [], [], 0
        for path in sorted((self.folder / "partial").glob("*.partial")):
            nbytes = remove_unlocked(path, dry_run=dry_run)
            if nbytes is None:
                in_use.append(f"partial/{path.name}")
            else:
                removed.append(f"partial/{path.name}")
                freed += nbytes
        return Leftovers(tuple(removed), freed, tuple(in_use))

    def overhead_bytes(self) -> int:
        """See `backend.SegmentBackend.overhead_bytes`."""
        total = sum(info.stored_bytes for info in self.quarantined())
        with contextlib.suppress(FileNotFoundError), os.scandir(self.folder / "partial") as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    total += entry.stat(follow_symlinks=False).st_blocks * 512
        folders = [self.folder, *(self.folder / inner for inner in ("segments", "partial", "damaged"))]
        folders += [self.folder / "segments" / inner for inner in os.listdir(self.folder / "segments")]
        for folder in folders:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(folder).st_blocks * 512
        return total

    def close(self) -> None:
        """See `backend.SegmentBackend.close`."""
        for blob in list(self._open):
            blob.close()


def _info(key: str, status: os.stat_result) -> BlobInfo:
    return BlobInfo(key, status.st_size, status.st_blocks * 512, status.st_mtime)


def _open_partial(folder: Path, key: str) -> tuple[int, Path]:
    """Create a locked partial file. The lock goes with the descriptor, so a crash frees it."""
    while True:
        path = folder / f"{key}.{secrets.token_hex(4)}.partial"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            # Without locks on this file system, `collect` goes by the age of partial files.
            with contextlib.suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_EX)
            # A `collect` that came between the two calls above has removed the file.
            if os.fstat(fd).st_nlink:
                return fd, path
        except BaseException:
            os.close(fd)
            path.unlink(missing_ok=True)
            raise
        os.close(fd)


def _reserve(fd: int, nbytes: int) -> None:
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        if error.errno in FULL:
            raise
        os.ftruncate(fd, nbytes)


def remove_unlocked(path: Path, *, dry_run: bool) -> int | None:
    """Delete a file that no process is writing; what it took up in bytes, or `None` when it is in use."""
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            if not dry_run:
                remove_anything(path)
            return 0
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return 0
    try:
        status = os.fstat(fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        except OSError:
            if time.time() - status.st_mtime < _YOUNG_S:
                return None
        if not dry_run:
            path.unlink(missing_ok=True)
        return status.st_blocks * 512
    finally:
        os.close(fd)


def remove_anything(path: Path) -> None:
    """Delete whatever is there: a file, a folder with all in it, a link (not what it leads to), or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the entries of a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _can_read_directly(folder: Path) -> bool:
    """Whether the file system of `folder` serves reads that bypass the page cache."""
    if not hasattr(os, "O_DIRECT"):
        return False
    probe = folder / "partial" / f".probe-{secrets.token_hex(4)}"
    buffer = as_memoryview(aligned_buffer(PAGE))
    try:
        probe.write_bytes(bytes(PAGE))
        fd = os.open(probe, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        try:
            return os.preadv(fd, (buffer,), 0) > 0
        finally:
            os.close(fd)
    except OSError:
        return False
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
