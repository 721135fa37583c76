"""What a request has just loaded is judged as if the request were over: it is used, and used last."""

from __future__ import annotations

import numpy as np
import pytest
from memory_helpers import Joined, check_tier, fake_segment, here, load, new_table, new_tier, places, usage

from hf_contiguouskv.hardware.aligned_memory import PAGE
from hf_contiguouskv.memory import POLICIES, MemoryTiers, Tier
from hf_contiguouskv.memory.history import Clock, SegmentTable
from hf_contiguouskv.memory.policies import policy_named


def tell(tier: Tier, clock: Clock, table: SegmentTable, used: list[int], mass: float = 0.0) -> None:
    """A request is over that used these chunks of a table, and found `mass` in each."""
    table.begin_request(clock)
    table.count(places(*used), clock)
    table.importance[used] += mass
    table.note_mass()
    clock.tick()
    tier.judge(table)


def worth(tier: Tier, table: SegmentTable, *wanted: int) -> list[float]:
    return tier._arena_of(table).worth[table.slots_in(tier.name)[list(wanted)]].tolist()


@pytest.mark.parametrize("eviction", sorted(POLICIES))
@pytest.mark.parametrize("before", [0, 1, 3])
def test_an_arrival_is_worth_what_it_will_be_when_its_request_is_over(eviction: str, before: int) -> None:
    table, clock = new_table(1, chunks=4), Clock()
    tier = new_tier(4 * PAGE, [table], policy_named(eviction), clock=clock)
    for _ in range(before):
        load(tier, table, places(0, 1))
        tell(tier, clock, table, [0, 1], mass=0.5)
        tier.make_room(4 * PAGE)
    found = np.array([0.25, 0.0, 4.0])
    load(tier, table, places(0, 2, 3), importance=found)
    arrived = worth(tier, table, 0, 2, 3)
    table.importance[[0, 2, 3]] += found.astype(np.float32)
    tell(tier, clock, table, [0, 2, 3])
    assert arrived == pytest.approx(worth(tier, table, 0, 2, 3))


@pytest.mark.parametrize("eviction", sorted(POLICIES))
def test_judging_an_arrival_counts_nothing(eviction: str) -> None:
    table, clock = new_table(1, chunks=4), Clock()
    tier = new_tier(4 * PAGE, [table], policy_named(eviction), clock=clock)
    load(tier, table, places(0, 2), importance=np.array([0.5, 2.0]))
    assert (table.uses, table.prefix_heat, table.last_request, clock.now) == (0, 0.0, 0, 1)
    for counted in (table.importance, table.requests, table.last, table.heat):
        assert not counted.any()
    assert table.loads.tolist() == [1, 0, 1, 0]


def test_of_several_chunks_that_arrive_together_each_gets_its_own_importance() -> None:
    """Also where some of them are there already, so that not all are kept."""
    table, clock = new_table(1, chunks=4), Clock()
    tier = new_tier(4 * PAGE, [table], policy_named("published"), clock=clock)
    load(tier, table, places(1), importance=np.array([9.0]))
    slots = tier.take(PAGE, 3)
    tier.keep(table, places(0, 1, 3), slots, PAGE, importance=np.array([1.0, 2.0, 3.0]))
    tier.release(slots, PAGE)
    assert worth(tier, table, 0, 1, 3) == [1.0, 9.0, 3.0]
    check_tier(tier, leased=0)


def layer_by_layer(eviction: str, importance: float | None = None) -> tuple[list[int], list[int]]:
    """A full tier of a prefix that one request used; then another prefix comes, a chunk at a time."""
    old, new, clock = new_table(1, chunks=4), new_table(2, chunks=1, layers=4), Clock()
    tier = new_tier(4 * PAGE, [old, new], policy_named(eviction), clock=clock)
    load(tier, old, np.arange(4))
    for used in ([0, 1, 2, 3], [3]):
        tell(tier, clock, old, used, mass=1.0)
    for layer in range(3):
        found = None if importance is None else np.array([importance])
        assert load(tier, new, places(layer), importance=found) == 1
    return here(tier, old), here(tier, new)


