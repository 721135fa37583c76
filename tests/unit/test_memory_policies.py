"""Who goes first under each policy, in histories made by hand; and what is counted in them."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_helpers import ByImportance, Joined, fake_segment, here, keys_in, load, new_table, new_tier, places, usage

from hf_contiguouskv.errors import ConfigError
from hf_contiguouskv.hardware.aligned_memory import PAGE
from hf_contiguouskv.memory import POLICIES, EvictionPolicy, MemoryTiers
from hf_contiguouskv.memory.history import HALF_LIFE, Clock, SegmentTable, Uses
from hf_contiguouskv.memory.policies import (
    AttentionGuided,
    ExpectedUse,
    LeastFrequentlyUsed,
    LeastRecentlyUsed,
    policy_named,
)

Request = tuple[SegmentTable, list[int]]


def uses(**changes: object) -> Uses:
    fields: dict[str, object] = {
        "importance": np.ones(3),
        "loads": np.ones(3),
        "requests": np.ones(3),
        "last": np.ones(3),
        "heat": np.ones(3),
        "prefix_heat": 1.0,
        "prefix_requests": 4,
    }
    return Uses(**(fields | changes))  # type: ignore[arg-type]


def tell(clock: Clock, *requests: Request) -> None:
    """Requests, one after the other: each is about one table and uses these of its chunks."""
    for table, used in requests:
        table.begin_request(clock)
        table.count(places(*used), clock)
        clock.tick()


def order(policy: EvictionPolicy, table: SegmentTable) -> list[int]:
    """Chunks of a table, the one that goes first in front; ties in the order of their places."""
    worth = policy.worth(table.uses_of(np.arange(table.chunks)))
    assert worth.dtype == np.float64
    assert worth.shape == (table.chunks,)
    return np.argsort(worth, kind="stable").tolist()


# ---- each policy's victim ----


def test_lru_gives_up_what_was_not_used_for_the_longest_time() -> None:
    table, clock = new_table(1, chunks=4), Clock()
    tell(clock, (table, [0, 1, 2, 3]), (table, [2]), (table, [0]), (table, [3]))
    assert order(LeastRecentlyUsed(), table) == [1, 2, 0, 3]


def test_lfu_gives_up_what_the_fewest_requests_used_and_of_equals_the_older() -> None:
    table, clock = new_table(1, chunks=4), Clock()
    tell(clock, (table, [0, 1, 2, 3]), (table, [0, 2]), (table, [0, 3]), (table, [0]), (table, [1, 2]))
    # Uses: 0 four times, 1 twice (last in request 5), 2 three times, 3 twice (last in request 3).
    assert order(LeastFrequentlyUsed(), table) == [3, 1, 2, 0]


@pytest.mark.parametrize(
    ("requests", "last"), [((5, 6), (2**31 - 1, 1)), ((2**20, 2**20 + 1), (2**31 - 1, 1)), ((7, 7), (10**6, 10**6 + 1))]
)
def test_lfu_never_prefers_recency_to_a_use(requests: tuple[int, int], last: tuple[int, int]) -> None:
    history = uses(requests=np.array(requests, dtype=float), last=np.array(last, dtype=float))
    few, many = LeastFrequentlyUsed().worth(history)
    assert few < many


def test_the_published_score_is_importance_times_loads() -> None:
    history = uses(importance=np.array([0.5, 2.0, 0.25]), loads=np.array([4.0, 1.5, 0.0]))
    assert AttentionGuided().worth(history).tolist() == [2.0, 3.0, 0.0]


def test_the_published_score_sums_what_requests_gave_and_counts_what_was_loaded() -> None:
    """`S_j = I_j * F_j`, with `I_j += A_j` after each request and `F_j` the times that the chunk came from disk."""
    table = new_table(1, chunks=4)
    tier = new_tier(4 * PAGE, [table], AttentionGuided())
    masses = np.array([[0.5, 0.25, 0.125, 0.125], [0.0, 0.75, 0.25, 0.0]], dtype=np.float32)
    load(tier, table, places(0, 1, 2))
    table.add_importance([0], 0, masses[0])
    assert tier.make_room(4 * PAGE)
    load(tier, table, places(0, 1))
    table.add_importance([0], 0, masses[1])
    tier.judge(table)
    assert table.importance.tolist() == masses.sum(0).tolist()
    assert table.loads.tolist() == [2, 2, 1, 0]
    assert AttentionGuided().worth(table.uses_of(np.arange(4))).tolist() == [1.0, 2.0, 0.375, 0.0]
    slots = table.slots_in("host")[:2]
    assert tier._arena_of(table).worth[slots].tolist() == [1.0, 2.0]


def test_loads_count_disk_reads_that_were_kept_and_nothing_else() -> None:
    table = new_table(1, chunks=4)
    tier = new_tier(4 * PAGE, [table])
    load(tier, table, places(0))
    load(tier, table, places(0))  # Another request read it at the same time: it is loaded already.
    slots = tier.take(PAGE, 1)
    tier.keep(table, places(1), slots, PAGE, loaded=False)  # From another tier.
    tier.release(slots, PAGE)
    tier.release(tier.find(table, places(0)), PAGE)
    assert table.loads.tolist() == [1, 0, 0, 0]


def test_importance_goes_to_these_layers_and_chunks_only() -> None:
    table = new_table(1, chunks=3, layers=3)
    table.add_importance([0, 2], 1, np.array([0.5, 0.25], dtype=np.float32))
    table.add_importance([2], 0, np.array([1.0], dtype=np.float32))
    assert table.importance.tolist() == [0, 0.5, 0.25, 0, 0, 0, 1.0, 0.5, 0.25]
    table.note_mass()
    assert table.mean_mass == pytest.approx((0.75 + 0.0 + 1.75) / 9)


@given(st.lists(st.lists(st.floats(0, 1, width=32), min_size=3, max_size=3), max_size=12))
def test_importance_is_the_sum_whatever_was_in_memory(masses: list[list[float]]) -> None:
    table = new_table(1, chunks=3)
    total = np.zeros(3, dtype=np.float32)
    for mass in masses:
        table.add_importance([0], 0, np.array(mass, dtype=np.float32))
        total += np.array(mass, dtype=np.float32)
    assert table.importance.tolist() == total.tolist()


# ---- expected use ----


def test_a_chunk_that_more_requests_of_its_prefix_used_stays_longer() -> None:
    table, clock = new_table(1, chunks=4), Clock()
    tell(clock, (table, [0, 1]), (table, [0, 2]), (table, [0, 1]), (table, [0]))
    assert order(ExpectedUse(), table) == [3, 2, 1, 0]


def test_a_chunk_of_a_prefix_that_is_asked_for_more_often_stays_longer() -> None:
    clock, often, rarely = Clock(), new_table(1, chunks=2), new_table(2, chunks=2)
    tell(clock, *[(often, [0])] * 6, (rarely, [0]))
    policy, both = ExpectedUse(), np.arange(2)
    assert policy.worth(often.uses_of(both)).min() > 0
    assert policy.worth(often.uses_of(both))[0] > policy.worth(rarely.uses_of(both))[0]


def test_a_prefix_that_was_popular_long_ago_gives_way_to_one_that_is_now() -> None:
    clock, old, new, other = Clock(), new_table(1), new_table(2), new_table(3)
    tell(clock, *[(old, [0])] * 8)
    tell(clock, *[(other, [0])] * (4 * HALF_LIFE))
    tell(clock, *[(new, [0])] * 2)
    policy = ExpectedUse()
    assert policy.worth(old.uses_of(places(0))) < policy.worth(new.uses_of(places(0)))
    assert LeastFrequentlyUsed().worth(old.uses_of(places(0))) > LeastFrequentlyUsed().worth(new.uses_of(places(0)))


def test_one_lucky_use_does_not_make_a_chunk_certain() -> None:
    """A prior pulls the share of few requests towards itself: 1 of 1 is less than 9 of 10."""
    once, proven = uses(requests=np.ones(1), prefix_requests=1), uses(requests=np.full(1, 9.0), prefix_requests=10)
    assert ExpectedUse().worth(once) < ExpectedUse().worth(proven)


def test_expected_use_is_a_probability_times_the_heat_of_the_prefix() -> None:
    worth = ExpectedUse(prior=0.5, weight=2.0).worth(
        uses(requests=np.array([0.0, 3.0, 99.0]), prefix_requests=4, prefix_heat=3.0)
    )
    assert worth.tolist() == [3.0 * 1 / 6, 3.0 * 4 / 6, 3.0]


@pytest.mark.parametrize("policy", [ExpectedUse(ahead=1.0), LeastRecentlyUsed(), LeastFrequentlyUsed()])
@given(history=st.lists(st.sets(st.integers(0, 3), max_size=4), min_size=1, max_size=10))
@settings(deadline=None)
def test_keys_are_worth_at_least_as_much_as_the_best_chunk(policy: EvictionPolicy, history: list[set[int]]) -> None:
    table, clock = new_table(1, chunks=4), Clock()
    for used in history:
        tell(clock, (table, sorted(used)))
    keys = policy.worth(table.uses_of_keys([0, 1]))
    assert keys.shape == (2,)
    assert keys.min() >= policy.worth(table.uses_of(np.arange(4))).max()


@pytest.mark.parametrize("ahead", [0.25, 0.5, 1.0])
def test_keys_are_worth_less_because_they_are_read_ahead(ahead: float) -> None:
    table, clock = new_table(1, chunks=4), Clock()
    tell(clock, *[(table, [0, 1])] * 3)
    keys = ExpectedUse(ahead=ahead).worth(table.uses_of_keys([0]))
    assert keys[0] == ahead * ExpectedUse(ahead=1.0).worth(table.uses_of_keys([0]))[0] > 0


def test_published_keys_have_the_mass_of_an_average_chunk() -> None:
    table = new_table(1, chunks=4, layers=2)
    table.add_importance([0], 0, np.full(4, 0.25, dtype=np.float32))
    table.add_importance([1], 0, np.full(4, 0.75, dtype=np.float32))
    table.note_mass()
    table.key_loads[2] = 2
    keys = AttentionGuided().worth(table.uses_of_keys([2, 3]))
    assert keys.tolist() == [2 * 0.5, 0.0]


def test_loads_of_keys_are_counted_when_they_are_kept() -> None:
    table = new_table(1, layers=2)
    tier = new_tier(2 * PAGE, [table], AttentionGuided())
    keys_in(tier, "a", table, which=0)
    keys_in(tier, "b", table, which=3)
    assert tier.make_room(2 * PAGE)
    keys_in(tier, "b", table, which=3)
    assert table.key_loads.tolist() == [1, 0, 0, 2]


# ---- time ----


def test_heat_halves_with_every_half_life() -> None:
    clock, old, new = Clock(), new_table(1), new_table(2)
    tell(clock, (old, [0]))
    clock.now += HALF_LIFE - 1
    tell(clock, (new, [0]))
    assert new.heat[0] / old.heat[0] == pytest.approx(2.0, rel=1e-6)
    assert new.prefix_heat / old.prefix_heat == pytest.approx(2.0)


def later(clock: Clock, half_lives: float) -> None:
    clock.now += int(half_lives * HALF_LIFE)


def test_a_new_epoch_changes_no_ratio() -> None:
    clock, tables = Clock(), [new_table(1), new_table(2)]
    for table in tables:
        later(clock, 1.5)
        tell(clock, (table, [0]))
    before = [(float(table.heat[0]), table.prefix_heat) for table in tables]
    factor = clock.rescale()
    for table in tables:
        table.rescale(factor)
    assert clock.weight == 1.0
    for index in (0, 1):
        first, second = ((float(t.heat[0]), t.prefix_heat)[index] for t in tables)
        assert first / second == pytest.approx(before[0][index] / before[1][index], rel=1e-5)
    # What is used now weighs what it would have weighed without the new epoch.
    tell(clock, (tables[0], [1]))
    assert tables[0].heat[1] / tables[1].heat[0] == pytest.approx(2 ** (1 / HALF_LIFE), rel=1e-5)


@pytest.mark.parametrize("half_lives", [1, 10, 100, 130, 255])
def test_heat_is_a_number_until_the_epoch_ends(half_lives: int) -> None:
    clock, table = Clock(), new_table(1, chunks=2)
    tell(clock, (table, [0]))
    later(clock, half_lives)
    if clock.tick():
        table.rescale(clock.rescale())
    with warnings.catch_warnings(action="error"):
        tell(clock, (table, [1]), (table, [0]))
        assert np.isfinite(table.heat).all()
        assert 0 < table.heat[1] < table.heat[0]
        table.rescale(clock.rescale())
    assert np.isfinite(table.heat).all()
    assert 0 < table.heat[1] < table.heat[0]


def test_tiers_begin_a_new_epoch_by_themselves_and_keep_the_order() -> None:
    """Prefixes in the order of their heat, before and after, in what a tier believes as well."""

    memory = MemoryTiers(64 * PAGE, 0, "expected-use")
    tables = [memory.table(fake_segment(str(n))) for n in range(3)]
    for table, count in zip(tables, (3, 1, 2), strict=True):
        assert table is not None
        load(memory.host, table, places(0))
        for _ in range(count):
            memory.finished(usage(Joined(table), 0))
            memory.catch_up()
    memory.clock.now = 256 * HALF_LIFE - 1
    assert tables[1] is not None
    memory.finished(usage(Joined(tables[1]), 0))
    memory.catch_up()
    assert memory.clock.weight == 1.0, "the epoch has ended"
    arena = memory.host._arenas[PAGE]
    worth = [float(arena.worth[table.slots_in("host")[0]]) for table in tables]
    assert worth[1] > worth[0] > worth[2] > 0
    assert arena.lowest(3).tolist() == [table.slots_in("host")[0] for table in (tables[2], tables[0], tables[1])]


# ---- names ----


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_policy_has_a_name_and_is_had_by_it(name: str) -> None:
    policy = policy_named(name)
    assert isinstance(policy, EvictionPolicy)
    assert (policy.name, type(policy)) == (name, POLICIES[name])
    assert set(POLICIES) == {"expected-use", "published", "lru", "lfu"}


def test_a_policy_of_ones_own_is_asked() -> None:
    own = ByImportance()
    memory = MemoryTiers(4 * PAGE, 0, own)
    assert memory.policy is own
    assert memory.host.policy is own
    table = new_table(1)
    tier = new_tier(3 * PAGE, [table], own)
    load(tier, table, places(0, 1, 2), worth=[2.0, 1.0, 3.0])
    load(tier, table, places(3), worth=[0.5])
    assert here(tier, table) == [0, 2, 3]


@pytest.mark.parametrize("name", ["", "LRU", "fifo"])
def test_an_unknown_policy_is_refused_with_the_names_that_there_are(name: str) -> None:
    with pytest.raises(ConfigError, match=r"expected-use.*lfu.*lru.*published"):
        MemoryTiers(PAGE, 0, name)
