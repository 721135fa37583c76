"""`max_disk_bytes` holds from opening on, by the rules of publishing."""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import pytest
from clock import Clock
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from store_helpers import FINGERPRINT, path_of, read_back, some_tokens, write_prefix
from test_eviction import (
    NOW,
    Known,
    database,
    kept,
    key_of,
    keys,
    model_of_choice,
    seconds_per_token,
    stores,
    write_measured,
)

from hf_contiguouskv.errors import StoreError, StoreFullError
from hf_contiguouskv.store import PrefixStore
from hf_contiguouskv.store.background import Background
from hf_contiguouskv.store.eviction import choose_excess
from hf_contiguouskv.store.hashing import TokenIds
from hf_contiguouskv.store.index import StoreIndex
from hf_contiguouskv.store.local_disk import LocalDisk
from hf_contiguouskv.store.memory_backend import MemoryBackend
from hf_contiguouskv.store.room import Room


@settings(max_examples=150, deadline=None)
@given(all_known=stores(), data=st.data())
def test_what_goes_is_what_the_model_says(all_known: list[Known], data: st.DataObject) -> None:
    worths = [known.worth(seconds_per_token(all_known)) for known in all_known]
    assume(len(set(worths)) == len(worths))
    total = sum(known.nbytes for known in all_known)
    bound = data.draw(st.integers(0, total + 100))
    expected = model_of_choice(all_known, ((), 0), total - bound)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: NOW)
        victims, excess = choose_excess(database(all_known), bound)
    gone = {row.key for row in victims}
    assert excess == total - sum(row.nbytes for row in victims) - bound
    if expected is not None:
        assert excess <= 0
        assert keys(victims) == expected
    else:

        def is_needed(known: Known) -> bool:
            return known.pinned or any(is_needed(other) for other in all_known if other.continues(known))

        assert excess > 0
        assert gone == {key_of(known) for known in all_known if not is_needed(known)}


# ---- through a store ----


def filled(path: Path, count: int) -> tuple[list[TokenIds], int]:
    """Prefixes of one size each, and that size."""
    prefixes = [some_tokens(16, seed) for seed in range(count)]
    with PrefixStore(path) as store:
        sizes = {write_prefix(store, ids).spans[0].segment.blob.stored_bytes for ids in prefixes}
    (size,) = sizes
    return prefixes, size


def test_a_lower_bound_holds_and_what_is_worth_most_stays(store_path: Path, clock: Clock) -> None:
    prefixes = [some_tokens(16, seed) for seed in range(4)]
    with PrefixStore(store_path) as store:
        for ids, seconds in zip(prefixes, (5.0, 0.5, 2.0, 9.0), strict=True):
            write_measured(store, ids, seconds)
        size = store.stats.segment_bytes // 4
        paths = list(store_path.glob("segments/*/*"))
    with PrefixStore(store_path, max_disk_bytes=2 * size + 1) as store:
        store.flush()
        assert kept(store, prefixes) == [True, False, False, True]
        assert (store.stats.evicted, store.stats.segments, store.stats.segment_bytes) == (2, 2, 2 * size)
        assert sum(path.exists() for path in paths) == 2
        assert store.verify() == []


