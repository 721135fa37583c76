"""Rows of the index that an enemy wrote: nothing but errors with a name comes of them, and what is stored is found."""

from __future__ import annotations

import shutil
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tally import Figures
from unit.store_helpers import FINGERPRINT, geometry, some_tokens, write_prefix

from hf_contiguouskv.errors import ContiguousKVError
from hf_contiguouskv.store import PrefixStore
from hf_contiguouskv.store.format import SegmentHeader
from hf_contiguouskv.store.hashing import root_hash, segment_hashes
from hf_contiguouskv.store.rows import (
    SCHEMA,
    IndexDamagedError,
    SegmentRow,
    all_segments,
    drop_segment,
    index_problems,
    insert_segment,
    mark_used,
    set_use,
)
from hf_contiguouskv.store.totals import totals, totals_are_right

G = geometry(num_layers=1, leader_layers=(), indexed_layers=())
C = G.chunk_size
LONG = some_tokens(26)
PROMPTS = {
    None: [LONG, np.append(LONG[:12], some_tokens(6, seed=1)), some_tokens(9, seed=2)],
    "tenant": [LONG[:18], some_tokens(7, seed=3)],
}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "store"
    with PrefixStore(path) as store:
        write_prefix(store, LONG[:12], 0, G)
        write_prefix(store, LONG[:20], 3, G)
        write_prefix(store, LONG, 5, G)
        write_prefix(store, PROMPTS[None][1], 3, G)
        write_prefix(store, PROMPTS[None][2], 0, G)
    with PrefixStore(path, salt="tenant") as store:
        write_prefix(store, LONG[:8], 0, G)
        write_prefix(store, LONG[:18], 2, G)
        write_prefix(store, PROMPTS["tenant"][1], 0, G)
    return path


# ---- what an enemy writes ----


def database() -> sqlite3.Connection:
    db = sqlite3.connect(":memory:", isolation_level=None)
    db.executescript(SCHEMA)
    return db


with closing(database()) as _db:
    COLUMNS = {
        table: [column[1] for column in _db.execute(f"PRAGMA table_info({table})")]
        for table in ("segments", "chunks", "totals")
    }

numbers = st.one_of(
    st.integers(-2, 40),
    st.sampled_from([2**31, 2**53 - 1, 2**53, 2**62, 2**63 - 1, -(2**63)]),
    st.floats(allow_nan=False),
    st.sampled_from([1e300, -1.0, 2.0**40, 2.0**40 - 1, float("inf")]),
)
texts = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=8), st.sampled_from(["ab" * 16, "../../etc/passwd", "\0", "1", "-1"])
)
octets = st.one_of(st.binary(max_size=20), st.binary(min_size=16, max_size=16), st.just(bytes(32)))


@st.composite
def edits(draw: st.DrawFn) -> tuple[str, tuple[Any, ...]]:
    """A statement with its values."""
    table = draw(st.sampled_from(sorted(COLUMNS)))
    column = draw(st.sampled_from(COLUMNS[table]))
    number = draw(st.integers(0, 12))
    # (Two of the tables have no rowid.)
    keys = {"segments": "id", "chunks": "(hash, segment)", "totals": "(root, fingerprint, chunk_size)"}[table]
    row = f"{keys} = (SELECT {keys.strip('()')} FROM {table} LIMIT 1 OFFSET {number})"
    kind = draw(st.sampled_from(["set", "copy", "delete", "all", "double"]))
    if kind == "set":
        return f"UPDATE OR IGNORE {table} SET {column} = ? WHERE {row}", (draw(st.one_of(numbers, texts, octets)),)
    if kind == "copy":
        # Sensible values in the wrong place are worse than nonsense.
        source = draw(st.sampled_from([(t, c) for t, names in COLUMNS.items() for c in names]))
        offset = draw(st.integers(0, 12))
        value = f"(SELECT {source[1]} FROM {source[0]} LIMIT 1 OFFSET {offset})"
        return f"UPDATE OR IGNORE {table} SET {column} = {value} WHERE {row}", ()
    if kind == "delete":
        return f"DELETE FROM {table} WHERE {row}", ()
    if kind == "all":
        return f"UPDATE OR IGNORE {table} SET {column} = ?", (draw(st.one_of(numbers, texts, octets)),)
    names = ", ".join(COLUMNS[table])
    values = ", ".join("?" if name == column else name for name in COLUMNS[table])
    more = draw(st.one_of(numbers, texts, octets))
    return f"INSERT OR IGNORE INTO {table} ({names}) SELECT {values} FROM {table} WHERE {row}", (more,)


