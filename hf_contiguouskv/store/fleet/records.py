"""What this machine knows of a shared store: which segments it has seen there, and which of their bytes it keeps.

A small SQLite database beside the index. All of it can be found out again, so a damaged one is replaced by an empty
one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import stat
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from ..directory import Directory
from ..index import transaction
from ..segment_row import is_key
from .names import SharedSegment
from .spans import Spans

logger = logging.getLogger("hf_contiguouskv")

Result = TypeVar("Result")

NAME = "shared.sqlite"
_BESIDE = ("-wal", "-shm", "-journal")
_BUSY_S = 10.0
_VERSION = 1
# A forked child must not touch the connections of its parent, not even by forgetting them.
_of_parents: list[sqlite3.Connection] = []
_SCHEMA = """
CREATE TABLE seen (key TEXT PRIMARY KEY, upload TEXT NOT NULL, first_chunk INTEGER NOT NULL,
    num_tokens INTEGER NOT NULL, nbytes INTEGER NOT NULL, modified REAL NOT NULL, stored INTEGER NOT NULL)
    WITHOUT ROWID;
CREATE TABLE kept (key TEXT NOT NULL, inode INTEGER NOT NULL, begin INTEGER NOT NULL, end INTEGER NOT NULL,
    PRIMARY KEY (key, inode, begin)) WITHOUT ROWID;
