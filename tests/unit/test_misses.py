"""A look-up that finds nothing says why, and every look-up is counted once."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_helpers import FINGERPRINT, geometry, path_of, some_tokens, tokens, write_prefix

from hf_contiguouskv.errors import InputError, StoreClosedError, StoreError
from hf_contiguouskv.stats import MISS_REASONS
from hf_contiguouskv.store import PrefixStore
from hf_contiguouskv.store.hashing import TokenIds

OTHER = "0e" * 16
IDS = some_tokens(18)


def misses(store: PrefixStore) -> dict[str, int]:
    """The reasons that were counted at all."""
    return {reason: count for reason, count in store.stats.misses.items() if count}


def found(store: PrefixStore, ids: TokenIds = IDS, fingerprint: str = FINGERPRINT, chunk_size: int = 4) -> int:
    stored = store.inner.lookup(fingerprint, ids, chunk_size)
    return 0 if stored is None else stored.tokens


def test_a_new_store_has_counted_nothing(store_path: Path) -> None:
    with PrefixStore(store_path) as store:
        assert store.stats.misses == dict.fromkeys(MISS_REASONS, 0)
        assert set(MISS_REASONS) == {"not_stored", "other_model", "corrupt", "expired"}
        assert (store.stats.hits, store.stats.tokens_found, store.stats.tokens_asked) == (0, 0, 0)


def test_prompts_that_were_passed_over_are_counted_by_whatever_reason(store_path: Path) -> None:
    with PrefixStore(store_path) as store:
        assert store.stats.passed_over == {}
        for reason in ("a cache of 2.5 GB", "", "a cache of 2.5 GB", "…"):
            store.inner.counters.add(f"passed_over.{reason}")
        assert store.stats.passed_over == {"a cache of 2.5 GB": 2, "": 1, "…": 1}
        assert store.stats.as_dict()["passed_over"] == store.stats.passed_over
    with PrefixStore(store_path) as store:
        assert store.stats.passed_over == {}


def test_what_was_never_stored(store_path: Path) -> None:
    with PrefixStore(store_path) as store:
        assert found(store) == 0
        write_prefix(store, IDS)
        for ids in (some_tokens(18, seed=1), tokens(), np.append(tokens(5), IDS)):
            assert found(store, ids) == 0
        assert misses(store) == {"not_stored": 4}
        assert (store.stats.tokens_asked, store.stats.hits) == (18 + 18 + 0 + 19, 0)


# ---- another model ----


@pytest.mark.parametrize("length", [4, 6, 18, 40])
def test_what_another_model_has_stored(store_path: Path, length: int) -> None:
    with PrefixStore(store_path) as store:
        write_prefix(store, IDS, fingerprint=OTHER)
        assert found(store, np.append(IDS, some_tokens(40))[:length]) == 0
        assert misses(store) == {"other_model": 1}
        store.inner.index.rebuild()
        assert found(store, IDS[:length]) == 0
        assert misses(store) == {"other_model": 2}


def test_another_model_with_another_prompt_is_no_reason(store_path: Path) -> None:
    with PrefixStore(store_path) as store:
        write_prefix(store, IDS, fingerprint=OTHER)
        changed = IDS.copy()
        changed[1] += 1  # Inside the first chunk, which is what is compared.
        assert found(store, changed) == 0
        assert found(store, chunk_size=8) == 0  # And with another chunk size nothing is.
        assert misses(store) == {"not_stored": 2}


def test_this_model_with_another_prompt_is_no_other_model(store_path: Path) -> None:
    with PrefixStore(store_path) as store:
        write_prefix(store, IDS)
        assert found(store, some_tokens(18, seed=1)) == 0
        assert misses(store) == {"not_stored": 1}
        write_prefix(store, IDS, fingerprint=OTHER)
        assert found(store) == 18
        assert (misses(store), store.stats.hits) == ({"not_stored": 1}, 1)


def test_a_continuation_by_another_model_is_found_by_its_beginning(store_path: Path) -> None:
    with PrefixStore(store_path) as store:
        write_prefix(store, IDS[:8], fingerprint=OTHER)
        write_prefix(store, IDS, first_chunk=2, fingerprint=OTHER)
        assert found(store) == 0
        assert found(store, IDS[8:]) == 0  # Nobody has stored a prefix that begins there.
        assert misses(store) == {"other_model": 1, "not_stored": 1}


@pytest.mark.parametrize(("theirs", "ours"), [("one", "two"), ("one", None), (None, "two")])
@pytest.mark.parametrize("fingerprint", [FINGERPRINT, OTHER])
def test_tenants_learn_nothing_of_each_other(
    store_path: Path, theirs: str | None, ours: str | None, fingerprint: str
) -> None:
    with PrefixStore(store_path, salt=theirs) as store:
        write_prefix(store, IDS, fingerprint=fingerprint)
    with PrefixStore(store_path, salt=ours) as store:
        for ids in (IDS, IDS[:4], IDS[:1]):
            assert found(store, ids) == 0
        assert misses(store) == {"not_stored": 3}
        assert store.stats.tokens_found == 0
    with PrefixStore(store_path, salt=theirs) as store:  # Of their own they do.
        assert found(store, fingerprint="another") == 0
        assert misses(store) == {"other_model": 1}


# ---- damage ----


def lose(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def scribble_over_header(path: Path) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_bytes(b"\0" * 4096 + path.read_bytes()[4096:])
    fresh.replace(path)


DAMAGE: dict[str, Callable[[Path], None]] = {"lost": lose, "cut": cut, "header": scribble_over_header}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_what_was_damaged_or_lost(store_path: Path, damage: Callable[[Path], None]) -> None:
    with PrefixStore(store_path) as store:
        path = path_of(write_prefix(store, IDS).spans[0].segment)
        assert found(store) == 18
    damage(path)
    with PrefixStore(store_path) as store:
        # (Opening forgets what is gone altogether; what is there but broken shows when it is wanted.)
        expected = "not_stored" if damage is lose else "corrupt"
        assert found(store) == 0
        assert misses(store) == {expected: 1}
        assert store.stats.quarantined == (0 if damage is lose else 1)
        assert found(store) == 0
        assert found(store, IDS[:3]) == 0
        assert sum(misses(store).values()) == 3
        assert misses(store)["not_stored"] == (3 if damage is lose else 2)  # It is out of service by now.
        write_prefix(store, IDS)
        assert found(store) == 18


def test_what_is_lost_under_an_open_store(store_path: Path) -> None:
    with PrefixStore(store_path) as store:
        path_of(write_prefix(store, IDS).spans[0].segment).unlink()
        assert found(store) == 0
        assert misses(store) == {"corrupt": 1}
        assert store.stats.quarantined == 0


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_that_leaves_a_beginning_is_a_shorter_hit(store_path: Path, damage: Callable[[Path], None]) -> None:
    with PrefixStore(store_path) as store:
        write_prefix(store, IDS[:8])
        path = path_of(write_prefix(store, IDS, first_chunk=2).spans[1].segment)
        damage(path)
        assert found(store) == 8
        assert (misses(store), store.stats.hits, store.stats.tokens_found) == ({}, 1, 8)


def test_a_lost_beginning_makes_what_continues_it_useless(store_path: Path) -> None:
    with PrefixStore(store_path) as store:
        path = path_of(write_prefix(store, IDS[:8]).spans[0].segment)
        write_prefix(store, IDS, first_chunk=2)
        path.unlink()
        assert found(store) == 0
        assert misses(store) == {"corrupt": 1}
        write_prefix(store, IDS[:8])
        assert found(store) == 18


def test_a_segment_that_was_taken_out_of_service(store_path: Path) -> None:
    with PrefixStore(store_path) as store:
        store.inner.discard(write_prefix(store, IDS).spans[0].segment, "a test")
        assert found(store) == 0
        assert misses(store) == {"not_stored": 1}
        assert store.stats.quarantined == 1


def test_an_index_that_cannot_be_read_finds_nothing_and_raises_nothing(
    store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with PrefixStore(store_path) as store:
        write_prefix(store, IDS)

        def fail(*_: object) -> None:
            raise StoreError("the disk is on fire")

        with monkeypatch.context() as patch:
            patch.setattr(store.inner.index, "read", fail)
            assert store.inner.lookup(FINGERPRINT, IDS, 4) is None
        assert misses(store) == {"corrupt": 1}
        assert found(store) == 18


def test_an_index_that_names_other_tokens_is_not_believed(store_path: Path) -> None:
    with PrefixStore(store_path) as store:
        write_prefix(store, IDS)
    changed = IDS.copy()
    changed[0] += 1
    with sqlite3.connect(store_path / "index.sqlite") as db:
        (row,) = db.execute("SELECT hash, tokens FROM chunks WHERE position = 0").fetchall()
        db.execute("UPDATE chunks SET tokens = ? WHERE hash = ?", (changed[:4].tobytes(), row[0]))
    db.close()
    with PrefixStore(store_path) as store:
        assert found(store, changed[:4]) == 0  # Its 4 tokens are claimed, but the segment says otherwise.
        assert found(store) == 18
        assert store.stats.hits == 1
        assert sum(misses(store).values()) == 1


# ---- age ----


def test_what_expired(store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    with PrefixStore(store_path, ttl_s=60) as store:
        write_prefix(store, IDS)
        now += 61
        assert found(store) == 0
        assert found(store) == 0
        assert misses(store) == {"expired": 2}
        assert found(store, some_tokens(18, seed=1)) == 0
        assert misses(store) == {"expired": 2, "not_stored": 1}
        store.gc()
        assert found(store) == 0
        assert misses(store) == {"expired": 2, "not_stored": 2}


def test_of_two_reasons_the_one_that_came_first_along_the_way_counts(
    store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    with PrefixStore(store_path, ttl_s=60) as store:
        path = path_of(write_prefix(store, IDS[:8]).spans[0].segment)
        now += 50
        write_prefix(store, IDS, first_chunk=2)
        now += 20
        path.unlink()
        # The beginning is both lost and too old: its age shows before its file is looked at.
        assert found(store) == 0
        assert misses(store) == {"expired": 1}


def test_what_another_model_has_stored_tells_it_even_when_that_is_old(
    store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    with PrefixStore(store_path, ttl_s=60) as store:
        write_prefix(store, IDS, fingerprint=OTHER)
        now += 61
        assert found(store) == 0
        assert misses(store) == {"other_model": 1}


# ---- counting ----


def test_what_does_not_count_changes_no_counter(store_path: Path) -> None:
    with PrefixStore(store_path) as store:
        write_prefix(store, IDS)
        before = store.stats.as_dict()
        assert store.inner.lookup(FINGERPRINT, IDS, 4, count=False) is not None
        assert store.inner.lookup(OTHER, IDS, 4, count=False) is None
        assert store.inner.next_stored(FINGERPRINT, IDS, 4, 0) == 0
        assert store.stats.as_dict() == before
        assert store.entries()[0].uses == 0


def test_what_is_refused_is_not_counted(store_path: Path) -> None:
    store = PrefixStore(store_path)
    with pytest.raises(InputError, match="chunk_size"):
        store.inner.lookup(FINGERPRINT, IDS, 0)
    with pytest.raises(InputError):
        store.inner.lookup(FINGERPRINT, np.zeros((2, 3), dtype=np.int64), 4)
    assert (store.stats.tokens_asked, misses(store)) == (0, {})
    store.close()
    with pytest.raises(StoreClosedError):
        store.inner.lookup(FINGERPRINT, IDS, 4)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    stored=st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 1), min_size=1, max_size=9)), max_size=4),
    asked=st.lists(st.lists(st.integers(0, 1), max_size=11), min_size=1, max_size=6),
)
def test_counters_are_those_of_a_plain_list(
    tmp_path_factory: pytest.TempPathFactory, stored: list[tuple[bool, list[int]]], asked: list[list[int]]
) -> None:
    hits = tokens_found = 0
    reasons = dict.fromkeys(MISS_REASONS, 0)
    with PrefixStore(tmp_path_factory.mktemp("store"), direct=False) as store:
        for ours, sequence in stored:
            write_prefix(store, tokens(*sequence), g=geometry(chunk_size=2), fingerprint=FINGERPRINT if ours else OTHER)
        others: list[list[int]] = []
        for sequence in (sequence for ours, sequence in stored if not ours):
            # A prefix of less than a chunk goes when one is stored that begins with it.
            others = [old for old in others if len(old) >= min(2, len(sequence)) or sequence[: len(old)] != old]
            others.append(sequence)
        for query in asked:
            longest = max((_shared(query, sequence) for ours, sequence in stored if ours), default=0)
            # Another model's prefix counts where it has the query's first chunk.
            other = any(query and query[:2] == sequence[:2] for sequence in others)
            if longest:
                hits, tokens_found = hits + 1, tokens_found + longest
            else:
                reasons["other_model" if other else "not_stored"] += 1
            assert found(store, tokens(*query), chunk_size=2) == longest
        stats = store.stats
        assert (stats.hits, stats.tokens_found, stats.misses) == (hits, tokens_found, reasons)
        assert stats.tokens_asked == sum(map(len, asked))


def _shared(left: list[int], right: list[int]) -> int:
    return len(os.path.commonprefix([left, right]))  # noqa: RUF071
