"""The books above the tiers: segments that are known, what requests used, and what is done later."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import numpy as np
import pytest
import torch
from memory_helpers import Joined, check_tier, content_of, fake_segment, here, load, places, read, usage

from hf_contiguouskv.errors import ConfigError
from hf_contiguouskv.hardware.aligned_memory import PAGE
from hf_contiguouskv.memory import MemoryTiers, Usage, tiers
from hf_contiguouskv.memory.history import SegmentTable
from hf_contiguouskv.memory.segments import CachedSegment

CHUNKS = 16


def opened(memory: MemoryTiers, key: str, chunks: int = CHUNKS) -> SegmentTable:
    table = memory.table(fake_segment(key, chunks=chunks))
    assert table is not None
    return table


def known(memory: MemoryTiers) -> list[str]:
    return [identity[0] for identity in memory._by_identity]  # type: ignore[index]


def request(memory: MemoryTiers, table: SegmentTable, used: list[int], loaded_bytes: int = 0) -> None:
    memory.finished(usage(Joined(table), *used, loaded_bytes=loaded_bytes))
    memory.catch_up()


# ---- segments ----


def test_a_segment_has_one_table_and_another_one_after_it_was_forgotten() -> None:
    memory = MemoryTiers(64 * PAGE, 0, "expected-use")
    table = opened(memory, "a")
    assert opened(memory, "a") is table
    assert opened(memory, "b") is not table
    memory.forget(["a", "unknown"])
    again = opened(memory, "a")
    assert again is not table
    assert again.number > table.number


@pytest.mark.parametrize(
    ("host_bytes", "segment"),
    [(0, fake_segment("a")), (PAGE - 1, fake_segment("a")), (64 * PAGE, fake_segment("a", in_memory=True))],
    ids=["no memory", "less than a chunk", "in memory already"],
)
def test_what_cannot_or_need_not_be_kept_has_no_table(host_bytes: int, segment: CachedSegment) -> None:
    memory = MemoryTiers(host_bytes, 0, "lru")
    assert memory.table(segment) is None
    memory.finished(Usage(loaded_bytes=PAGE))
    memory.catch_up()
    assert memory.bytes_by_tier == {"device": 0, "host": 0}


@pytest.mark.parametrize("bounds", [(-1, 0)])
def test_a_negative_bound_is_refused(bounds: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="must be 0 or more"):
        MemoryTiers(*bounds, "lru")


def test_a_negative_bound_for_devices_is_refused_on_every_machine() -> None:
    with pytest.raises(ConfigError, match="must be 0 or more"):
        MemoryTiers(PAGE, -1, "lru")


def test_the_cpu_has_no_tier_of_its_own() -> None:
    memory = MemoryTiers(64 * PAGE, 64 * PAGE, "lru")
    assert memory.on(torch.device("cpu")) is None
    assert memory.tiers == [memory.host]


# ---- what tables take up ----


def test_tables_count_in_the_host_tier() -> None:
    memory = MemoryTiers(64 * PAGE, 0, "expected-use")
    one = opened(memory, "a", chunks=8)
    assert memory.host.bytes_by_use["tables"] == memory.host.held_bytes == one.nbytes == 8 * (3 * 4 + 4 + 8 + 8) + 2 * 4
    before = memory.host.held_bytes
    opened(memory, "b", chunks=8)
    assert memory.host.held_bytes == memory.bytes_by_tier["host"] > before
    memory.forget(["a", "b"])
    assert memory.host.held_bytes == 0


def test_tables_count_with_all_that_they_hold() -> None:
    memory = MemoryTiers(64 * PAGE, 0, "expected-use")
    table = opened(memory, "a", chunks=8)
    load(memory.host, table, places(0))
    assert memory.host.bytes_by_use["tables"] == table.nbytes


def test_room_for_tables_is_made_at_the_expense_of_chunks() -> None:
    memory = MemoryTiers(64 * PAGE, 0, "lru")
    table = opened(memory, "a")
    while load(memory.host, table, np.arange(16)) and memory.host.held_bytes + 16 * PAGE < memory.host.max_bytes:
        table = opened(memory, f"a{table.number}")
    opened(memory, "last", chunks=100)
    assert memory.host.held_bytes <= memory.host.max_bytes
    check_tier(memory.host, leased=0)


def test_the_peak_covers_tables() -> None:
    memory = MemoryTiers(64 * PAGE, 0, "lru")
    opened(memory, "a")
    assert memory.host.peak_bytes >= memory.host.held_bytes > 0


def test_the_limit_holds_even_where_a_new_table_finds_everything_in_use() -> None:
    memory = MemoryTiers(64 * PAGE, 0, "lru")
    table = opened(memory, "a")
    slots = memory.host.take(PAGE, 64)
    assert len(slots) == 63
    made = [memory.table(fake_segment(str(number), chunks=16)) for number in range(20)]
    assert None in made
    assert memory.host.held_bytes <= memory.host.max_bytes
    memory.host.release(slots, table.slot_bytes)
    check_tier(memory.host, leased=0)
    assert memory.table(fake_segment("19")) is not None


def test_a_table_that_would_take_up_too_much_is_not_made() -> None:
    memory = MemoryTiers(16 * PAGE, 0, "lru")
    assert memory.table(fake_segment("large", chunks=1000)) is None
    assert memory.host.held_bytes == 0
    assert opened(memory, "small", chunks=16) is not None


@pytest.mark.parametrize("in_use", [False, True], ids=["too large", "no room beside what is in use"])
def test_a_table_that_is_refused_costs_the_others_nothing(in_use: bool) -> None:
    memory = MemoryTiers(16 * PAGE, 0, "lru")
    table = opened(memory, "small")
    load(memory.host, table, places(0, 1))
    if in_use:
        held = memory.host.find(table, places(0, 1))
        buffer = memory.host.lease(memory.host.max_bytes - memory.host.held_bytes, exact=True)
        assert memory.table(fake_segment("large", chunks=120)) is None
        assert buffer is not None
        memory.host.give_back(buffer)
        memory.host.release(held, PAGE)
    else:
        assert memory.table(fake_segment("large", chunks=1000)) is None
    assert (known(memory), here(memory.host, table)) == (["small"], [0, 1])


def test_of_too_many_segments_those_that_nobody_asked_for_the_longest_are_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tiers, "_MAX_TABLES", 3)
    memory = MemoryTiers(64 * PAGE, 0, "lru")
    for key in ("a", "b", "c", "a", "d"):
        opened(memory, key)
    assert known(memory) == ["c", "a", "d"]


def test_segments_of_which_something_is_in_memory_outlast_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers, "_MAX_TABLES", 2)
    memory = MemoryTiers(64 * PAGE, 0, "lru")
    load(memory.host, opened(memory, "a"), places(1))
    for key in ("b", "c", "d"):
        opened(memory, key)
    assert known(memory) == ["a", "d"]
    assert here(memory.host, opened(memory, "a")) == [1]


def test_a_new_segment_takes_the_place_of_the_oldest_where_all_have_chunks_in_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tiers, "_MAX_TABLES", 2)
    memory = MemoryTiers(64 * PAGE, 0, "lru")
    for key in ("a", "b"):
        load(memory.host, opened(memory, key), places(1))
    assert memory.table(fake_segment("c")) is not None
    assert known(memory) == ["b", "c"]


# ---- history ----


def test_what_requests_used_is_remembered_of_chunks_that_are_not_in_memory() -> None:
    memory = MemoryTiers(64 * PAGE, 0, "published")
    table = opened(memory, "a")
    mass = np.linspace(0, 1, CHUNKS, dtype=np.float32)
    memory.finished(usage(Joined(table), 2, 5, mass=mass))
    assert not table.uses, "only `catch_up` counts"
    memory.catch_up()
    memory.catch_up()
    assert (table.uses, table.last_request, table.requests.sum()) == (1, 1, 2)
    assert np.flatnonzero(table.requests).tolist() == [2, 5]
    assert table.importance.tolist() == mass.tolist()
    assert here(memory.host, table) == []
    load(memory.host, table, places(5, 15))
    memory.host.make_room(64 * PAGE - memory.host.table_bytes)
    assert here(memory.host, table) == []
    request(memory, table, [5])
    assert (table.requests[5], table.last[5], table.loads[5]) == (2, 2, 1)


def test_what_a_request_counts_decides_who_goes_first() -> None:
    memory = MemoryTiers(64 * PAGE, 0, "lru")
    table = opened(memory, "a")
    load(memory.host, table, places(0, 1, 2))
    for used in ([0, 1, 2], [2], [0]):
        request(memory, table, used)
    arena = memory.host._arenas[PAGE]
    assert arena.place[arena.lowest(3)].tolist() == [1, 2, 0]


def test_usage_of_a_segment_that_is_gone_is_not_counted_and_hurts_nobody() -> None:
    memory = MemoryTiers(64 * PAGE, 0, "expected-use")
    gone, stays = opened(memory, "gone"), opened(memory, "stays")
    load(memory.host, gone, places(1))
    memory.finished(usage(Joined(gone, stays), 1, CHUNKS + 2))
    memory.forget(["gone"])
    memory.catch_up()
    assert (gone.uses, stays.uses, stays.requests[2]) == (0, 1, 1)
    check_tier(memory.host, leased=0)


@pytest.mark.parametrize(("eviction", "room"), [("expected-use", True), ("lru", False)])
def test_where_arrivals_compete_room_is_made_after_the_request(eviction: str, room: bool) -> None:
    memory = MemoryTiers(64 * PAGE, 0, eviction)
    table = opened(memory, "a", chunks=64)
    load(memory.host, table, np.arange(64))
    full = len(here(memory.host, table))
    for _ in range(30):
        request(memory, table, [0], loaded_bytes=16 * PAGE)
    free = full - len(here(memory.host, table))
    # At most an eighth of the limit, although requests load a quarter of it.
    assert 6 <= free <= 8 if room else free == 0
    assert 0 in here(memory.host, table)


# ---- forgetting ----


def test_only_the_segments_with_these_keys_are_forgotten() -> None:
    memory = MemoryTiers(64 * PAGE, 0, "lru")
    first, second = opened(memory, "a"), opened(memory, "b")
    for table in (first, second):
        load(memory.host, table, places(0, 1))
        buffer = memory.host.lease(PAGE, exact=True)
        assert buffer is not None
        kept = memory.host.keep_keys(f"{table.number}", 0, buffer, table)
        assert kept is not None
        memory.host.let_go(kept)
    memory.forget(["a"])
    assert known(memory) == ["b"]
    assert (here(memory.host, first), here(memory.host, second)) == ([], [0, 1])
    assert [memory.host.has_keys(f"{table.number}") for table in (first, second)] == [False, True]
    assert torch.equal(read(memory.host, second, places(1)), content_of(second.number, places(1), PAGE))
    check_tier(memory.host, leased=0)


def test_a_request_that_outlives_its_table_keeps_nothing_and_gives_back_everything() -> None:
    memory = MemoryTiers(64 * PAGE, 0, "lru")
    table = opened(memory, "a")
    slots = memory.host.take(PAGE, 2)
    memory.forget(["a"])
    memory.host.keep(table, places(0, 1), slots, PAGE)
    memory.host.release(slots, PAGE)
    assert memory.host.bytes_by_use["chunks"] == 0
    check_tier(memory.host, leased=0)


# ---- later ----


def test_a_finalizer_in_the_middle_of_anything_waits_for_nothing() -> None:
    """The collector may run while a thread holds the lock, in that thread or in another one."""
    memory = MemoryTiers(64 * PAGE, 0, "lru")
    table = opened(memory, "a")
    slots = memory.host.take(PAGE, 2)

    class Request:
        pass

    def give_up() -> None:
        memory.host.release(slots, PAGE)

    owner = Request()
    owner.cycle = owner  # type: ignore[attr-defined]  # Only the collector finds it.
    weakref.finalize(owner, memory.defer, give_up)
    weakref.finalize(owner, memory.finished, usage(Joined(table), 4))
    del owner
    with memory.lock:
        collector = threading.Thread(target=gc.collect, daemon=True)
        collector.start()
        collector.join(timeout=30)
        assert not collector.is_alive(), "a finalizer waits for the lock"
        assert len(memory._deferred) == 2
        assert memory.host._arenas[PAGE].users[slots].tolist() == [1, 1]
    memory.catch_up()
    assert memory.host._arenas[PAGE].users[slots].tolist() == [0, 0]
    assert table.requests[4] == 1
    check_tier(memory.host, leased=0)


def test_what_is_deferred_is_done_once_in_order_also_when_it_defers_more() -> None:
    memory = MemoryTiers(64 * PAGE, 0, "lru")
    done: list[str] = []
    memory.defer(lambda: (done.append("first"), memory.defer(lambda: done.append("third"))))  # type: ignore[arg-type]
    memory.defer(lambda: done.append("second"))
    memory.catch_up()
    memory.catch_up()
    assert done == ["first", "second", "third"]


def test_several_threads_catch_up_on_everything_exactly_once() -> None:
    memory = MemoryTiers(64 * PAGE, 0, "expected-use")
    table = opened(memory, "a")
    begin = threading.Barrier(4)

    def finish_many() -> None:
        begin.wait()
        for _ in range(200):
            memory.finished(usage(Joined(table), 0, 1))
            memory.catch_up()

    threads = [threading.Thread(target=finish_many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    memory.catch_up()
    assert (table.uses, table.requests[:3].tolist(), memory.clock.now) == (800, [800, 800, 0], 801)


def test_memory_is_behind_until_what_was_deferred_is_done() -> None:
    memory = MemoryTiers(64 * PAGE, 0, "lru")
    table = opened(memory, "a")
    assert not memory.behind
    memory.finished(Usage())
    assert not memory.behind, "a request that used nothing has nothing to tell"
    memory.finished(usage(Joined(table), 0))
    assert memory.behind
    memory.catch_up()
    assert not memory.behind


def test_requests_forget_and_find_at_the_same_time() -> None:
    memory = MemoryTiers(48 * PAGE, 0, "expected-use")
    errors: list[BaseException] = []
    until = time.monotonic() + 1.5

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            while time.monotonic() < until:
                table = memory.table(fake_segment(str(rng.integers(6))))
                if table is None:
                    continue
                wanted = np.sort(rng.choice(CHUNKS, 4, replace=False))
                slots = memory.host.find(table, wanted)
                found = slots >= 0
                if found.any():
                    bytes_there = memory.host.blocks(PAGE).select(slots[found])
                    assert torch.equal(bytes_there, content_of(table.number, wanted[found], PAGE))
                    memory.host.release(slots[found], PAGE)
                load(memory.host, table, wanted[~found])
                loaded = int((~found).sum()) * PAGE
                memory.finished(usage(Joined(table), *wanted.tolist(), loaded_bytes=loaded))
                memory.catch_up()
                if rng.integers(20) == 0:
                    memory.forget([str(rng.integers(6))])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    memory.catch_up()
    check_tier(memory.host, leased=0)
    assert not memory.host._arenas[PAGE].users.any()
