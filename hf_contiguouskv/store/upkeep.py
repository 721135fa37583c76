"""Looking after a store: the part of `PrefixStore` that lists, deletes, pins, verifies and cleans up."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable
from pathlib import Path

from ..errors import InputError, PrefixInUseError, StoreError, StoreFullError
from ..stats import REMOTE_COUNTS, StoreStats
from . import maintenance
from .backend import SegmentBackend
from .entries import GcReport, PrefixInfo, StoreProblem
from .folder import folder_bytes
from .inner import StoreInner
from .repacking import Repacked, repack_segment, require_repackable
from .rows import SegmentRow, all_segments, drop_segment, index_problems, segments_with_beginning
from .search import continuations
from .tenant import Tenant
from .totals import Totals, totals
from .verification import verify_segments

logger = logging.getLogger("hf_contiguouskv")

# So many segments are deleted in one transaction: meanwhile nobody else can write.
_DELETED_AT_ONCE = 500
# A refusal names so many of the segments that are in the way.
_NAMED = 5


class Upkeep:
    """What `PrefixStore` is made of, and the methods that look after it.

    A store that was opened with a salt regards only the segments that were stored with it.

    Attributes:
        path: folder of the store.
        backend: where its segments lie.
        inner: for this library alone.
    """

    path: Path
    backend: SegmentBackend
    max_disk_bytes: int | None
    inner: StoreInner

    def _put_in_order(self) -> None:
        """On opening: free what crashes left, index what they had just published, and let `max_disk_bytes` hold.

        Only looks, if all is well.
        """
        try:
            self.backend.collect()
            if self.backend.lists_cheaply:
                unindexed, gone = maintenance.unindexed_and_gone(self.inner.parts)
                earlier = self.inner.earlier.note(unindexed) if self.inner.fleet is None else set()
                self.inner.earlier.warn()
                if gone or unindexed - earlier:
                    maintenance.reconcile_on_opening(self.inner.parts, earlier)
            if not self.inner.room.is_within_bound():
                # Another process may be writing, and deleting takes long: opening waits for neither.
                self.inner.submit_background(self._evict_excess)
        except (StoreError, OSError) as error:
            logger.warning("%s could not be cleaned up: %s", self.path, error)

    def _evict_excess(self) -> None:
        try:
            self.inner.room.evict_excess()
        except (StoreError, OSError) as error:
            logger.warning("%s takes up more than max_disk_bytes=%s: %s", self.path, self.max_disk_bytes, error)

    def entries(self, beginning: str = "") -> list[PrefixInfo]:
        """All stored segments, oldest first.

        Args:
            beginning: hex digits; only those whose keys begin with them.
        """

        def query(db: sqlite3.Connection) -> list[SegmentRow]:
            if not beginning:
                return all_segments(db, self.inner.tenant.roots(db))
            if not all(digit in "0123456789abcdef" for digit in beginning):
                return []
            rows = [row for row in segments_with_beginning(db, beginning) if self.inner.tenant.owns(row)]
            return sorted(rows, key=lambda row: (row.created, row.id))

        rows = self.inner.read(query)
        uses = self.inner.parts.uses.pending()
        return [PrefixInfo.from_row(row, *uses.get(row.key, (0, 0.0))) for row in rows]

    def delete(self, key: str, recursive: bool = False) -> list[str]:
        """Delete the segment named `key`. Caches that have it open keep working.

        Args:
            key: of the segment.
            recursive: delete the longer prefixes that continue it as well.

        Returns:
            the keys of all segments that were deleted, parents before children.

        Raises:
            PrefixInUseError: longer prefixes continue it, and not `recursive`.
            StoreError: there is no such segment.
        """

        def delete(db: sqlite3.Connection) -> list[str]:
            # (The last ones are leaves. A crash in between leaves prefixes that are shorter, and whole.)
            doomed = _deletable(db, self.inner.tenant, key, recursive)[-_DELETED_AT_ONCE:]
            for one in doomed:
                drop_segment(db, one)
                self.backend.delete(one)
            return doomed

        deleted: list[str] = []
        while key not in deleted:
            try:
                some: list[str] = self.inner.write(delete)
            except StoreFullError:
                # Even forgetting takes a little room, and there is none: the segments go first, which makes some.
                for key_of_one in self.inner.read(lambda db: _deletable(db, self.inner.tenant, key, recursive)):
                    self.backend.delete(key_of_one)
                some = self.inner.write(delete)
            deleted = some + deleted
            self.inner.parts.opened.forget(some)
            for gone in self.inner.parts.pins.keys() & set(some):
                self.inner.parts.pins.set(gone, False)
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
            number = self.inner.tenant.find(db, key).id
            self.inner.parts.pins.set(key, pinned)
            db.execute("UPDATE segments SET pinned = ? WHERE id = ?", (int(pinned), number))

        self.inner.write(change)

    def verify(
        self, key: str | None = None, progress: Callable[[int, int], None] | None = None, deep: bool = False
    ) -> list[StoreProblem]:
        """Compare every byte of all segments, or of one, with its checksum, and the index with the files.

        Args:
            key: of one segment; `None` is all.
            progress: called with `(bytes done, bytes in all)`.
            deep: also make what approximates or repeats keys and values again from these, and compare it.

        Returns:
            what is wrong; empty when all is well. Nothing is changed, except that a damaged index is rebuilt. Of a
            shared store, only what this machine has whole is read; `shared_upkeep` verifies the rest.
        """
        self.inner.require_open()
        # First, because the next read of a damaged index repairs it.
        texts = [] if key else self.inner.index.inspect()
        if texts and not self.inner.tenant.is_operator:  # (They name segments of others.)
            texts = ["is or was damaged; `verify` of the store without a salt tells where"]
        found = [StoreProblem("", "index", text) for text in texts]

        def query(db: sqlite3.Connection) -> list[SegmentRow]:
            rows = [self.inner.tenant.find(db, key)] if key else all_segments(db, self.inner.tenant.roots(db))
            return rows if self.inner.fleet is None else self.inner.fleet.whole(rows)

        # With a connection of its own: look-ups of this process do not wait for long questions.
        index = self.inner.index.again()
        try:
            return found + verify_segments(
                self.backend,
                index,
                self.inner.read(query),
                self.inner.parts.pins.keys(),
                whole_store=key is None and self.inner.tenant.is_operator,
                progress=progress,
                opener=self.inner.opener,
                deep=deep,
            )
        finally:
            index.close()

    def repack(self, key: str, index_bits: int = 2) -> Repacked | None:
        """Give the segment named `key` a key index of `index_bits` bits, and chunks in the form that goes with it.

        Keys and values, and all that they approximate, are verified on the way. Requests that use the segment go on.

        Args:
            key: of the segment.
            index_bits: 8 or 2 (see `ContiguousKVConfig`).

        Returns:
            what was done; `None`: it has this form already, or is another one by now.

        Raises:
            InputError: there is no such form for it, or the store is a shared one.
            SegmentCorruptError: it is damaged; it is left as it is.
            StoreFullError: there is no room for another file beside it.
            StoreError: there is no such segment, or it cannot be read or written.
        """
        if index_bits not in (8, 2):
            raise InputError(f"index_bits must be 8 or 2, got {index_bits!r}")
        require_repackable(self.inner)
        self.inner.read(lambda db: self.inner.tenant.find(db, key))
        return repack_segment(self.inner, key, index_bits)

    def repack_earlier(self, progress: Callable[[int, int], None] | None = None) -> list[str]:
        """Bring what an earlier release stored, in formats 1 and 2, to the present format, with an index of 8 bits.

        Look-ups do so for what they need. What was stored with another salt than this object's stays as it is.

        Args:
            progress: called with `(bytes done, bytes in all)`.

        Returns:
            the keys of the new segments, parents before what continues them. What is damaged, continues what is not
            stored, or does not fit in `max_disk_bytes` beside the others, stays as it is.

        Raises:
            InputError: the store is a shared one.
            StoreError: the store cannot be read.
        """
        require_repackable(self.inner)
        self.inner.earlier.note(maintenance.unindexed_and_gone(self.inner.parts)[0])
        total, finished = self.inner.earlier.waiting_bytes, 0

        def report(nbytes: int) -> None:
            nonlocal finished
            finished += nbytes
            if progress is not None:
                progress(finished, total)

        return self.inner.earlier.bring_all(report)

    def gc(self, dry_run: bool = False) -> GcReport:
        """Clean up: remove leftovers of crashes, damaged and expired segments; make index and segments agree.

        A store that was opened with a salt leaves damaged segments to the handle without one, and tells only of its
        own.

        Args:
            dry_run: only say what would be done.
        """
        self.inner.require_open()
        if not dry_run and self.inner.read(index_problems):
            self.inner.index.rebuild()
        # With connections of its own: look-ups of this process do not wait for long questions.
        index = self.inner.index.again()
        try:
            report = maintenance.collect_garbage(
                self.inner.parts, index, expired=self.inner.room.expire(dry_run), dry_run=dry_run
            )
        finally:
            index.close()
        self.inner.parts.opened.forget(report.forgotten)
        return report

    @property
    def stats(self) -> StoreStats:
        """What the store holds, and what this object did since it was opened."""
        stored: Totals = self.inner.read(lambda db: totals(db, self.inner.tenant.roots(db)))
        tiers = self.inner.memory.bytes_by_tier
        stats = StoreStats(
            segments=stored.segments,
            prefix_tokens=stored.tokens,
            segment_bytes=stored.nbytes,
            disk_bytes=stored.nbytes,
            host_bytes=tiers["host"],
            device_bytes=tiers["device"],
            bytes_read=self.inner.bytes_read,
            direct_reads=self.backend.direct,
        )
        if self.inner.tenant.is_operator:
            stats.disk_bytes += (
                self.inner.earlier.waiting_bytes + self.backend.overhead_bytes() + folder_bytes(self.inner.parts.folder)
            )
            stats.quarantined_bytes = sum(info.stored_bytes for info in self.backend.quarantined())
        if self.inner.fleet is not None:
            stats.remote = dict.fromkeys(REMOTE_COUNTS, 0) | dict(self.inner.fleet.engine.requests)
        self.inner.counters.put_into(stats)
        return stats


def _deletable(db: sqlite3.Connection, tenant: Tenant, key: str, recursive: bool) -> list[str]:
    doomed = continuations(db, tenant.find(db, key))
    more = len(doomed) - 1
    if more and not recursive:
        names = ", ".join(row.key for row in doomed[1 : 1 + _NAMED])
        others = f" and {more - _NAMED:,} more" if more > _NAMED else ""
        raise PrefixInUseError(f"{key} is continued by {names}{others}; delete these first, or all of them at once")
    return [row.key for row in doomed]
