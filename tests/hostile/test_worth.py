"""Room cannot be bought: what a segment claims to be worth is bounded, and nobody has used it tomorrow."""

from __future__ import annotations

import os
import sqlite3
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from clock import Clock
from hypothesis import given
from hypothesis import strategies as st
from tally import Figures
from unit.store_helpers import FINGERPRINT, expected_kv, geometry, some_tokens, write_prefix

from hf_contiguouskv.store import PrefixStore
from hf_contiguouskv.store.bundle import export_bundle, import_bundle
from hf_contiguouskv.store.eviction import typical_cost, worth
from hf_contiguouskv.store.hashing import TokenIds
from hf_contiguouskv.store.rows import SegmentRow

NOW = 1_800_000_000.0
ROW = SegmentRow(1, "0" * 32, "", "", bytes(16), 0, 64, 1024, 16, 3, "float32", 2**20, 10_000, NOW, NOW - 60.0, 3, 0)
"""Honest: 1,024 tokens that took 10 s, used 3 times, the last time a minute ago."""


# ---- what may be claimed ----


def test_seconds_are_bounded_by_tokens(attacks: Figures) -> None:
    most = worth(replace(ROW, compute_ms=2**52), NOW, 1.0)
    # An honest model that takes a quarter of a second for a token (and 5 s for the request besides) is worth as much.
    slow = replace(ROW, compute_ms=5000 + 250 * ROW.num_tokens)
    assert most == pytest.approx(worth(slow, NOW, 1.0))
    assert most < 30 * worth(ROW, NOW, 1.0)
    attacks.add("claims of worth cut down")


def test_what_is_not_claimed_is_not_raised_by_the_claims_of_others(attacks: Figures) -> None:
    unknown, liar = replace(ROW, compute_ms=0), replace(ROW, compute_ms=2**52)
    honest = [ROW] * 9
    assert typical_cost(honest) == pytest.approx(10 / 1024)
    assert typical_cost([*honest, liar]) < 5 * typical_cost(honest)
    assert worth(unknown, NOW, typical_cost([*honest, liar])) < 5 * worth(ROW, NOW, 1.0)
    attacks.add("claims of worth cut down")


def test_uses_are_bounded(attacks: Figures) -> None:
    most = worth(replace(ROW, uses=2**52), NOW, 1.0)
    assert most == worth(replace(ROW, uses=1000), NOW, 1.0)
    # Idle for a week, it is worth less than what was used once in the last ten minutes.
    old = replace(ROW, uses=2**52, last_used=NOW - 7 * 86400)
    assert worth(old, NOW, 1.0) < worth(replace(ROW, uses=1, last_used=NOW - 600), NOW, 1.0)
    attacks.add("claims of worth cut down")


@given(ahead=st.floats(0, 2**39))
def test_nobody_has_used_it_tomorrow(ahead: float) -> None:
    assert worth(replace(ROW, last_used=NOW + ahead), NOW, 1.0) == worth(replace(ROW, last_used=NOW), NOW, 1.0)


@given(
    compute_ms=st.integers(0, 2**53 - 1), uses=st.integers(0, 2**53 - 1), last_used=st.floats(0, 2.0**40 - 1),
    idle=st.floats(0, 10**9),
)  # fmt: skip
def test_whatever_is_claimed_is_worth_no_more_than_its_tokens_allow(
    compute_ms: int, uses: int, last_used: float, idle: float
) -> None:
    claimed = replace(ROW, compute_ms=compute_ms, uses=uses, last_used=last_used)
    bound = 1001 * (5 + 0.25 * ROW.num_tokens) / ROW.nbytes
    assert 0 <= worth(claimed, NOW + idle, 0.25) <= bound * (1 + 1e-9)


# ---- through a store ----


def store_measured(store: PrefixStore, ids: TokenIds, compute_s: float) -> str:
    g = geometry(leader_layers=(), indexed_layers=())
    with store.inner.begin_segment(FINGERPRINT, g, ids) as writer:
        for layer in range(g.num_layers):
            writer.write_chunks(layer, 0, expected_kv(g, ids, layer))
        return writer.commit(compute_s=compute_s).spans[0].segment.key


