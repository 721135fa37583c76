"""An index that gives, or keeps, far more than its file fills: values that share pages, holes, rows in a square."""

from __future__ import annotations

import os
import sqlite3
import tracemalloc
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tally import Figures
from unit.store_helpers import FINGERPRINT, geometry, some_tokens, write_prefix

from hf_contiguouskv.errors import StoreError
from hf_contiguouskv.store import PrefixStore, index_file, maintenance
from hf_contiguouskv.store.chains import parents_of_all
from hf_contiguouskv.store.directory import Directory
from hf_contiguouskv.store.eviction import choose_excess, expired_segments
from hf_contiguouskv.store.index_file import IndexFile
from hf_contiguouskv.store.rows import (
    SCHEMA,
    IndexDamagedError,
    SegmentRow,
    all_segments,
    has_chunks,
    index_problems,
    segment_by_key,
)
from hf_contiguouskv.store.search import continuations, longest_match, unreachable_keys
from hf_contiguouskv.store.totals import stored_models, stored_roots

IDS = some_tokens(20)
ROW = {
    "id": 1,
    "key": "ab" * 16,
    "fingerprint": FINGERPRINT,
    "beginning": "",
    "parent": bytes(16),
    "first_chunk": 0,
    "num_chunks": 1,
    "num_tokens": 4,
    "chunk_size": 4,
    "num_layers": 1,
    "dtype": "float32",
    "nbytes": 1,
    "compute_ms": 0,
    "created": 1.0,
    "last_used": 1.0,
    "uses": 0,
    "pinned": 0,
    "root": bytes(16),
}


def database() -> sqlite3.Connection:
    db = sqlite3.connect(":memory:", isolation_level=None)
    db.executescript(SCHEMA)
    return db


def add(
    db: sqlite3.Connection, number: int, hash_: bytes | None = None, tokens: bytes = bytes(32), **told: Any
) -> None:
    """A segment of one chunk."""
    row = ROW | {"id": number, "key": f"{number:032x}"} | told
    db.execute(f"INSERT INTO segments ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})", tuple(row.values()))
    values = (hash_ or number.to_bytes(16, "big"), number, row["parent"], tokens)
    db.execute("INSERT INTO chunks (hash, segment, parent, position, tokens) VALUES (?, ?, ?, 0, ?)", values)


