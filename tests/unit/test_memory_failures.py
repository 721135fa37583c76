"""What was taken is given back when something fails, or when the store is closed meanwhile."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from memory_helpers import (
    FourPerBlock,
    Joined,
    check_tier,
    fake_segment,
    here,
    load,
    new_table,
    new_tier,
    pageable,
    places,
    usage,
)
from store_helpers import expected_kv, geometry, some_tokens, write_prefix

from hf_contiguouskv.errors import StoreClosedError
from hf_contiguouskv.hardware.aligned_memory import PAGE
from hf_contiguouskv.loading.host_residency import HostResidency
from hf_contiguouskv.loading.prefix_tables import PrefixTables
from hf_contiguouskv.loading.residency import LoadedChunks
from hf_contiguouskv.memory import MemoryTiers
from hf_contiguouskv.store import PrefixStore
from hf_contiguouskv.store.attached_prefix import AttachedPrefix

# ---- after `close` ----


@pytest.mark.parametrize("kind", [pageable, FourPerBlock])
def test_a_closed_tier_keeps_nothing_and_still_lends_buffers(kind: object) -> None:
    table = new_table(1)
    tier = new_tier(32 * PAGE, [table], blocks=kind)
    load(tier, table, np.arange(4))
    tier.close()
    assert (tier.held_bytes, tier.bytes_by_use["chunks"], tier.has_keys("keys")) == (0, 0, False)
    assert len(tier.take(PAGE, 4)) == 0
    assert tier.lease(PAGE, must=False) is None
    buffer = tier.lease(PAGE)
    assert buffer is not None
    assert buffer.counted == 0
    tier.give_back(buffer)
    assert not tier.make_room(1)
    assert tier.would_keep(np.ones(1), PAGE) == 0
    tier.trim(PAGE, PAGE)
    with pytest.raises(StoreClosedError, match="closed"):
        tier.blocks(PAGE)
    assert tier.held_bytes == 0


@pytest.mark.parametrize("kind", [pageable, FourPerBlock])
def test_what_was_taken_before_close_is_given_back_into_nothing(kind: object) -> None:
    table = new_table(1)
    tier = new_tier(32 * PAGE, [table], blocks=kind)
    load(tier, table, places(0, 1))
    loading, found = tier.take(PAGE, 2), tier.find(table, places(0))
    buffer, leased = tier.lease(PAGE, exact=True), tier.lease(PAGE)
    assert buffer is not None
    assert leased is not None
    keys = tier.keep_keys("keys", 0, buffer, table)
    assert keys is not None
    forgotten = tier.hold_keys("keys")
    buffer.data.fill_(7)
    tier.close()
    tier.keep(table, places(2, 3), loading, PAGE)
    tier.release(loading, PAGE)
    tier.release(found, PAGE)
    tier.give_back(leased)
    tier.let_go(keys)
    assert forgotten is keys
    tier.let_go(keys)
    assert tier.held_bytes == 0
    assert not tier._idle
    assert (buffer.data == 7).all(), "memory in use is nobody else's"
    assert tier.lease(PAGE) is not leased


def test_a_closed_tier_keeps_no_keys() -> None:
    table = new_table(1)
    tier = new_tier(32 * PAGE, [table])
    buffer = tier.lease(PAGE, exact=True)
    assert buffer is not None
    tier.close()
    assert tier.keep_keys("keys", 0, buffer, table) is None


def test_closing_counts_what_was_deferred_and_leaves_nothing() -> None:
    memory = MemoryTiers(64 * PAGE, 0, "lru")
    table = memory.table(fake_segment("a"))
    assert table is not None
    load(memory.host, table, places(0, 1))
    slots = memory.host.take(PAGE, 1)
    memory.defer(lambda: memory.host.release(slots, PAGE))
    memory.finished(usage(Joined(table), 0))
    memory.close()
    assert not memory.behind
    assert (table.uses, table.resident, here(memory.host, table)) == (1, 0, [])
    assert memory.bytes_by_tier == {"device": 0, "host": 0}
    assert memory.host.find(table, places(0, 1)).tolist() == [-1, -1]


def test_a_request_that_outlives_its_store_goes_on_without_memory() -> None:
    memory = MemoryTiers(64 * PAGE, 0, "expected-use")
    table = memory.table(fake_segment("a"))
    assert table is not None
    load(memory.host, table, places(0, 1))
    found = memory.host.find(table, places(0, 1))
    memory.close()
    memory.close()
    assert memory.table(fake_segment("a")) is None
    assert memory.host.find(table, places(0, 1)).tolist() == [-1, -1]
    assert load(memory.host, table, places(2)) == 0
    memory.finished(usage(Joined(table), 0, 1, loaded_bytes=PAGE))
    memory.defer(lambda: memory.host.release(found, PAGE))
    memory.catch_up()
    memory.forget(["a"])
    assert memory.host.held_bytes == 0


# ---- what fails later ----


def test_what_fails_later_is_logged_and_the_rest_is_done(caplog: pytest.LogCaptureFixture) -> None:
    memory = MemoryTiers(64 * PAGE, 0, "lru")
    table = memory.table(fake_segment("a"))
    assert table is not None
    memory.defer(lambda: 1 // 0)  # type: ignore[arg-type, return-value]
    memory.finished(usage(Joined(table), 3))
    with caplog.at_level(logging.ERROR, logger="hf_contiguouskv"):
        memory.catch_up()
    assert "ZeroDivisionError" in caplog.text
    assert table.requests[3] == 1
    assert not memory.behind


# ---- reads that cannot be started ----


class Place:
    """Where chunks of a small stored prefix are brought on a CPU, and what its tier must look like afterwards."""

    def __init__(self, store: PrefixStore) -> None:
        self.ids = some_tokens(64)
        self.store = store
        self.tier = store.inner.memory.host
        prefix = AttachedPrefix.of(write_prefix(store, self.ids), 64)
        self.segment = prefix.spans[0].segment
        self.tables = PrefixTables(prefix, store.inner.memory)
        self.residency = HostResidency(prefix, store.inner.memory, store.inner.reader, self.tables, verify=True)
        (self.table,) = self.tables.known

    def finish(self, batches: list[LoadedChunks], layer: int = 1) -> None:
        for batch in batches:
            if batch.ticket is not None:
                batch.ticket.wait()
            expected = expected_kv(geometry(), self.ids, layer)[batch.chunks]
            assert torch.equal(batch.extents(None), expected.view(torch.uint8).view(len(batch.chunks), -1))
            batch.release()

    def check(self) -> None:
        check_tier(self.tier, leased=0)
        assert not any(arena.users.any() for arena in self.tier._arenas.values())


@pytest.fixture
def place(store_path: Path) -> Iterator[Place]:
    with PrefixStore(store_path, host_bytes=2**20) as store:
        yield Place(store)


def refuse(*args: object, **kwargs: object) -> None:
    raise RuntimeError("no more reads")


@pytest.mark.parametrize("broken", ["submit", "reads", "take"])
def test_found_and_taken_slots_are_given_back_if_the_rest_cannot_be_read(
    place: Place, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    batches, left = place.residency.find_or_read(1, places(0, 1, 2))
    assert not len(left)
    place.finish(batches)
    assert here(place.tier, place.table) == [16, 17, 18]
    with monkeypatch.context() as patched:
        where = {"submit": place.store.inner.reader, "reads": AttachedPrefix, "take": place.tier}[broken]
        patched.setattr(where, broken, refuse)
        with pytest.raises(RuntimeError, match="no more reads"):
            place.residency.find_or_read(1, np.arange(8))
    place.check()
    assert here(place.tier, place.table) == [16, 17, 18]
    batches, left = place.residency.find_or_read(1, np.arange(8))
    assert [(batch.from_host, batch.from_disk) for batch in batches] == [(3, 0), (0, 5)]
    place.finish(batches)
    place.check()


@pytest.mark.parametrize("broken", ["submit", "reads", "take"])
def test_slots_of_all_layers_are_given_back_if_layers_cannot_be_read_together(
    place: Place, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    batches, _ = place.residency.find_or_read(1, places(0, 1, 2))
    place.finish(batches)
    asked = [(layer, np.arange(8)) for layer in range(3)]
    calls = 0

    def refuse_the_second(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        return refuse() if calls == 2 or broken == "submit" else original(*args, **kwargs)

    with monkeypatch.context() as patched:
        where = {"submit": place.store.inner.reader, "reads": AttachedPrefix, "take": place.tier}[broken]
        original = getattr(where, broken)
        patched.setattr(where, broken, refuse_the_second)
        with pytest.raises(RuntimeError, match="no more reads"):
            place.residency.find_or_read_together(asked, speculative=True)
    place.check()
    assert here(place.tier, place.table) == [16, 17, 18]
    found = [parts for parts, _ in place.residency.find_or_read_together(asked, speculative=True)]
    assert [[(part.from_host, part.from_disk) for part in parts] for parts in found] == [
        [(0, 8)],
        [(3, 0), (0, 5)],
        [(0, 8)],
    ]
    tickets = {id(part.ticket): part.ticket for parts in found for part in parts if part.ticket is not None}
    assert len(tickets) == 1, "one ticket for all"
    for layer, parts in enumerate(found):
        place.finish(parts, layer)
    place.check()
    (ticket,) = tickets.values()
    assert (ticket.take_count(), ticket.take_count()) == (ticket.bytes_read, 0)


@pytest.mark.parametrize("broken", ["submit", "reads"])
def test_the_buffer_of_a_piece_is_given_back_if_it_cannot_be_read(
    place: Place, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr({"submit": place.store.inner.reader, "reads": AttachedPrefix}[broken], broken, refuse)
        with pytest.raises(RuntimeError, match="no more reads"):
            place.residency.read_piece(1, np.arange(8))
    place.check()
    piece, left = place.residency.read_piece(1, np.arange(8))
    assert not len(left)
    place.finish([piece])
    place.check()


def test_what_was_not_read_to_its_end_does_not_stay(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(place.segment, "read_into", refuse)
        (batch,), _ = place.residency.find_or_read(1, np.arange(8))
        assert batch.ticket is not None
        with pytest.raises(RuntimeError, match="no more reads"):
            batch.ticket.wait()
        batch.release()
    assert here(place.tier, place.table) == []
    assert not place.table.loads.any()
    place.check()


def test_a_batch_outlives_the_store_and_is_released_all_the_same(place: Place) -> None:
    batches, _ = place.residency.find_or_read(1, np.arange(8))
    for batch in batches:
        assert batch.ticket is not None
        batch.ticket.wait()
    place.store.close()
    for batch in batches:
        with pytest.raises(StoreClosedError):
            batch.extents(None)
        batch.release()
    assert place.tier.held_bytes == 0
