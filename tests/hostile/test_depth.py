"""Chains of hundreds of segments, and stores of thousands: statements, opens and rows that are read are counted."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tally import Figures
from typer.testing import CliRunner
from unit.store_helpers import FINGERPRINT, geometry, some_tokens, write_prefix

from hf_contiguouskv.cli import app
from hf_contiguouskv.errors import PrefixInUseError, StoreError
from hf_contiguouskv.store import PrefixStore, eviction, opened
from hf_contiguouskv.store.backend import Blob
from hf_contiguouskv.store.chains import chains, children, parents_of_all
from hf_contiguouskv.store.format import SegmentHeader
from hf_contiguouskv.store.hashing import TokenIds, root_hash, segment_hashes
from hf_contiguouskv.store.memory_backend import MemoryBackend
from hf_contiguouskv.store.rows import SCHEMA, SegmentRow, all_segments, insert_segment, is_reachable, segment_by_key
from hf_contiguouskv.store.search import chain_of, chain_to, continuations, longest_match

G = geometry(num_layers=1, kv_heads=1, head_dim=1, leader_layers=(), indexed_layers=())
C = G.chunk_size
DEEP = 300


class Counted(MemoryBackend):
    """Counts what is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.opened = 0

    def open(self, key: str) -> Blob:
        self.opened += 1
        return super().open(key)


@contextmanager
def statements(store: PrefixStore) -> Iterator[list[str]]:
    """The SQL that this store runs within it, on both connections."""
    found: list[str] = []
    connections = store.inner.index._for_reading, store.inner.index._for_writing
    for connection in connections:
        db = connection.open()
        assert db is not None
        db.set_trace_callback(found.append)
    yield found
    for connection in connections:
        db = connection.open()
        assert db is not None
        db.set_trace_callback(None)


@pytest.fixture(scope="module")
def backend() -> Counted:
    return Counted()


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory, backend: Counted) -> Iterator[tuple[PrefixStore, TokenIds]]:
    """A conversation of many turns, each one a segment."""
    ids = some_tokens(C * DEEP)
    with PrefixStore(tmp_path_factory.mktemp("deep") / "store", backend=backend) as store:
        for turn in range(DEEP):
            write_prefix(store, ids[: C * (turn + 1)], turn, G)
        yield store, ids


def test_a_look_up_asks_once_for_a_whole_chain_and_opens_each_segment_once(
    deep: tuple[PrefixStore, TokenIds], backend: Counted, attacks: Figures
) -> None:
    store, ids = deep
    store.inner.parts.opened.close()
    for opens in (DEEP, 0, 0):
        before = backend.opened
        with statements(store) as ran:
            stored = store.inner.lookup(FINGERPRINT, ids, C, count=False)
        assert stored is not None
        assert (stored.tokens, len(stored.spans)) == (len(ids), DEEP)
        assert backend.opened - before == opens  # (Before: all but 128 of them, every time.)
        assert len(ran) < 20  # Bisection, the chain, and the transaction.
    attacks.add("deep chains served in few statements")


def test_refusing_describing_and_counting_ask_a_few_times(
    deep: tuple[PrefixStore, TokenIds], backend: Counted, attacks: Figures
) -> None:
    store, _ = deep
    entries = store.entries()
    before = backend.opened
    with statements(store) as ran:
        with pytest.raises(PrefixInUseError, match=f"{DEEP - 6} more"):
            store.delete(entries[0].key)
        assert [row.key for row in chains(store, [entries[-1].key])[entries[-1].key]] == [e.key for e in entries]
        assert children(store, entries[0].key) == [entries[1].key]
        assert children(store, entries[-1].key) == []
        assert store.stats.segments == DEEP
        assert store.entries(entries[7].key[:12]) == [entries[7]]
    assert len(ran) < 40
    assert not any("FROM segments" in sql and "WHERE" not in sql for sql in ran)
    assert backend.opened == before
    attacks.add("deep chains served in few statements", 5)


def test_all_of_a_deep_chain_is_deleted_in_short_transactions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attacks: Figures
) -> None:
    monkeypatch.setattr("hf_contiguouskv.store.upkeep._DELETED_AT_ONCE", 16)
    ids = some_tokens(C * 50)
    with PrefixStore(tmp_path / "store", backend=MemoryBackend()) as store:
        for turn in range(50):
            write_prefix(store, ids[: C * (turn + 1)], turn, G)
        keys = [entry.key for entry in store.entries()]
        store.pin(keys[40])
        with statements(store) as ran:
            assert store.delete(keys[2], recursive=True) == keys[2:]
        assert sum(sql.startswith("BEGIN IMMEDIATE") for sql in ran) == 3
        assert len(ran) < 12 * 50
        assert [entry.key for entry in store.entries()] == keys[:2]
        assert store.backend.list_keys() == set(keys[:2])
        assert store.inner.parts.pins.keys() == set()
        assert store.inner.lookup(FINGERPRINT, ids, C).tokens == 2 * C  # type: ignore[union-attr]
    attacks.add("deep chains deleted in short transactions")


