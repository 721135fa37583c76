"""Looking after a store: index segments, reconcile index and backend, clean up after crashes."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from ..errors import EarlierFormatError, SegmentMissingError, StoreError
from .backend import Leftovers, SegmentBackend
from .entries import GcReport
from .index import StoreIndex
from .parts import StoreParts
from .rows import SegmentRow, all_segments, drop_segment, insert_segment, keys_of_all, segment_by_key, set_use
from .search import unreachable_keys
from .segment import SegmentOpener
from .tenant import Tenant
from .verification import in_words, row_problems

logger = logging.getLogger("hf_contiguouskv")


def index_segments(
    db: sqlite3.Connection, backend: SegmentBackend, opener: SegmentOpener, pinned: set[str], tenant: Tenant
) -> None:
    """Insert every readable segment into an empty index; one that cannot be read is named in a warning."""
    for key in sorted(backend.list_keys()):
        problem = _index_segment(db, backend, opener, key, pinned)
        if problem is not None and not isinstance(problem, EarlierFormatError):
            # (Whose it is cannot be told, so a tenant's log does not name it.)
            text = in_words(key, problem) if tenant.is_operator else "a segment that cannot be read"
            logger.warning("not indexed: %s", text)


def _index_segment(
    db: sqlite3.Connection, backend: SegmentBackend, opener: SegmentOpener, key: str, pinned: set[str]
) -> Exception | None:
    """Insert one segment; why it was not inserted, if it was not."""
    try:
        segment = opener(backend.open(key))
        try:
            if segment.key != key:
                raise StoreError(f"{segment.name}: holds segment {segment.key}; it is left alone")
            blob = segment.blob
            with _all_or_nothing(db):
                insert_segment(db, segment.header, segment.token_ids, blob.stored_bytes, blob.created, key in pinned)
        finally:
            segment.close()
    except sqlite3.OperationalError:
        raise  # It is the index that cannot be written.
    except Exception as error:
        # This segment may have been made to stop us, by whatever a parser or an allocation can raise.
        return error
    return None


@contextlib.contextmanager
def _all_or_nothing(db: sqlite3.Connection) -> Iterator[None]:
    """A part of a transaction that is undone alone if it fails."""
    db.execute("SAVEPOINT one_segment")
    try:
        yield
    except BaseException:
        db.execute("ROLLBACK TO one_segment")
        raise
    finally:
        db.execute("RELEASE one_segment")


@dataclass
class Reconciled:
    """What `reconcile` did.

    Attributes:
        indexed: keys of segments that were indexed.
        forgotten: keys of segments that were gone.
        unreadable: by key, why a segment could not be indexed.
    """

    indexed: list[str] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)


def reconcile(
    db: sqlite3.Connection, backend: SegmentBackend, opener: SegmentOpener, pinned: set[str], tenant: Tenant
) -> Reconciled:
    """Index what is not indexed, and forget what is gone; of what is not the tenant's, nothing is told."""
    known, there = keys_of_all(db), backend.list_keys()
    done = Reconciled()
    for key in sorted(known - there):
        row = segment_by_key(db, key)
        drop_segment(db, key)
        if row is not None and tenant.owns(row):
            done.forgotten.append(key)
    for key in sorted(there - known):
        problem = _index_segment(db, backend, opener, key, pinned)
        if problem is None:
            row = segment_by_key(db, key)
            if row is not None and tenant.owns(row):
                done.indexed.append(key)
            continue
        if tenant.is_operator:
            done.unreadable[key] = in_words(key, problem)
    return done


def unindexed_and_gone(parts: StoreParts) -> tuple[set[str], set[str]]:
    """Keys of segments that the index does not have, and of those that only the index has."""
    known: set[str] = parts.index.read(keys_of_all)
    there = parts.backend.list_keys()
    return there - known, known - there


def reconcile_on_opening(parts: StoreParts, earlier: set[str]) -> None:
    """Where a crash came between the publication of a segment and its entry in the index, make up for it.

    Where another process is writing, that one is left in peace.

    Args:
        parts: of the store.
        earlier: keys of segments of earlier formats, which no index has.
    """
    index, backend = parts.index, parts.backend
    done = index.try_write(lambda db: reconcile(db, backend, parts.opener, parts.pins.keys(), parts.tenant))
    for key, text in done.unreadable.items() if done else ():
        if key not in earlier:
            logger.warning("skipped: %s", text)