def peak(work: Callable[[], object]) -> int:
    """The most bytes that `work` took at a time."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# ---- values ----


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("fingerprint", "f" * 257),
        ("fingerprint", "f" * 30_000),
        ("beginning", "b"),
        ("beginning", "b" * 31),
        ("beginning", "b" * 33),
        ("dtype", "d" * 33),
    ],
)
def test_a_value_that_is_longer_than_the_format_allows(column: str, value: str, attacks: Figures) -> None:
    with closing(database()) as db:
        add(db, 1, **{column: value})
        assert index_problems(db)
        for ask in (all_segments, lambda db: segment_by_key(db, f"{1:032x}")):
            with pytest.raises(IndexDamagedError, match="makes no sense"):
                ask(db)
    attacks.add("values of absurd lengths refused")


def test_the_longest_values_that_the_format_allows() -> None:
    told = ROW | {"fingerprint": "f" * 256, "beginning": "b" * 32, "dtype": "float8_e4m3fnuz"}
    assert SegmentRow.checked(tuple(told.values())).fingerprint == "f" * 256


@pytest.mark.parametrize("tokens", [b"", bytes(4), bytes(8 * 4096 + 8)])
def test_token_ids_of_no_chunk(tokens: bytes, attacks: Figures) -> None:
    with closing(database()) as db:
        add(db, 1, tokens=tokens)
        assert any("make no sense" in problem for problem in index_problems(db))
    attacks.add("values of absurd lengths refused")


@pytest.mark.parametrize("value", ["f" * 257, b"f", 1])
def test_a_model_that_makes_no_sense(value: object, attacks: Figures) -> None:
    with closing(database()) as db:
        db.execute("INSERT INTO totals VALUES (?, ?, 4, 1, 1, 1)", (bytes(16), value if value != 1 else b"1"))
        with pytest.raises(IndexDamagedError, match="a model"):
            stored_models(db)
    attacks.add("values of absurd lengths refused")


@pytest.mark.parametrize("root", [b"", bytes(15), bytes(30_000), "0" * 16])
def test_a_root_that_makes_no_sense(root: object, attacks: Figures) -> None:
    with closing(database()) as db:
        db.execute("INSERT INTO totals VALUES (?, 'f', 4, 1, 1, 1)", (root,))
        with pytest.raises(IndexDamagedError, match="a root"):
            stored_roots(db)
    attacks.add("values of absurd lengths refused")


@pytest.mark.parametrize("column", ["fingerprint", "beginning", "key", "dtype"])
def test_no_value_is_longer_than_a_chunk(tmp_path: Path, column: str, attacks: Figures) -> None:
    """SQLite refuses what is longer before it makes it: so many rows that share one such value give nothing."""
    path = a_store(tmp_path)
    with closing(sqlite3.connect(path / "index.sqlite", isolation_level=None)) as db:
        db.execute(f"UPDATE segments SET {column} = printf('%.*c', 50000, 'x')")
    with Directory.open(path) as folder:
        connection, _ = IndexFile(folder).connect(busy_s=0.0)
        with closing(connection), pytest.raises(sqlite3.DataError, match="too big"):
            connection.execute(f"SELECT {column} FROM segments").fetchall()
    attacks.add("values of absurd lengths refused")


def test_an_index_holds_the_longest_chunk(tmp_path: Path) -> None:
    g = geometry(num_layers=1, kv_heads=1, leader_layers=(), indexed_layers=(), chunk_size=4096)
    ids = some_tokens(5000)
    with PrefixStore(tmp_path / "store") as store:
        write_prefix(store, ids, 0, g)
        stored = store.inner.lookup(FINGERPRINT, ids, 4096)
        assert stored is not None
        assert stored.tokens == 5000
        # What no chunk can be as long as is not looked for.
        assert store.inner.lookup(FINGERPRINT, ids, 10_000) is None
        assert store.verify() == []
        os.unlink(store.path / "index.sqlite")
        assert len(store.entries()) == 1
    assert list((tmp_path / "store").glob("*.damaged-*")) == []


def test_rows_that_share_one_long_value_take_no_memory(tmp_path: Path, attacks: Figures) -> None:
    """Each row has a value of its own here, of 30,000 characters: as many as could share one, in pages of one chain."""
    with closing(database()) as db:
        for number in range(1, 1001):
            add(db, number, fingerprint="f" * 30_000, tokens=bytes(30_000), parent=bytes(16))
            db.execute("INSERT INTO totals VALUES (?, ?, 4, 1, 1, 1)", (number.to_bytes(16, "big"), "f" * 30_000))
        db.execute("UPDATE chunks SET segment = 1, position = segment")

        def ask() -> None:
            for question in (all_segments, stored_models, index_problems):
                with suppress(IndexDamagedError):
                    question(db)
            assert not has_chunks(db, 1, [(bytes(16), bytes(16), 0, bytes(32))] * 2)

        assert peak(ask) < 2_000_000
    attacks.add("rows that are too many or too long not collected")


# ---- rows without an end ----


class Repeating:
    """A connection of which every query gives its rows many times over, as pages do that are used many times."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def execute(self, query: str, values: Any = ()) -> Any:
        rows = self._db.execute(query, values).fetchall()

        class Rows:
            def __iter__(self) -> Any:
                return (row for _ in range(20_000) for row in rows)

            def fetchone(self) -> Any:
                return rows[0] if rows else None

            def fetchall(self) -> Any:
                return list(self)

        return Rows()


@pytest.mark.parametrize(
    "ask",
    [
        all_segments,
        lambda db: all_segments(db, [bytes(16)]),
        lambda db: expired_segments(db, 1e9),
        lambda db: expired_segments(db, 1e9, roots=[bytes(16)]),
        lambda db: choose_excess(db, -(10**9)),
    ],
)
def test_rows_that_come_again_and_again(ask: Callable[[Any], Any], attacks: Figures) -> None:
    with closing(database()) as db:
        for number in range(1, 4):
            add(db, number)
        db.execute("INSERT INTO totals VALUES (?, ?, 4, 3, 12, 3)", (bytes(16), FINGERPRINT))
        ask(db)

        def question() -> None:
            with pytest.raises(IndexDamagedError, match="listed twice"):
                ask(Repeating(db))

        assert peak(question) < 8_000_000
    attacks.add("rows that are too many or too long not collected")


def a_square(db: sqlite3.Connection, count: int) -> None:
    """A segment, `count` that continue it and hold the same chunk, and `count` that continue this chunk."""
    add(db, 1)
    shared = b"\x11" * 16
    for number in range(count):
        add(db, 1000 + number, shared, parent=(1).to_bytes(16, "big"), first_chunk=1)
        add(db, 100_000 + number, parent=shared, first_chunk=2)


