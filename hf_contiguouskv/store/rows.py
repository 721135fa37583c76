"""The tables of the index: what a row may say, and the statements that read and write rows.

Any byte of the database may be wrong: a row that makes no sense raises `IndexDamagedError`.
"""

from __future__ import annotations

import contextlib
import math
import re
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from ..errors import StoreError
from .format import SegmentHeader
from .hashing import HASH_BYTES, TokenIds, segment_hashes

_KEY = re.compile(r"[0-9a-f]{32}")

SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE segments (
    id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, fingerprint TEXT NOT NULL, beginning TEXT NOT NULL,
    parent BLOB NOT NULL, first_chunk INTEGER NOT NULL, num_chunks INTEGER NOT NULL, num_tokens INTEGER NOT NULL,
    chunk_size INTEGER NOT NULL, num_layers INTEGER NOT NULL, dtype TEXT NOT NULL, nbytes INTEGER NOT NULL,
    compute_ms INTEGER NOT NULL, created REAL NOT NULL, last_used REAL NOT NULL, uses INTEGER NOT NULL,
    pinned INTEGER NOT NULL
);
CREATE INDEX segments_by_parent ON segments (parent);
CREATE INDEX segments_by_beginning ON segments (beginning);
CREATE TABLE chunks (
    hash BLOB NOT NULL, segment INTEGER NOT NULL, parent BLOB NOT NULL, position INTEGER NOT NULL,
    tokens BLOB NOT NULL, PRIMARY KEY (hash, segment)
) WITHOUT ROWID;
CREATE INDEX chunks_by_parent ON chunks (parent, tokens);
CREATE INDEX chunks_by_segment ON chunks (segment);
"""

_COLUMNS = (
    "id, key, fingerprint, beginning, parent, first_chunk, num_chunks, num_tokens, chunk_size, num_layers, dtype, "
    "nbytes, compute_ms, created, last_used, uses, pinned"
)


@dataclass(frozen=True, slots=True)
class SegmentRow:
    """One segment as the index knows it.

    `parent` is the chain hash before its first chunk (the root's for roots), `nbytes` what it takes up where it lies;
    the others are fields of its header.
    """

    id: int
    key: str
    fingerprint: str
    beginning: str
    parent: bytes
    first_chunk: int
    num_chunks: int
    num_tokens: int
    chunk_size: int
    num_layers: int
    dtype: str
    nbytes: int
    compute_ms: int
    created: float
    last_used: float
    uses: int
    pinned: int

    @classmethod
    def checked(cls, values: tuple[Any, ...] | None) -> SegmentRow:
        """A row as the database gave it. Any byte of the file may be wrong, so nothing is taken for granted.

        Raises:
            IndexDamagedError: it makes no sense.
        """
        if values is None:
            raise IndexDamagedError("a chunk refers to a segment that is not there")
        row = cls(*values)
        counts = (row.id, row.first_chunk, row.num_chunks, row.num_tokens, row.chunk_size, row.num_layers, row.nbytes)
        sane = (
            all(type(number) is int and 0 <= number < 2**53 for number in (*counts, row.compute_ms, row.uses))
            and type(row.key) is str
            and bool(_KEY.fullmatch(row.key))
            and all(type(text) is str for text in (row.fingerprint, row.beginning, row.dtype))
            and type(row.parent) is bytes
            and len(row.parent) == HASH_BYTES
            and all(type(moment) in (float, int) and math.isfinite(moment) for moment in (row.created, row.last_used))
            and row.pinned in (0, 1)
            and row.chunk_size > 0
            and row.num_tokens > 0
            and row.num_chunks == -(-row.num_tokens // row.chunk_size)
        )
        if not sane:
            raise IndexDamagedError(f"the row of segment {str(row.key)[:64]!r} makes no sense")
        return row


class IndexDamagedError(sqlite3.DatabaseError):
    """A row of the index makes no sense: the index is rebuilt, as if the file were damaged."""


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
        "length(tokens) > 0 AND length(tokens) % 8 = 0) FROM chunks GROUP BY segment"
    ):
        row = rows.pop(number, None)
        if row is None:
            problems.append(f"chunks refer to a segment {number!r} that is not there")
        elif count != row.num_chunks or not sane:
            problems.append(f"the chunks of segment {row.key} make no sense")
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
        StoreError: the token ids do not have the key that the header names.
    """
    geometry = header.geometry
    if segment_hashes(header.parent_hash, token_ids, geometry.chunk_size)[-1].hex() != header.key:
        raise StoreError(f"segment {header.key}: its token ids do not have this key")
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
    }
    names = ", ".join(fields)
    cursor = db.execute(
        f"INSERT INTO segments ({names}) VALUES ({', '.join('?' * len(fields))})", tuple(fields.values())
    )
    assert cursor.lastrowid is not None
    db.executemany(
        "INSERT INTO chunks (segment, hash, parent, position, tokens) VALUES (?, ?, ?, ?, ?)",
        [(cursor.lastrowid, *row) for row in chunk_rows(header, token_ids)],
    )