def collect_garbage(parts: StoreParts, index: StoreIndex, *, expired: list[SegmentRow], dry_run: bool) -> GcReport:
    """Remove what crashes left and make index and segments agree, as `PrefixStore.gc` says.

    Args:
        parts: of the store.
        index: of the store, with connections of its own, because the questions asked here take long.
        expired: segments that were removed before because their time was over, or would have been.
        dry_run: only say what would be done.
    """
    backend, opener, tenant = parts.backend, parts.opener, parts.tenant
    report = GcReport(expired=tuple(row.key for row in expired), bytes_freed=sum(row.nbytes for row in expired))
    leftovers = backend.collect(dry_run)
    if tenant.is_operator:  # (Names of partial files and of damaged segments tell what others store.)
        report = _with_leftovers(report, leftovers, index, backend, dry_run)
    # Reading every header takes long: that is done before anybody is kept from writing.
    suspects, damaged = index.read(lambda db: _suspects(db, backend, opener, parts.pins.keys(), tenant))

    def change(db: sqlite3.Connection) -> tuple[Reconciled, list[str], list[str]]:
        pins = parts.pins.keys()
        done = reconcile(db, backend, opener, pins, tenant)
        repaired = _repair_rows(db, backend, opener, pins, suspects)
        outcome = done, repaired, unreachable_keys(db, tenant.roots(db))
        if dry_run:
            raise _DryRunEnd(*outcome)
        return outcome

    try:
        done, repaired, unreachable = index.write(change)
    except _DryRunEnd as end:
        done, repaired, unreachable = end.args
    return replace(
        report,
        indexed=tuple(done.indexed),
        forgotten=tuple(done.forgotten),
        repaired=tuple(repaired),
        unreachable=tuple(unreachable),
        unreadable=(*done.unreadable.values(), *damaged),
    )


def _with_leftovers(
    report: GcReport, leftovers: Leftovers, index: StoreIndex, backend: SegmentBackend, dry_run: bool
) -> GcReport:
    """What belongs to nobody in particular: partial files, damaged indexes, quarantine. It is deleted."""
    removed, freed = list(leftovers.removed), report.bytes_freed + leftovers.bytes_freed
    # A damaged index has been replaced by one that was built from the segments.
    replaced = index.collect(dry_run)
    removed += replaced.removed
    freed += replaced.bytes_freed
    quarantine = list(backend.quarantined())
    for info in quarantine:
        freed += info.stored_bytes if dry_run else backend.drop_quarantined(info.key)
    return replace(
        report,
        removed=tuple(removed),
        in_use=tuple(leftovers.in_use),
        quarantine=tuple(info.key for info in quarantine),
        bytes_freed=freed,
    )


def _suspects(
    db: sqlite3.Connection, backend: SegmentBackend, opener: SegmentOpener, pinned: set[str], tenant: Tenant
) -> tuple[list[str], list[str]]:
    """Keys of segments of which the index says something wrong, and what could not be read."""
    wrong, damaged = [], []
    for row in all_segments(db, tenant.roots(db)):
        try:
            if _is_wrong(db, backend, opener, row, pinned):
                wrong.append(row.key)
        except SegmentMissingError:
            continue  # It is forgotten, or was deleted just now.
        except sqlite3.Error:
            raise
        except Exception as error:
            damaged.append(in_words(row.key, error))
    return wrong, damaged


def _is_wrong(
    db: sqlite3.Connection, backend: SegmentBackend, opener: SegmentOpener, row: SegmentRow, pinned: set[str]
) -> bool:
    segment = opener(backend.open(row.key))
    try:
        return segment.key == row.key and bool(row_problems(db, segment, row, row.key in pinned))
    finally:
        segment.close()


def _repair_rows(
    db: sqlite3.Connection, backend: SegmentBackend, opener: SegmentOpener, pinned: set[str], suspects: list[str]
) -> list[str]:
    """Rewrite the rows of these segments that are still wrong; the keys of those that were."""
    repaired = []
    for key in suspects:
        row = segment_by_key(db, key)
        try:
            if row is None or not _is_wrong(db, backend, opener, row, pinned):
                continue
        except sqlite3.Error:
            raise
        except Exception as error:
            logger.warning("not repaired: %s", in_words(key, error))
            continue
        with contextlib.suppress(_NotIndexedError), _all_or_nothing(db):
            drop_segment(db, key)
            problem = _index_segment(db, backend, opener, key, pinned)
            if problem is not None:
                logger.warning("not repaired: %s", in_words(key, problem))
                raise _NotIndexedError
            set_use(db, key, row.created, row.last_used, row.uses)
            repaired.append(key)
    return repaired


class _NotIndexedError(Exception):
    """A segment that was dropped could not be inserted again: the dropping is undone."""


class _DryRunEnd(Exception):  # noqa: N818 (it reports no error)
    """Rolls a transaction back; its arguments are the outcome."""