def write_rows(folder: Path, statements: list[tuple[str, tuple[Any, ...]]]) -> None:
    with closing(sqlite3.connect(folder / "index.sqlite", isolation_level=None)) as db:
        for sql, values in statements:
            # (NOT NULL, or a value that SQLite cannot hold.)
            with suppress(sqlite3.IntegrityError, OverflowError):
                db.execute(sql, values)


def attempt(act: Callable[[], object]) -> None:
    with suppress(ContiguousKVError):
        act()


def use(store: PrefixStore, salt: str | None) -> None:
    """Whatever a user does, without an exception that has no name. (Look-ups raise none at all.)"""
    for ids in PROMPTS[salt]:
        store.inner.lookup(FINGERPRINT, ids, C)
        store.inner.next_stored(FINGERPRINT, ids, C, 0)
    entries = []
    with suppress(ContiguousKVError):
        entries = store.entries()
    for entry in entries:
        attempt(lambda key=entry.key: store.pin(key))  # type: ignore[misc]
        attempt(lambda key=entry.key: store.unpin(key))  # type: ignore[misc]
        attempt(lambda key=entry.key: store.entries(key[:9]))  # type: ignore[misc]
    for act in (lambda: store.stats, store.verify, lambda: store.gc(dry_run=True)):
        attempt(act)
    attempt(lambda: write_prefix(store, some_tokens(10, seed=77), 0, G))
    attempt(lambda: write_prefix(store, np.append(LONG[:12], some_tokens(9, seed=78)), 3, G))


SLOW = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.mark.usefixtures("bounded_memory")
@SLOW
@given(statements=st.lists(edits(), min_size=1, max_size=4), first=st.sampled_from([None, "tenant"]))
@example(statements=[("UPDATE segments SET last_used = ?", (1e300,))], first=None)
@example(statements=[("UPDATE totals SET bytes = ?", (-(2**63),))], first="tenant")
@example(statements=[("DELETE FROM totals", ()), ("DELETE FROM chunks", ())], first=None)
@example(statements=[("UPDATE segments SET root = parent", ())], first="tenant")
@example(statements=[("UPDATE segments SET num_tokens = ?, num_chunks = 1", (1,))], first=None)
def test_whatever_is_in_the_rows(
    template: Path, tmp_path: Path, attacks: Figures, statements: list[tuple[str, tuple[Any, ...]]], first: str | None
) -> None:
    folder = tmp_path / "store"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(template, folder)
    write_rows(folder, statements)
    for salt in (first, None if first else "tenant"):
        with PrefixStore(folder, salt=salt) as store:
            use(store, salt)
    with PrefixStore(folder) as store:
        store.gc()
        assert [str(problem) for problem in store.verify()] == []
    for salt, prompts in PROMPTS.items():
        with PrefixStore(folder, salt=salt) as store:
            for ids in prompts:
                stored = store.inner.lookup(FINGERPRINT, ids, C)
                assert stored is not None
                assert stored.tokens == len(ids)
    attacks.add("indexes with an enemy's rows lived through")


