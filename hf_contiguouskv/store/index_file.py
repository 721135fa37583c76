"""The file of the index, opened so that neither its place nor its content can do more than be damaged.

SQLite opens files by path, reads whatever schema they hold and runs as long as a query takes. Here the file must be an
ordinary one of a user whom we trust, and the one in the open folder of the store; its schema must be the very one that
this library makes before any query runs on it; and a query ends that takes far more steps than an index of this size
could ask for.
"""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from filelock import FileLock

from ..errors import StoreError, StoreFormatError, UntrustedOwnerError
from .backend import Leftovers
from .directory import Directory, require_trusted
from .local_disk import remove_unlocked
from .rows import SCHEMA
from .totals import IndexDamagedError

INDEX_FORMAT = 3
NAME = "index.sqlite"
_FRESH = f"{NAME}.new"
_BESIDE = ("-wal", "-shm", "-journal")
_LOCK = "index.lock"
_LOCK_S = 600.0
_ASIDE = f"{NAME}.damaged-"

# Far more than all prefixes of a disk need. (What SQLite allocates for a check grows with it.)
_MAX_BYTES = 2**36
# A row holds the tokens of one chunk, 32 KiB at most.
_MAX_ROW = 2**20
# Steps of the machine in SQLite, tens of millions a second. Honest transactions were seen to take one for four bytes of
# the index, and some millions for a very long prompt. One that never ends takes more.
_STEPS = 20_000_000
_STEPS_PER_BYTE = 10
_LOOK_EVERY = 100_000
_TRIES = 20

_SCHEMA_QUERY = "SELECT type, name, tbl_name, sql FROM sqlite_master"

_Identity = tuple[int, int]


class Watch:
    """Ends a transaction that takes far more steps than an honest one could.

    Args:
        db: the connection.
        size: gives the bytes of the index now.
    """

    def __init__(self, db: sqlite3.Connection, size: Callable[[], int]) -> None:
        self._size = size
        self._steps = 0
        db.set_progress_handler(self._look, _LOOK_EVERY)

    def restart(self) -> None:
        """A new transaction begins."""
        self._steps = 0

    def _look(self) -> bool:
        self._steps += _LOOK_EVERY
        return self._steps > _STEPS and self._steps > _STEPS + _STEPS_PER_BYTE * self._size()