def chunk_rows(header: SegmentHeader, token_ids: TokenIds) -> list[tuple[bytes, bytes, int, bytes]]:
    """`(hash, parent, position, token ids)` of every chunk of a segment: what the index must say of it."""
    size = header.geometry.chunk_size
    hashes = segment_hashes(header.parent_hash, token_ids, size)
    octets, step = token_ids.tobytes(), 8 * size
    parents = [header.parent_hash, *hashes[:-1]]
    return [
        (own, parent, position, octets[position * step : (position + 1) * step])
        for position, (own, parent) in enumerate(zip(hashes, parents, strict=True))
    ]


def stored_chunk_rows(db: sqlite3.Connection, number: int) -> list[tuple[bytes, bytes, int, bytes]]:
    """What the index says of the chunks of the segment with this id, in order."""
    return db.execute(
        "SELECT hash, parent, position, tokens FROM chunks WHERE segment = ? ORDER BY position", (number,)
    ).fetchall()


def drop_segment(db: sqlite3.Connection, key: str) -> None:
    """Forget a segment and its chunks."""
    db.execute("DELETE FROM chunks WHERE segment IN (SELECT id FROM segments WHERE key = ?)", (key,))
    db.execute("DELETE FROM segments WHERE key = ?", (key,))


def all_segments(db: sqlite3.Connection) -> list[SegmentRow]:
    """All segments, oldest first."""
    return [SegmentRow.checked(row) for row in db.execute(f"SELECT {_COLUMNS} FROM segments ORDER BY created, id")]


def segment_by_key(db: sqlite3.Connection, key: str) -> SegmentRow | None:
    """The segment named `key`, if there is one."""
    row = db.execute(f"SELECT {_COLUMNS} FROM segments WHERE key = ?", (key,)).fetchone()
    return SegmentRow.checked(row) if row else None


def is_reachable(db: sqlite3.Connection, key: str) -> bool:
    """Whether the segment `key` is stored, and what it continues as well."""
    row = segment_by_key(db, key)
    return row is not None and (row.first_chunk == 0 or find_chunk(db, row.parent) is not None)


def segments_that_begin_with(db: sqlite3.Connection, parent: bytes, beginnings: list[bytes]) -> list[SegmentRow]:
    """The segments whose first chunk follows the chunk `parent` and is one of `beginnings` (its token ids)."""
    marks = ", ".join("?" * len(beginnings))
    query = (
        f"SELECT {_COLUMNS} FROM segments WHERE id IN "
        f"(SELECT segment FROM chunks WHERE parent = ? AND position = 0 AND tokens IN ({marks}))"
    )
    return [SegmentRow.checked(row) for row in db.execute(query, (parent, *beginnings))]