@pytest.mark.usefixtures("bounded_memory")
@SLOW
@given(statements=st.lists(edits(), min_size=1, max_size=4), bound=st.integers(0, 200_000))
@example(statements=[("UPDATE segments SET nbytes = ?", (2**53 - 1,))], bound=50_000)
@example(statements=[("UPDATE segments SET nbytes = 0", ())], bound=0)
@example(statements=[("UPDATE segments SET parent = (SELECT hash FROM chunks LIMIT 1), first_chunk = 1", ())], bound=0)
def test_whatever_is_in_the_rows_of_a_full_store(
    template: Path, tmp_path: Path, attacks: Figures, statements: list[tuple[str, tuple[Any, ...]]], bound: int
) -> None:
    """Evicting and expiring follow the rows: they end, and take away no more than what a row can name."""
    folder = tmp_path / "store"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(template, folder)
    write_rows(folder, statements)
    with PrefixStore(folder, max_disk_bytes=bound, ttl_s=1000) as store:
        store.flush()
        use(store, None)
        attempt(store.gc)
    with PrefixStore(folder) as store:
        store.gc()
        assert [str(problem) for problem in store.verify()] == []
        for ids in PROMPTS[None]:
            store.inner.lookup(FINGERPRINT, ids, C)
        assert store.stats.misses["corrupt"] == 0
    attacks.add("indexes with an enemy's rows lived through")


# ---- times ----


@pytest.mark.parametrize("moment", [1e300, -1.0, -1e300, 2.0**40, float("inf"), 1.7e308])
def test_no_time_is_such_a_time(moment: float, attacks: Figures) -> None:
    good = (1, "ab" * 16, "", "", bytes(16), 0, 1, 4, 4, 1, "float32", 1, 0, 1.0, 1.0, 0, 0, bytes(16))
    assert SegmentRow.checked(good).created == 1.0
    for place in (13, 14):
        with pytest.raises(IndexDamagedError, match="makes no sense"):
            SegmentRow.checked((*good[:place], moment, *good[place + 1 :]))
        attacks.add("times that make no sense refused")


@given(moment=st.floats(allow_nan=True, allow_infinity=True))
def test_times_are_those_that_have_been_whoever_says_them(moment: float) -> None:
    with closing(database()) as db:
        before = time.time()
        header = a_segment(0)
        insert_segment(db, header, np.arange(4), 1, moment)
        mark_used(db, [(1, moment, header.key)])
        set_use(db, header.key, moment, moment, 3)
        (row,) = all_segments(db)
        assert all(0 <= told <= time.time() for told in (row.created, row.last_used))
        if not 0 <= moment <= before:
            assert row.last_used >= before


# ---- totals ----


def a_segment(number: int, salt: bytes = b"") -> SegmentHeader:
    root = root_hash(FINGERPRINT, C, salt)
    (name,) = segment_hashes(root, np.arange(number, number + 4), C, first=True)
    return SegmentHeader(G, FINGERPRINT, root.hex(), "", name.hex(), 0, 4)


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.sampled_from([b"", b"a"]), st.integers(1, 9)), max_size=30)
)
def test_totals_are_those_of_the_segments_whatever_comes_and_goes(acts: list[tuple[bool, int, bytes, int]]) -> None:
    with closing(database()) as db:
        there: dict[tuple[int, bytes], int] = {}
        for adds, number, salt, nbytes in acts:
            header = a_segment(number, salt)
            if adds and (number, salt) not in there:
                insert_segment(db, header, np.arange(number, number + 4), nbytes, 1.0)
                there[number, salt] = nbytes
            elif not adds:
                drop_segment(db, header.key)  # (It may not be there.)
                there.pop((number, salt), None)
            assert totals_are_right(db)
            assert (totals(db).segments, totals(db).nbytes) == (len(there), sum(there.values()))
            own = totals(db, [root_hash(FINGERPRINT, C, b"a")])
            assert own.nbytes == sum(nbytes for (_, tenant), nbytes in there.items() if tenant)
            assert own.tokens == 4 * own.segments
        assert index_problems(db) == []