CREATE TABLE sent (key TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE refused (key TEXT NOT NULL, upload TEXT NOT NULL, PRIMARY KEY (key, upload)) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class Seen:
    """A segment of the shared store that this machine has seen.

    Attributes:
        segment: as its name described it.
        modified: when it was seen first, seconds since the epoch.
        stored: bytes of it that this machine keeps.
    """

    segment: SharedSegment
    modified: float
    stored: int


class Records:
    """The database. Shared by threads and processes.

    Args:
        folder: of the store on this machine, open.
    """

    def __init__(self, folder: Directory) -> None:
        self._folder = folder
        self._lock = threading.RLock()
        self._db: sqlite3.Connection | None = None
        self._pid = os.getpid()
        # (Every look-up asks for each segment of its chain. What another process forgets, this one may still know:
        # then a read finds nothing, and it is forgotten here as well.)
        self._seen: dict[str, Seen] = {}

    # -- segments of the shared store -------------------------------------------------------------------------------

    def see(self, segments: Iterable[SharedSegment], modified: float) -> None:
        """Note segments that lie in the shared store; what was kept of another upload of them is forgotten."""
        found = list(segments)

        def change(db: sqlite3.Connection) -> None:
            for one in found:
                there = db.execute("SELECT 1 FROM seen WHERE key = ? AND upload = ?", (one.key, one.upload)).fetchone()
                if there is None:
                    db.execute("DELETE FROM kept WHERE key = ?", (one.key,))
                    db.execute(
                        "INSERT OR REPLACE INTO seen VALUES (?, ?, ?, ?, ?, ?, 0)",
                        (one.key, one.upload, one.first_chunk, one.num_tokens, one.nbytes, modified),
                    )

        self._write(change)
        for one in found:
            self._seen.pop(one.key, None)

    def get(self, key: str) -> Seen | None:
        """A segment of the shared store, if it was noted."""
        known = self._seen.get(key)
        if known is None:
            known = self._read(lambda db: _one(db, key))
            if known is not None:
                self._seen[key] = known
        return known

    def set_stored(self, key: str, nbytes: int) -> None:
        """Note how many bytes of a segment this machine keeps."""
        self._write(lambda db: db.execute("UPDATE seen SET stored = ? WHERE key = ?", (nbytes, key)))
        self._seen.pop(key, None)

    def keys(self) -> set[str]:
        """The keys of all segments that were noted."""
        return self.keys_if_readable() or set()

    def keys_if_readable(self) -> set[str] | None:
        """The keys of all segments that were noted; `None` if that cannot be told now."""
        return self._read(lambda db: {key for (key,) in db.execute("SELECT key FROM seen") if is_key(key)})

    def forget(self, key: str) -> bool:
        """Forget a segment and what is kept of it; whether it was known."""

        def change(db: sqlite3.Connection) -> bool:
            db.execute("DELETE FROM kept WHERE key = ?", (key,))
            return db.execute("DELETE FROM seen WHERE key = ?", (key,)).rowcount > 0

        known = self._seen.pop(key, None) is not None
        return bool(self._write(change)) or known

    # -- bytes that this machine keeps --------------------------------------------------------------------------------

    def keep(self, key: str, inode: int, ranges: Iterable[tuple[int, int]]) -> None:
        """Note ranges `(begin, end)` of a segment that the file with this inode holds."""

        def change(db: sqlite3.Connection) -> None:
            spans = Spans([*_kept(db, key, inode), *ranges])
            # (What other files held that had its name is gone with them.)
            db.execute("DELETE FROM kept WHERE key = ?", (key,))
            db.executemany("INSERT INTO kept VALUES (?, ?, ?, ?)", [(key, inode, *span) for span in spans])

        self._write(change)

    def kept(self, key: str, inode: int) -> list[tuple[int, int]]:
        """Ranges of a segment that the file with this inode holds, by offset."""
        return self._read(lambda db: _kept(db, key, inode)) or []

    # -- what was sent, and what is refused ---------------------------------------------------------------------------

    def note_sent(self, key: str) -> None:
        """Note that a segment of this machine lies in the shared store."""
        self._write(lambda db: db.execute("INSERT OR IGNORE INTO sent VALUES (?)", (key,)))

    def sent(self) -> set[str] | None:
        """Keys of segments of this machine that were sent; `None` if that cannot be told now."""
        return self._read(lambda db: {key for (key,) in db.execute("SELECT key FROM sent")})

    def forget_sent(self, keys: Iterable[str]) -> None:
        """Forget that segments were sent: they are not on this machine any more."""
        self._write(lambda db: db.executemany("DELETE FROM sent WHERE key = ?", [(key,) for key in keys]))

    def refuse(self, key: str, upload: str) -> None:
        """Note an upload whose bytes proved wrong."""
        self._write(lambda db: db.execute("INSERT OR IGNORE INTO refused VALUES (?, ?)", (key, upload)))

    def is_refused(self, key: str, upload: str) -> bool:
        """Whether the bytes of an upload proved wrong."""
        query = "SELECT 1 FROM refused WHERE key = ? AND upload = ?"
        return self._read(lambda db: db.execute(query, (key, upload)).fetchone()) is not None

    def close(self) -> None:
        """Close the database; the next use opens it again."""
        with self._lock:
            if self._db is not None and self._pid == os.getpid():
                self._db.close()
            elif self._db is not None:
                _of_parents.append(self._db)
            self._db = None

    # -- the database -----------------------------------------------------------------------------------------------

    def _read(self, query: Callable[[sqlite3.Connection], Result]) -> Result | None:
        return self._use(query)

    def _write(self, change: Callable[[sqlite3.Connection], Result]) -> Result | None:
        return self._use(lambda db: transaction(db, change, "BEGIN IMMEDIATE"))

    def _use(self, action: Callable[[sqlite3.Connection], Result]) -> Result | None:
        """What `action` returns; `None` where the database cannot be used now."""
        with self._lock:
            try:
                try:
                    return action(self._open())
                except sqlite3.OperationalError:
                    raise  # Locked, or no room: it may be sound.
                except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
                    logger.warning("%s is damaged and begun again: %s", self._folder.path_of(NAME), error)
                    self._remove()
                    return action(self._open())
            except (sqlite3.Error, OSError) as error:
                logger.warning("%s cannot be used: %s", self._folder.path_of(NAME), error)
                return None

    def _open(self) -> sqlite3.Connection:
        if self._db is not None and self._pid == os.getpid():
            return self._db
        if self._db is not None:
            _of_parents.append(self._db)
        self._pid, self._db = os.getpid(), None
        status = self._folder.stat(NAME)
        if status is not None and not stat.S_ISREG(status.st_mode):
            self._folder.make_free(NAME)  # (A link could lead out of the store.)
            status = None
        if status is None:
            with contextlib.suppress(FileExistsError):
                os.close(self._folder.create_file(NAME))
        db = sqlite3.connect(self._folder.path_of(NAME), timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version != _VERSION:
                db.executescript(f"BEGIN IMMEDIATE; {_fresh(db)} {_SCHEMA} PRAGMA user_version = {_VERSION}; COMMIT;")
        except BaseException:
            db.close()
            raise
        self._db = db
        return db

    def _remove(self) -> None:
        self.close()
        self._seen.clear()
        for suffix in ("", *_BESIDE):
            self._folder.remove(NAME + suffix)


def _kept(db: sqlite3.Connection, key: str, inode: int) -> list[tuple[int, int]]:
    rows = db.execute("SELECT begin, end FROM kept WHERE key = ? AND inode = ? ORDER BY begin", (key, inode)).fetchall()
    return [(begin, end) for begin, end in rows if type(begin) is type(end) is int and 0 <= begin < end]


def _one(db: sqlite3.Connection, key: str) -> Seen | None:
    query = "SELECT upload, first_chunk, num_tokens, nbytes, modified, stored FROM seen WHERE key = ?"
    row = db.execute(query, (key,)).fetchone()
    if row is None:
        return None
    upload, first, tokens, nbytes, modified, stored = row
    numbers = (first, tokens, nbytes, stored)
    if not (type(upload) is str and upload.isalnum() and all(type(one) is int and one >= 0 for one in numbers)):
        return None
    return Seen(SharedSegment(key, upload, first, tokens, nbytes), float(modified), stored)


def _fresh(db: sqlite3.Connection) -> str:
    """Statements that drop what another version left."""
    names = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    return " ".join(f'DROP TABLE "{name}";' for name in names if name.isidentifier())
