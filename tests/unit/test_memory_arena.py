"""Slots: what lies in them stays, and who goes first is what a min-heap of all of them would say."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from memory_helpers import FourPerBlock, check_arena, content_of, heap_victims, octets, pageable, places

from hf_contiguouskv.hardware.aligned_memory import PAGE
from hf_contiguouskv.memory import arena as arena_module
from hf_contiguouskv.memory.arena import Arena
from hf_contiguouskv.memory.blocks import Blocks, PageableBlocks, Slots, TensorBlocks, neighbours, runs

KINDS: dict[str, Callable[[int, int], Blocks]] = {"pageable": pageable, "tensors": FourPerBlock}


def blocks_of(kind: str, slot_bytes: int, count: int) -> Blocks:
    blocks = KINDS[kind](slot_bytes, 16 * count * slot_bytes)
    for block in range(count):
        blocks.take(block)
    return blocks


# ---- blocks ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slot_bytes", [PAGE // 8, PAGE, 3 * PAGE, PAGE + 512])
@pytest.mark.parametrize(
    "slots",
    [[5], [0, 1, 2], [2, 3, 4, 5, 6], [7, 6, 5], [0, 2, 3], [1, 6, 3], [4, 0], [3, 4], [3, 4, 6], [3, 5, 4, 6], []],
    ids=str,
)
def test_what_is_written_into_slots_is_read_from_them_in_the_order_asked_for(
    kind: str, slot_bytes: int, slots: list[int]
) -> None:
    blocks = blocks_of(kind, slot_bytes, 8)
    everything = np.arange(8, dtype=np.int64)
    blocks.write(everything, content_of(1, everything, slot_bytes))
    assert torch.equal(blocks.select(places(*slots)), content_of(1, places(*slots), slot_bytes))
    blocks.write(places(*slots), content_of(2, places(*slots), slot_bytes))
    expected = content_of(1, everything, slot_bytes)
    expected[slots] = content_of(2, places(*slots), slot_bytes)
    assert torch.equal(blocks.select(everything), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("slots", "view"),
    [([1, 2], True), ([3], True), ([0, 1, 2, 3], True), ([2, 1], False), ([0, 2], False), ([1, 3, 2], False)],
    ids=str,
)
def test_neighbouring_slots_are_not_copied_and_others_are(kind: str, slots: list[int], view: bool) -> None:
    blocks = blocks_of(kind, PAGE, 4)
    blocks.write(places(0, 1, 2, 3), content_of(1, places(0, 1, 2, 3), PAGE))
    selected = blocks.select(places(*slots))
    blocks.write(places(*slots), content_of(5, places(*slots), PAGE))
    assert torch.equal(selected, content_of(5, places(*slots), PAGE)) is view


def test_slots_of_two_tensors_are_copied_even_if_their_numbers_are_neighbours() -> None:
    blocks = blocks_of("tensors", PAGE, 2)
    blocks.write(places(3, 4), content_of(1, places(3, 4), PAGE))
    copied = blocks.select(places(3, 4))
    blocks.write(places(3, 4), content_of(2, places(3, 4), PAGE))
    assert torch.equal(copied, content_of(1, places(3, 4), PAGE))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slot_bytes", [PAGE // 8, PAGE, PAGE + 512])
def test_a_buffer_is_the_memory_of_its_slots_and_of_no_others(kind: str, slot_bytes: int) -> None:
    blocks = blocks_of(kind, slot_bytes, 2)
    before, inside, after = places(0), places(1, 2), places(3)
    everything = np.arange(4, dtype=np.int64)
    blocks.write(everything, content_of(1, everything, slot_bytes))
    buffer = blocks.buffer(1, 2)
    assert buffer.nbytes == 2 * slot_bytes
    assert not buffer.readonly
    buffer[:] = content_of(9, inside, slot_bytes).numpy().tobytes()
    assert torch.equal(blocks.select(inside), content_of(9, inside, slot_bytes))
    for untouched in (before, after):
        assert torch.equal(blocks.select(untouched), content_of(1, untouched, slot_bytes))


def test_a_buffer_over_two_tensors_is_refused_and_never_cut() -> None:
    blocks = blocks_of("tensors", PAGE, 2)
    assert blocks.slots_in_a_row == 4
    with pytest.raises(ValueError, match="slots 3 to 5 lie in several blocks of 4"):
        blocks.buffer(3, 2)
    assert blocks.buffer(2, 2).nbytes == 2 * PAGE


@pytest.mark.parametrize("slot_bytes", [PAGE // 4, PAGE, 2 * PAGE, PAGE + 512])
def test_pages_of_dropped_blocks_really_go_and_the_others_stay(slot_bytes: int) -> None:
    blocks = PageableBlocks(slot_bytes, 32 * slot_bytes * 8)
    size = blocks.slots_per_block
    everything = np.arange(5 * size, dtype=np.int64)
    blocks.write(everything, content_of(1, everything, slot_bytes))
    blocks.drop([4, 0, 1])
    kept = (everything // size == 2) | (everything // size == 3)
    found = blocks.select(everything)
    assert torch.equal(found[torch.from_numpy(kept)], content_of(1, everything[kept], slot_bytes))
    assert not found[torch.from_numpy(~kept)].any(), "anonymous memory that was given back reads as zeros"


def test_a_dropped_tensor_is_freed_and_a_block_can_be_had_again() -> None:
    allocated: list[int] = []

    def allocate(nbytes: int) -> torch.Tensor:
        allocated.append(nbytes)
        return octets(nbytes)

    blocks = TensorBlocks(PAGE, 8 * PAGE, allocate)
    assert (blocks.slots_per_block, blocks.max_blocks) == (8, 1)
    blocks.take(0)
    blocks.drop([0])
    with pytest.raises(KeyError):
        blocks.tensor(0)
    blocks.take(0)
    assert allocated == [8 * PAGE, 8 * PAGE]


@pytest.mark.parametrize("kind", ["pageable", "TensorBlocks"])
@pytest.mark.parametrize("slot_bytes", [1, 512, PAGE, PAGE + 512, 3 * PAGE, 2**20])
@pytest.mark.parametrize("max_bytes", [0, 511, PAGE, 10 * PAGE, 10 * PAGE + 1, 2**22, 2**24 + 5])
def test_all_blocks_together_fit_into_the_bound(kind: str, slot_bytes: int, max_bytes: int) -> None:
    if kind == "TensorBlocks" and max_bytes < slot_bytes:
        pytest.skip("a tier asks for no blocks of slots larger than its bound")
    blocks = (
        PageableBlocks(slot_bytes, max_bytes) if kind == "pageable" else TensorBlocks(slot_bytes, max_bytes, octets)
    )
    block_bytes = blocks.slots_per_block * slot_bytes
    assert blocks.max_blocks * block_bytes <= max_bytes < (blocks.max_blocks + 1) * block_bytes
    if kind == "pageable":
        assert block_bytes % PAGE == 0


@given(st.lists(st.integers(0, 12), max_size=8))
def test_neighbours_and_runs_are_what_a_loop_finds(numbers: list[int]) -> None:
    slots = np.array(numbers, dtype=np.int64)
    follow = all(b == a + 1 for a, b in itertools.pairwise(numbers))
    assert neighbours(slots) is (bool(numbers) and follow)
    ascending = sorted(set(numbers))
    ranges = runs(np.array(ascending, dtype=np.int64))
    assert [n for first, end in ranges for n in range(first, end)] == ascending
    assert all(end < first for (_, end), (first, _) in itertools.pairwise(ranges))


# ---- who goes first ----


def filled(worth: list[float], blocks: Blocks | None = None) -> Arena:
    """An arena in which slot `i` is resident, unused, and worth `worth[i]`."""
    arena = Arena(blocks or PageableBlocks(PAGE, 4 * len(worth) * PAGE))
    arena.grow(-(-len(worth) // arena.blocks.slots_per_block))
    keep(arena, arena.take(len(worth)), worth)
    return arena


def keep(arena: Arena, slots: Slots, worth: list[float]) -> None:
    """As `Tier.keep` and `Tier.release` do."""
    arena.owner[slots], arena.place[slots], arena.worth[slots] = 1, slots, worth
    arena.release(slots)


def test_slots_that_were_given_again_to_something_worth_more_hide_nobody() -> None:
    with patch.object(arena_module, "_CANDIDATES", 2):
        arena = filled([0.0, 1.0, 2.0, 3.0])
        arena.vacate(arena.lowest(2))
        keep(arena, arena.take(2), [8.0, 9.0])
        assert arena.lowest(2).tolist() == [2, 3]


def test_thousands_of_evictions_between_two_judgements_go_in_the_order_of_the_heap() -> None:
    rng = np.random.default_rng(0)
    arena = filled(rng.random(2000).tolist())
    for step in range(60):
        victims = arena.lowest(30)
        assert victims.tolist() == heap_victims(arena, 30), f"step {step}"
        arena.vacate(victims)
        keep(arena, arena.take(30), rng.random(30).tolist())


def test_ties_go_to_the_lower_slot_even_past_the_candidates() -> None:
    with patch.object(arena_module, "_CANDIDATES", 2):
        arena = filled([1.0] * 6 + [0.0])
        assert arena.lowest(1).tolist() == [6]
        assert arena.lowest(5).tolist() == [6, 0, 1, 2, 3]
        assert arena.lowest(99).tolist() == [6, 0, 1, 2, 3, 4, 5]
        assert arena.lowest(0).tolist() == []


def test_what_is_used_is_no_victim_until_it_is_released() -> None:
    arena = filled([3.0, 1.0, 2.0])
    assert arena.lowest(1).tolist() == [1]
    arena.users[places(1)] += 1
    assert arena.lowest(2).tolist() == [2, 0]
    arena.release(places(1))
    assert arena.lowest(2).tolist() == [1, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_is_returned_only_when_all_its_slots_are_free(kind: str) -> None:
    arena = filled([0.0] * 8, KINDS[kind](PAGE, 64 * PAGE))
    per_block = arena.blocks.slots_per_block
    arena.vacate(places(0, 1, 2, 5))
    expected = 0 if per_block == 4 else 4
    assert arena.return_blocks(99) == expected
    arena.vacate(places(3))
    assert arena.return_blocks(99) == 1
    check_arena(arena)
    assert arena.grow(99) > 0
    check_arena(arena)
    assert arena.held_bytes == 64 * PAGE


def test_blocks_are_ordered_by_the_mean_worth_of_what_is_in_them() -> None:
    arena = filled([9.0, 9.0, 9.0, 9.0, 1.0, 2.0, 3.0, 6.0, 2.0, 2.0, 0.0, 0.0], FourPerBlock(PAGE, 64 * PAGE))
    arena.grow(1)  # A block without entries is no victim.
    arena.vacate(places(10, 11))
    assert arena.lowest_blocks() == [(2.0, 2), (3.0, 1), (9.0, 0)]
    arena.users[places(5)] += 1
    assert arena.lowest_blocks() == [(2.0, 2), (9.0, 0)]
    assert arena.in_block(2).tolist() == [8, 9]


def test_when_memory_cannot_be_had_nothing_is_lost() -> None:
    calls = 0

    def allocate(nbytes: int) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise MemoryError
        return octets(nbytes)

    blocks = TensorBlocks(2**20, 32 * 2**20, allocate)
    arena = Arena(blocks)
    with contextlib.suppress(MemoryError):
        arena.grow(4)
    assert arena.held_bytes == len(blocks._tensors) * arena.block_bytes
    check_arena(arena)
    arena.grow(99)
    assert arena.held_bytes == 32 * 2**20


# ---- random order ----


class ArenaMachine(RuleBasedStateMachine):
    """Everything that a tier does to an arena, in random order, against sets and a heap."""

    draw_worth = st.integers(0, 7).map(float)

    @initialize(
        kind=st.sampled_from(sorted(KINDS)),
        slot=st.sampled_from([PAGE // 4, PAGE]),
        few=st.integers(1, 4),
        worth=st.lists(draw_worth, max_size=12),
    )
    def begin(self, kind: str, slot: int, few: int, worth: list[float]) -> None:
        # With few candidates at a time, what is remembered from one search to the next matters soon.
        self.patched = patch.object(arena_module, "_CANDIDATES", few)
        self.patched.start()
        self.arena = Arena(KINDS[kind](slot, 32 * slot))
        self.free: set[int] = set()
        self.users: dict[int, int] = {}
        self.worth: dict[int, float] = {}
        if worth:
            self.arena.grow(-(-len(worth) // self.arena.blocks.slots_per_block))
            slots = self.arena.take(len(worth))
            self.free = set(self.arena._free)
            self.keep_all(slots, worth)

    def keep_all(self, slots: Slots, worth: list[float]) -> None:
        keep(self.arena, slots, worth)
        self.worth.update(zip(slots.tolist(), worth, strict=True))

    def teardown(self) -> None:
        if hasattr(self, "patched"):
            self.patched.stop()

    @rule(blocks=st.integers(0, 5))
    def grow(self, blocks: int) -> None:
        before = set(self.arena._free)
        assert before == self.free
        assert self.arena.grow(blocks) == len(self.arena._free) - len(before)
        self.free = set(self.arena._free)

    @rule(count=st.integers(0, 9))
    def take(self, count: int) -> None:
        slots = self.arena.take(count).tolist()
        assert slots == sorted(slots)
        assert len(slots) == min(count, len(self.free))
        assert set(slots) <= self.free
        self.free -= set(slots)
        self.users.update(dict.fromkeys(slots, 1))

    @precondition(lambda self: any(slot not in self.worth for slot in self.users))
    @rule(data=st.data())
    def register(self, data: st.DataObject) -> None:
        loading = sorted(slot for slot in self.users if slot not in self.worth)
        for slot in data.draw(st.lists(st.sampled_from(loading), unique=True, min_size=1)):
            self.worth[slot] = data.draw(self.draw_worth)
            self.arena.owner[slot], self.arena.place[slot], self.arena.worth[slot] = 1, slot, self.worth[slot]

    @precondition(lambda self: self.worth)
    @rule(data=st.data())
    def use(self, data: st.DataObject) -> None:
        slots = data.draw(st.lists(st.sampled_from(sorted(self.worth)), unique=True))
        self.arena.users[slots] += 1
        for slot in slots:
            self.users[slot] = self.users.get(slot, 0) + 1

    @precondition(lambda self: self.users)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        slots = sorted(data.draw(st.sets(st.sampled_from(sorted(self.users)), min_size=1)))
        self.arena.release(places(*slots))
        for slot in slots:
            self.users[slot] -= 1
            if not self.users[slot]:
                del self.users[slot]
                if slot not in self.worth:
                    self.free.add(slot)

    @precondition(lambda self: self.worth)
    @rule(data=st.data())
    def judge(self, data: st.DataObject) -> None:
        slots = sorted(data.draw(st.sets(st.sampled_from(sorted(self.worth)), min_size=1)))
        worth = data.draw(st.lists(self.draw_worth, min_size=len(slots), max_size=len(slots)))
        self.arena.set_worth(places(*slots), np.array(worth))
        self.worth.update(zip(slots, worth, strict=True))

    @rule(count=st.integers(0, 12), evict=st.booleans())
    def lowest(self, count: int, evict: bool) -> None:
        victims = self.arena.lowest(count)
        order = sorted((worth, slot) for slot, worth in self.worth.items() if slot not in self.users)
        assert victims.tolist() == [slot for _, slot in order[:count]] == heap_victims(self.arena, count)
        if evict:
            self.arena.vacate(victims)
            self.free |= set(victims.tolist())
            for slot in victims.tolist():
                del self.worth[slot]

    @rule(worth=st.lists(draw_worth, min_size=1, max_size=4))
    def replace(self, worth: list[float]) -> None:
        """What a request does when memory is full, many times between two judgements."""
        self.lowest(len(worth), True)
        slots = self.arena.take(len(worth))
        self.free -= set(slots.tolist())
        self.keep_all(slots, worth[: len(slots)])

    @precondition(lambda self: any(slot in self.worth for slot in self.users))
    @rule(data=st.data())
    def forget_in_use(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(slot for slot in self.users if slot in self.worth)))
        self.arena.owner[slot] = 0
        del self.worth[slot]

    @rule(blocks=st.integers(0, 6))
    def return_blocks(self, blocks: int) -> None:
        size = self.arena.blocks.slots_per_block
        whole = {slot // size for slot in self.free if all(slot // size * size + i in self.free for i in range(size))}
        assert self.arena.return_blocks(blocks) == min(blocks, len(whole))
        self.free = set(self.arena._free)

    @invariant()
    def agrees(self) -> None:
        if hasattr(self, "arena"):
            check_arena(self.arena)
            assert set(self.arena._free) == self.free
            assert {slot: n for slot, n in enumerate(self.arena.users.tolist()) if n} == self.users
            assert self.arena.resident().tolist() == sorted(self.worth)
            assert self.arena.free_slots == len(self.free)


ArenaMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestArena = ArenaMachine.TestCase