@pytest.mark.parametrize("eviction", ["lru", "lfu"])
def test_an_arrival_displaces_what_was_not_used_for_the_longest_time_and_not_another_arrival(eviction: str) -> None:
    assert layer_by_layer(eviction) == ([3], [0, 1, 2])


@pytest.mark.parametrize(("importance", "stay"), [(1.5, True), (0.5, False), (None, False)])
def test_under_the_published_policy_arrivals_stay_if_the_request_found_more_in_them(
    importance: float | None, stay: bool
) -> None:
    old, new = layer_by_layer("published", importance)
    # Chunk 3 was found twice, and is worth more than each arrival.
    assert (old, new) == (([3], [0, 1, 2]) if stay else ([1, 2, 3], [2]))


@pytest.mark.parametrize(("requests", "stay"), [(1, True), (6, False)])
def test_under_expected_use_arrivals_of_a_new_prefix_must_outscore_what_is_there(requests: int, stay: bool) -> None:
    old, new, clock = new_table(1, chunks=4), new_table(2, chunks=1, layers=4), Clock()
    tier = new_tier(4 * PAGE, [old, new], policy_named("expected-use"), clock=clock)
    load(tier, old, np.arange(4))
    for _ in range(requests):
        tell(tier, clock, old, [0, 1, 2, 3])
    for layer in range(3):
        assert load(tier, new, places(layer)) == 1
    assert (len(here(tier, old)), here(tier, new)) == ((1, [0, 1, 2]) if stay else (3, [2]))


def test_lfu_prefers_an_arrival_that_was_used_often_before_it_went() -> None:
    table, clock = new_table(1, chunks=4), Clock()
    tier = new_tier(2 * PAGE, [table], policy_named("lfu"), clock=clock)
    for used in ([0], [0], [1], [2]):
        load(tier, table, places(*used))
        tell(tier, clock, table, used)
    tier.make_room(2 * PAGE)
    load(tier, table, places(1, 2))
    tell(tier, clock, table, [1, 2])
    load(tier, table, places(0))  # Used for the third time, 1 and 2 twice.
    assert here(tier, table) == [0, 2]
    load(tier, table, places(3))  # For the first time, but one must go.
    assert here(tier, table) == [0, 3]


@pytest.mark.parametrize("eviction", ["lru", "published"])
def test_a_request_larger_than_memory_ends_with_its_last_or_most_important_chunks(eviction: str) -> None:
    """What is judged while the request runs agrees with what `MemoryTiers` counts when it is over."""
    memory = MemoryTiers(12 * PAGE, 0, eviction)
    table = memory.table(fake_segment("a", chunks=8))
    assert table is not None
    mass = np.array([8, 7, 6, 5, 1, 2, 3, 4], dtype=np.float32)
    for place in range(8):
        load(memory.host, table, places(place), importance=mass[[place]].astype(np.float64))
    there = here(memory.host, table)
    before = worth(memory.host, table, *there)
    memory.finished(usage(Joined(table), *range(8), mass=mass))
    memory.catch_up()
    assert here(memory.host, table) == there
    assert before == pytest.approx(worth(memory.host, table, *there))
    check_tier(memory.host, leased=0)


@pytest.mark.parametrize("eviction", ["lru", "lfu", "expected-use"])
def test_keys_of_a_request_that_is_not_over_are_worth_as_much_as_its_chunks(eviction: str) -> None:
    old, new, clock = new_table(1, chunks=2), new_table(2, chunks=2), Clock()
    tier = new_tier(4 * PAGE, [old, new], policy_named(eviction), clock=clock)
    load(tier, old, places(0, 1))
    tell(tier, clock, old, [0, 1], mass=0.125)
    buffer = tier.lease(PAGE, exact=True)
    assert buffer is not None
    keys = tier.keep_keys("keys", 0, buffer, new)
    assert keys is not None
    tier.let_go(keys)
    load(tier, new, places(0), importance=np.ones(1))
    load(tier, new, places(1), importance=np.ones(1))
    assert tier.has_keys("keys"), "every request to the segment needs them"
