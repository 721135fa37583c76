"""What competes for a tier's memory, and what is given up for what."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from memory_helpers import (
    ByImportance,
    FourPerBlock,
    check_tier,
    content_of,
    here,
    hold_new_keys,
    keys_in,
    load,
    new_table,
    new_tier,
    pageable,
    places,
    read,
)

from hf_contiguouskv.errors import ConfigError
from hf_contiguouskv.hardware.aligned_memory import PAGE

# ---- the bound ----


def test_a_negative_bound_is_refused() -> None:
    with pytest.raises(ConfigError, match="host tier must be 0 or more, got -1"):
        new_tier(-1)


@pytest.mark.parametrize("bound", [0, PAGE - 1])
def test_a_tier_without_room_for_one_chunk_keeps_nothing_and_still_lends_buffers(bound: int) -> None:
    table = new_table(1)
    tier = new_tier(bound, [table])
    assert load(tier, table, places(0, 1)) == 0
    assert tier.lease(PAGE, must=False) is None
    buffer = tier.lease(PAGE)
    assert buffer is not None
    assert (buffer.counted, len(buffer.data)) == (0, PAGE)
    assert tier.keep_keys("keys", 0, buffer, table) is None
    tier.give_back(buffer)
    assert tier.would_keep(np.ones(2), PAGE) == 0
    assert tier.make_room(0)
    assert not tier.make_room(bound + 1)
    tier.trim(PAGE, PAGE)
    tier.judge(table)
    tier.forget(table)
    assert (tier.held_bytes, tier.peak_bytes) == (0, 0)


@pytest.mark.parametrize("bound", [1, 3, 5])
def test_exactly_as_many_chunks_stay_as_fit(bound: int) -> None:
    table = new_table(1)
    tier = new_tier(bound * PAGE + PAGE - 1, [table])
    assert load(tier, table, np.arange(8)) == bound
    assert here(tier, table) == list(range(bound))
    assert (tier.held_bytes, tier.peak_bytes) == (bound * PAGE, bound * PAGE)
    assert tier.bytes_by_use == {"chunks": bound * PAGE, "keys": 0, "buffers": 0, "tables": 0}


def test_slots_in_use_are_never_taken_and_the_rest_is_had() -> None:
    table = new_table(1)
    tier = new_tier(4 * PAGE, [table])
    load(tier, table, np.arange(4), worth=[1, 2, 3, 4])
    held = tier.find(table, places(0, 1))
    assert load(tier, table, np.arange(4, 8), worth=[9] * 4) == 2
    assert here(tier, table)[:2] == [0, 1]
    assert torch.equal(tier.blocks(PAGE).select(held), content_of(1, places(0, 1), PAGE))
    tier.release(held, PAGE)
    check_tier(tier, leased=0)


def test_whoever_registered_a_chunk_first_keeps_it_and_the_other_slot_is_free_again() -> None:
    table = new_table(1)
    tier = new_tier(4 * PAGE, [table])
    first, second = tier.take(PAGE, 1), tier.take(PAGE, 1)
    tier.keep(table, places(3), first, PAGE)
    tier.keep(table, places(3), second, PAGE)
    assert table.slots_in("host")[3] == first[0]
    tier.release(first, PAGE)
    tier.release(second, PAGE)
    check_tier(tier, leased=0)
    assert tier.bytes_by_use["chunks"] == PAGE


# ---- slots of several sizes, keys and buffers ----


@pytest.mark.parametrize("kind", [pageable, FourPerBlock])
def test_chunks_of_another_size_take_the_memory_of_what_is_worth_less(kind: object) -> None:
    small, large = new_table(1, slot_bytes=PAGE), new_table(2, slot_bytes=4 * PAGE)
    tier = new_tier(32 * PAGE, [small, large], blocks=kind)
    load(tier, small, np.arange(16), worth=[1] * 16)
    load(tier, large, places(0, 1, 2, 3), worth=[5] * 4)
    assert (len(here(tier, small)), len(here(tier, large))) == (16, 4)
    assert load(tier, large, places(4, 5, 6, 7), worth=[5] * 4) == 4
    assert (here(tier, small), len(here(tier, large))) == ([], 8)
    assert torch.equal(read(tier, large, places(7)), content_of(2, places(7), 4 * PAGE))
    check_tier(tier, leased=0)


def test_what_is_worth_more_keeps_its_memory_against_chunks_of_another_size() -> None:
    small, large = new_table(1), new_table(2, slot_bytes=2 * PAGE)
    tier = new_tier(8 * PAGE, [small, large])
    load(tier, small, places(0, 1, 2, 3), worth=[9] * 4)
    load(tier, large, places(0, 1), worth=[1, 2])
    assert load(tier, large, places(2), worth=[1]) == 1
    assert here(tier, small) == [0, 1, 2, 3]
    assert here(tier, large) == [1, 2]


def test_memory_that_lies_idle_goes_before_anything_that_is_kept() -> None:
    small, large = new_table(1), new_table(2, slot_bytes=2 * PAGE)
    tier = new_tier(16 * PAGE, [small, large])
    load(tier, small, np.arange(8), worth=[1] * 8)
    tier.release(tier.take(2 * PAGE, 3), 2 * PAGE)  # Free slots.
    tier.give_back(tier.lease(2 * PAGE, exact=True))  # type: ignore[arg-type]  # A buffer that is kept for the next.
    assert tier.held_bytes == 16 * PAGE
    assert load(tier, small, np.arange(8, 16), worth=[0] * 8) == 8
    assert here(tier, small) == list(range(16))
    assert tier.evicted == 0


def test_a_tier_gives_all_slots_that_can_be_had_however_many_are_free() -> None:
    small, large = new_table(1), new_table(2, slot_bytes=2 * PAGE)
    tier = new_tier(8 * PAGE, [small, large])
    load(tier, large, places(0, 1))
    tier.forget(large)  # Two free slots.
    load(tier, small, places(0, 1, 2, 3))
    assert len(tier.take(2 * PAGE, 4)) == 4


@pytest.mark.parametrize(("keys_worth", "stay"), [(5, True), (1, False)])
def test_keys_and_chunks_compete_by_worth(keys_worth: int, stay: bool) -> None:
    table, other = new_table(1), new_table(2)
    tier = new_tier(4 * PAGE, [table, other])
    other.mean_mass = keys_worth
    keys_in(tier, "keys", other)
    load(tier, table, places(0, 1, 2), worth=[3, 4, 6])
    assert load(tier, table, places(3), worth=[9]) == 1
    assert tier.has_keys("keys") is stay
    assert here(tier, table) == ([1, 2, 3] if stay else [0, 1, 2, 3])
    assert tier.evicted == 1
    check_tier(tier, leased=0)


def test_keys_are_judged_anew_with_their_table() -> None:
    table, other = new_table(1), new_table(2)
    tier = new_tier(2 * PAGE, [table, other])
    keys_in(tier, "a", table)
    keys_in(tier, "b", other)
    table.mean_mass, other.mean_mass = 2.0, 1.0
    for changed in (table, other):
        tier.judge(changed)
    assert tier.make_room(PAGE)
    assert (tier.has_keys("a"), tier.has_keys("b")) == (True, False)


def test_keys_in_use_stay_and_go_afterwards() -> None:
    table = new_table(1)
    tier = new_tier(2 * PAGE, [table])
    first = hold_new_keys(tier, "keys", table)
    assert tier.hold_keys("keys") is first
    for _ in range(2):
        assert not tier.make_room(2 * PAGE)
        assert tier.has_keys("keys")
        tier.let_go(first)
    assert tier.make_room(2 * PAGE)
    assert tier.hold_keys("keys") is None


def test_keys_are_kept_once_and_only_of_segments_that_are_known() -> None:
    table = new_table(1)
    tier = new_tier(8 * PAGE, [table])
    keys_in(tier, "keys", table)
    for name, owner in (("keys", table), ("new", None), ("new", new_table(9))):
        buffer = tier.lease(PAGE, exact=True)
        assert buffer is not None
        assert tier.keep_keys(name, 0, buffer, owner) is None
        tier.give_back(buffer)
    check_tier(tier, leased=0)


def test_letting_go_of_forgotten_keys_does_not_let_go_of_those_that_took_their_name() -> None:
    table = new_table(1)
    tier = new_tier(4 * PAGE, [table])
    first = hold_new_keys(tier, "keys", table)
    tier.forget(table)
    second = hold_new_keys(tier, "keys", table)
    assert tier.hold_keys("keys") is second
    check_tier(tier, leased=0, forgotten=PAGE)
    tier.let_go(first)
    check_tier(tier, leased=0)
    tier.let_go(second)
    assert not tier.make_room(4 * PAGE), "the second is still in use"
    tier.let_go(second)
    assert tier.make_room(4 * PAGE)


def test_forgotten_keys_count_until_the_last_who_uses_them_lets_go() -> None:
    table = new_table(1)
    tier = new_tier(4 * PAGE, [table])
    keys = hold_new_keys(tier, "keys", table, pages=2)
    tier.hold_keys("keys")
    keys.buffer.data.fill_(7)
    tier.forget(table)
    assert (tier.has_keys("keys"), table.resident) == (False, 0)
    for users in (2, 1):
        assert tier.bytes_by_use["keys"] == 2 * PAGE, f"{users} still use them"
        assert len(tier.take(PAGE, 4)) == (2 if users == 2 else 0)
        assert (keys.buffer.data == 7).all()
        tier.let_go(keys)
    assert tier.bytes_by_use["keys"] == 0
    assert len(tier.take(PAGE, 4)) == 2


# ---- buffers ----


@pytest.mark.parametrize(
    ("nbytes", "capacity"), [(1, PAGE), (PAGE, PAGE), (PAGE + 1, 2 * PAGE), (2**22, 2**22), (2**22 + 1, 5 * 2**20)]
)
def test_a_buffer_is_rounded_up_unless_it_is_to_be_exact(nbytes: int, capacity: int) -> None:
    tier = new_tier(2**26)
    for exact, expected in ((False, capacity), (True, nbytes)):
        buffer = tier.lease(nbytes, exact=exact)
        assert buffer is not None
        assert (len(buffer.data), buffer.counted) == (expected, expected)
        tier.give_back(buffer)


class Event:
    def __init__(self, happened: bool) -> None:
        self.happened = happened

    def query(self) -> bool:
        return self.happened


@pytest.mark.parametrize(
    ("busy", "on_device", "again"),
    [(None, False, True), (Event(True), False, True), (Event(False), False, False), (Event(False), True, True)],
)
def test_a_buffer_is_lent_again_once_no_copy_from_it_is_under_way(
    busy: Event | None, on_device: bool, again: bool
) -> None:
    tier = new_tier(64 * PAGE)
    tier.on_device = on_device
    first = tier.lease(PAGE)
    assert first is not None
    first.busy = busy
    tier.give_back(first)
    assert (tier.lease(PAGE) is first) is again
    check_tier(tier)


def test_few_buffers_are_kept_for_the_next_read() -> None:
    tier = new_tier(64 * PAGE)
    lent = [tier.lease(PAGE) for _ in range(20)]
    for buffer in lent:
        assert buffer is not None
        tier.give_back(buffer)
    assert tier.held_bytes == 8 * PAGE
    check_tier(tier, leased=0)


def test_a_buffer_that_cannot_be_allocated_is_not_counted() -> None:
    tier = new_tier(8 * PAGE)

    def fail(nbytes: int) -> torch.Tensor:
        raise MemoryError

    tier._make_buffer = fail
    with pytest.raises(MemoryError):
        tier.lease(PAGE)
    assert tier.held_bytes == 0


@pytest.mark.parametrize("kind", [pageable, FourPerBlock])
def test_making_room_in_vain_lets_go_of_nothing_at_all(kind: object) -> None:
    table, other = new_table(1), new_table(2, slot_bytes=2 * PAGE)
    tier = new_tier(32 * PAGE, [table, other], blocks=kind)
    load(tier, table, np.arange(8))
    load(tier, other, np.arange(4))
    tier.forget(other)  # Free slots,
    keys_in(tier, "keys", table)
    tier.give_back(tier.lease(PAGE))  # type: ignore[arg-type]  # and a buffer for the next.
    held = tier.find(table, places(0, 5))
    before = (tier.held_bytes, tier.bytes_by_use, tier._idle_bytes)
    assert not tier.make_room(31 * PAGE)
    assert not tier.make_room(33 * PAGE)
    assert (tier.held_bytes, tier.bytes_by_use, tier._idle_bytes) == before
    assert (tier.evicted, here(tier, table), tier.has_keys("keys")) == (0, list(range(8)), True)
    tier.release(held, PAGE)
    assert tier.make_room(31 * PAGE)


def test_nothing_goes_for_a_buffer_that_does_not_fit_all_the_same() -> None:
    table = new_table(1)
    tier = new_tier(8 * PAGE, [table])
    load(tier, table, np.arange(8))
    held = tier.find(table, np.arange(4))
    buffer = tier.lease(8 * PAGE, exact=True)
    assert buffer is not None
    assert buffer.counted == 0
    assert here(tier, table) == list(range(8))
    tier.release(held, PAGE)


# ---- room ahead ----


@pytest.mark.parametrize("ahead", [0, 1, 3, 8])
def test_after_trim_so_much_can_be_loaded_without_anything_going(ahead: int) -> None:
    table = new_table(1)
    tier = new_tier(8 * PAGE, [table])
    load(tier, table, np.arange(8), worth=range(8))
    tier.trim(PAGE, ahead * PAGE)
    assert here(tier, table) == list(range(ahead, 8))
    before = tier.evicted
    assert len(tier.take(PAGE, ahead)) == ahead
    assert tier.evicted == before


@pytest.mark.parametrize("kind", [pageable, FourPerBlock])
def test_what_would_be_kept_is_all_while_there_is_room_and_then_what_outscores_its_victim(kind: object) -> None:
    table = new_table(1)
    tier = new_tier(7 * PAGE if kind is FourPerBlock else 4 * PAGE, [table], ByImportance(), kind)
    worth = np.array([9.0, 3.5, 2.0, 0.0])
    assert tier.would_keep(worth, PAGE) == 4
    load(tier, table, np.arange(2), worth=[4, 2])
    assert [tier.would_keep(worth[:count], PAGE) for count in range(5)] == [0, 1, 2, 2, 2]
    load(tier, table, places(2, 3), worth=[3, 4])
    assert tier.would_keep(worth, PAGE) == 2
    held = tier.find(table, places(1))
    assert tier.would_keep(worth, PAGE) == 1
    tier.release(held, PAGE)
    held = tier.find(table, np.arange(4))
    assert tier.would_keep(worth, PAGE) == 0
    tier.release(held, PAGE)


def test_a_forgotten_chunk_in_use_keeps_its_bytes_until_it_is_released() -> None:
    table, other = new_table(1), new_table(2)
    tier = new_tier(4 * PAGE, [table, other])
    load(tier, table, np.arange(4))
    first, second = tier.find(table, places(0)), tier.find(table, places(0, 1))
    tier.forget(table)
    assert here(tier, table) == []
    assert load(tier, other, np.arange(4)) == 2
    tier.release(first, PAGE)
    assert torch.equal(tier.blocks(PAGE).select(second), content_of(1, places(0, 1), PAGE))
    tier.release(second, PAGE)
    assert load(tier, other, np.arange(2, 4)) == 2
    check_tier(tier, leased=0)
