"""Looking after a store: index segments, reconcile index and backend, clean up after crashes."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Callable
from pathlib import Path

from ..errors import SegmentMissingError, StoreError
from .backend import SegmentBackend
from .entries import GcReport
from .index import StoreIndex
from .local_disk import remove_unlocked
from .rows import SegmentRow, all_segments, drop_segment, insert_segment, parent_ids, segment_by_key, set_use
from .segment import Segment
from .verification import row_problems

logger = logging.getLogger("hf_contiguouskv")


def index_segments(db: sqlite3.Connection, backend: SegmentBackend, pinned: set[str]) -> None:
    """Insert every readable segment into an empty index; one that cannot be read is named in a warning."""
    for key in sorted(backend.list_keys()):
        try:
            _index_segment(db, backend, key, pinned)
        except (StoreError, OSError) as error:
            logger.warning("not indexed: %s", error)


def _index_segment(db: sqlite3.Connection, backend: SegmentBackend, key: str, pinned: set[str]) -> None:
    segment = Segment(backend.open(key))
    try:
        if segment.key != key:
            raise StoreError(f"{segment.name}: holds segment {segment.key}; it is left alone")
        blob = segment.blob
        insert_segment(db, segment.header, segment.token_ids, blob.stored_bytes, blob.created, key in pinned)
    finally:
        segment.close()


def reconcile(
    db: sqlite3.Connection, backend: SegmentBackend, pinned: set[str]
) -> tuple[list[str], list[str], list[str]]:
    """Index what is not indexed, and forget what is gone.

    Returns:
        keys that were indexed, keys that were forgotten, and what could not be read.
    """
    known = {row.key for row in all_segments(db)}
    there = backend.list_keys()
    indexed, unreadable = [], []
    forgotten = sorted(known - there)
    for key in forgotten:
        drop_segment(db, key)
    for key in sorted(there - known):
        try:
            _index_segment(db, backend, key, pinned)
            indexed.append(key)
        except (StoreError, OSError) as error:
            unreadable.append(str(error))
    return indexed, forgotten, unreadable


def reconcile_on_opening(index: StoreIndex, backend: SegmentBackend, pinned: Callable[[], set[str]]) -> None:
    """Where a crash came between the publication of a segment and its entry in the index, make up for it.

    Only looks, if all is well; and where another process is writing, that one is left in peace.
    """
    known = {key for (key,) in index.read(lambda db: db.execute("SELECT key FROM segments").fetchall())}
    if not backend.lists_cheaply or known == backend.list_keys():
        return
    done = index.try_write(lambda db: reconcile(db, backend, pinned()))
    for text in done[2] if done else ():
        logger.warning("skipped: %s", text)


def collect_garbage(
    folder: Path,
    index: StoreIndex,
    backend: SegmentBackend,
    pinned: Callable[[], set[str]],
    *,
    expired: list[SegmentRow],
    dry_run: bool,
) -> GcReport:
    """See `PrefixStore.gc`; `expired` have been (or would be) removed before."""
    leftovers = backend.collect(dry_run)
    removed, in_use, freed = list(leftovers.removed), list(leftovers.in_use), leftovers.bytes_freed
    freed += sum(row.nbytes for row in expired)
    # A damaged index has been replaced by one that was built from the segments.
    for path in sorted(folder.glob("index.sqlite.damaged-*")):
        nbytes = remove_unlocked(path, dry_run=dry_run)
        removed.append(path.name)
        freed += nbytes or 0
    quarantine = list(backend.quarantined())
    for info in quarantine:
        freed += info.stored_bytes if dry_run else backend.drop_quarantined(info.key)

    # Reading every header takes long: that is done before anybody is kept from writing.
    suspects, damaged = index.read(lambda db: _suspects(db, backend, pinned()))

    def change(db: sqlite3.Connection) -> tuple[list[str], ...]:
        pins = pinned()
        indexed, forgotten, unreadable = reconcile(db, backend, pins)
        repaired = _repair_rows(db, backend, pins, suspects)
        unreadable += damaged
        linked = {child for child, _ in parent_ids(db)}
        unreachable = [row.key for row in all_segments(db) if row.first_chunk and row.id not in linked]
        if dry_run:
            raise _DryRunEnd(indexed, forgotten, repaired, unreadable, unreachable)
        return indexed, forgotten, repaired, unreadable, unreachable

    try:
        indexed, forgotten, repaired, unreadable, unreachable = index.write(change)
    except _DryRunEnd as outcome:
        indexed, forgotten, repaired, unreadable, unreachable = outcome.args
    return GcReport(
        removed=tuple(removed),
        quarantine=tuple(info.key for info in quarantine),
        expired=tuple(row.key for row in expired),
        bytes_freed=freed,
        indexed=tuple(indexed),
        forgotten=tuple(forgotten),
        repaired=tuple(repaired),
        unreachable=tuple(unreachable),
        unreadable=tuple(unreadable),
        in_use=tuple(in_use),
    )


def _suspects(db: sqlite3.Connection, backend: SegmentBackend, pinned: set[str]) -> tuple[list[str], list[str]]:
    """Keys of segments of which the index says something wrong, and what could not be read."""
    wrong, damaged = [], []
    for row in all_segments(db):
        try:
            if _is_wrong(db, backend, row, pinned):
                wrong.append(row.key)
        except SegmentMissingError:
            continue  # It is forgotten, or was deleted just now.
        except (StoreError, OSError) as error:
            damaged.append(str(error))
    return wrong, damaged


def _is_wrong(db: sqlite3.Connection, backend: SegmentBackend, row: SegmentRow, pinned: set[str]) -> bool:
    segment = Segment(backend.open(row.key))
    try:
        return segment.key == row.key and bool(row_problems(db, segment, row, row.key in pinned))
    finally:
        segment.close()


def _repair_rows(db: sqlite3.Connection, backend: SegmentBackend, pinned: set[str], suspects: list[str]) -> list[str]:
    """Write anew what the index says wrongly of these segments, if it still does; the keys of those."""
    repaired = []
    for key in suspects:
        row = segment_by_key(db, key)
        with contextlib.suppress(StoreError, OSError):
            if row is not None and _is_wrong(db, backend, row, pinned):
                drop_segment(db, key)
                _index_segment(db, backend, key, pinned)
                set_use(db, key, row.created, row.last_used, row.uses)
                repaired.append(key)
    return repaired


class _DryRunEnd(Exception):  # noqa: N818 (it reports no error)
    """Rolls a transaction back; its arguments are the outcome."""
