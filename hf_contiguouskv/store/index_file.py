"""The file of the index, opened so that neither its place nor its content can do more than be damaged.

SQLite opens files by path, reads whatever schema they hold and runs as long as a query takes. Here the file must be an
ordinary one of a user whom we trust, and the one in the open folder of the store; its schema must be the very one that
this library makes before any query runs on it; and a query ends that takes far more steps than an index of this size
could ask for.
"""

from __future__ import annotations

import contextlib
import fcntl
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
from .new_descriptors import NewDescriptors
from .rows import SCHEMA
from .totals import EarlierIndexError, IndexDamagedError

INDEX_FORMAT = 3
NAME = "index.sqlite"
_FRESH = f"{NAME}.new"
_BESIDE = ("-wal", "-shm", "-journal")
_LOCK = "index.lock"
_LOCK_S = 600.0
# A lock that others can hold is waited for so long, in case it is an honest process that does.
_DOUBTFUL_LOCK_S = 5.0
_ASIDE = f"{NAME}.damaged-"

# Far more than all prefixes of a disk need. (What SQLite allocates for a check grows with it.)
_MAX_BYTES = 2**36
# A row holds the tokens of one chunk, 32 KiB at most, and little besides.
_MAX_ROW = 40 * 1024
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

    It is large because opening a database that may be damaged, foreign or swapped takes many checks.

    Args:
        folder: of the store.

    Attributes:
        path: of the database.
    """

    def __init__(self, folder: Directory) -> None:
        self.folder = folder
        self.path = folder.path_of(NAME)
        self._built: _Identity | None = None

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
        return _identity_of(status)

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
        """What it and its log hold now. Holes are not counted: they take up nothing, and nobody asks for them."""
        found = [status for suffix in ("", "-wal") if (status := self.folder.stat(NAME + suffix)) is not None]
        if found and found[0].st_blocks == 0:  # No database is empty: this file system does not tell.
            return sum(status.st_size for status in found)
        return sum(min(status.st_size, 512 * status.st_blocks) for status in found)

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
        with open(self.folder.create_file(_FRESH), "rb") as file:
            self._built = _identity_of(os.fstat(file.fileno()))
        with contextlib.closing(self._connect(_FRESH, "mode=rw", 0.0)) as db:
            # Nobody sees the file before it is complete, so it needs no journal meanwhile.
            db.execute("PRAGMA journal_mode = OFF")
            db.executescript(SCHEMA)
            db.execute("INSERT INTO meta VALUES ('format', ?)", (str(INDEX_FORMAT),))
            yield db
            db.execute("PRAGMA journal_mode = WAL")

    def found(self) -> _Identity | None:
        """As `identity`, of whatever lies there."""
        status = self.folder.stat(NAME)
        return None if status is None else _identity_of(status)

    def is_due(self, found: _Identity | None) -> bool:
        """Whether what was built is there still, and what it replaces is what was `found` when that began.

        Else another process has built one, too: the lock was taken from one of the two (see `lock`).
        """
        status = self.folder.stat(_FRESH)
        return self.found() == found and status is not None and _identity_of(status) == self._built

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
        """Exclude all others who rebuild it, in all processes; strangers cannot hold this lock.

        A user who can read a file can lock it. We lock only files that nobody else could read when we did, so what is
        held although others can read it is held by a stranger; or by one of us, if its owner has opened the whole
        store to others meanwhile. So such a lock is waited for, but not for long, before it is replaced. Where two
        build after all, `is_due` makes one of them give up.
        """
        doubtful_until = time.monotonic() + _DOUBTFUL_LOCK_S
        while (status := self.folder.stat(_LOCK)) is not None and not self._is_own_lock(status):
            if not self._is_ours(status):
                self.folder.make_free(_LOCK)  # (Other names of it, and what a link leads to, stay as they are.)
                break
            if self._replace_lock(status, by_force=time.monotonic() >= doubtful_until):
                break
            time.sleep(0.05)
        with FileLock(self.folder.path_of(_LOCK), timeout=_LOCK_S, mode=0o600):
            yield

    def _is_ours(self, status: os.stat_result) -> bool:
        """Whether this is a file in this folder alone, of a user whom we trust."""
        trusted = self.folder.trust_owner or status.st_uid in (os.geteuid(), 0)
        return trusted and stat.S_ISREG(status.st_mode) and status.st_nlink == 1

    def _is_own_lock(self, status: os.stat_result) -> bool:
        return self._is_ours(status) and (self.folder.trust_owner or not status.st_mode & 0o077)

    def _replace_lock(self, status: os.stat_result, *, by_force: bool) -> bool:
        """Delete a lock that others can hold, if nobody holds it (or `by_force`); whether this was done.

        We hold it ourselves meanwhile. Who waits for it sees then that it is gone, and takes the new one.
        """
        try:
            descriptor = os.open(
                _LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self.folder.fd
            )
        except FileNotFoundError:
            return False
        with open(descriptor, "rb", buffering=0):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                if not by_force:
                    return False
            there = self.folder.stat(_LOCK)
            if there is None or not _identity_of(there) == _identity_of(status) == _identity_of(os.fstat(descriptor)):
                return False  # Another process has replaced it.
            self.folder.make_free(_LOCK)
            return True

    def _check(self, name: str) -> _Identity | None:
        """Look at `name` and all beside it; `None` where it is missing."""
        identity = None
        for suffix in ("", *_BESIDE):
            status = self.folder.stat(name + suffix)
            if status is None:
                continue
            if not suffix:
                identity = _identity_of(status)
            if not stat.S_ISREG(status.st_mode):
                raise IndexDamagedError(f"{name}{suffix} is no ordinary file")
            if status.st_nlink != 1:
                # What is written to it would be written to a file elsewhere.
                raise IndexDamagedError(f"{name}{suffix} is also a file of another name")
            if status.st_size > _MAX_BYTES:
                raise IndexDamagedError(f"{name}{suffix} has {status.st_size} bytes")
            try:
                require_trusted(status, name + suffix, self.folder.trust_owner)
            except UntrustedOwnerError as error:
                raise IndexDamagedError(str(error)) from None
        return identity

    def _connect(self, name: str, options: str, busy_s: float) -> sqlite3.Connection:
        path = self.path if name == NAME else self.folder.path_of(name)
        for _ in range(_TRIES):
            before = self._check(name)
            if before is None:
                raise IndexDamagedError("it is missing")
            if _identity_at(path) == before:
                db, known = self._open(path, name, before, options, busy_s)
                try:
                    if known:
                        _set_up(db)
                        if _identity_at(path) == before == self._check(name):
                            return db
                except BaseException:
                    db.close()
                    raise
                db.close()
            # Another process may just have put a new one in place: look again.
        raise StoreError(
            f"{path}: the folder of this store was moved, or another one was put in its place, since it was opened. "
            "Close the store and open it again."
        )

    def _open(
        self, path: Path, name: str, identity: _Identity, options: str, busy_s: float
    ) -> tuple[sqlite3.Connection, bool]:
        """A connection of which nothing was asked yet, and whether it leads to the file that was looked at."""
        # (What lies at the path before and after may be something else than what SQLite found there in between.)
        with NewDescriptors(self.folder.fd) as descriptors:
            # As a URI, for a path alone would make a file where there is none.
            db = sqlite3.connect(
                f"{path.as_uri()}?{options}", uri=True, timeout=busy_s, isolation_level=None, check_same_thread=False
            )
            try:
                return db, descriptors.may_hold(identity) and self._is_named(db, name)
            except BaseException:
                db.close()
                raise

    def _is_named(self, db: sqlite3.Connection, name: str) -> bool:
        """Whether SQLite has found a file of this name in a folder of this path, and no link to another one."""
        db.text_factory = bytes  # (A path need not be text.)
        told = os.fsdecode(db.execute("PRAGMA database_list").fetchone()[2])
        db.text_factory = str
        if told == f"{self.folder.name}/{name}":
            return True
        return told == os.path.join(os.path.realpath(self.folder.name), name)


def _identity_of(status: os.stat_result) -> _Identity:
    return status.st_dev, status.st_ino


def _identity_at(path: Path) -> _Identity | None:
    try:
        return _identity_of(os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return None


def _set_up(db: sqlite3.Connection) -> None:
    db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MAX_ROW)
    db.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
    for pragma in ("trusted_schema = OFF", "cell_size_check = ON", "synchronous = NORMAL"):
        db.execute(f"PRAGMA {pragma}")
    if hasattr(db, "setconfig"):  # From Python 3.12 on.
        db.setconfig(getattr(sqlite3, "SQLITE_DBCONFIG_DEFENSIVE"), True)  # noqa: B009 (older ones have no such name)


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
        raise EarlierIndexError(f"format {version} is no longer read")
    if version > INDEX_FORMAT:
        raise StoreFormatError(
            f"{path}: index format {version}, this library knows {INDEX_FORMAT}. Update it, or delete the file: it is "
            "rebuilt from the segments."
        )
    if found != ours:
        raise IndexDamagedError("its tables are not the ones that this library makes")
