"""The tables of the index: what a row may say, and the statements that read and write rows.

Any byte of the database may be wrong: a row that makes no sense raises `IndexDamagedError`. Where a function takes
`roots`, it regards only segments of these prefixes (root hashes, 16 bytes each: see `tenant.py`); `None` is all.
"""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
import time
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from ..errors import StoreError
from ..wording import quoted
from .format import SegmentHeader
from .hashing import TokenIds
from .segment_row import COLUMNS, SegmentRow, checked_name, distinct, is_key
from .totals import TOTALS, IndexDamagedError, Roots, add_to_totals, is_number, take_from_totals, totals_are_right

__all__ = [
    "ANY_ROOT",
    "COLUMNS",
    "MAX_TOKEN_BYTES",
    "SCHEMA",
    "IndexDamagedError",
    "SegmentRow",
    "all_segments",
    "checked_name",
    "chunk_rows",
    "clear",
    "distinct",
    "drop_segment",
    "end_future_uses",
    "find_chunk",
    "has_chunks",
    "index_problems",
    "insert_segment",
    "is_key",
    "is_reachable",
    "keys_of_all",
    "mark_used",
    "number_of_chunks",
    "require_place",
    "segment_by_id",
    "segment_by_key",
    "segments_by_id",
    "segments_that_begin_with",
    "segments_with_beginning",
    "set_use",
]

# The token ids of the longest chunk that the format allows.
MAX_TOKEN_BYTES = 8 * 4096
_AT_ONCE = 500
# So many problems are enough to know that the index is damaged.
_MAX_PROBLEMS = 100

SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE segments (
    id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, fingerprint TEXT NOT NULL, beginning TEXT NOT NULL,
    parent BLOB NOT NULL, first_chunk INTEGER NOT NULL, num_chunks INTEGER NOT NULL, num_tokens INTEGER NOT NULL,
    chunk_size INTEGER NOT NULL, num_layers INTEGER NOT NULL, dtype TEXT NOT NULL, nbytes INTEGER NOT NULL,
    compute_ms INTEGER NOT NULL, created REAL NOT NULL, last_used REAL NOT NULL, uses INTEGER NOT NULL,
    pinned INTEGER NOT NULL, root BLOB NOT NULL
);
CREATE INDEX segments_by_root ON segments (root, last_used);
CREATE TABLE chunks (
    hash BLOB NOT NULL, segment INTEGER NOT NULL, parent BLOB NOT NULL, position INTEGER NOT NULL,
    tokens BLOB NOT NULL, PRIMARY KEY (hash, segment)
) WITHOUT ROWID;
CREATE INDEX chunks_by_parent ON chunks (parent, tokens, position);
CREATE INDEX chunks_by_segment ON chunks (segment, position);
"""
SCHEMA += TOTALS

ANY_ROOT = "root IN (SELECT root FROM totals)"
"""Of segments, true; a query that says so goes through the index by root and last use."""


def _tables(db: sqlite3.Connection) -> set[tuple[str, ...]]:
    query = "SELECT type, name, tbl_name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'"
    return set(db.execute(query).fetchall())


@cache
def _expected_tables() -> set[tuple[str, ...]]:
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        db.executescript(SCHEMA)
        return _tables(db)


def index_problems(db: sqlite3.Connection) -> list[str]:
    """What is wrong with the database as such, in words."""
    problems = [text for (text,) in db.execute("PRAGMA integrity_check(20)") if text != "ok"]
    if _tables(db) != _expected_tables():
        return [*problems, "its tables are not the ones that this library makes"]
    try:
        rows = {row.id: row for row in all_segments(db)}
    except IndexDamagedError as error:
        return [*problems, str(error)]
    for number, count, sane in db.execute(
        "SELECT segment, count(*), min(typeof(hash) = 'blob' AND length(hash) = 16 AND typeof(parent) = 'blob' AND "
        "length(parent) = 16 AND typeof(position) = 'integer' AND position >= 0 AND typeof(tokens) = 'blob' AND "
        "length(tokens) BETWEEN 8 AND ? AND length(tokens) % 8 = 0) FROM chunks GROUP BY segment",
        (MAX_TOKEN_BYTES,),
    ):
        if len(problems) >= _MAX_PROBLEMS:
            return problems
        row = rows.pop(number, None)
        if row is None:
            problems.append(f"chunks refer to a segment {quoted(number)} that is not there")
        elif count != row.num_chunks or not sane:
            problems.append(f"the chunks of segment {row.key} make no sense")
    if not totals_are_right(db):
        problems.append("what it says that all segments take up is not what they do")
    return problems + [f"segment {row.key} has no chunks" for row in rows.values()]


def insert_segment(
    db: sqlite3.Connection,
    header: SegmentHeader,
    token_ids: TokenIds,
    nbytes: int,
    created: float,
    pinned: bool = False,
) -> None:
    """Add a segment and its chunks.

    Args:
        header: of the segment.
        token_ids: int64 `[num_tokens]`.
        nbytes: what it takes up.
        created: seconds since the epoch.
        pinned: whether eviction leaves it alone.

    Raises:
        StoreError: the token ids do not have the key that the header names, or `nbytes` is no number of bytes.
    """
    geometry = header.geometry
    chunks = chunk_rows(header, token_ids)
    if chunks[-1][0].hex() != header.key:
        raise StoreError(f"segment {header.key}: its token ids do not have this key")
    if not is_number(nbytes):
        raise StoreError(f"segment {header.key}: cannot take up {quoted(nbytes)} bytes")
    created = _past(created)
    fields: dict[str, Any] = {
        "key": header.key,
        "fingerprint": header.fingerprint,
        "beginning": header.beginning,
        "parent": header.parent_hash,
        "first_chunk": header.first_chunk,
        "num_chunks": header.num_chunks,
        "num_tokens": header.num_tokens,
        "chunk_size": geometry.chunk_size,
        "num_layers": geometry.num_layers,
        "dtype": geometry.dtype_name,
        "nbytes": nbytes,
        "compute_ms": header.compute_ms,
        "created": created,
        "last_used": created,
        "uses": 0,
        "pinned": int(pinned),
        "root": bytes.fromhex(header.root),
    }
    names = ", ".join(fields)
    cursor = db.execute(
        f"INSERT INTO segments ({names}) VALUES ({', '.join('?' * len(fields))})", tuple(fields.values())
    )
    assert cursor.lastrowid is not None
    db.executemany(
        "INSERT INTO chunks (segment, hash, parent, position, tokens) VALUES (?, ?, ?, ?, ?)",
        [(cursor.lastrowid, *row) for row in chunks],
    )
    add_to_totals(db, fields["root"], header.fingerprint, geometry.chunk_size, header.num_tokens, nbytes)


def _past(moment: float) -> float:
    """`moment` as a time that may have been: a clock that was wrong, or a liar, may say something else."""
    now = time.time()
    return moment if 0 <= moment <= now else now


def chunk_rows(header: SegmentHeader, token_ids: TokenIds) -> list[tuple[bytes, bytes, int, bytes]]:
    """`(hash, parent, position, token ids)` of every chunk of a segment: what the index must say of it."""
    size = header.geometry.chunk_size
    hashes = header.hashes(token_ids)
    octets, step = token_ids.tobytes(), 8 * size
    parents = [header.parent_hash, *hashes[:-1]]
    return [
        (own, parent, position, octets[position * step : (position + 1) * step])
        for position, (own, parent) in enumerate(zip(hashes, parents, strict=True))
    ]


def has_chunks(db: sqlite3.Connection, number: int, rows: list[tuple[bytes, bytes, int, bytes]]) -> bool:
    """Whether the index says of the chunks of the segment with this id what `chunk_rows` does."""
    # (One by one: there may be many more than the segment has chunks, and longer ones.)
    query = "SELECT hash, parent, position, tokens FROM chunks WHERE segment = ? ORDER BY position"
    return all(told == row for told, row in itertools.zip_longest(db.execute(query, (number,)), rows))


def number_of_chunks(db: sqlite3.Connection, number: int) -> int:
    """Of how many chunks the index knows that they lie in the segment with this id."""
    (count,) = db.execute("SELECT count(*) FROM chunks WHERE segment = ?", (number,)).fetchone()
    return int(count)


def drop_segment(db: sqlite3.Connection, key: str) -> None:
    """Forget a segment and its chunks."""
    found = db.execute(
        "SELECT id, num_tokens, nbytes, root, fingerprint, chunk_size FROM segments WHERE key = ?", (key,)
    ).fetchone()
    if found is None:
        return
    number, tokens, nbytes, root, fingerprint, chunk_size = found
    db.execute("DELETE FROM chunks WHERE segment = ?", (number,))
    db.execute("DELETE FROM segments WHERE id = ?", (number,))
    take_from_totals(db, root, fingerprint, chunk_size, tokens, nbytes)


def clear(db: sqlite3.Connection) -> None:
    """Forget all segments."""
    for table in ("chunks", "segments", "totals"):
        db.execute(f"DELETE FROM {table}")


def all_segments(db: sqlite3.Connection, roots: Roots = None) -> list[SegmentRow]:
    """All segments of `roots`, oldest first."""
    # (Sorted here: SQLite would collect rows that nobody has checked, and write them to a file where they are many.)
    query = f"SELECT {COLUMNS} FROM segments"
    if roots is None:
        found: Iterable[Any] = db.execute(query)
    else:
        found = (row for root in roots for row in db.execute(f"{query} WHERE root = ?", (root,)))
    return sorted(distinct(map(SegmentRow.checked, found)), key=lambda row: (row.created, row.id))


def keys_of_all(db: sqlite3.Connection) -> set[str]:
    """The keys of all segments."""
    return {checked_name(key) for (key,) in db.execute("SELECT key FROM segments")}


def segment_by_key(db: sqlite3.Connection, key: str) -> SegmentRow | None:
    """The segment named `key`, if there is one."""
    row = db.execute(f"SELECT {COLUMNS} FROM segments WHERE key = ?", (key,)).fetchone()
    return SegmentRow.checked(row) if row else None


def find_chunk(
    db: sqlite3.Connection, chunk: bytes, root: bytes | None = None, at: int = 0, whole: bool = False
) -> tuple[int, int] | None:
    """`(segment id, position in it)` of a chunk; of several, the one with the most chunks before it.

    Args:
        db: the index.
        chunk: its hash.
        root: regard only segments of prefixes with this root hash; `None`: all.
        at: with `root`: regard only segments that hold it as chunk `at` of the prefix.
        whole: with `root`: regard only segments in which it is full, as what other segments continue must be.
    """
    if root is None:
        found = db.execute(
            "SELECT segment, position FROM chunks WHERE hash = ? ORDER BY position DESC LIMIT 1", (chunk,)
        ).fetchone()
    else:
        # (A chunk of a segment that is not there is damage, and must be seen.)
        found = db.execute(
            "SELECT segment, position FROM chunks LEFT JOIN segments ON id = segment WHERE hash = ? AND (id IS NULL OR "
            "root = ? AND first_chunk + position = ? AND (position + 1 - ?) * chunk_size <= num_tokens) "
            "ORDER BY position DESC LIMIT 1",
            (chunk, root, at, not whole),
        ).fetchone()
    if found is not None:
        require_place(*found)
    return found  # type: ignore[no-any-return]


def require_place(segment: object, position: object) -> None:
    """Check what the database says of a chunk.

    Raises:
        IndexDamagedError: it makes no sense.
    """
    if type(segment) is not int or not is_number(position):
        raise IndexDamagedError(f"a chunk at position {quoted(position)} of segment {quoted(segment)} makes no sense")


def is_reachable(db: sqlite3.Connection, key: str) -> bool:
    """Whether the segment `key` is stored, and what it continues as well."""
    row = segment_by_key(db, key)
    return row is not None and (
        row.first_chunk == 0 or find_chunk(db, row.parent, row.root, row.first_chunk - 1, whole=True) is not None
    )


def segments_with_beginning(db: sqlite3.Connection, beginning: str) -> list[SegmentRow]:
    """The segments whose keys begin with these digits, in the order of their keys."""
    # (A key has hex digits only, and all of these come before "g".)
    query = f"SELECT {COLUMNS} FROM segments WHERE key >= ? AND key < ? ORDER BY key"
    return list(distinct(map(SegmentRow.checked, db.execute(query, (beginning, f"{beginning}g")))))


def segments_that_begin_with(db: sqlite3.Connection, parent: bytes, beginnings: list[bytes]) -> list[SegmentRow]:
    """The segments whose first chunk follows the chunk `parent` and is one of `beginnings` (its token ids)."""
    marks = ", ".join("?" * len(beginnings))
    query = (
        f"SELECT {COLUMNS} FROM segments WHERE id IN "
        f"(SELECT segment FROM chunks WHERE parent = ? AND position = 0 AND tokens IN ({marks}))"
    )
    return list(distinct(map(SegmentRow.checked, db.execute(query, (parent, *beginnings)))))


def segment_by_id(db: sqlite3.Connection, number: int) -> SegmentRow:
    """The segment that chunks refer to by `number`."""
    return SegmentRow.checked(db.execute(f"SELECT {COLUMNS} FROM segments WHERE id = ?", (number,)).fetchone())


def segments_by_id(db: sqlite3.Connection, numbers: Sequence[int]) -> list[SegmentRow]:
    """The segments with these ids, in this order; each must be there."""
    found: dict[int, SegmentRow] = {}
    for start in range(0, len(numbers), _AT_ONCE):
        some = numbers[start : start + _AT_ONCE]
        query = f"SELECT {COLUMNS} FROM segments WHERE id IN ({', '.join('?' * len(some))})"
        found |= {values[0]: SegmentRow.checked(values) for values in db.execute(query, some)}
    return [found[number] if number in found else SegmentRow.checked(None) for number in numbers]


def set_use(db: sqlite3.Connection, key: str, created: float, last_used: float, uses: int) -> None:
    """Set what only the index knows of a segment."""
    values = (_past(created), _past(last_used), uses, key)
    db.execute("UPDATE segments SET created = ?, last_used = ?, uses = ? WHERE key = ?", values)


def set_stored_bytes(db: sqlite3.Connection, key: str, nbytes: int) -> None:
    """Set what a segment takes up where it lies; does nothing where it is not known."""
    row = segment_by_key(db, key)
    if row is not None:
        db.execute("UPDATE segments SET nbytes = ? WHERE id = ?", (nbytes, row.id))
        take_from_totals(db, row.root, row.fingerprint, row.chunk_size, row.num_tokens, row.nbytes)
        add_to_totals(db, row.root, row.fingerprint, row.chunk_size, row.num_tokens, nbytes)


def mark_used(db: sqlite3.Connection, uses: Iterable[tuple[int, float, str]]) -> None:
    """Add `(uses, time of the last one, key)`."""
    values = [(count, _past(when), key) for count, when, key in uses]
    db.executemany("UPDATE segments SET uses = uses + ?, last_used = max(last_used, ?) WHERE key = ?", values)


def end_future_uses(db: sqlite3.Connection) -> None:
    """Segments that were used in the future, as a clock that was wrong or a liar said, were used now.

    Otherwise they would never grow old.
    """
    now = time.time()
    db.execute(f"UPDATE segments SET last_used = ? WHERE {ANY_ROOT} AND last_used > ?", (now, now))
