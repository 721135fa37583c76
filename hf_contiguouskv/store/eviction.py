"""Which segments to give up when room is needed, and which have outlived their time.

A full store may hold a hundred thousand segments, and each one that is published into it makes others go. So nothing
here looks at all of them: those that were used least recently are candidates, and of these goes what is worth least.
Where functions take `roots`, they regard only segments of these prefixes (a tenant's); `None` is all.
"""

from __future__ import annotations

import heapq
import itertools
import sqlite3
import time
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from ..errors import StoreFullError
from .format import SegmentHeader
from .hashing import TokenIds
from .rows import ANY_ROOT, COLUMNS, SegmentRow, distinct, segment_by_id, segment_by_key, segments_that_begin_with
from .search import chain_to, children_of, parents_of
from .totals import Roots, stored_roots, totals

# Segments that were used within one another's reach of this are equally recent.
_GRACE_S = 1.0
# So many candidates are looked at first, the least recently used ones; more where these are not enough.
_CANDIDATES = 1000
# What a segment may claim to have cost: seconds for each token, and for whatever comes with a request besides. Who has
# a model that is slower still (a prompt of a thousand tokens takes it four minutes) loses nothing but the distinction
# between its segments: all of them cost the same a token. Who lies gains no more than that model has.
_MOST_S_PER_TOKEN = 0.25
_MOST_S_BESIDES = 5.0
# What was used so often is popular, and of more uses only the last one counts.
_MOST_USES = 1000


def worth(row: SegmentRow, now: float, seconds_per_token: float) -> float:
    """What keeping a segment is worth: seconds of computing that it is expected to save, per byte and second.

    Expected uses are estimated as `(uses + 1) / (time since the last one)`, which forgets what was popular once
    (hyperbolic caching, Blankstein et al., USENIX ATC 2017, with the last use in the place of the insertion). What a
    segment claims is bounded: seconds by its number of tokens, uses by a number, and uses to come are of now.

    Args:
        row: the segment.
        now: seconds since the epoch.
        seconds_per_token: what a token costs where that was not measured.
    """
    cost = claimed_cost(row) if row.compute_ms else row.num_tokens * seconds_per_token
    idle = max(0.0, now - row.last_used) + _GRACE_S
    return (min(row.uses, _MOST_USES) + 1) / idle * cost / max(1, row.nbytes)


def claimed_cost(row: SegmentRow) -> float:
    """The seconds that a segment says it took to compute, as far as that is credible."""
    return min(row.compute_ms / 1000, _MOST_S_BESIDES + row.num_tokens * _MOST_S_PER_TOKEN)


def typical_cost(rows: list[SegmentRow]) -> float:
    """Measured seconds per token over all rows; 1.0 where nothing was measured (then only tokens count)."""
    measured = [row for row in rows if row.compute_ms]
    tokens = sum(row.num_tokens for row in measured)
    return sum(map(claimed_cost, measured)) / tokens if tokens else 1.0


