"""The index of a store: which chunk lies in which segment. SQLite, and always rebuildable from the segments.

What it says is never taken for granted: a row that makes no sense counts as damage (the index is rebuilt), and a
look-up compares what it found with the checksummed headers of the segments (`finding.py`).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from ..errors import StoreError, StoreFullError
from .backend import Leftovers
from .directory import Directory
from .index_file import IndexFile, Watch
from .rows import all_segments, clear, index_problems, set_use
from .totals import EarlierIndexError, IndexDamagedError

logger = logging.getLogger("hf_contiguouskv")

_BUSY_S = 60.0

Result = TypeVar("Result")

# The driver fails to decode even the messages of SQLite, where these quote a damaged name.
_DATABASE_ERRORS = (sqlite3.DatabaseError, UnicodeDecodeError)


class StoreIndex:
    """The SQLite file of a store, shared by threads (two connections, each with its lock) and processes (WAL).

    Args:
        folder: of the store, open.
        refill: called with a connection to a new, empty database; inserts what the segments say.

    Attributes:
        path: of the database, for messages.

    A missing database is made from the segments. A damaged one is moved aside first. No stored segment depends on it.
    """

    def __init__(self, folder: Directory, refill: Callable[[sqlite3.Connection], None]) -> None:
        self._file = IndexFile(folder)
        self.path = self._file.path
        self._refill = refill
        # Two connections: a look-up must not wait for a publish of this process, which flushes folders to the disk.
        self._for_reading, self._for_writing = _Connection(self._file), _Connection(self._file)
        self._repairs: list[str] = []
        self.read(lambda db: None)

    def again(self) -> StoreIndex:
        """The same index with connections of its own, for the caller to close."""
        return StoreIndex(self._file.folder, self._refill)

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
            db, _ = self._file.connect(busy_s=0.0, frozen=True)
            with contextlib.closing(db):
                return query(db)
        except (sqlite3.Error, UnicodeDecodeError):
            raise error from error.__cause__

    def inspect(self) -> list[str]:
        """What is wrong with the database, in words, and what was when it was repaired since the last time."""
        problems = [f"was damaged ({reason}) and has been rebuilt from the segments" for reason in self._repairs]
        self._repairs = []
        try:
            db, _ = self._file.connect(busy_s=_BUSY_S)
            with contextlib.closing(db):
                return problems + index_problems(db)
        except (*_DATABASE_ERRORS, StoreError) as error:
            return [*problems, str(error)]

    def write(self, change: Callable[[sqlite3.Connection], Result]) -> Result:
        """Run `change` as one transaction that excludes all other writers, in all processes."""
        return self._run(self._for_writing, change, "BEGIN IMMEDIATE")

    def try_write(self, change: Callable[[sqlite3.Connection], Result]) -> Result | None:
        """As `write`, for what can wait: does nothing while another connection writes, or where writing fails."""
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
                        return transaction(db, action, begin)
                except _DATABASE_ERRORS as error:
                    if attempt == 2 or not _is_damage(self._file, error):
                        raise _as_store_error(self.path, error) from error
                    connection.close()
                    self._repair(error)
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

    def _repair(self, damage: Exception | str | None) -> None:
        """Build a new database from the segments and put it in place; the damaged one is moved aside.

        Args:
            damage: what is wrong with the one that there is; `None`: there should be none.
        """
        try:
            with self._file.lock():
                if self._file.exists() and (damage is None or _is_sound(self._file)):
                    return  # Another process was faster.
                found = self._file.found()
                with self._file.build() as db:
                    transaction(db, self._refill, "BEGIN IMMEDIATE")
                if not self._file.is_due(found):
                    return  # As above.
                if found is not None:
                    aside = self._file.move_aside()
                    if isinstance(damage, EarlierIndexError):
                        logger.info("%s is of an earlier release: moved to %s and rebuilt", self.path, aside)
                    else:
                        logger.warning("%s is damaged (%s): moved to %s and rebuilt", self.path, damage, aside)
                        self._repairs.append(str(damage))
                self._file.put_in_place()
        except _DATABASE_ERRORS as error:
            raise _as_store_error(self.path, error) from error
        except OSError as error:
            raise StoreError(f"{self.path}: {error}") from error

    def collect(self, dry_run: bool = False) -> Leftovers:
        """Delete the damaged databases that were moved aside; a folder that holds something is left alone."""
        return self._file.collect(dry_run)

    def rebuild(self) -> None:
        """Empty the tables and fill them from the segments; pins and, if they can be read, counters of use are kept."""

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
        problems = self.read(index_problems)
        if problems:
            # Pages are damaged that are not written by filling tables: a new file has none of them.
            self._repair(problems[0])

    def close(self) -> None:
        """Close the connections; the next use opens them again."""
        for connection in (self._for_reading, self._for_writing):
            with connection.lock:
                connection.close()


class _Connection:
    """One connection with the lock for it; opened again after a fork, or when the file has been replaced."""

    def __init__(self, file: IndexFile) -> None:
        self.lock = threading.RLock()
        self._file = file
        self._db: sqlite3.Connection | None = None
        self._watch: Watch | None = None
        self._opened_as: tuple[object, int] = (None, 0)
        self._busy_s = _BUSY_S

    def open(self) -> sqlite3.Connection | None:
        """The connection; `None` when there is no file."""
        identity = self._file.identity()
        if identity is None:
            self.close()
            return None
        opened_as = (identity, os.getpid())
        if self._db is not None and self._watch is not None and opened_as == self._opened_as:
            self._watch.restart()
            return self._db
        self.close()
        self._db, self._watch = self._file.connect(busy_s=self._busy_s)
        self._opened_as = opened_as
        return self._db

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


def _cannot_be_locked(cause: object) -> bool:
    """Whether SQLite could not make, or use, the files beside the database that its locks are in."""
    code = getattr(cause, "sqlite_errorcode", 0) & 0xFF
    return code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY)


def transaction(db: sqlite3.Connection, action: Callable[[sqlite3.Connection], Result], begin: str) -> Result:
    """What `action` returns, done as a whole or not at all.

    Args:
        db: a connection without a transaction.
        action: does it.
        begin: the statement that begins the transaction.
    """
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
    # A row that is too long, or a query that runs too long (`index_file.Watch`).
    sqlite3.SQLITE_TOOBIG,
    sqlite3.SQLITE_INTERRUPT,
)


def _is_damage(file: IndexFile, error: sqlite3.DatabaseError | UnicodeDecodeError) -> bool:
    if isinstance(error, IndexDamagedError | UnicodeDecodeError):
        return True
    code = getattr(error, "sqlite_errorcode", None)
    if code is None:
        return "decode" in str(error)  # Text that is no text; found by the driver, not by SQLite.
    if code & 0xFF == sqlite3.SQLITE_CANTOPEN:
        return not file.is_ordinary()
    if code & 0xFF == sqlite3.SQLITE_READONLY:
        return file.is_writable()  # So says the damaged header of a file that may be written.
    return code & 0xFF in _DAMAGE


def _is_sound(file: IndexFile) -> bool:
    try:
        db, _ = file.connect(busy_s=_BUSY_S)
    except (*_DATABASE_ERRORS, StoreError):
        return False
    with contextlib.closing(db):
        try:
            db.execute("BEGIN IMMEDIATE")
            return not index_problems(db)
        except _DATABASE_ERRORS:
            return False