class IndexFile:
    """The database of a store and the files beside it, in the open folder.

    Args:
        folder: of the store.

    Attributes:
        path: of the database.
    """

    def __init__(self, folder: Directory) -> None:
        self.folder = folder
        self.path = folder.path_of(NAME)

    def identity(self) -> _Identity | None:
        """Tells the database from another one in its place; `None` where there is none.

        Raises:
            IndexDamagedError: it is no ordinary file.
        """
        status = self.folder.stat(NAME)
        if status is None:
            return None
        if not stat.S_ISREG(status.st_mode):
            # A link could lead out of the store, where nothing of ours may be written.
            raise IndexDamagedError("it is no ordinary file")
        return status.st_dev, status.st_ino

    def exists(self) -> bool:
        """Whether anything lies there."""
        return self.folder.stat(NAME) is not None

    def is_ordinary(self) -> bool:
        """Whether the database and all beside it are ordinary files that only we (or root) can write, or missing."""
        try:
            self._check(NAME)
        except IndexDamagedError:
            return False
        return True

    def is_writable(self) -> bool:
        """Whether the system lets this process write it."""
        return os.access(NAME, os.W_OK, dir_fd=self.folder.fd, effective_ids=True)

    def nbytes(self) -> int:
        """What it and its log hold now."""
        found = (self.folder.stat(NAME + suffix) for suffix in ("", "-wal"))
        return sum(status.st_size for status in found if status is not None)

    def connect(self, *, busy_s: float, frozen: bool = False) -> tuple[sqlite3.Connection, Watch]:
        """Open the database, if it is one of ours.

        Args:
            busy_s: seconds to wait for others who write.
            frozen: as it stands, without the files that SQLite wants beside it; nothing is written.

        Raises:
            IndexDamagedError: it is something else, or missing.
            StoreFormatError: a newer library has made it.
            StoreError: another folder lies at the path of the store.
        """
        db = self._connect(NAME, "mode=ro&immutable=1" if frozen else "mode=rw", busy_s)
        try:
            watch = Watch(db, self.nbytes)
            _require_our_schema(db, self.path)
        except BaseException:
            db.close()
            raise
        return db, watch

    @contextlib.contextmanager
    def build(self) -> Iterator[sqlite3.Connection]:
        """A connection to a new, empty database beside the present one, for this user only from its first byte."""
        for suffix in ("", *_BESIDE):
            self.folder.make_free(_FRESH + suffix)
        os.close(self.folder.create_file(_FRESH))
        with contextlib.closing(self._connect(_FRESH, "mode=rw", 0.0)) as db:
            # Nobody sees the file before it is complete, so it needs no journal meanwhile.
            db.execute("PRAGMA journal_mode = OFF")
            db.executescript(SCHEMA)
            db.execute("INSERT INTO meta VALUES ('format', ?)", (str(INDEX_FORMAT),))
            yield db
            db.execute("PRAGMA journal_mode = WAL")

    def put_in_place(self) -> None:
        """Put what was built in the place of the database, which must be gone or moved."""
        for suffix in _BESIDE:
            self.folder.make_free(NAME + suffix)
        self.folder.rename(_FRESH, self.folder, NAME)

    def move_aside(self) -> str:
        """Give the damaged database another name, until `collect`; that name."""
        aside = f"{_ASIDE}{time.time_ns()}"
        self.folder.rename(NAME, self.folder, aside)
        return aside

    def collect(self, dry_run: bool) -> Leftovers:
        """Delete what was moved aside; a folder that holds something, and what others own, is left alone."""
        removed, freed = [], 0
        for name in self.folder.names():
            if name.startswith(_ASIDE):
                nbytes = remove_unlocked(self.folder, name, dry_run=dry_run)
                if nbytes is not None:
                    removed.append(name)
                    freed += nbytes
        return Leftovers(tuple(removed), freed)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Exclude all others who rebuild it, in all processes; strangers cannot hold this lock."""
        status = self.folder.stat(_LOCK)
        if status is not None and not stat.S_ISREG(status.st_mode):
            self.folder.make_free(_LOCK)  # A link could lead out of the store.
        elif status is not None and not self.folder.trust_owner:
            if status.st_uid not in (os.geteuid(), 0):
                self.folder.make_free(_LOCK)
            elif status.st_uid == os.geteuid():
                self.folder.make_private(_LOCK)
        with FileLock(self.folder.path_of(_LOCK), timeout=_LOCK_S, mode=0o600):
            yield

    def _check(self, name: str) -> _Identity | None:
        """Look at `name` and all beside it; `None` where it is missing."""
        identity = None
        for suffix in ("", *_BESIDE):
            status = self.folder.stat(name + suffix)
            if status is None:
                continue
            if not suffix:
                identity = status.st_dev, status.st_ino
            if not stat.S_ISREG(status.st_mode):
                raise IndexDamagedError(f"{name}{suffix} is no ordinary file")
            if status.st_size > _MAX_BYTES:
                raise IndexDamagedError(f"{name}{suffix} has {status.st_size} bytes")
            try:
                require_trusted(status, name + suffix, self.folder.trust_owner)
            except UntrustedOwnerError as error:
                raise IndexDamagedError(str(error)) from None
        return identity

    def _connect(self, name: str, options: str, busy_s: float) -> sqlite3.Connection:
        path = self.folder.path_of(name)
        for _ in range(_TRIES):
            before = self._check(name)
            if before is None:
                raise IndexDamagedError("it is missing")
            if _identity_at(path) == before:
                db = _open(path, options, busy_s)
                # (What SQLite has open cannot be asked for. What lies there before and after is what it found.)
                if _identity_at(path) == before == self._check(name):
                    return db
                db.close()
            # Another process may just have put a new one in place: look again.
        raise StoreError(
            f"{path}: the folder of this store was moved, or another one was put in its place, since it was opened. "
            "Close the store and open it again."
        )


def _identity_at(path: Path) -> _Identity | None:
    try:
        status = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _open(path: Path, options: str, busy_s: float) -> sqlite3.Connection:
    # As a URI, for a path alone would make a file where there is none.
    db = sqlite3.connect(
        f"{path.as_uri()}?{options}", uri=True, timeout=busy_s, isolation_level=None, check_same_thread=False
    )
    try:
        db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MAX_ROW)
        db.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
        for pragma in ("trusted_schema = OFF", "cell_size_check = ON", "synchronous = NORMAL"):
            db.execute(f"PRAGMA {pragma}")
        if hasattr(db, "setconfig"):  # From Python 3.12 on.
            db.setconfig(getattr(sqlite3, "SQLITE_DBCONFIG_DEFENSIVE"), True)  # noqa: B009 (older ones have no such name)
    except BaseException:
        db.close()
        raise
    return db


@cache
def _our_schema() -> frozenset[tuple[str, ...]]:
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        db.executescript(SCHEMA)
        return frozenset(db.execute(_SCHEMA_QUERY))


def _require_our_schema(db: sqlite3.Connection, path: Path) -> None:
    """Refuse a database with a table, view, trigger or index that is not ours, before anything is asked of these."""
    ours = _our_schema()
    found = set(db.execute(f"{_SCHEMA_QUERY} LIMIT 1000").fetchall())
    if not {row for row in ours if row[2] == "meta"} <= found:
        raise IndexDamagedError("no format mark")
    row = db.execute("SELECT value FROM meta WHERE name = 'format'").fetchone()
    if row is None or not re.fullmatch(r"[0-9]{1,9}", str(row[0])):
        raise IndexDamagedError("no format mark")
    version = int(row[0])
    if version < INDEX_FORMAT:
        raise IndexDamagedError(f"format {version} is no longer read")
    if version > INDEX_FORMAT:
        raise StoreFormatError(
            f"{path}: index format {version}, this library knows {INDEX_FORMAT}. Update it, or delete the file: it is "
            "rebuilt from the segments."
        )
    if found != ours:
        raise IndexDamagedError("its tables are not the ones that this library makes")
