"""What all segments take up together, kept in a table: nothing that asks for it has to look at every segment.

`rows.py` changes the table in the transactions that add and drop segments. As everything in the index it may be wrong:
`totals_are_right` compares it with the segments.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .hashing import HASH_BYTES

TOTALS = """
CREATE TABLE totals (
    root BLOB NOT NULL, fingerprint TEXT NOT NULL, chunk_size INTEGER NOT NULL, segments INTEGER NOT NULL,
    tokens INTEGER NOT NULL, bytes INTEGER NOT NULL, PRIMARY KEY (root, fingerprint, chunk_size)
) WITHOUT ROWID;
"""

_OF_ONE = "WHERE root = ? AND fingerprint = ? AND chunk_size = ?"
_BELOW = 2**53
_MAX_FINGERPRINT = 256  # As in headers: see `format.py`.

Roots = Sequence[bytes] | None
"""Root hashes of prefixes, 16 bytes each; `None`: of all that are stored."""


class IndexDamagedError(sqlite3.DatabaseError):
    """A row of the index makes no sense: the index is rebuilt, as if the file were damaged."""


class EarlierIndexError(IndexDamagedError):
    """The index is of an earlier release: it is rebuilt."""


def is_number(value: object) -> bool:
    """Whether a value of the database is a count, as this library writes them."""
    return type(value) is int and 0 <= value < _BELOW


def is_fingerprint(value: object) -> bool:
    """Whether this is text that is no longer than a fingerprint may be."""
    return type(value) is str and len(value) <= _MAX_FINGERPRINT


@dataclass(frozen=True, slots=True)
class Totals:
    """How many segments there are, how many tokens they hold, and how many bytes they take up."""

    segments: int = 0
    tokens: int = 0
    nbytes: int = 0


def totals(db: sqlite3.Connection, roots: Roots = None) -> Totals:
    """What the segments of `roots` take up.

    Raises:
        IndexDamagedError: the table makes no sense.
    """
    query, sums = "SELECT segments, tokens, bytes FROM totals", [0, 0, 0]
    found: Iterable[Sequence[Any]]
    if roots is None:
        found = db.execute(query)
    else:
        found = (row for root in roots for row in db.execute(f"{query} WHERE root = ?", (root,)))
    for row in found:
        if not all(map(is_number, row)):
            raise IndexDamagedError("what it says that all segments take up makes no sense")
        sums = [one + more for one, more in zip(sums, row, strict=True)]
    return Totals(*sums)


def stored_models(db: sqlite3.Connection) -> list[tuple[str, int]]:
    """`(fingerprint, chunk size)` of all that is stored, each pair once.

    Raises:
        IndexDamagedError: the table makes no sense.
    """
    # (Told apart here: what SQLite collects nobody has checked.)
    found: dict[tuple[str, int], None] = {}
    for fingerprint, size in db.execute("SELECT fingerprint, chunk_size FROM totals"):
        if not (is_fingerprint(fingerprint) and is_number(size)):
            raise IndexDamagedError("a model that it names makes no sense")
        found[fingerprint, size] = None
    return list(found)


def stored_roots(db: sqlite3.Connection) -> list[bytes]:
    """The root hashes of all prefixes that are stored, sorted.

    Raises:
        IndexDamagedError: the table makes no sense.
    """
    found: set[bytes] = set()
    for (root,) in db.execute("SELECT root FROM totals"):
        if type(root) is not bytes or len(root) != HASH_BYTES:
            raise IndexDamagedError("a root that it names makes no sense")
        found.add(root)
    return sorted(found)


def add_to_totals(
    db: sqlite3.Connection, root: bytes, fingerprint: str, chunk_size: int, tokens: int, nbytes: int
) -> None:
    """A segment was added."""
    db.execute(
        "INSERT INTO totals VALUES (?, ?, ?, 1, ?, ?) ON CONFLICT (root, fingerprint, chunk_size) DO UPDATE SET "
        "segments = segments + 1, tokens = tokens + excluded.tokens, bytes = bytes + excluded.bytes",
        (root, fingerprint, chunk_size, tokens, nbytes),
    )


def take_from_totals(
    db: sqlite3.Connection, root: bytes, fingerprint: str, chunk_size: int, tokens: int, nbytes: int
) -> None:
    """A segment was dropped."""
    group = (root, fingerprint, chunk_size)
    db.execute(
        f"UPDATE totals SET segments = segments - 1, tokens = tokens - ?, bytes = bytes - ? {_OF_ONE}",
        (tokens, nbytes, *group),
    )
    db.execute(f"DELETE FROM totals {_OF_ONE} AND segments <= 0", group)


def totals_are_right(db: sqlite3.Connection) -> bool:
    """Whether the table says what the segments do, whose rows make sense (`SegmentRow.checked`)."""
    counted = set(
        db.execute(
            "SELECT root, fingerprint, chunk_size, count(*), sum(num_tokens), sum(nbytes) FROM segments "
            "GROUP BY 1, 2, 3"
        )
    )
    told: set[tuple[Any, ...]] = set()
    for row in db.execute("SELECT root, fingerprint, chunk_size, segments, tokens, bytes FROM totals"):
        if row not in counted:
            return False
        told.add(row)
    return len(told) == len(counted)