def test_a_segment_that_claims_years_goes_all_the_same(store_path: Path, clock: Clock, attacks: Figures) -> None:
    with PrefixStore(store_path) as store:
        liar = store_measured(store, some_tokens(16, seed=1), 1e8)
        size = store.stats.segment_bytes
    with PrefixStore(store_path, max_disk_bytes=3 * size) as store:
        for seed in range(2, 32):
            clock.now += 60
            honest = some_tokens(16, seed)
            store_measured(store, honest, 0.5)
            clock.now += 1
            store.inner.lookup(FINGERPRINT, honest, 4)
        assert liar not in {entry.key for entry in store.entries()}
        attacks.add("segments that claimed much evicted")


def test_what_is_imported_claims_nothing(tmp_path: Path, clock: Clock, attacks: Figures) -> None:
    with PrefixStore(tmp_path / "enemy") as enemy:
        liar = store_measured(enemy, some_tokens(16, seed=1), 1e8)
        export_bundle(enemy, [liar], tmp_path / "bundle")
    with PrefixStore(tmp_path / "own") as store:
        import_bundle(store, tmp_path / "bundle")
        (entry,) = store.entries()
        assert (entry.key, entry.compute_s, entry.uses) == (liar, 0.0, 0)
        store_measured(store, some_tokens(16, seed=2), 0.5)
        size = store.stats.segment_bytes
        clock.now += 60
        store.inner.lookup(FINGERPRINT, some_tokens(16, seed=2), 4)
    with PrefixStore(tmp_path / "own", max_disk_bytes=size) as store:
        store_measured(store, some_tokens(16, seed=3), 0.5)
        assert liar not in {entry.key for entry in store.entries()}
    attacks.add("segments that claimed much evicted")


def test_a_file_from_the_future_is_one_of_now(store_path: Path, attacks: Figures) -> None:
    """The time of a file is what its owner says; it becomes `created` where a segment is indexed again."""
    with PrefixStore(store_path) as store:
        key = write_prefix(store, some_tokens(16)).spans[0].segment.key
    path = store_path / "segments" / key[:2] / f"{key}.safetensors"
    for moment in (2**33, 0):
        os.utime(path, (moment, moment))
        for name in ("index.sqlite", "index.sqlite-wal", "index.sqlite-shm"):
            (store_path / name).unlink(missing_ok=True)
        with PrefixStore(store_path) as store:
            (entry,) = store.entries()
            assert 0 <= entry.created <= time.time()
            assert entry.last_used <= time.time()
        attacks.add("times to come clamped")


@pytest.mark.parametrize("moment", [9e9, 2.0**40 - 1])
def test_what_was_used_in_the_future_grows_old(store_path: Path, clock: Clock, moment: float, attacks: Figures) -> None:
    """A row that says so is sane, but it must not keep its segment for a hundred years."""
    with PrefixStore(store_path) as store:
        liar = write_prefix(store, some_tokens(16)).spans[0].segment.key
        size = store.stats.segment_bytes
    with closing(sqlite3.connect(store_path / "index.sqlite", isolation_level=None)) as db:
        db.execute("UPDATE segments SET last_used = ?", (moment,))
    with PrefixStore(store_path, ttl_s=100) as store:
        assert store.gc().expired == ()  # It counts as used now,
        (entry,) = store.entries()
        assert entry.last_used == clock.now
    with PrefixStore(store_path, max_disk_bytes=2 * size) as store:
        for seed in range(1, 4):
            clock.now += 50
            write_prefix(store, some_tokens(16, seed))
            store.inner.lookup(FINGERPRINT, some_tokens(16, seed), 4)
        assert liar not in {entry.key for entry in store.entries()}  # ... and later as used then.
    attacks.add("times to come clamped")


def test_what_was_used_in_the_future_expires(store_path: Path, clock: Clock, attacks: Figures) -> None:
    with PrefixStore(store_path, ttl_s=100) as store:
        key = write_prefix(store, some_tokens(16)).spans[0].segment.key
        with closing(sqlite3.connect(store_path / "index.sqlite", isolation_level=None)) as db:
            db.execute("UPDATE segments SET last_used = 9e9")
        assert store.gc().expired == ()
        clock.now += 101
        assert store.gc().expired == (key,)
    attacks.add("times to come clamped")
