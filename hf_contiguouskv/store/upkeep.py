"""Looking after a store: the part of `PrefixStore` that lists, deletes, pins, verifies and cleans up."""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import PrefixInUseError, StoreClosedError, StoreError, StoreFullError
from ..memory import MemoryTiers
from ..stats import StoreCounters, StoreStats
from . import maintenance
from .backend import SegmentBackend
from .background import Background
from .entries import GcReport, PrefixInfo, StoreProblem
from .folder import Pins, folder_bytes
from .index import StoreIndex
from .opened import OpenSegments
from .publishing import Publisher
from .reader import ExtentReader
from .rows import SegmentRow, all_segments, drop_segment, index_problems, segment_by_key
from .search import continuations
from .verification import verify_segments

logger = logging.getLogger("hf_contiguouskv")


class Upkeep:
    """What `PrefixStore` is made of, and the methods that look after it.

    Attributes:
        path: folder of the store.
        backend: where its segments lie.
        memory: what this process keeps of it in memory.
        counters: what this process did with it.
    """

    path: Path
    backend: SegmentBackend
    memory: MemoryTiers
    counters: StoreCounters
    max_disk_bytes: int | None
    _background: Background
    _index: StoreIndex
    _opened: OpenSegments
    _publisher: Publisher
    _pins: Pins
    _reader: ExtentReader | None
    _uses: dict[str, tuple[int, float]]
    _lock: threading.RLock
    _closed: bool

    def _require_open(self) -> None:
        if self._closed:
            raise StoreClosedError(f"{self.path}: the store is closed")

    def _read(self, query: Callable[[sqlite3.Connection], Any]) -> Any:
        self._require_open()
        return self._index.read(query)

    def _write(self, change: Callable[[sqlite3.Connection], Any]) -> Any:
        self._require_open()
        return self._index.write(change)

    def _refill(self, db: sqlite3.Connection) -> None:
        maintenance.index_segments(db, self.backend, self._pins.keys())

    def _put_in_order(self) -> None:
        """On opening: free what crashes left, index what they had just published, and let `max_disk_bytes` hold.

        Only looks, if all is well.
        """
        try:
            self.backend.collect()
            maintenance.reconcile_on_opening(self._index, self.backend, self._pins.keys)
            if not self._publisher.is_within_bound():
                # Somebody else may be writing, and deleting takes long: opening waits for neither.
                self._background.submit(self._evict_excess)
        except (StoreError, OSError) as error:
            logger.warning("%s could not be cleaned up: %s", self.path, error)

    def _evict_excess(self) -> None:
        try:
            self._publisher.evict_excess()
        except (StoreError, OSError) as error:
            logger.warning("%s takes up more than max_disk_bytes=%s: %s", self.path, self.max_disk_bytes, error)

    def entries(self) -> list[PrefixInfo]:
        """All stored segments, oldest first."""
        rows = self._read(all_segments)
        with self._lock:
            uses = dict(self._uses)
        return [PrefixInfo.from_row(row, *uses.get(row.key, (0, 0.0))) for row in rows]

    def delete(self, key: str, recursive: bool = False) -> list[str]:
        """Delete the segment named `key`. Caches that have it open keep working.

        Args:
            key: of the segment.
            recursive: delete the longer prefixes that continue it as well.

        Returns:
            the keys of all segments that were deleted.

        Raises:
            PrefixInUseError: longer prefixes continue it, and not `recursive`.
            StoreError: there is no such segment.
        """

        def delete(db: sqlite3.Connection) -> list[str]:
            doomed = _deletable(db, key, recursive)
            for one in doomed:
                drop_segment(db, one)
                self.backend.delete(one)
            return doomed

        try:
            deleted: list[str] = self._write(delete)
        except StoreFullError:
            # Even forgetting takes a little room, and there is none: the segments go first, which makes some.
            for key_of_one in self._read(lambda db: _deletable(db, key, recursive)):
                self.backend.delete(key_of_one)
            deleted = self._write(delete)
        self._opened.forget(deleted)
        for gone in deleted:
            self._pins.set(gone, False)
        return deleted

    def pin(self, key: str) -> None:
        """Keep the segment named `key` when others are evicted.

        Raises:
            StoreError: there is no such segment.
        """
        self._set_pinned(key, True)

    def unpin(self, key: str) -> None:
        """Undo `pin`.

        Raises:
            StoreError: there is no such segment.
        """
        self._set_pinned(key, False)

    def _set_pinned(self, key: str, pinned: bool) -> None:
        def change(db: sqlite3.Connection) -> None:
            number = _known(db, key).id
            self._pins.set(key, pinned)
            db.execute("UPDATE segments SET pinned = ? WHERE id = ?", (int(pinned), number))

        self._write(change)

    def verify(self, key: str | None = None, progress: Callable[[int, int], None] | None = None) -> list[StoreProblem]:
        """Compare every byte of all segments, or of one, with its checksum, and the index with the files.

        Args:
            key: of one segment; `None` is all.
            progress: called with `(bytes done, bytes in all)`.

        Returns:
            what is wrong; empty when all is well. Nothing is changed, except that a damaged index is rebuilt.
        """
        self._require_open()
        # First, for whoever reads a damaged index repairs it.
        found = [StoreProblem("", "index", text) for text in ([] if key else self._index.inspect())]
        rows = self._read(lambda db: [_known(db, key)] if key else all_segments(db))
        # With a connection of its own: look-ups of this process do not wait for long questions.
        index = StoreIndex(self._index.path, self._refill)
        try:
            pinned = self._pins.keys()
            return found + verify_segments(
                self.backend, index, rows, pinned, whole_store=key is None, progress=progress
            )
        finally:
            index.close()

    def gc(self, dry_run: bool = False) -> GcReport:
        """Clean up: remove leftovers of crashes, damaged and expired segments; make index and segments agree.

        Args:
            dry_run: only say what would be done.
        """
        self._require_open()
        if not dry_run and self._read(index_problems):
            self._index.rebuild()
        # With connections of its own: look-ups of this process do not wait for long questions.
        index = StoreIndex(self._index.path, self._refill)
        try:
            report = maintenance.collect_garbage(
                self.path,
                index,
                self.backend,
                self._pins.keys,
                expired=self._publisher.expire(dry_run),
                dry_run=dry_run,
            )
        finally:
            index.close()
        self._opened.forget(report.forgotten)
        return report

    def rebuild_index(self) -> None:
        """Build the index anew from the segments; pins and counters are kept."""
        self._require_open()
        self._index.rebuild()

    @property
    def stats(self) -> StoreStats:
        """What the store holds, and what this object did since it was opened."""
        count, tokens, nbytes = self._read(
            lambda db: db.execute("SELECT count(*), total(num_tokens), total(nbytes) FROM segments").fetchone()
        )
        tiers = self.memory.bytes_by_tier
        stats = StoreStats(
            segments=count,
            prefix_tokens=int(tokens),
            segment_bytes=int(nbytes),
            disk_bytes=int(nbytes) + self.backend.overhead_bytes() + folder_bytes(self.path),
            quarantined_bytes=sum(info.stored_bytes for info in self.backend.quarantined()),
            host_bytes=tiers["host"],
            device_bytes=tiers["device"],
            bytes_read=self._reader.bytes_read if self._reader else 0,
            direct_reads=self.backend.direct,
        )
        self.counters.put_into(stats)
        return stats


def _known(db: sqlite3.Connection, key: str) -> SegmentRow:
    row = segment_by_key(db, key)
    if row is None:
        raise StoreError(f"no stored prefix has the key {key!r}; `entries()` lists those that there are")
    return row


def _deletable(db: sqlite3.Connection, key: str, recursive: bool) -> list[str]:
    doomed = continuations(db, _known(db, key))
    if len(doomed) > 1 and not recursive:
        names = ", ".join(row.key for row in doomed[1:])
        raise PrefixInUseError(f"{key} is continued by {names}; delete these first, or all of them at once")
    return [row.key for row in doomed]