class _Victims:
    """Chooses segments to remove: leaves, the one that is worth least first.

    Args:
        db: the index.
        roots: regard only these prefixes.
        kept: ids of segments that stay.
        pinned: keys of segments that stay, besides those of which the index knows it.
    """

    def __init__(self, db: sqlite3.Connection, roots: Roots, kept: Collection[int], pinned: Collection[str]) -> None:
        self._db = db
        self._roots = roots
        self._kept = kept
        self._pinned = pinned
        self._removed: set[int] = set()
        self._queued: set[int] = set()  # (What holds a chunk that thousands continue would be put there by each one.)
        self._known: dict[int, SegmentRow] = {}
        self._now, self._typical = time.time(), 1.0
        # What a segment is worth does not change meanwhile; which ones are leaves does. (Numbers decide last: rows
        # cannot be compared.)
        self._waiting: list[tuple[float, float, float, int]] = []

    def choose(self, excess: int, at_most: int | None = None) -> tuple[list[SegmentRow], int]:
        """Remove leaves until `excess` bytes are gone, or `at_most` segments, or nothing is left that may go.

        Returns:
            what was removed, children before parents, and what is left of `excess`.
        """
        victims: list[SegmentRow] = []
        for page in self._pages():
            if not victims and not self._known:
                self._typical = typical_cost(page)
            for row in page:
                self._known.setdefault(row.id, row)
                self._consider(row)
            while excess > 0 and self._waiting and len(victims) != at_most:
                row = self._known[heapq.heappop(self._waiting)[-1]]
                self._queued.discard(row.id)
                if row.id in self._removed or not self._is_leaf(row):
                    continue  # (It is considered again when the last one that continues it goes.)
                self._removed.add(row.id)
                victims.append(row)
                excess -= row.nbytes
                for number in parents_of(self._db, row.id):
                    self._consider(self._row(number))
            if excess <= 0 or len(victims) == at_most:
                break
        return victims, excess

    def _pages(self) -> Iterator[list[SegmentRow]]:
        """Candidates, the least recently used ones first; each time as many as before together."""
        rows, more = _least_recently_used(self._db, self._roots), _CANDIDATES
        seen = 0
        while page := list(itertools.islice(rows, more)):
            yield page
            seen += len(page)
            more = seen

    def _consider(self, row: SegmentRow) -> None:
        if not (row.id in self._kept or row.id in self._queued or row.pinned or row.key in self._pinned):
            self._queued.add(row.id)
            entry = (worth(row, self._now, self._typical), row.last_used, row.created, row.id)
            heapq.heappush(self._waiting, entry)

    def _row(self, number: int) -> SegmentRow:
        row = self._known.get(number)
        if row is None:
            row = self._known[number] = segment_by_id(self._db, number)
        return row

    def _is_leaf(self, row: SegmentRow) -> bool:
        return all(child in self._removed for child in children_of(self._db, row.id))


def choose_victims(
    db: sqlite3.Connection,
    header: SegmentHeader,
    nbytes: int,
    max_disk_bytes: int,
    pinned: Collection[str] = (),
    roots: Roots = None,
) -> list[SegmentRow]:
    """Which segments to delete so that a new one fits: leaves, the one that is worth least first.

    Args:
        db: the index.
        header: of the new segment; what it continues stays.
        nbytes: what it takes up.
        max_disk_bytes: the bound.
        pinned: keys of segments that stay, besides those of which the index knows it.
        roots: whose segments count, and may go.

    Raises:
        StoreFullError: pinned segments and the ones that the new one continues leave too little room.
    """
    excess = stored_bytes(db, roots) + nbytes - max_disk_bytes
    if excess <= 0:
        return []
    kept: set[int] = set()
    if header.parent:
        # The new segment is not indexed yet, so its ancestors may look unused.
        chain = chain_to(db, bytes.fromhex(header.root), header.parent_hash, header.first_chunk)
        if not isinstance(chain, int):
            kept = {row.id for row, _ in chain}
    victims, excess = _Victims(db, roots, kept, pinned).choose(excess)
    if excess > 0:
        raise too_large(nbytes, max_disk_bytes)
    return victims


def choose_excess(
    db: sqlite3.Connection,
    max_disk_bytes: int,
    pinned: Collection[str] = (),
    roots: Roots = None,
    at_most: int | None = None,
) -> tuple[list[SegmentRow], int]:
    """Which segments to delete so that what is left is within the bound, by the same rules as `choose_victims`.

    Args:
        db: the index.
        max_disk_bytes: the bound.
        pinned: keys of segments that stay, besides those of which the index knows it.
        roots: whose segments count, and may go.
        at_most: no more segments than that.

    Returns:
        the segments, and by how many bytes (0 or less: not at all) what is left exceeds the bound all the same.
    """
    excess = stored_bytes(db, roots) - max_disk_bytes
    return ([], excess) if excess <= 0 else _Victims(db, roots, (), pinned).choose(excess, at_most)