def between_forgetting_and_deleting(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Let `act` happen once, where the index has forgotten what is evicted and the segments still lie there."""
    original, acted = Room.remove, []

    def remove(self: Room, doomed: dict[str, Hashable]) -> set[str]:
        if not acted and doomed:
            acted.append(True)
            act()
        return original(self, doomed)

    monkeypatch.setattr(Room, "remove", remove)


def test_what_two_openings_evict_at_once_is_counted_once(store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefixes, size = filled(store_path, 8)
    second: list[int] = []

    def open_a_second_time() -> None:
        # This opening finds segments without rows, indexes them, and evicts them again.
        with PrefixStore(store_path, max_disk_bytes=3 * size) as other:
            other.flush()
            second.append(other.stats.evicted)

    between_forgetting_and_deleting(monkeypatch, open_a_second_time)
    with PrefixStore(store_path, max_disk_bytes=3 * size) as store:
        store.flush()
        assert sum(kept(store, prefixes)) == store.stats.segments == 3
        assert store.stats.evicted + second[0] == 8 - 3
        assert store.verify() == []


def test_what_an_opening_indexes_again_is_not_counted_as_evicted(
    store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A publication that evicts, while a handle without a bound opens the store and keeps what it finds."""
    prefixes, size = filled(store_path, 3)
    kept_open: list[PrefixStore] = []
    between_forgetting_and_deleting(monkeypatch, lambda: kept_open.append(PrefixStore(store_path)))
    with PrefixStore(store_path, max_disk_bytes=3 * size) as store:
        write_prefix(store, some_tokens(16, 99))
        assert store.stats.evicted == 0
        assert sum(kept(store, prefixes)) == 3
        assert store.stats.segments == 4
        assert store.verify() == []
    kept_open[0].close()


def test_without_a_lower_bound_opening_starts_nothing(store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefixes, size = filled(store_path, 3)
    submitted: list[object] = []
    monkeypatch.setattr(Background, "submit", lambda self, function, label=(): submitted.append(function))
    for bound in (None, 3 * size, 100 * size):
        with PrefixStore(store_path, max_disk_bytes=bound) as store:
            assert submitted == []
            assert kept(store, prefixes) == [True] * 3


@pytest.mark.parametrize(("count", "sound", "evicted"), [(3, 2, 0), (2, 2, 0), (1, 1, 1)])
def test_what_is_damaged_goes_first(store_path: Path, count: int, sound: int, evicted: int) -> None:
    prefixes, size = filled(store_path, 3)
    with PrefixStore(store_path) as store:
        found = store.inner.lookup(FINGERPRINT, prefixes[0], 4)
        assert found is not None
        store.inner.discard(found.spans[0].segment, "a test")
    with PrefixStore(store_path, max_disk_bytes=count * size) as store:
        store.flush()
        assert store.stats.quarantined_bytes == (size if count == 3 else 0)
        assert sum(kept(store, prefixes)) == sound
        assert store.stats.evicted == evicted


def test_pinned_prefixes_and_what_they_continue_stay_and_a_warning_says_so(
    store_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ids, other = some_tokens(32), some_tokens(16, seed=1)
    with PrefixStore(store_path) as store:
        write_prefix(store, ids[:16])
        write_prefix(store, other)
        pinned = write_prefix(store, ids[:24], first_chunk=4).spans[1].segment.key
        write_prefix(store, ids, first_chunk=6)
        store.pin(pinned)
    with caplog.at_level(logging.WARNING), PrefixStore(store_path, max_disk_bytes=1) as store:
        store.flush()
        found = store.inner.lookup(FINGERPRINT, ids, 4, count=False)
        assert found is not None
        assert found.tokens == 24
        assert kept(store, [other]) == [False]
        over = store.stats.segment_bytes - 1
        assert store.inner.background_failures == 0
    (message,) = [record.getMessage() for record in caplog.records]
    assert f"{over} bytes more than max_disk_bytes=1; unpin or delete" in message


def test_pins_that_the_index_has_lost_hold(store_path: Path) -> None:
    prefixes, size = filled(store_path, 2)
    with PrefixStore(store_path) as store:
        store.pin(store.entries()[0].key)
    with sqlite3.connect(store_path / "index.sqlite") as db:
        db.execute("UPDATE segments SET pinned = 0")
    with PrefixStore(store_path, max_disk_bytes=size) as store:
        store.flush()
        assert kept(store, prefixes) == [True, False]


def test_who_has_a_prefix_open_reads_on(store_path: Path) -> None:
    prefixes, _ = filled(store_path, 2)
    with PrefixStore(store_path) as store:
        found = [store.inner.lookup(FINGERPRINT, ids, 4) for ids in prefixes]
        assert None not in found
        with PrefixStore(store_path, max_disk_bytes=0) as other:
            other.flush()
            assert other.stats.segments == 0
        assert not list(store_path.glob("segments/*/*"))
        assert all(read_back(store, stored, [0]) for stored in found if stored)
        assert kept(store, prefixes) == [False, False]
        write_prefix(store, prefixes[0])
        assert kept(store, prefixes) == [True, False]


def test_ten_thousand_segments_are_brought_within_the_bound(tmp_path: Path) -> None:
    count = 10_000
    all_known = [
        Known((number, 0, 1), 0, 100, 0, idle=number % 977, uses=number % 5, pinned=False, created=number)
        for number in range(count)
    ]
    victims, excess = choose_excess(database(all_known), count * 10)
    assert (len(victims), excess) == (count * 9 // 10, 0)


# ---- where it cannot be done ----


def fail_first(monkeypatch: pytest.MonkeyPatch, error: Exception) -> list[Exception]:
    """Let the first write to the index fail with `error`; what was raised."""
    raised: list[Exception] = []
    write = StoreIndex.write

    def fail(self: Any, change: Callable[[sqlite3.Connection], Any]) -> Any:
        if not raised:
            raised.append(error)
            raise error
        return write(self, change)

    monkeypatch.setattr(StoreIndex, "write", fail)
    return raised


def test_on_a_full_disk_segments_go_before_the_index_says_so(store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, size = filled(store_path, 3)
    raised = fail_first(monkeypatch, StoreFullError("the disk is full"))
    with PrefixStore(store_path, max_disk_bytes=size) as store:
        store.flush()
        assert len(raised) == 1
        assert len(list(store_path.glob("segments/*/*"))) == 1
        assert (store.stats.segments, store.stats.evicted) == (1, 2)
        assert store.verify() == []


def test_what_another_process_deletes_first_is_not_counted(
    store_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The index cannot be written when the segments are to go, so nothing keeps another process out meanwhile."""
    _, size = filled(store_path, 4)
    backends: list[LocalDisk] = []
    original, identity = Room.remove, LocalDisk.identity

    def remove(self: Room, doomed: dict[str, Hashable]) -> set[str]:
        with monkeypatch.context() as patch:
            fail_first(patch, StoreError("the index is locked"))
            patch.setattr(LocalDisk, "identity", look_then_delete)
            return original(self, doomed)

    def look_then_delete(self: LocalDisk, key: str) -> Hashable:
        found = identity(self, key)
        if not backends:
            backends.append(self)
            assert self.delete(key)
        return found

    monkeypatch.setattr(Room, "remove", remove)
    with caplog.at_level(logging.WARNING), PrefixStore(store_path, max_disk_bytes=size) as store:
        store.flush()
        assert len(backends) == 1
        assert (store.stats.segments, store.stats.evicted) == (1, 2)
        assert store.verify() == []
    assert "3 segments could not be evicted in order" in caplog.text


def test_an_index_that_cannot_be_written_is_reported_and_the_store_serves(
    store_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prefixes, size = filled(store_path, 3)
    fail_first(monkeypatch, StoreError("the index is locked"))
    with caplog.at_level(logging.WARNING), PrefixStore(store_path, max_disk_bytes=size) as store:
        store.flush()
        assert kept(store, prefixes) == [True] * 3
        assert store.inner.background_failures == 0
    assert f"more than max_disk_bytes={size}: the index is locked" in caplog.text


def test_segments_of_a_backend_that_lists_slowly_are_bounded_as_well(tmp_path: Path) -> None:
    class Slow(MemoryBackend):
        lists_cheaply = False

    backend = Slow()
    prefixes = [some_tokens(16, seed) for seed in range(3)]
    with PrefixStore(tmp_path, backend=backend) as store:
        size = max(write_prefix(store, ids).spans[0].segment.blob.stored_bytes for ids in prefixes)
        with PrefixStore(tmp_path, backend=backend, max_disk_bytes=size) as other:
            other.flush()
            assert sum(kept(other, prefixes)) == 1


def test_the_bound_of_a_store_that_is_open_already_is_left_alone(store_path: Path) -> None:
    _, size = filled(store_path, 3)
    with PrefixStore(store_path) as store, PrefixStore(store_path, max_disk_bytes=size) as bounded:
        bounded.flush()
        assert (store.stats.segments, store.max_disk_bytes) == (1, None)
        path = path_of(write_prefix(store, some_tokens(16, seed=7)).spans[0].segment)
        assert path.exists()
        assert store.stats.segments == 2
        assert PrefixStore.shared(store_path) is store