def test_the_command_does_not_list_the_store_for_every_key(tmp_path: Path, attacks: Figures) -> None:
    ids = some_tokens(C * 20)
    with PrefixStore(tmp_path / "store") as store:
        for turn in range(20):
            write_prefix(store, ids[: C * (turn + 1)], turn, G)
        keys = [entry.key for entry in store.entries()]
    listed: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_contiguouskv.store.upkeep.all_segments", lambda db, roots=None: listed.append("all") or [])
        assert CliRunner().invoke(app, ["rm", str(tmp_path / "store"), *keys[5:]]).exit_code == 0
        assert CliRunner().invoke(app, ["info", str(tmp_path / "store"), keys[4]]).exit_code == 0
    assert listed == []
    with PrefixStore(tmp_path / "store") as store:
        assert [entry.key for entry in store.entries()] == keys[:5]
    attacks.add("deep chains deleted in short transactions")


def test_what_stays_open_is_bounded_by_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attacks: Figures
) -> None:
    with PrefixStore(tmp_path / "store", backend=MemoryBackend()) as store:
        for seed in range(30):
            write_prefix(store, some_tokens(C, seed), 0, G)
        rows, table = _rows(store), store.inner.parts.opened
        one = opened.kept_bytes(table.get(rows[0]))
        monkeypatch.setattr(opened, "_ALWAYS_OPEN", 4)
        monkeypatch.setattr(opened, "_MAX_KEPT_BYTES", 10 * one)
        table.forget([row.key for row in rows])
        for row in rows * 2:
            table.get(row)
            assert len(table._recent) <= 10
            assert table._kept_bytes == sum(map(opened.kept_bytes, table._recent.values()))
        monkeypatch.setattr(opened, "_MAX_KEPT_BYTES", 0)
        for row in rows:
            table.get(row)
        assert len(table._recent) == 4
        table.forget([row.key for row in rows])
        assert (len(table._recent), table._kept_bytes) == (0, 0)
    attacks.add("tables of open segments bounded")


def _rows(store: PrefixStore) -> list[SegmentRow]:
    found: list[SegmentRow] = store.inner.read(all_segments)
    return found


# ---- many segments ----


def many(count: int, base: float) -> sqlite3.Connection:
    """An index of `count` conversations: a parent, and a child that was used ten seconds later; oldest first."""
    db = sqlite3.connect(":memory:", isolation_level=None)
    db.executescript(SCHEMA)
    db.execute("BEGIN")
    for number in range(count):
        ids = np.array([number, 1, 2, 3, number, 5, 6, 7])
        insert_segment(db, header(ids, 0, C), ids[:C], 4096, base + 20 * number)
        insert_segment(db, header(ids, 1), ids[C:], 4096, base + 20 * number + 10)
    db.execute("COMMIT")
    return db


def header(ids: TokenIds, first: int, end: int | None = None) -> SegmentHeader:
    root = root_hash(FINGERPRINT, C)
    names = [root, *segment_hashes(root, ids[:end], C, first=True)]
    parent = names[first].hex() if first else ""
    return SegmentHeader(G, FINGERPRINT, root.hex(), parent, names[-1].hex(), first, len(ids[:end]) - first * C)


@pytest.fixture
def rows_read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...] | None]:
    """Every row that was read as a segment."""
    found: list[tuple[object, ...] | None] = []
    original = SegmentRow.checked.__func__  # type: ignore[attr-defined]

    def checked(cls: type[SegmentRow], values: tuple[object, ...] | None) -> SegmentRow:
        found.append(values)
        row: SegmentRow = original(cls, values)
        return row

    monkeypatch.setattr(SegmentRow, "checked", classmethod(checked))
    return found


def test_who_publishes_into_a_full_store_looks_at_candidates_only(
    rows_read: list[tuple[object, ...] | None], attacks: Figures
) -> None:
    db = many(3000, time.time() - 10**6)
    new = header(np.array([9, 9, 9, 9]), 0)
    victims = eviction.choose_victims(db, new, 3 * 4096, 6000 * 4096)
    assert len(victims) == 3
    assert len(rows_read) <= eviction._CANDIDATES + 10
    # Of the thousand that were used least recently, those that are worth least: the two oldest leaves, then the parent
    # whose only child is gone (used ten seconds before its child, so it is worth less than the next leaf).
    assert [row.first_chunk for row in victims] == [1, 0, 1]
    rows_read.clear()
    assert eviction.stored_bytes(db) == 6000 * 4096
    assert rows_read == []
    attacks.add("full stores that were not scanned")


def test_where_the_candidates_may_not_go_more_are_looked_at(
    rows_read: list[tuple[object, ...] | None], attacks: Figures
) -> None:
    db = many(3000, time.time() - 10**6)
    db.execute("UPDATE segments SET pinned = 1 WHERE last_used < (SELECT last_used FROM segments LIMIT 1 OFFSET 1200)")
    new = header(np.array([9, 9, 9, 9]), 0)
    (victim,) = eviction.choose_victims(db, new, 4096, 6000 * 4096)
    assert not victim.pinned
    assert eviction._CANDIDATES < len(rows_read) <= 2 * eviction._CANDIDATES + 10
    everything = {row.key for row in eviction.choose_excess(db, 0)[0]}
    assert len(everything) == 6000 - 1200
    attacks.add("full stores that were not scanned")


