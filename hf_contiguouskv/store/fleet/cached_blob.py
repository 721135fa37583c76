"""A segment of a shared store, open for reading: what this machine keeps of it is read here, the rest is fetched."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Sequence

from ...errors import UntrustedOwnerError
from ..backend import Extent
from ..descriptors import with_room
from ..directory import Directory
from ..files import SUFFIX, read_each
from .engine import EngineUnavailableError, SharedEngine
from .link import LinkMeter
from .names import SharedSegment
from .spans import Spans

logger = logging.getLogger("hf_contiguouskv")

# A reader thread passes so many ranges at once: the engine is asked for them side by side.
_AT_ONCE = 64


class KeptFile:
    """The part of a segment that this machine keeps: a file with holes, and a set of what is not a hole.

    The file is opened for each read, so a machine that uses thousands of segments holds no descriptor of them. Where it
    was deleted or replaced meanwhile, nothing is kept any more.

    Args:
        folder: of such files, open.
        name: of the file; it is made where it is missing.
        nbytes: length of the segment.
        kept: gives the ranges that a file with this inode holds.

    Attributes:
        inode: of the file.

    Raises:
        OSError: it cannot be opened or made.
    """

    def __init__(
        self, folder: Directory, name: str, nbytes: int, kept: Callable[[int], Iterable[tuple[int, int]]]
    ) -> None:
        self._folder, self._name = folder, name
        self._lock = threading.Lock()
        with contextlib.suppress(FileExistsError):
            os.close(with_room(lambda: folder.create_file(name)))
        descriptor, status = with_room(lambda: folder.open_checked(name, os.O_RDWR))
        try:
            self.inode = status.st_ino
            if status.st_size != nbytes:
                os.ftruncate(descriptor, nbytes)
            self._spans = Spans(kept(self.inode) if status.st_size == nbytes else ())
        finally:
            os.close(descriptor)

    def holds(self, begin: int, end: int) -> bool:
        """Whether a range is kept."""
        with self._lock:
            return (begin, end) in self._spans

    def kept_bytes(self, begin: int, end: int) -> int:
        """Bytes of a range that are kept."""
        with self._lock:
            return self._spans.within(begin, end)

    def first_gap(self, begin: int, end: int) -> tuple[int, int]:
        """The first part of a range that is not kept; empty if all of it is."""
        with self._lock:
            return self._spans.first_gap(begin, end)

    def read(self, extents: Sequence[Extent]) -> bool:
        """Fill buffers from what is kept; false if the file is not there any more."""
        descriptor = self._open(os.O_RDONLY)
        if descriptor is None:
            return False
        try:
            read_each(None, descriptor, extents)
        except (OSError, EOFError) as error:
            logger.warning("%s: what is kept cannot be read: %s", self._folder.path_of(self._name), error)
            self._give_up()
            return False
        finally:
            os.close(descriptor)
        return True

    def write(self, extents: Sequence[Extent]) -> list[tuple[int, int]]:
        """Keep bytes; the ranges that are kept now."""
        descriptor = self._open(os.O_WRONLY)
        if descriptor is None:
            return []
        try:
            for offset, octets in extents:
                done = 0
                while done < octets.nbytes:
                    done += os.pwrite(descriptor, octets[done:], offset + done)
        except OSError as error:
            logger.warning("%s: nothing more is kept of it: %s", self._folder.path_of(self._name), error)
            self._give_up()
            return []
        finally:
            os.close(descriptor)
        ranges = [(offset, offset + octets.nbytes) for offset, octets in extents]
        with self._lock:
            for begin, end in ranges:
                self._spans.add(begin, end)
        return ranges

    def _open(self, flags: int) -> int | None:
        """A descriptor of the very file; `None` if it was deleted or replaced."""
        try:
            descriptor, status = with_room(lambda: self._folder.open_checked(self._name, flags))
        except (OSError, UntrustedOwnerError):
            self._give_up()
            return None
        if status.st_ino == self.inode:
            return descriptor
        os.close(descriptor)
        self._give_up()
        return None

    def _give_up(self) -> None:
        with self._lock:
            self._spans = Spans()


class CachedBlob:
    """A `backend.Blob` of an object of the shared store.

    Args:
        segment: what it is.
        engine: where it lies.
        kept: what this machine keeps of it; `None`: nothing can be kept.
        stored_bytes: bytes of it that this machine keeps, as the index counts them.
        created: when it was seen first, seconds since the epoch.
        link: counts what crosses the network.
        on_fetched: told the file, if the ranges that were fetched are kept in it now, these, the bytes that crossed the
            network, and the seconds that it took.
        on_missing: called when the object turns out to be gone.

    Attributes:
        was_unreachable: whether a read failed for another reason than the bytes themselves.
    """

    extents_per_read = _AT_ONCE

    def __init__(
        self,
        segment: SharedSegment,
        engine: SharedEngine,
        kept: KeptFile | None,
        *,
        stored_bytes: int,
        created: float,
        link: LinkMeter,
        on_fetched: Callable[[SharedSegment, int, list[tuple[int, int]], int, float], None],
        on_missing: Callable[[SharedSegment], None],
    ) -> None:
        self.segment = segment
        self.name = f"{engine.name}/{segment.object_name}"
        self.nbytes = segment.nbytes
        self.stored_bytes = stored_bytes
        self.identity: Hashable = identity_of(segment)
        self.created = created
        self._engine = engine
        self._kept = kept
        self._link = link
        self._on_fetched, self._on_missing = on_fetched, on_missing
        self._version: str | None = None
        self._closed = False
        self.was_unreachable = False

    def read_into(self, extents: Sequence[Extent]) -> int:
        if self._closed:
            raise OSError(errno.EBADF, "it is closed", self.name)
        kept = self._kept
        here: list[Extent] = []
        missing: list[Extent] = []
        for offset, into in extents:
            if offset < 0 or offset + into.nbytes > self.nbytes:
                raise EOFError(f"{self.name} has {self.nbytes} bytes, wanted {offset} to {offset + into.nbytes}")
            if not into.nbytes:
                continue
            found = kept is not None and kept.holds(offset, offset + into.nbytes)
            (here if found else missing).append((offset, into))
        if kept is not None and here and not kept.read(here):
            missing, here = missing + here, []
        fetched = self._fetch(missing) if missing else 0
        return sum(into.nbytes for _, into in here) + fetched

    def _fetch(self, missing: list[Extent]) -> int:
        began = time.perf_counter()
        try:
            with self._link.counting() as counted:
                found = self._engine.read_ranges(self.segment.object_name, missing, self._version)
                counted.nbytes = found.nbytes
        except FileNotFoundError as error:
            self.was_unreachable = True
            self._on_missing(self.segment)
            raise OSError(errno.ESTALE, "it is not in the shared store any more", self.name) from error
        except (EngineUnavailableError, PermissionError) as error:
            self.was_unreachable = True
            raise OSError(errno.ETIMEDOUT, str(error.strerror), self.name) from error
        if found.size != self.nbytes:
            # (How long it is its name said so far. Memory is taken for what it holds.)
            raise EOFError(f"{self.name} has {found.size} bytes, and its name says {self.nbytes}")
        self._version, seconds = found.version, time.perf_counter() - began
        kept, ranges = self._kept, []
        if kept is not None:
            ranges = kept.write(missing)
        self._on_fetched(self.segment, kept.inode if kept is not None else 0, ranges, found.nbytes, seconds)
        return found.nbytes

    def away_bytes(self, begin: int, end: int) -> int:
        """Bytes of a range that are not on this machine."""
        return end - begin - (0 if self._kept is None else self._kept.kept_bytes(begin, end))

    def first_away(self, nbytes: int) -> tuple[int, int]:
        """The first range `(begin, end)` that is not on this machine, of at most `nbytes`; empty if all is here."""
        begin, end = (0, self.nbytes) if self._kept is None else self._kept.first_gap(0, self.nbytes)
        return begin, min(end, begin + nbytes)

    def is_backed(self, offset: int, nbytes: int) -> bool:
        # The engine said how long the object is.
        return 0 <= offset <= offset + nbytes <= self.nbytes

    def close(self) -> None:
        self._closed = True


def identity_of(segment: SharedSegment) -> Hashable:
    """Tells uploads of one segment apart, and from a file on this machine."""
    return "shared", segment.upload


def file_name(segment: SharedSegment) -> str:
    """The name of the file of what this machine keeps of a segment."""
    return f"{segment.key}.{segment.upload}{SUFFIX}"
