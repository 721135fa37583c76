"""Which segments to give up when room is needed, and which have outlived their time."""

from __future__ import annotations

import heapq
import sqlite3
import time
from collections.abc import Collection

from ..errors import StoreFullError
from .format import SegmentHeader
from .hashing import TokenIds
from .rows import SegmentRow, all_segments, parent_ids, segments_that_begin_with
from .search import chain_to

# Segments that were used within one another's reach of this are equally recent.
_GRACE_S = 1.0


def worth(row: SegmentRow, now: float, seconds_per_token: float) -> float:
    """What keeping a segment is worth: seconds of computing that it is expected to save, per byte and second.

    Expected uses are estimated as `(uses + 1) / (time since the last one)`, which forgets what was popular once
    (hyperbolic caching, Blankstein et al., USENIX ATC 2017, with the last use in the place of the insertion).

    Args:
        row: the segment.
        now: seconds since the epoch.
        seconds_per_token: what a token costs where that was not measured.
    """
    cost = row.compute_ms / 1000 if row.compute_ms else row.num_tokens * seconds_per_token
    idle = max(0.0, now - row.last_used) + _GRACE_S
    return (row.uses + 1) / idle * cost / max(1, row.nbytes)


def typical_cost(rows: list[SegmentRow]) -> float:
    """Measured seconds per token over all rows; 1.0 where nothing was measured (then only tokens count)."""
    measured = [row for row in rows if row.compute_ms]
    tokens = sum(row.num_tokens for row in measured)
    return sum(row.compute_ms for row in measured) / 1000 / tokens if tokens else 1.0


class _Tree:
    """The segments that are left, and which of them nothing continues."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self.rows = {row.id: row for row in all_segments(db)}
        self._parents: dict[int, set[int]] = {}
        self._children: dict[int, set[int]] = {number: set() for number in self.rows}
        for child, parent in parent_ids(db):
            self._parents.setdefault(child, set()).add(parent)
            self._children[parent].add(child)

    @property
    def nbytes(self) -> int:
        """What is left takes up so much."""
        return sum(row.nbytes for row in self.rows.values())

    def pinned(self, keys: Collection[str]) -> set[int]:
        """Numbers of the segments that are pinned, as the index says or by one of these keys."""
        return {number for number, row in self.rows.items() if row.pinned or row.key in keys}

    def give_up(self, excess: int, kept: Collection[int]) -> tuple[list[SegmentRow], int]:
        """Remove leaves, the one that is worth least first, until `excess` bytes are gone or only `kept` ones are left.

        Returns:
            what was removed, children before parents, and what is left of `excess`.
        """
        now, typical = time.time(), typical_cost(list(self.rows.values()))
        victims: list[SegmentRow] = []
        # What a segment is worth does not change meanwhile; which ones are leaves does. (Numbers decide last: rows
        # cannot be compared.)
        leaves: list[tuple[float, float, float, int]] = []

        def consider(number: int) -> None:
            if number not in kept and self.is_leaf(number):
                row = self.rows[number]
                heapq.heappush(leaves, (worth(row, now, typical), row.last_used, row.created, number))

        for number in self.rows:
            consider(number)
        while excess > 0 and leaves:
            *_, number = heapq.heappop(leaves)
            parents = self._parents.get(number, ())
            victim = self.remove(number)
            victims.append(victim)
            excess -= victim.nbytes
            for parent in parents:
                consider(parent)
        return victims, excess

    def is_leaf(self, number: int) -> bool:
        return not self._children[number]

    def remove(self, number: int) -> SegmentRow:
        for parent in self._parents.pop(number, ()):
            self._children[parent].discard(number)
        return self.rows.pop(number)


def choose_victims(
    db: sqlite3.Connection, header: SegmentHeader, nbytes: int, max_disk_bytes: int, pinned: Collection[str] = ()
) -> list[SegmentRow]:
    """Which segments to delete so that a new one fits: leaves, the one that is worth least first.

    Args:
        header: of the new segment; what it continues stays.
        nbytes: what it takes up.
        max_disk_bytes: the bound.
        pinned: keys of segments that stay, besides those of which the index knows it.

    Raises:
        StoreFullError: pinned segments and the ones that the new one continues leave too little room.
    """
    if stored_bytes(db) + nbytes <= max_disk_bytes:
        return []
    tree = _Tree(db)
    kept = tree.pinned(pinned)
    if header.parent:
        # The new segment is not indexed yet, so its ancestors may look unused.
        chain = chain_to(db, header.parent_hash, header.first_chunk)
        if not isinstance(chain, int):
            kept |= {row.id for row, _ in chain}
    victims, excess = tree.give_up(tree.nbytes + nbytes - max_disk_bytes, kept)
    if excess > 0:
        raise too_large(nbytes, max_disk_bytes)
    return victims


def choose_excess(
    db: sqlite3.Connection, max_disk_bytes: int, pinned: Collection[str] = ()
) -> tuple[list[SegmentRow], int]:
    """Which segments to delete so that what is left is within the bound, by the same rules as `choose_victims`.

    Returns:
        the segments, and by how many bytes (0 or less: not at all) pinned ones exceed the bound all the same.
    """
    excess = stored_bytes(db) - max_disk_bytes
    if excess <= 0:
        return [], excess
    tree = _Tree(db)
    return tree.give_up(excess, tree.pinned(pinned))


def stored_bytes(db: sqlite3.Connection) -> int:
    """What all published segments take up, in bytes."""
    (total,) = db.execute("SELECT total(nbytes) FROM segments").fetchone()
    return int(total)


def expired_segments(db: sqlite3.Connection, unused_since: float, pinned: Collection[str] = ()) -> list[SegmentRow]:
    """Leaves that nobody used after `unused_since` (seconds since the epoch), children before parents; no pinned ones.

    A look-up uses every segment of the prefix that it finds, so a parent never expires before what continues it.
    """
    tree = _Tree(db)
    found: list[SegmentRow] = []
    while True:
        more = [
            number
            for number, row in tree.rows.items()
            if not (row.pinned or row.key in pinned) and row.last_used < unused_since and tree.is_leaf(number)
        ]
        if not more:
            return found
        found += [tree.remove(number) for number in more]


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
    return [row for row in rows if not row.pinned and row.num_chunks == 1]


def too_large(nbytes: int, max_disk_bytes: int) -> StoreFullError:
    """The error for a segment that cannot fit."""
    return StoreFullError(
        f"a segment of {nbytes} bytes does not fit in max_disk_bytes={max_disk_bytes} with what must stay there; "
        "raise the bound, or delete or unpin stored prefixes"
    )
