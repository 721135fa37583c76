"""Room for segments: which ones go when there is none, or when their time is over, and how they are removed."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import time
from collections.abc import Hashable
from functools import partial

from ..errors import StoreError, StoreFullError
from .eviction import choose_excess, choose_victims, expired_segments, is_expired, stored_bytes
from .format import SegmentHeader
from .parts import StoreParts
from .rows import SegmentRow, drop_segment, end_future_uses, insert_segment, number_of_chunks, segment_by_key

logger = logging.getLogger("hf_contiguouskv")

# So many segments are removed in one transaction: meanwhile nobody else can write.
_REMOVED_AT_ONCE = 1000


class Room:
    """Keeps what a handle stores within its bound, and removes what is given up.

    Args:
        parts: of the store. The tenant's segments are counted and evicted.
        max_disk_bytes: bound on what these take up; `None`: no bound.
        ttl_s: seconds after which an unused segment expires; `None`: never.
    """

    def __init__(self, parts: StoreParts, *, max_disk_bytes: int | None, ttl_s: float | None) -> None:
        self._parts = parts
        self.max_disk_bytes = max_disk_bytes
        self.ttl_s = ttl_s

    def victims(self, db: sqlite3.Connection, header: SegmentHeader, nbytes: int) -> list[SegmentRow]:
        """What must go so that a new segment fits; see `eviction.choose_victims`.

        Raises:
            StoreFullError: there is too little that may go.
        """
        if self.max_disk_bytes is None:
            return []
        roots = self._parts.tenant.roots(db)
        needed = stored_bytes(db, roots) + nbytes
        self._drop_quarantined(needed, self.max_disk_bytes)
        if needed <= self.max_disk_bytes:
            return []
        end_future_uses(db)
        return choose_victims(db, header, nbytes, self.max_disk_bytes, self._parts.pins.keys(), roots)

    def _drop_quarantined(self, needed: int, max_disk_bytes: int) -> None:
        """Delete damaged segments, which are kept to be looked at only as long as nobody needs the room."""
        if not self._parts.tenant.is_operator:
            return  # (They may be anybody's.)
        aside = list(self._parts.backend.quarantined())
        if needed + sum(info.stored_bytes for info in aside) > max_disk_bytes:
            for info in aside:
                self._parts.backend.drop_quarantined(info.key)

    def is_within_bound(self) -> bool:
        """Whether what is stored, and what is in quarantine, is within `max_disk_bytes`; cheap.

        (Of a backend that lists slowly, only what is stored.)
        """
        if self.max_disk_bytes is None:
            return True
        total = self.stored_bytes()
        if self._parts.backend.lists_cheaply and self._parts.tenant.is_operator:
            total += sum(info.stored_bytes for info in self._parts.backend.quarantined())
        return total <= self.max_disk_bytes

    def stored_bytes(self) -> int:
        """What the tenant's segments take up."""
        total: int = self._parts.index.read(lambda db: stored_bytes(db, self._parts.tenant.roots(db)))
        return total

    def evict_excess(self) -> None:
        """Make what is stored fit in `max_disk_bytes`, by the rules of publishing: where the bound is a new one.

        Where pinned segments exceed it, they stay, and a warning is logged.

        Raises:
            StoreError: the index cannot be written.
            OSError: the storage failed.
        """
        bound = self.max_disk_bytes
        if bound is None:
            return

        def choose(db: sqlite3.Connection) -> tuple[list[SegmentRow], int]:
            roots = self._parts.tenant.roots(db)
            self._drop_quarantined(stored_bytes(db, roots), bound)
            return choose_excess(db, bound, self._parts.pins.keys(), roots, at_most=_REMOVED_AT_ONCE)

        def change(db: sqlite3.Connection) -> tuple[dict[str, Hashable], int]:
            end_future_uses(db)
            victims, excess = choose(db)
            for row in victims:
                drop_segment(db, row.key)
            return {row.key: self._parts.backend.identity(row.key) for row in victims}, excess

        self._parts.uses.flush()  # Victims are chosen by what the index says.
        excess = 1
        while excess > 0:
            try:
                doomed, excess = self._parts.index.write(change)
            except StoreFullError:
                # Even forgetting takes a little room, and there is none: the segments go first, which makes some.
                for row in self._parts.index.read(choose)[0]:
                    self._parts.backend.delete(row.key)
                doomed, excess = self._parts.index.write(change)
            if not doomed:
                break
            self._parts.counters.add("evicted", len(self.remove(doomed)))
        if excess > 0:
            logger.warning(
                "pinned prefixes of %s, and what they continue, take up %d bytes more than max_disk_bytes=%d; unpin or "
                "delete some of them, or raise the bound",
                self._parts.backend.name,
                excess,
                bound,
            )

    def expire(self, dry_run: bool) -> list[SegmentRow]:
        """Delete what nobody used for `ttl_s`; what was (or would be) deleted."""
        if self.ttl_s is None:
            return []
        unused_since = time.time() - self.ttl_s
        self._parts.uses.flush()  # Victims are chosen by what the index says.

        def choose(db: sqlite3.Connection) -> list[SegmentRow]:
            return expired_segments(db, unused_since, self._parts.pins.keys(), self._parts.tenant.roots(db))

        if dry_run:
            return self._parts.index.read(choose)

        def delete(db: sqlite3.Connection, some: list[SegmentRow]) -> list[SegmentRow]:
            pinned, gone = self._parts.pins.keys(), []
            for row in some:
                # (Another process may have used it meanwhile, or continued it.)
                if is_expired(db, row.key, unused_since, pinned):
                    drop_segment(db, row.key)
                    self._parts.backend.delete(row.key)
                    gone.append(row)
            return gone

        self._parts.index.write(end_future_uses)
        rows, expired = self._parts.index.read(choose), []
        for start in range(0, len(rows), _REMOVED_AT_ONCE):
            expired += self._parts.index.write(partial(delete, some=rows[start : start + _REMOVED_AT_ONCE]))
        self._parts.opened.forget([row.key for row in expired])
        self._parts.counters.add("expired", len(expired))
        return expired

    def remove(self, doomed: dict[str, Hashable]) -> set[str]:
        """Delete blobs that the index has forgotten: only now, when that is certain to last.

        Returns:
            Keys of those that this call removed, and of those that had no blob any more when the index forgot them.
            Another process that opens the store meanwhile finds a blob without a row, and indexes it again: that one
            stays, and the process that removes it later counts it.
        """
        removed: set[str] = set()

        def change(db: sqlite3.Connection) -> None:
            for key, identity in doomed.items():
                # Another process may have stored or indexed it again meanwhile.
                if self._parts.backend.identity(key) != identity:
                    continue
                if self.delete_unindexed(db, key) or identity is None:
                    removed.add(key)

        self._parts.opened.forget(doomed)
        try:
            if doomed:
                self._parts.index.write(change)
        except (StoreError, OSError) as error:
            logger.warning("%d segments could not be evicted in order: %s", len(doomed), error)
            removed |= self._remove_out_of_order(doomed)
        return removed

    def _remove_out_of_order(self, doomed: dict[str, Hashable]) -> set[str]:
        """Delete what can be deleted; what cannot takes up room, so it is indexed again. Keys of what was deleted."""
        removed: set[str] = set()

        def change(db: sqlite3.Connection) -> None:
            for key, identity in doomed.items():
                if self._parts.backend.identity(key) == identity:
                    self.is_there(db, key, segment_by_key(db, key))

        for key, identity in doomed.items():
            with contextlib.suppress(OSError):
                # (Another process may delete it after this look.)
                if self._parts.backend.identity(key) == identity and (
                    self._parts.backend.delete(key) or identity is None
                ):
                    removed.add(key)
        with contextlib.suppress(OSError):
            self._parts.index.try_write(change)
        return removed

    def delete_unindexed(self, db: sqlite3.Connection, key: str) -> bool:
        """Delete a blob unless the index knows it: inside a transaction, for another process may have indexed it.

        Returns:
            Whether there was one, and this call deleted it.
        """
        return segment_by_key(db, key) is None and self._parts.backend.delete(key)

    def is_there(self, db: sqlite3.Connection, key: str, row: SegmentRow | None) -> bool:
        """Whether the segment is stored already; if only the index does not know it (well), it learns."""
        if self._parts.backend.identity(key) is None:
            return False
        if row is not None and number_of_chunks(db, row.id) == row.num_chunks:
            return True
        try:
            with contextlib.closing(self._parts.opener(self._parts.backend.open(key))) as segment:
                if segment.key != key:
                    return False
                drop_segment(db, key)
                blob, pinned = segment.blob, self._parts.pins.holds(key)
                insert_segment(db, segment.header, segment.token_ids, blob.stored_bytes, blob.created, pinned)
        except (StoreError, OSError):
            return False  # Whatever lies there cannot be used, or is not what its name says.
        return True
