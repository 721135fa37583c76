"""An index that was made to hang, mislead or lead elsewhere: it is put aside unasked, and rebuilt."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tally import Figures
from unit.store_helpers import FINGERPRINT, geometry, some_tokens, write_prefix

from hf_contiguouskv.errors import StoreError, StoreFormatError
from hf_contiguouskv.store import PrefixStore, index_file
from hf_contiguouskv.store.directory import Directory
from hf_contiguouskv.store.index_file import IndexFile

from .conftest import needs_root

IDS = some_tokens(40)
SIZE = geometry().chunk_size


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise AssertionError("it waits, or runs, without an end")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 90, 1)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "store"
    with PrefixStore(path) as store:
        write_prefix(store, IDS[:20])
        write_prefix(store, IDS, 5)
    return path


@pytest.fixture
def path(template: Path, tmp_path: Path) -> Path:
    shutil.copytree(template, tmp_path / "store")
    return tmp_path / "store"


def change(path: Path, *statements: str) -> None:
    with contextlib.closing(sqlite3.connect(path / "index.sqlite", isolation_level=None)) as db:
        for statement in statements:
            db.execute(statement)


def live(path: Path) -> None:
    """Everything is found, and everything that asks the index ends."""
    with PrefixStore(path) as store:
        stored = store.inner.lookup(FINGERPRINT, IDS, SIZE)
        assert stored is not None
        assert stored.tokens == 40
        assert store.inner.lookup(FINGERPRINT, IDS + 1, SIZE) is None
        assert len(store.entries()) == store.stats.segments == 2
        assert all(problem.problem.startswith("was damaged") for problem in store.verify())
        store.gc()
        assert store.verify() == []
        write_prefix(store, IDS + 1)
        assert len(store.entries()) == 3


# ---- what is no file ----


def a_fifo(place: Path, outside: Path) -> None:
    os.mkfifo(place)


def a_socket(place: Path, outside: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one, contextlib.chdir(place.parent):
        one.bind(place.name)


def a_device(place: Path, outside: Path) -> None:
    os.mknod(place, 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero


def an_empty_folder(place: Path, outside: Path) -> None:
    place.mkdir()


def a_full_folder(place: Path, outside: Path) -> None:
    place.mkdir()
    (place / "work").write_text("of a user")


def a_link_to_zeros(place: Path, outside: Path) -> None:
    place.symlink_to("/dev/zero")


def a_link_to_itself(place: Path, outside: Path) -> None:
    place.symlink_to(place.name)


def a_link_to_nothing(place: Path, outside: Path) -> None:
    place.symlink_to(outside / "nothing")


def a_link_to_a_file(place: Path, outside: Path) -> None:
    place.symlink_to(outside / "file")


def a_link_to_a_pipe(place: Path, outside: Path) -> None:
    place.symlink_to(outside / "pipe")


FILES = [f"index.sqlite{suffix}" for suffix in ("", "-wal", "-shm", "-journal", ".new", ".new-journal", ".damaged-1")]


@pytest.mark.parametrize("name", [*FILES, "index.lock"])
@pytest.mark.parametrize(
    "make",
    [
        a_fifo,
        a_socket,
        pytest.param(a_device, marks=needs_root),
        an_empty_folder,
        a_full_folder,
        a_link_to_zeros,
        a_link_to_itself,
        a_link_to_nothing,
        a_link_to_a_file,
        a_link_to_a_pipe,
    ],
)
def test_what_is_no_file_is_put_aside(
    path: Path, tmp_path: Path, name: str, make: Callable[[Path, Path], None], attacks: Figures
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"not of the store")
    os.mkfifo(outside / "pipe")
    (path / name).unlink(missing_ok=True)
    make(path / name, outside)
    if name.startswith(("index.sqlite.new", "index.lock")):
        (path / "index.sqlite").unlink()  # So that these are needed.
    live(path)
    assert {file.name for file in outside.iterdir()} == {"file", "pipe"}
    assert (outside / "file").read_bytes() == b"not of the store"
    works = [file.read_text() for file in path.rglob("work")]
    assert works == (["of a user"] if make is a_full_folder else [])
    attacks.add("no files in the place of the index")


@pytest.mark.parametrize("suffix", ["", "-wal", "-shm", "-journal"])
def test_a_file_of_a_thousand_gigabytes(path: Path, suffix: str, attacks: Figures) -> None:
    """With holes it takes up nothing, but what SQLite allocates for a check grows with it."""
    file = path / f"index.sqlite{suffix}"
    file.touch(mode=0o600)
    os.truncate(file, 2**40)
    live(path)
    attacks.add("files of absurd sizes put aside")


# ---- schemas ----

ENDLESS = "WITH RECURSIVE n(x) AS (VALUES (1) UNION ALL SELECT x + 1 FROM n)"
SEGMENTS = "id, key, fingerprint, beginning, parent, first_chunk, num_chunks, num_tokens, chunk_size, num_layers, dtype"
SCHEMAS: dict[str, tuple[str, ...]] = {
    "the format mark is an endless view": (
        "DROP TABLE meta",
        f"CREATE VIEW meta AS {ENDLESS} SELECT 'x' AS name, x AS value FROM n",
    ),
    "a mark that is right, and an endless view of segments": (
        "ALTER TABLE segments RENAME TO kept",
        f"CREATE VIEW segments AS {ENDLESS} SELECT kept.* FROM kept, n",
    ),
    "an endless view of chunks": (
        "ALTER TABLE chunks RENAME TO kept",
        f"CREATE VIEW chunks AS {ENDLESS} SELECT kept.* FROM kept, n",
    ),
    "a view more": (f"CREATE VIEW more AS {ENDLESS} SELECT x FROM n",),
    "a trigger that deletes": ("CREATE TRIGGER evil AFTER UPDATE ON segments BEGIN DELETE FROM segments; END",),
    "a trigger that never ends": (
        f"CREATE TRIGGER evil AFTER INSERT ON chunks BEGIN INSERT INTO meta {ENDLESS} SELECT x, x FROM n; END",
    ),
    "a trigger with a name of SQLite's own": (
        "PRAGMA writable_schema = ON",
        "INSERT INTO sqlite_master VALUES ('trigger', 'sqlite_evil', 'segments', 0, 'CREATE TRIGGER sqlite_evil AFTER "
        "UPDATE ON segments BEGIN DELETE FROM segments; END')",
    ),
    "a virtual table": ("CREATE VIRTUAL TABLE more USING fts5(text)",),
    "a table more": ("CREATE TABLE more (x)",),
    "an index more": ("CREATE INDEX more ON segments (uses)",),
    "an index over an expression": ("CREATE INDEX more ON segments (abs(uses))",),
    "an index less": ("DROP INDEX chunks_by_segment",),
    "a column more": ("ALTER TABLE segments ADD COLUMN more",),
    "a column that is computed": ("ALTER TABLE segments ADD COLUMN more AS (zeroblob(100000000))",),
    "a check": ("ALTER TABLE segments ADD COLUMN more CHECK (length(randomblob(100000000)) > more)",),
    "statistics": ("ANALYZE",),
    "a schema that cannot be read": (
        "PRAGMA writable_schema = ON",
        "UPDATE sqlite_master SET sql = 'CREATE TABLE segments (' WHERE name = 'segments'",
    ),
    "tables that exchanged their places": (
        "PRAGMA writable_schema = ON",
        "CREATE TEMP TABLE roots AS SELECT name, rootpage FROM sqlite_master WHERE name IN ('meta', 'segments')",
        "UPDATE sqlite_master SET rootpage = (SELECT rootpage FROM roots WHERE roots.name != sqlite_master.name) WHERE "
        "name IN ('meta', 'segments')",
    ),
    "two thousand tables": tuple(f"CREATE TABLE more{number} (x)" for number in range(2000)),
}


@pytest.mark.parametrize("what", SCHEMAS)
def test_a_schema_that_is_not_ours_is_asked_nothing(
    path: Path, what: str, monkeypatch: pytest.MonkeyPatch, attacks: Figures
) -> None:
    change(path, *SCHEMAS[what])
    evil, asked = (path / "index.sqlite").stat().st_ino, []
    connect = sqlite3.connect

    def noting(*values: Any, **named: Any) -> sqlite3.Connection:
        db = connect(*values, **named)
        if "/index.sqlite?" in values[0] and (path / "index.sqlite").stat().st_ino == evil:
            db.set_trace_callback(asked.append)
        return db

    monkeypatch.setattr(sqlite3, "connect", noting)
    live(path)
    assert len(list(path.glob("index.sqlite.damaged-*"))) == 0  # (`live` has collected it.)
    assert (path / "index.sqlite").stat().st_ino != evil
    selects = {text.partition("FROM ")[2].split()[0] for text in asked if not text.startswith("PRAGMA")}
    assert selects <= {"sqlite_master", "meta"}, asked
    if "mark is an" in what:
        assert selects == {"sqlite_master"}
    attacks.add("foreign schemas refused")


def test_a_newer_index_is_left_alone(path: Path) -> None:
    change(path, "CREATE TABLE of_tomorrow (x)", "UPDATE meta SET value = '99'")
    with pytest.raises(StoreFormatError, match="index format 99"):
        PrefixStore(path)
    assert list(path.glob("index.sqlite.damaged-*")) == []


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(["VIEW", "TRIGGER", "INDEX", "TABLE"]),
    name=st.text(st.characters(exclude_characters='"\0', codec="utf-8"), min_size=1, max_size=8),
)
def test_any_object_more_is_noticed(template: Path, tmp_path: Path, kind: str, name: str) -> None:
    path = tmp_path / "store"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(template, path)
    rest = {
        "VIEW": "AS SELECT 1 AS x",
        "TRIGGER": "AFTER INSERT ON chunks BEGIN SELECT 1; END",
        "INDEX": "ON chunks (tokens)",
        "TABLE": "(x)",
    }
    try:
        change(path, f'CREATE {kind} "{name}" {rest[kind]}')
    except sqlite3.OperationalError:
        return  # The name is taken, or SQLite's own.
    with PrefixStore(path) as store:
        assert [problem.where for problem in store.verify()] == ["index"]
        assert len(store.entries()) == 2


# ---- content ----


def _varint(number: int) -> bytes:
    octets = [number & 0x7F]
    while number := number >> 7:
        octets.append(0x80 | number & 0x7F)
    return bytes(reversed(octets))


def multiply_rows(path: Path, table: str, levels: int) -> None:
    """Make a tree of a table in which every page is a child of its parent many times over."""
    with contextlib.closing(sqlite3.connect(path / "index.sqlite", isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = DELETE")
        (root,) = db.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (table,)).fetchone()
        (size,) = db.execute("PRAGMA page_size").fetchone()
        (count,) = db.execute("PRAGMA page_count").fetchone()
    octets = bytearray((path / "index.sqlite").read_bytes())
    leaf = bytes(octets[(root - 1) * size : root * size])
    of_table = {0x0D: True, 0x0A: False}[leaf[0]]
    start = int.from_bytes(leaf[8:10], "big")
    assert leaf[start] < 128 or not leaf[start + 1] & 0x80  # (A length of one or two bytes.)
    head = 1 if leaf[start] < 128 else 2
    length = leaf[start] if head == 1 else (leaf[start] & 0x7F) << 7 | leaf[start + 1]
    payload = leaf[start : start + head + length]
    octets += leaf
    child = count + 1
    for level in range(levels):
        cells, pointers, end = b"", b"", size
        fan = 300 if of_table else (size - 12) // (len(payload) + 6)
        for number in range(fan):
            cell = child.to_bytes(4, "big") + (_varint(number + 1) if of_table else payload)
            end -= len(cell)
            cells = cell + cells
            pointers += end.to_bytes(2, "big")
        kind = b"\x05" if of_table else b"\x02"
        start_of_page = (
            kind + b"\0\0" + fan.to_bytes(2, "big") + end.to_bytes(2, "big") + b"\0" + child.to_bytes(4, "big")
        )
        page = (start_of_page + pointers).ljust(end, b"\0") + cells
        if level == levels - 1:
            octets[(root - 1) * size : root * size] = page
        else:
            octets += page
            child = len(octets) // size
    octets[28:32] = (len(octets) // size).to_bytes(4, "big")
    (path / "index.sqlite").write_bytes(octets)


@pytest.mark.parametrize("table", ["segments", "meta", "chunks", "totals"])
def test_a_table_of_endless_rows_in_a_small_file(
    path: Path, table: str, monkeypatch: pytest.MonkeyPatch, attacks: Figures
) -> None:
    """The schema is ours; the pages of the tree are not: billions of rows."""
    monkeypatch.setattr(index_file, "_STEPS", 2_000_000)
    multiply_rows(path, table, 7)
    with PrefixStore(path) as store:
        for ask in (store.entries, lambda: store.stats, store.verify):
            with contextlib.suppress(StoreError):
                ask()
        store.gc()
    live(path)
    attacks.add("endless tables ended")


def test_a_query_that_never_ends_ends(path: Path, attacks: Figures) -> None:
    with PrefixStore(path) as store, pytest.raises(StoreError, match="interrupted"):
        store.inner.read(lambda db: db.execute(f"{ENDLESS} SELECT count(*) FROM n").fetchone())
    live(path)
    attacks.add("endless tables ended")


def test_what_is_allowed_grows_with_the_index_and_begins_anew_with_each_transaction(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def steps(rows: int) -> Callable[[sqlite3.Connection], Any]:
        return lambda db: db.execute(f"{ENDLESS} SELECT count(*) FROM (SELECT x FROM n LIMIT {rows})").fetchone()

    monkeypatch.setattr(index_file, "_STEPS", 100_000)
    with PrefixStore(path) as store:
        monkeypatch.setattr(IndexFile, "nbytes", lambda self: 0)
        for _ in range(30):
            assert store.inner.read(steps(2000)) == (2000,)
        with pytest.raises(StoreError, match="interrupted"):
            store.inner.read(steps(100_000))
        monkeypatch.setattr(IndexFile, "nbytes", lambda self: 10_000_000)
        assert store.inner.read(steps(100_000)) == (100_000,)


@pytest.mark.parametrize("column", ["fingerprint", "beginning", "key", "dtype"])
def test_a_row_that_is_far_too_long(path: Path, column: str, attacks: Figures) -> None:
    change(path, f"UPDATE segments SET {column} = printf('%.*c', 3000000, 'x') WHERE id = 1")
    with PrefixStore(path) as store:
        with contextlib.suppress(StoreError):
            store.entries()
        store.gc()
    live(path)
    attacks.add("rows of absurd lengths put aside")


# ---- the connection ----


def test_a_connection_trusts_nothing_in_the_file(path: Path) -> None:
    with Directory.open(path) as folder:
        db, _ = IndexFile(folder).connect(busy_s=0.0)
        with contextlib.closing(db):
            found = {name: db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("trusted_schema", "cell_size_check")}
            assert found == {"trusted_schema": 0, "cell_size_check": 1}
            assert db.getlimit(sqlite3.SQLITE_LIMIT_LENGTH) == 40 * 1024
            with pytest.raises(sqlite3.OperationalError, match="too many attached"):
                db.execute("ATTACH ':memory:' AS other")
            with pytest.raises(sqlite3.DataError, match="too big"):
                db.execute("SELECT length(zeroblob(2000000))").fetchone()


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_folder_that_is_exchanged_when_the_index_is_opened(
    path: Path, tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch, attacks: Figures
) -> None:
    """SQLite opens a path. What it finds there must be what lies in the open folder, or it is not asked."""
    evil = tmp_path / "evil"
    shutil.copytree(path, evil)
    change(evil, "DELETE FROM segments")
    content = (evil / "index.sqlite").read_bytes()
    connect, asked = sqlite3.connect, []

    def swap() -> None:
        if evil.exists():
            path.rename(tmp_path / "taken away")
            evil.rename(path)

    def racing(*values: Any, **named: Any) -> sqlite3.Connection:
        if moment == "before":
            swap()
        db = connect(*values, **named)
        db.set_trace_callback(asked.append)
        if moment == "after":
            swap()
        return db

    monkeypatch.setattr(sqlite3, "connect", racing)
    with pytest.raises(StoreError, match="another one was put in its place"):
        PrefixStore(path)
    assert not any("SELECT" in text for text in asked)
    assert (path / "index.sqlite").read_bytes() == content
    attacks.add("exchanged folders noticed")


def test_a_lock_on_the_index_of_another_connection_stays(path: Path) -> None:
    """Closing any descriptor of a file drops the locks that this process has on it: the index is only looked at."""
    with PrefixStore(path) as one:
        one.inner.index._for_writing.open().execute("BEGIN IMMEDIATE")  # type: ignore[union-attr]
        with PrefixStore(path) as two:
            assert two.inner.index.inspect() == []
            assert two.inner.index.try_write(lambda db: True) is None
        one.inner.index._for_writing.open().execute("ROLLBACK")  # type: ignore[union-attr]
        assert one.inner.index.write(lambda db: True)
