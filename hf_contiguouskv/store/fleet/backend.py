"""Segments of a fleet as a backend: those of this machine's disk, and those of the shared store that it has seen.

To everything above it is one place. A segment is opened from the disk if it lies there, and else from the shared store,
with what was read of it kept on the disk. Deleting, evicting and quarantine concern this machine alone: nothing here
deletes what other machines use.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Hashable, Iterable
from functools import partial

from ...errors import SegmentMissingError, UntrustedOwnerError
from ..backend import Blob, BlobInfo, BlobWriter, Leftovers, checked_key
from ..directory import Directory
from ..local_disk import LocalDisk
from .cached_blob import CachedBlob, KeptFile, file_name, identity_of
from .engine import SharedEngine
from .link import LinkMeter
from .names import SharedSegment
from .records import Records

logger = logging.getLogger("hf_contiguouskv")

FOLDER = "shared"


class FleetBackend:
    """A `SegmentBackend` of a machine in a fleet.

    Args:
        local: this machine's disk.
        folder: of the store on this machine, open.
        engine: holds the shared store.
        records: what this machine knows of it.

    Attributes:
        local, records: as passed.
        link: how fast the shared store has been read.
        on_fetched: called with the bytes that crossed the network, and the seconds that it took.
        on_missing: called with a segment that is gone from the shared store.
        on_damaged: called with a segment whose bytes, or what is kept of them here, proved wrong.
    """

    lists_cheaply = True

    def __init__(self, local: LocalDisk, folder: Directory, engine: SharedEngine, records: Records) -> None:
        self.local = local
        self.records = records
        self.link = LinkMeter()
        self.name = local.name
        self.on_fetched: Callable[[int, float], None] = _nothing_of_two
        self.on_missing: Callable[[SharedSegment], None] = _nothing
        self.on_damaged: Callable[[SharedSegment], None] = _nothing
        self._engine = engine
        self._folder = folder.sub(FOLDER, create=True)
        self._lock = threading.Lock()
        self._new_ranges: dict[tuple[str, int], list[tuple[int, int]]] = {}

    @property
    def direct(self) -> bool:
        return self.local.direct

    # -- opening ------------------------------------------------------------------------------------------------

    def open(self, key: str) -> Blob:
        try:
            return self.local.open(key)
        except SegmentMissingError:
            seen = self.records.get(key)
            if seen is None:
                raise
        return self._shared(seen.segment, self._kept_file(seen.segment), seen.stored, seen.modified)

    def open_uncached(self, segment: SharedSegment) -> CachedBlob:
        """The object of a segment as it lies in the shared store, whatever this machine keeps of it."""
        return self._shared(segment, None, 0, 0.0)

    def _shared(self, segment: SharedSegment, kept: KeptFile | None, stored: int, created: float) -> CachedBlob:
        return CachedBlob(
            segment,
            self._engine,
            kept,
            stored_bytes=stored,
            created=created,
            link=self.link,
            on_fetched=self._fetched,
            on_missing=self._missing,
        )

    def _kept_file(self, segment: SharedSegment) -> KeptFile | None:
        self.settle_ranges()
        try:
            return KeptFile(self._folder, file_name(segment), segment.nbytes, partial(self.records.kept, segment.key))
        except (OSError, UntrustedOwnerError) as error:
            logger.warning("nothing of segment %s can be kept on this machine: %s", segment.key, error)
            return None

    def identity(self, key: str) -> Hashable:
        found = self.local.identity(key)
        if found is None:
            seen = self.records.get(checked_key(key))
            found = None if seen is None else identity_of(seen.segment)
        return found

    def _fetched(
        self, segment: SharedSegment, inode: int, ranges: list[tuple[int, int]], nbytes: int, seconds: float
    ) -> None:
        if ranges:
            with self._lock:
                self._new_ranges.setdefault((segment.key, inode), []).extend(ranges)
        self.on_fetched(nbytes, seconds)

    def settle_ranges(self) -> set[str]:
        """Note durably what was kept since the last call; keys of the segments that it belongs to."""
        with self._lock:
            new, self._new_ranges = self._new_ranges, {}
        kept = set()
        for (key, inode), ranges in new.items():
            seen = self.records.get(key)
            status = self._folder.stat(file_name(seen.segment)) if seen is not None else None
            # (Another process may have evicted it, and another file may have its name.)
            if status is not None and status.st_ino == inode:
                self.records.keep(key, inode, ranges)
                kept.add(key)
        return kept

    def kept_bytes(self, key: str) -> int:
        """What this machine keeps of a segment of the shared store takes up so many bytes."""
        seen = self.records.get(key)
        status = self._folder.stat(file_name(seen.segment)) if seen is not None else None
        return status.st_blocks * 512 if status is not None else 0

    def _missing(self, segment: SharedSegment) -> None:
        # (Another upload of it may have been noted meanwhile.)
        seen = self.records.get(segment.key)
        if seen is not None and seen.segment.upload == segment.upload:
            self._forget(segment)
        self.on_missing(segment)

    def forget(self, key: str) -> bool:
        """Forget that a segment was seen in the shared store, and what is kept of it; whether it was known."""
        seen = self.records.get(key)
        return seen is not None and self._forget(seen.segment)

    def _forget(self, segment: SharedSegment) -> bool:
        known = self.records.forget(segment.key)
        with contextlib.suppress(OSError):
            self._folder.remove(file_name(segment))
        return known

    # -- writing and deleting, on this machine ------------------------------------------------------------------------

    def create(self, key: str, nbytes: int) -> BlobWriter:
        return _LocalWriter(self.local.create(key, nbytes), key, self)

    def delete(self, key: str) -> bool:
        deleted = self.local.delete(key)
        return self.forget(key) or deleted

    def quarantine(self, key: str, identity: Hashable) -> bool:
        if self.local.quarantine(key, identity):
            return True
        seen = self.records.get(checked_key(key))
        if seen is None or identity_of(seen.segment) != identity:
            return False
        self._forget(seen.segment)
        self.on_damaged(seen.segment)
        return True

    def quarantined(self) -> Iterable[BlobInfo]:
        return self.local.quarantined()

    def drop_quarantined(self, key: str) -> int:
        return self.local.drop_quarantined(key)

    # -- lists --------------------------------------------------------------------------------------------------

    def list_keys(self) -> set[str]:
        return self.local.list_keys() | self.records.keys()

    def list_blobs(self) -> Iterable[BlobInfo]:
        here = set()
        for info in self.local.list_blobs():
            here.add(info.key)
            yield info
        for key in self.records.keys() - here:
            seen = self.records.get(key)
            if seen is not None:
                yield BlobInfo(key, seen.segment.nbytes, seen.stored, seen.modified)

    def collect(self, dry_run: bool = False) -> Leftovers:
        """As `LocalDisk.collect`; and files of segments of the shared store that are not known any more."""
        found = self.local.collect(dry_run)
        removed, freed = list(found.removed), found.bytes_freed
        keys = self.records.keys_if_readable()
        if keys is None:
            return found
        known = {file_name(seen.segment) for key in keys if (seen := self.records.get(key)) is not None}
        for name in self._folder.names():
            if name in known:
                continue
            status = self._folder.stat(name)
            removed.append(f"{FOLDER}/{name}")
            freed += status.st_blocks * 512 if status is not None else 0
            if not dry_run:
                self._folder.remove(name)
        return Leftovers(tuple(removed), freed, found.in_use)

    def overhead_bytes(self) -> int:
        return self.local.overhead_bytes()

    def close(self) -> None:
        self.settle_ranges()
        self.local.close()
        self._folder.close()
        self.records.close()


class _LocalWriter:
    """A `backend.BlobWriter` of the local disk: what it publishes takes the place of what is kept from elsewhere."""

    def __init__(self, writer: BlobWriter, key: str, backend: FleetBackend) -> None:
        self._writer, self._key, self._backend = writer, key, backend
        self.name, self.nbytes, self.stored_bytes = writer.name, writer.nbytes, writer.stored_bytes
        self.write, self.read, self.discard = writer.write, writer.read, writer.discard

    def seal(self) -> None:
        self._writer.seal()
        self.stored_bytes = self._writer.stored_bytes

    def publish(self) -> None:
        self._writer.publish()
        self._backend.forget(self._key)


def _nothing(what: object) -> None:
    """Nobody is told."""


def _nothing_of_two(nbytes: int, seconds: float) -> None:
    """Nobody is told."""
