"""The index of a store: which chunk lies in which segment file. SQLite, and always rebuildable from the files."""

from __future__ import annotations

import errno
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from filelock import FileLock

from ..errors import StoreError, StoreFormatError, StoreFullError
from .format import SegmentHeader
from .hashing import TokenIds, segment_hashes

logger = logging.getLogger("hf_contiguouskv")

INDEX_FORMAT = 1
_BUSY_S = 60.0

_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE segments (
    id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, file TEXT NOT NULL, fingerprint TEXT NOT NULL,
    parent BLOB NOT NULL, first_chunk INTEGER NOT NULL, num_chunks INTEGER NOT NULL, num_tokens INTEGER NOT NULL,
    chunk_size INTEGER NOT NULL, num_layers INTEGER NOT NULL, dtype TEXT NOT NULL, nbytes INTEGER NOT NULL,
    created REAL NOT NULL, last_used REAL NOT NULL, uses INTEGER NOT NULL, pinned INTEGER NOT NULL
);
CREATE INDEX segments_by_parent ON segments (parent);
CREATE TABLE chunks (
    hash BLOB NOT NULL, segment INTEGER NOT NULL, parent BLOB NOT NULL, position INTEGER NOT NULL,
    tokens BLOB NOT NULL, PRIMARY KEY (hash, segment)
) WITHOUT ROWID;
CREATE INDEX chunks_by_parent ON chunks (parent, tokens);
CREATE INDEX chunks_by_segment ON chunks (segment);
"""

_COLUMNS = (
    "id, key, file, fingerprint, parent, first_chunk, num_chunks, num_tokens, chunk_size, num_layers, dtype, nbytes, "
    "created, last_used, uses, pinned"
)

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class SegmentRow:
    """One segment as the index knows it; `parent` is the chain hash before its first chunk (the root's for roots)."""

    id: int
    key: str
    file: str
    fingerprint: str
    parent: bytes
    first_chunk: int
    num_chunks: int
    num_tokens: int
    chunk_size: int
    num_layers: int
    dtype: str
    nbytes: int
    created: float
    last_used: float
    uses: int
    pinned: int


class StoreIndex:
    """The SQLite file of a store, shared by threads (two connections, each with its lock) and processes (WAL).

    Args:
        path: of the database.
        refill: called with a connection to a new, empty database; inserts what the segment files say.

    A missing database is made anew; a damaged one is moved aside first. Nothing that is stored depends on it.
    """

    def __init__(self, path: Path, refill: Callable[[sqlite3.Connection], None]) -> None:
        self.path = path
        self._refill = refill
        # Two connections: a look-up must not wait for a publish of this process, which flushes folders to the disk.
        self._for_reading, self._for_writing = _Connection(path), _Connection(path)
        self.read(lambda db: None)

    def read(self, query: Callable[[sqlite3.Connection], Result]) -> Result:
        """Run `query`, which only reads, on one state of the index."""
        return self._run(self._for_reading, query, "BEGIN")

    def write(self, change: Callable[[sqlite3.Connection], Result]) -> Result:
        """Run `change` as one transaction that excludes all other writers, in all processes."""
        return self._run(self._for_writing, change, "BEGIN IMMEDIATE")

    def _run(self, connection: _Connection, action: Callable[[sqlite3.Connection], Result], begin: str) -> Result:
        with connection.lock:
            for attempt in (1, 2):
                try:
                    db = connection.open()
                    if db is None:
                        self._replace(None)
                        db = connection.open()
                    if db is not None:
                        return _transaction(db, action, begin)
                except sqlite3.DatabaseError as error:
                    if attempt == 2 or not _is_damage(error):
                        raise _as_store_error(self.path, error) from error
                    connection.close()
                    self._replace(str(error))
            raise StoreError(f"{self.path}: disappears again and again; is another program deleting it?")

    def _replace(self, damage: str | None) -> None:
        """Build a new database from the segment files and put it in place; the damaged one is moved aside."""
        with FileLock(self.path.with_suffix(".lock"), timeout=600):
            if self.path.exists():
                if damage is None or _is_sound(self.path):
                    return  # Another process was faster.
                aside = self.path.with_name(f"{self.path.name}.damaged-{time.time_ns()}")
                logger.warning("%s is damaged (%s): moved to %s and rebuilt", self.path, damage, aside.name)
                os.replace(self.path, aside)
            for suffix in ("-wal", "-shm"):
                self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
            fresh = self.path.with_name(self.path.name + ".new")
            fresh.unlink(missing_ok=True)
            db = sqlite3.connect(fresh, isolation_level=None)
            try:
                # Nobody sees the file before it is complete, so it needs no journal meanwhile.
                db.execute("PRAGMA journal_mode = OFF")
                db.executescript(_SCHEMA)
                db.execute("INSERT INTO meta VALUES ('format', ?)", (str(INDEX_FORMAT),))
                _transaction(db, self._refill, "BEGIN IMMEDIATE")
                db.execute("PRAGMA journal_mode = WAL")
            finally:
                db.close()
            os.chmod(fresh, 0o600)
            os.replace(fresh, self.path)

    def rebuild(self) -> None:
        """Empty the tables and fill them from the segment files; pins and counters of use are kept."""

        def refill(db: sqlite3.Connection) -> None:
            kept = {row.key: row for row in all_segments(db)}
            db.execute("DELETE FROM chunks")
            db.execute("DELETE FROM segments")
            self._refill(db)
            for row in all_segments(db):
                if old := kept.get(row.key):
                    db.execute(
                        "UPDATE segments SET created = ?, last_used = ?, uses = ?, pinned = ? WHERE id = ?",
                        (old.created, old.last_used, old.uses, old.pinned, row.id),
                    )

        self.write(refill)

    def close(self) -> None:
        """Close the connections; the next use opens them again."""
        for connection in (self._for_reading, self._for_writing):
            with connection.lock:
                connection.close()


class _Connection:
    """One connection with the lock for it; opened anew after a fork, or when the file has been replaced."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = threading.RLock()
        self._db: sqlite3.Connection | None = None
        self._opened_as = (0, 0)

    def open(self) -> sqlite3.Connection | None:
        """The connection; `None` when there is no file."""
        try:
            identity = (os.stat(self.path).st_ino, os.getpid())
        except FileNotFoundError:
            self.close()
            return None
        if self._db is not None and identity == self._opened_as:
            return self._db
        self.close()
        db = sqlite3.connect(self.path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            db.execute("PRAGMA synchronous = NORMAL")
            row = db.execute("SELECT value FROM meta WHERE name = 'format'").fetchone()
            if row is None or not str(row[0]).isdigit():
                raise sqlite3.DatabaseError("no format mark")
            if int(row[0]) > INDEX_FORMAT:
                raise StoreFormatError(
                    f"{self.path}: index format {row[0]}, this library knows {INDEX_FORMAT}. Update it, or delete the "
                    "file: it is rebuilt from the segments."
                )
        except BaseException:
            db.close()
            raise
        self._db, self._opened_as = db, identity
        return db

    def close(self) -> None:
        # A forked child must not touch the connection of its parent, not even to close it.
        if self._db is not None and self._opened_as[1] == os.getpid():
            self._db.close()
        self._db = None


def _transaction(db: sqlite3.Connection, action: Callable[[sqlite3.Connection], Result], begin: str) -> Result:
    # Reads are transactions as well: what several queries see together belongs together.
    db.execute(begin)
    try:
        result = action(db)
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
    return result


def _as_store_error(path: Path, error: sqlite3.DatabaseError) -> StoreError:
    if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL:
        return StoreFullError(errno.ENOSPC, f"{path}: {error}; free space or delete stored prefixes")
    return StoreError(f"{path}: {error}")


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    code = getattr(error, "sqlite_errorcode", None)
    if code is not None and code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return True
    text = str(error)
    return "no format mark" in text or "no such table" in text or "no such column" in text


def _is_sound(path: Path) -> bool:
    db = sqlite3.connect(path, timeout=_BUSY_S)
    try:
        found = db.execute("SELECT value FROM meta WHERE name = 'format'").fetchone()
        return found is not None and db.execute("PRAGMA quick_check").fetchone() == ("ok",)
    except sqlite3.DatabaseError:
        return False
    finally:
        db.close()


def insert_segment(
    db: sqlite3.Connection, header: SegmentHeader, token_ids: TokenIds, nbytes: int, file: str, created: float
) -> None:
    """Add a segment and its chunks.

    Raises:
        StoreError: the token ids do not have the key that the header names.
    """
    geometry = header.geometry
    hashes = segment_hashes(header.parent_hash, token_ids, geometry.chunk_size)
    if hashes[-1].hex() != header.key:
        raise StoreError(f"{file}: token ids do not match the key {header.key}")
    row = (header.key, file, header.fingerprint, header.parent_hash, header.first_chunk, header.num_chunks)
    row += (header.num_tokens, geometry.chunk_size, geometry.num_layers, geometry.dtype_name, nbytes)  # type: ignore[assignment]
    cursor = db.execute(f"INSERT INTO segments ({_COLUMNS}) VALUES (NULL{', ?' * 13}, 0, 0)", (*row, created, created))
    octets, step = token_ids.tobytes(), 8 * geometry.chunk_size
    parents = [header.parent_hash, *hashes[:-1]]
    db.executemany(
        "INSERT INTO chunks (hash, segment, parent, position, tokens) VALUES (?, ?, ?, ?, ?)",
        [
            (own, cursor.lastrowid, parent, i, octets[i * step : (i + 1) * step])
            for i, (own, parent) in enumerate(zip(hashes, parents, strict=True))
        ],
    )


def drop_segment(db: sqlite3.Connection, key: str) -> None:
    """Forget a segment and its chunks."""
    db.execute("DELETE FROM chunks WHERE segment IN (SELECT id FROM segments WHERE key = ?)", (key,))
    db.execute("DELETE FROM segments WHERE key = ?", (key,))


def all_segments(db: sqlite3.Connection) -> list[SegmentRow]:
    """All segments, oldest first."""
    return [SegmentRow(*row) for row in db.execute(f"SELECT {_COLUMNS} FROM segments ORDER BY created, id")]


def segment_by_key(db: sqlite3.Connection, key: str) -> SegmentRow | None:
    """The segment named `key`, if there is one."""
    row = db.execute(f"SELECT {_COLUMNS} FROM segments WHERE key = ?", (key,)).fetchone()
    return SegmentRow(*row) if row else None


def segment_by_id(db: sqlite3.Connection, number: int) -> SegmentRow:
    """The segment that chunks refer to by `number`."""
    return SegmentRow(*db.execute(f"SELECT {_COLUMNS} FROM segments WHERE id = ?", (number,)).fetchone())


def find_chunk(db: sqlite3.Connection, chunk: bytes) -> tuple[int, int] | None:
    """`(segment id, position in it)` of a chunk; of several, the one with the most chunks before it."""
    found: tuple[int, int] | None = db.execute(
        "SELECT segment, position FROM chunks WHERE hash = ? ORDER BY position DESC LIMIT 1", (chunk,)
    ).fetchone()
    return found


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
            shared = _shared_tokens(row[2], tokens)
            if shared > (best[2] if best else 0):
                best = (row[0], row[1], shared)
    return best


def _shared_tokens(left: bytes, right: bytes) -> int:
    length = min(len(left), len(right)) // 8
    ours, theirs = np.frombuffer(left, dtype="<i8", count=length), np.frombuffer(right, dtype="<i8", count=length)
    different = np.flatnonzero(ours != theirs)
    return int(different[0]) if different.size else length


def parent_ids(db: sqlite3.Connection) -> set[tuple[int, int]]:
    """All `(child id, parent id)`: the child continues a chunk of the parent. More than one may hold that chunk."""
    return set(
        db.execute("SELECT s.id, c.segment FROM segments s JOIN chunks c ON c.hash = s.parent WHERE c.segment != s.id")
    )


def mark_used(db: sqlite3.Connection, uses: Iterable[tuple[int, float, str]]) -> None:
    """Add `(uses, time of the last one, key)`."""
    db.executemany("UPDATE segments SET uses = uses + ?, last_used = max(last_used, ?) WHERE key = ?", list(uses))