def stored_bytes(db: sqlite3.Connection, roots: Roots = None) -> int:
    """What all published segments of `roots` take up, in bytes."""
    return totals(db, roots).nbytes


def expired_segments(
    db: sqlite3.Connection, unused_since: float, pinned: Collection[str] = (), roots: Roots = None
) -> list[SegmentRow]:
    """Leaves that nobody used after `unused_since` (seconds since the epoch), children before parents; no pinned ones.

    A look-up uses every segment of the prefix that it finds, so a parent never expires before what continues it.
    """
    rows = [row for row in _unused_segments(db, roots, unused_since) if not (row.pinned or row.key in pinned)]
    found: dict[int, SegmentRow] = {}
    # A child begins after its parent, so all that continue a segment have been looked at before it.
    for row in sorted(rows, key=lambda row: (-row.first_chunk, row.created, row.id)):
        if all(child in found for child in children_of(db, row.id)):
            found[row.id] = row
    return list(found.values())


def is_expired(db: sqlite3.Connection, key: str, unused_since: float, pinned: Collection[str]) -> bool:
    """Whether the segment `key` is stored, and one of `expired_segments` whose children are gone."""
    row = segment_by_key(db, key)
    if row is None or row.pinned or key in pinned or row.last_used >= unused_since:
        return False
    return not any(True for _ in children_of(db, row.id))


def _least_recently_used(db: sqlite3.Connection, roots: Roots) -> Iterator[SegmentRow]:
    """The segments of `roots` in the order of their last use, the earliest first; read as far as they are asked for."""
    if roots is None:
        roots = stored_roots(db)
    query = f"SELECT {COLUMNS} FROM segments WHERE root = ? ORDER BY last_used, id"
    each = [map(SegmentRow.checked, db.execute(query, (root,))) for root in roots]
    return distinct(heapq.merge(*each, key=lambda row: (row.last_used, row.id)))


def _unused_segments(db: sqlite3.Connection, roots: Roots, since: float) -> list[SegmentRow]:
    """Segments of `roots` that nobody used after `since` (seconds since the epoch)."""
    query = f"SELECT {COLUMNS} FROM segments WHERE last_used < ? AND"
    found: Iterable[Any]
    if roots is None:
        found = db.execute(f"{query} {ANY_ROOT}", (since,))
    else:
        found = (row for root in roots for row in db.execute(f"{query} root = ?", (since, root)))
    return list(distinct(map(SegmentRow.checked, found)))


def superseded_by(db: sqlite3.Connection, header: SegmentHeader, ids: TokenIds) -> list[SegmentRow]:
    """Segments of a single chunk that is not full, and that the first chunk of a new segment begins with.

    The last chunk of a conversation so far grows with its next turn; where that chunk is all that a turn has added,
    the new segment holds everything that the old one does.

    Args:
        header: of the new segment.
        ids: int64 `[num_tokens]`, its own token ids.
    """
    size = min(header.geometry.chunk_size, len(ids))
    beginnings = [ids[:length].tobytes() for length in range(1, size)]
    # A chunk that is not full ends its segment, so one that begins a segment is all of it.
    rows = segments_that_begin_with(db, header.parent_hash, beginnings)
    place = (header.root, header.fingerprint, header.first_chunk, 1)
    return [
        row
        for row in rows
        if not row.pinned and (row.root.hex(), row.fingerprint, row.first_chunk, row.num_chunks) == place
    ]


def too_large(nbytes: int, max_disk_bytes: int) -> StoreFullError:
    """The error for a segment that cannot fit."""
    return StoreFullError(
        f"a segment of {nbytes} bytes does not fit in max_disk_bytes={max_disk_bytes} with what must stay there; "
        "raise the bound, or delete or unpin stored prefixes"
    )