def test_segments_that_all_continue_all_others(attacks: Figures) -> None:
    """Millions of pairs, of some hundred segments."""
    with closing(database()) as db:
        a_square(db, 700)
        row = segment_by_key(db, f"{1:032x}")
        assert row is not None
        found: list[SegmentRow] = []
        assert peak(lambda: found.extend(continuations(db, row))) < 25_000_000
        assert [len(found), found[0].id] == [1401, 1]
        assert [one.first_chunk for one in found] == [0] + [1] * 700 + [2] * 700
        assert peak(lambda: unreachable_keys(db)) < 1_000_000
        inner = SimpleNamespace(tenant=SimpleNamespace(roots=lambda db: None), read=lambda query: query(db))
        store = SimpleNamespace(inner=inner)
        assert peak(lambda: parents_of_all(store)) < 4_000_000  # type: ignore[arg-type]
    attacks.add("rows that are too many or too long not collected")


def test_what_is_held_elsewhere_is_not_lost() -> None:
    """Of two segments that hold one chunk, one stays: what continues this chunk stays, and what continues that."""
    with closing(database()) as db:
        shared, other = b"\x11" * 16, (5).to_bytes(16, "big")
        add(db, 1, shared)
        add(db, 2, shared)
        add(db, 3, parent=shared, first_chunk=1)
        add(db, 4, parent=(3).to_bytes(16, "big"), first_chunk=2)
        add(db, 5, parent=(4).to_bytes(16, "big"), first_chunk=3)
        add(db, 6, parent=other, first_chunk=4)

        def lost(number: int) -> list[int]:
            row = segment_by_key(db, f"{number:032x}")
            assert row is not None
            return [row.id for row in continuations(db, row)]

        assert lost(1) == [1]
        assert lost(3) == [3, 4, 5, 6]
        db.execute("DELETE FROM segments WHERE id = 2")
        db.execute("DELETE FROM chunks WHERE segment = 2")
        assert lost(1) == [1, 3, 4, 5, 6]


def test_a_walk_gives_its_segments_in_order() -> None:
    with closing(database()) as db:
        for number in range(1, 40):
            add(db, number, parent=(number - 1).to_bytes(16, "big"), first_chunk=number - 1)
        hashes = [number.to_bytes(16, "big") for number in range(1, 40)]
        found = longest_match(db, bytes(16), hashes, some_tokens(4 * 39), 4)
        assert isinstance(found, tuple)
        assert [row.id for row, _ in found[1]] == list(range(1, 40))


# ---- holes ----


def a_store(tmp_path: Path) -> Path:
    path = tmp_path / "store"
    with PrefixStore(path) as store:
        write_prefix(store, IDS)
    return path


@pytest.mark.parametrize("suffix", ["", "-wal"])
def test_holes_do_not_count(tmp_path: Path, suffix: str, attacks: Figures) -> None:
    path = a_store(tmp_path)
    file = path / f"index.sqlite{suffix}"
    file.touch(mode=0o600)
    with Directory.open(path) as folder:
        index = IndexFile(folder)
        before = index.nbytes()
        assert before > 0
        os.truncate(file, 2**35)
        assert before <= index.nbytes() <= before + 2**17
    attacks.add("holes not counted")


def test_a_file_system_that_does_not_tell_what_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = a_store(tmp_path)
    real = Directory.stat

    def without_blocks(self: Directory, name: str) -> Any:
        status = real(self, name)
        return None if status is None else _Status(status)

    class _Status:
        def __init__(self, status: os.stat_result) -> None:
            self.st_size, self.st_blocks = status.st_size, 0

    with Directory.open(path) as folder:
        monkeypatch.setattr(Directory, "stat", without_blocks)
        assert IndexFile(folder).nbytes() == (path / "index.sqlite").stat().st_size


def test_a_question_ends_however_long_the_file_is_told_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attacks: Figures
) -> None:
    monkeypatch.setattr(index_file, "_STEPS", 200_000)
    path = a_store(tmp_path)
    key = "0" * 31 + "1"
    with closing(sqlite3.connect(path / "index.sqlite", isolation_level=None)) as db:
        db.execute("BEGIN")
        db.execute("DELETE FROM segments")
        db.execute("DELETE FROM chunks")
        a_square(db, 800)
        db.execute("DELETE FROM totals")
        db.execute("INSERT INTO totals VALUES (?, ?, 4, 1601, 6404, 1601)", (bytes(16), FINGERPRINT))
        db.execute("COMMIT")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    os.truncate(path / "index.sqlite", 2**35)
    # (These rows are written while the store is open: otherwise opening forgets segments that are not there.)
    monkeypatch.setattr(maintenance, "reconcile_on_opening", lambda *_: None)
    with PrefixStore(path) as store, pytest.raises(StoreError, match="interrupted"):
        store.delete(key, recursive=True)
    monkeypatch.undo()
    with PrefixStore(path) as store:
        stored = store.inner.lookup(FINGERPRINT, IDS, geometry().chunk_size)
        assert stored is not None
        assert stored.tokens == 20
    attacks.add("endless tables ended")