def segment_by_id(db: sqlite3.Connection, number: int) -> SegmentRow:
    """The segment that chunks refer to by `number`."""
    return SegmentRow.checked(db.execute(f"SELECT {_COLUMNS} FROM segments WHERE id = ?", (number,)).fetchone())


def find_chunk(db: sqlite3.Connection, chunk: bytes) -> tuple[int, int] | None:
    """`(segment id, position in it)` of a chunk; of several, the one with the most chunks before it."""
    found: tuple[int, int] | None = db.execute(
        "SELECT segment, position FROM chunks WHERE hash = ? ORDER BY position DESC LIMIT 1", (chunk,)
    ).fetchone()
    if found is not None:
        _require_numbers(*found)
    return found


def _require_numbers(segment: object, position: object) -> None:
    if type(segment) is not int or type(position) is not int or not 0 <= position < 2**53:
        raise IndexDamagedError(f"a chunk at position {position!r} of segment {segment!r} makes no sense")


def known_chunks(db: sqlite3.Connection, chunks: list[bytes]) -> set[bytes]:
    """Those of `chunks` that are stored."""
    return {chunk for chunk in chunks if find_chunk(db, chunk) is not None}


def is_stored_for_another_model(db: sqlite3.Connection, beginning: str, fingerprint: str) -> bool:
    """Whether another model's prefix begins with the tokens that `beginning` stands for."""
    query = "SELECT 1 FROM segments WHERE beginning = ? AND fingerprint != ? LIMIT 1"
    return db.execute(query, (beginning, fingerprint)).fetchone() is not None


def closest_child(db: sqlite3.Connection, parent: bytes, tokens: bytes) -> tuple[int, int, int] | None:
    """Among the chunks that follow `parent`, the one that shares the most leading token ids with `tokens`.

    Returns:
        `(segment id, position in it, shared tokens)`, or `None` when not even one token is shared.
    """
    best: tuple[int, int, int] | None = None
    # In sorted order nothing shares more with `tokens` than its two neighbours: the number of children does not matter.
    for condition in ("tokens >= ? ORDER BY tokens", "tokens < ? ORDER BY tokens DESC"):
        row = db.execute(
            f"SELECT segment, position, tokens FROM chunks WHERE parent = ? AND {condition} LIMIT 1", (parent, tokens)
        ).fetchone()
        if row is not None:
            _require_numbers(*row[:2])
            if type(row[2]) is not bytes:
                raise IndexDamagedError("token ids of a chunk are no bytes")
            shared = _shared_tokens(row[2], tokens)
            if shared > (best[2] if best else 0):
                best = (row[0], row[1], shared)
    return best


def _shared_tokens(left: bytes, right: bytes) -> int:
    length = min(len(left), len(right)) // 8
    # (A stored chunk is never empty, and whole numbers of 8 bytes: what is left over here is damage, and not counted.)
    ours, theirs = np.frombuffer(left, dtype="<i8", count=length), np.frombuffer(right, dtype="<i8", count=length)
    different = np.flatnonzero(ours != theirs)
    return int(different[0]) if different.size else length


def parent_ids(db: sqlite3.Connection) -> set[tuple[int, int]]:
    """All `(child id, parent id)`: the child continues a chunk of the parent. More than one may hold that chunk."""
    return set(
        db.execute("SELECT s.id, c.segment FROM segments s JOIN chunks c ON c.hash = s.parent WHERE c.segment != s.id")
    )


def set_use(db: sqlite3.Connection, key: str, created: float, last_used: float, uses: int) -> None:
    """Set what only the index knows of a segment."""
    values = (created, last_used, uses, key)
    db.execute("UPDATE segments SET created = ?, last_used = ?, uses = ? WHERE key = ?", values)


def mark_used(db: sqlite3.Connection, uses: Iterable[tuple[int, float, str]]) -> None:
    """Add `(uses, time of the last one, key)`."""
    db.executemany("UPDATE segments SET uses = uses + ?, last_used = max(last_used, ?) WHERE key = ?", list(uses))
