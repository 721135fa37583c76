"""The index of a store: which chunk lies in which segment. SQLite, and always rebuildable from the segments.

What it says is never taken for granted: a row that makes no sense counts as damage (the index is rebuilt), and a
look-up compares what it found with the checksummed headers of the segments (`finding.py`).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

from ..errors import StoreError, StoreFormatError, StoreFullError
from .local_disk import remove_anything
from .rows import SCHEMA, all_segments, clear, index_problems, set_use
from .totals import IndexDamagedError

logger = logging.getLogger("hf_contiguouskv")

INDEX_FORMAT = 3
_BUSY_S = 60.0

Result = TypeVar("Result")

# The driver fails to decode even the messages of SQLite, where these quote a damaged name.
_DATABASE_ERRORS = (sqlite3.DatabaseError, UnicodeDecodeError)


class StoreIndex:
    """The SQLite file of a store, shared by threads (two connections, each with its lock) and processes (WAL).

    Args:
        path: of the database.
        refill: called with a connection to a new, empty database; inserts what the segments say.

    A missing database is made anew; a damaged one is moved aside first. Nothing that is stored depends on it.
    """

    def __init__(self, path: Path, refill: Callable[[sqlite3.Connection], None]) -> None:
        self.path = path
        self._refill = refill
        # Two connections: a look-up must not wait for a publish of this process, which flushes folders to the disk.
        self._for_reading, self._for_writing = _Connection(path), _Connection(path)
        self._repairs: list[str] = []
        self.read(lambda db: None)

    def read(self, query: Callable[[sqlite3.Connection], Result]) -> Result:
        """Run `query`, which only reads, on one state of the index."""
        try:
            return self._run(self._for_reading, query, "BEGIN")
        except StoreError as error:
            if not _cannot_be_locked(error.__cause__):
                raise
            return self._read_frozen(query, error)

    def _read_frozen(self, query: Callable[[sqlite3.Connection], Result], error: StoreError) -> Result:
        """Read as it stands, without the files that SQLite wants beside it.

        A full disk has no room for them, and a read-only one no right to make them. What other processes write
        meanwhile may be missed; what is found is compared with the segments anyway.
        """
        try:
            with contextlib.closing(sqlite3.connect(f"{self.path.as_uri()}?mode=ro&immutable=1", uri=True)) as db:
                _check_format(db, self.path)
                return query(db)
        except (sqlite3.Error, UnicodeDecodeError):
            raise error from error.__cause__

    def inspect(self) -> list[str]:
        """What is wrong with the database, in words, and what was when it was repaired since the last time."""
        problems = [f"was damaged ({reason}) and has been rebuilt from the segments" for reason in self._repairs]
        self._repairs = []
        if not self.path.exists() or not _are_ordinary(self.path):
            return [*problems, "is missing, or no ordinary file"]
        try:
            with contextlib.closing(sqlite3.connect(self.path, timeout=_BUSY_S, isolation_level=None)) as db:
                _check_format(db, self.path)
                return problems + index_problems(db)
        except (*_DATABASE_ERRORS, StoreFormatError) as error:
            return [*problems, str(error)]

    def write(self, change: Callable[[sqlite3.Connection], Result]) -> Result:
        """Run `change` as one transaction that excludes all other writers, in all processes."""
        return self._run(self._for_writing, change, "BEGIN IMMEDIATE")

    def try_write(self, change: Callable[[sqlite3.Connection], Result]) -> Result | None:
        """As `write`, but for what can wait: where somebody else is writing, or writing fails, nothing is done."""
        if not self._for_writing.lock.acquire(blocking=False):
            return None
        try:
            with self._for_writing.without_waiting():
                return self.write(change)
        except StoreError as error:
            logger.info("put off: %s", error)
            return None
        finally:
            self._for_writing.lock.release()

    def _run(self, connection: _Connection, action: Callable[[sqlite3.Connection], Result], begin: str) -> Result:
        with connection.lock:
            for attempt in (1, 2):
                try:
                    db = self._connected(connection)
                    if db is not None:
                        return _transaction(db, action, begin)
                except _DATABASE_ERRORS as error:
                    if attempt == 2 or not _is_damage(self.path, error):
                        raise _as_store_error(self.path, error) from error
                    connection.close()
                    self._repair(str(error))
            raise StoreError(f"{self.path}: disappears again and again; is another program deleting it?")

    def _connected(self, connection: _Connection) -> sqlite3.Connection | None:
        try:
            db = connection.open()
            if db is None:
                self._repair(None)
                db = connection.open()
            return db
        except OSError as error:
            if isinstance(error, StoreError):
                raise
            raise StoreError(f"{self.path}: {error}") from error

    def _repair(self, damage: str | None) -> None:
        """Build a new database from the segments and put it in place; the damaged one is moved aside."""
        lock = self.path.with_suffix(".lock")
        try:
            if not _is_ordinary(lock):
                remove_anything(lock)
            with FileLock(lock, timeout=600):
                if os.path.lexists(self.path) and (damage is None or _is_sound(self.path)):
                    return  # Another process was faster.
                self._replace(self._rebuilt(), damage)
        except _DATABASE_ERRORS as error:
            raise _as_store_error(self.path, error) from error
        except OSError as error:
            raise StoreError(f"{self.path}: {error}") from error

    def _rebuilt(self) -> Path:
        fresh = self.path.with_name(self.path.name + ".new")
        for suffix in ("", "-wal", "-shm"):
            remove_anything(fresh.with_name(fresh.name + suffix))
        with contextlib.closing(sqlite3.connect(fresh, isolation_level=None)) as db:
            # Nobody sees the file before it is complete, so it needs no journal meanwhile.
            db.execute("PRAGMA journal_mode = OFF")
            db.executescript(SCHEMA)
            db.execute("INSERT INTO meta VALUES ('format', ?)", (str(INDEX_FORMAT),))
            _transaction(db, self._refill, "BEGIN IMMEDIATE")
            db.execute("PRAGMA journal_mode = WAL")
        os.chmod(fresh, 0o600)
        return fresh

    def _replace(self, fresh: Path, damage: str | None) -> None:
        if os.path.lexists(self.path):
            aside = self.path.with_name(f"{self.path.name}.damaged-{time.time_ns()}")
            logger.warning("%s is damaged (%s): moved to %s and rebuilt", self.path, damage, aside.name)
            self._repairs.append(str(damage))
            os.replace(self.path, aside)
        for suffix in ("-wal", "-shm"):
            remove_anything(self.path.with_name(self.path.name + suffix))
        os.replace(fresh, self.path)

    def rebuild(self) -> None:
        """Empty the tables and fill them from the segments; pins and counters of use are kept."""

        def refill(db: sqlite3.Connection) -> None:
            try:
                kept = {row.key: row for row in all_segments(db)}
            except IndexDamagedError:
                kept = {}  # Counters of use are lost; pins are kept elsewhere as well.
            clear(db)
            self._refill(db)
            for row in all_segments(db):
                if old := kept.get(row.key):
                    set_use(db, row.key, old.created, old.last_used, old.uses)

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
        self._busy_s = _BUSY_S

    def open(self) -> sqlite3.Connection | None:
        """The connection; `None` when there is no file."""
        try:
            status = os.lstat(self.path)
        except FileNotFoundError:
            self.close()
            return None
        if not stat.S_ISREG(status.st_mode):
            # A link could lead out of the store, where nothing of ours may be written.
            raise IndexDamagedError("it is no ordinary file")
        identity = (status.st_ino, os.getpid())
        if self._db is not None and identity == self._opened_as:
            return self._db
        self.close()
        if not _are_ordinary(self.path):
            raise IndexDamagedError("a file beside it is no ordinary file")
        db = sqlite3.connect(self.path, timeout=self._busy_s, isolation_level=None, check_same_thread=False)
        try:
            db.execute("PRAGMA synchronous = NORMAL")
            _check_format(db, self.path)
        except BaseException:
            db.close()
            raise
        self._db, self._opened_as = db, identity
        return db

    @contextlib.contextmanager
    def without_waiting(self) -> Iterator[None]:
        """Let a transaction fail at once where another process holds the lock. The caller holds `lock`."""
        self._set_busy(0.0)
        try:
            yield
        finally:
            self._set_busy(_BUSY_S)

    def _set_busy(self, seconds: float) -> None:
        self._busy_s = seconds
        if self._db is not None and self._opened_as[1] == os.getpid():
            self._db.execute(f"PRAGMA busy_timeout = {int(1000 * seconds)}")

    def close(self) -> None:
        # A forked child must not touch the connection of its parent, not even to close it.
        if self._db is not None and self._opened_as[1] == os.getpid():
            self._db.close()
        self._db = None


def _check_format(db: sqlite3.Connection, path: Path) -> None:
    row = db.execute("SELECT value FROM meta WHERE name = 'format'").fetchone()
    if row is None or not re.fullmatch(r"[0-9]{1,9}", str(row[0])):
        raise IndexDamagedError("no format mark")
    if int(row[0]) < INDEX_FORMAT:
        raise IndexDamagedError(f"format {row[0]} is no longer read")
    if int(row[0]) > INDEX_FORMAT:
        raise StoreFormatError(
            f"{path}: index format {row[0]}, this library knows {INDEX_FORMAT}. Update it, or delete the file: it is "
            "rebuilt from the segments."
        )


def _cannot_be_locked(cause: object) -> bool:
    """Whether SQLite could not make, or use, the files beside the database that its locks are in."""
    code = getattr(cause, "sqlite_errorcode", 0) & 0xFF
    return code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY)


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


def _as_store_error(path: Path, error: sqlite3.DatabaseError | UnicodeDecodeError) -> StoreError:
    if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL:
        return StoreFullError(errno.ENOSPC, f"{path}: {error}; free space or delete stored prefixes")
    return StoreError(f"{path}: {error}")


# What SQLite says of a file that is not (or no longer) what we wrote. Its statements are constant, so even a plain
# "error" means that the tables are not the ones that they were written for.
_DAMAGE = (
    sqlite3.SQLITE_ERROR,
    sqlite3.SQLITE_INTERNAL,
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_SCHEMA,
    sqlite3.SQLITE_CONSTRAINT,
    sqlite3.SQLITE_MISMATCH,
    sqlite3.SQLITE_NOTADB,
)


def _is_damage(path: Path, error: sqlite3.DatabaseError | UnicodeDecodeError) -> bool:
    if isinstance(error, IndexDamagedError | UnicodeDecodeError):
        return True
    code = getattr(error, "sqlite_errorcode", None)
    if code is None:
        return "decode" in str(error)  # Text that is no text; found by the driver, not by SQLite.
    if code & 0xFF == sqlite3.SQLITE_CANTOPEN:
        return not _are_ordinary(path)
    if code & 0xFF == sqlite3.SQLITE_READONLY:
        return os.access(path, os.W_OK)  # So says the damaged header of a file that may be written.
    return code & 0xFF in _DAMAGE


def _is_ordinary(path: Path) -> bool:
    """Whether there is a file, or nothing: no link, no folder, no pipe."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except FileNotFoundError:
        return True


def _are_ordinary(path: Path) -> bool:
    """The same for the database `path` and the files that SQLite keeps beside it."""
    return all(_is_ordinary(path.with_name(path.name + suffix)) for suffix in ("", "-wal", "-shm"))


def _is_sound(path: Path) -> bool:
    if not path.exists() or not _are_ordinary(path):
        return False
    db = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)
    try:
        found = db.execute("SELECT value FROM meta WHERE name = 'format'").fetchone()
        db.execute("BEGIN IMMEDIATE")
        return found == (str(INDEX_FORMAT),) and not index_problems(db)
    except _DATABASE_ERRORS:
        return False
    finally:
        db.close()