def test_removing_goes_on_where_it_was_cut(attacks: Figures) -> None:
    db = many(40, time.time() - 10**6)
    victims, left = eviction.choose_excess(db, 10 * 4096, at_most=7)
    assert (len(victims), left) == (7, 63 * 4096)
    attacks.add("full stores emptied in steps")


def test_what_expires_is_found_by_its_time(rows_read: list[tuple[object, ...] | None], attacks: Figures) -> None:
    base = time.time() - 10**6
    db = many(3000, base)
    gone = eviction.expired_segments(db, base + 20 * 50)
    assert len(gone) == 100
    assert len(rows_read) == 100
    assert [row.first_chunk for row in gone] == [1] * 50 + [0] * 50
    attacks.add("full stores that were not scanned")


@pytest.mark.parametrize(
    "query",
    [
        pytest.param(lambda db, row: longest_match(db, row.root, [row.parent], np.arange(C), C), id="look-up"),
        pytest.param(lambda db, row: continuations(db, row), id="continuations"),
        pytest.param(lambda db, row: chain_to(db, row.root, row.parent, 1), id="chain"),
    ],
)
def test_no_question_about_one_prefix_scans_a_table(
    query: Callable[[sqlite3.Connection, SegmentRow], object], attacks: Figures
) -> None:
    """SQLite's own plan: it goes through an index for every table, whatever the number of rows."""
    db = many(20, time.time() - 10**6)
    row = SegmentRow.checked(
        db.execute(f"SELECT {eviction.COLUMNS} FROM segments WHERE first_chunk = 1 LIMIT 1").fetchone()
    )
    ran: list[str] = []
    db.set_trace_callback(ran.append)
    query(db, row)
    db.set_trace_callback(None)
    assert ran
    for sql in ran:
        for *_, step in db.execute(f"EXPLAIN QUERY PLAN {sql}"):
            assert not step.startswith(("SCAN segments", "SCAN chunks", "SCAN child", "SCAN parent", "SCAN held")), step
            assert "segments_by_root" not in step, step  # (All of a tenant are as many as all.)
    attacks.add("questions that scan nothing")


# ---- a child of a chunk that is not whole ----


@settings(deadline=None, max_examples=60)
@given(tokens=st.integers(1, 3 * C), position=st.integers(0, 2))
def test_only_whole_chunks_are_continued(tokens: int, position: int) -> None:
    """Whatever chunk of a segment another one says that it continues: it does only where that chunk is whole."""
    db = sqlite3.connect(":memory:", isolation_level=None)
    db.executescript(SCHEMA)
    ids = np.arange(tokens)
    parent = header(ids, 0)
    insert_segment(db, parent, ids, 4096, 1.0)
    position = min(position, parent.num_chunks - 1)
    names = segment_hashes(bytes.fromhex(parent.root), ids, C, first=True)
    own = np.array([7, 8, 9])
    child = SegmentHeader(G, FINGERPRINT, parent.root, names[position].hex(), "", position + 1, 3)
    child = SegmentHeader(
        G, FINGERPRINT, parent.root, names[position].hex(), child.hashes(own)[-1].hex(), position + 1, 3
    )
    insert_segment(db, child, own, 4096, 2.0)
    whole = (position + 1) * C <= tokens
    row, below = segment_by_key(db, parent.key), segment_by_key(db, child.key)
    assert row is not None
    assert below is not None
    assert [one.key for one in continuations(db, row)] == [parent.key, child.key][: 1 + whole]
    for chain in (chain_of(db, below), chain_to(db, row.root, bytes.fromhex(child.key), position + 2)):
        assert isinstance(chain, list) == whole
    assert is_reachable(db, child.key) == whole
    freed = [one.key for one in eviction.expired_segments(db, 10.0)]
    assert set(freed) == {parent.key, child.key}


def test_a_child_of_a_partial_chunk_is_nobodys_child(store_path: Path, attacks: Figures) -> None:
    ids = some_tokens(C + 2)
    with PrefixStore(store_path) as store:
        parent = write_prefix(store, ids, 0, G).spans[0].segment
        own = some_tokens(4, seed=1)
        child = SegmentHeader(G, FINGERPRINT, parent.header.root, parent.key, "", 2, len(own))
        key = child.hashes(own)[-1].hex()
        child = SegmentHeader(G, FINGERPRINT, parent.header.root, parent.key, key, 2, len(own))
        store.inner.write(lambda db: insert_segment(db, child, own, 4096, time.time()))
        assert parents_of_all(store) == {}
        assert children(store, parent.key) == []
        with pytest.raises(StoreError, match="not stored any more"):
            chains(store, [key])
        assert store.delete(parent.key) == [parent.key]  # It is not in the way.
    attacks.add("children of partial chunks not believed")
