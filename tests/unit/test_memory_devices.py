"""The tier of an accelerator above the host's: what moves down, what is counted, and what fails on the way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from memory_helpers import ByImportance, Joined, check_arena, content_of, fake_segment, here, load, places, usage

from hf_contiguouskv.hardware.aligned_memory import PAGE
from hf_contiguouskv.memory import MemoryTiers, blocks
from hf_contiguouskv.memory.device_tier import DeviceTier
from hf_contiguouskv.memory.history import SegmentTable
from hf_contiguouskv.memory.policies import EvictionPolicy


class Event:
    def __init__(self, happened: bool) -> None:
        self.happened = happened

    def query(self) -> bool:
        return self.happened


class PlainDevice:
    """A device in host memory, whose copies have ended as soon as they are asked for, or (`late`) when told."""

    name = "plain"

    def __init__(self) -> None:
        self.late = False
        self.copies: list[Event] = []

    def empty(self, nbytes: int, *, for_copies: bool = False) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def copy_in(self, source: torch.Tensor, target: torch.Tensor, after: Any = None) -> Event:
        target.copy_(source)
        return Event(True)

    def copy_out(self, source: torch.Tensor, target: torch.Tensor) -> Event:
        target.copy_(source)
        self.copies.append(Event(not self.late))
        return self.copies[-1]

    def wait(self, event: Any) -> None: ...

    def mark(self) -> Event:
        return Event(True)

    def uses(self, tensor: torch.Tensor) -> None: ...

    def stream(self) -> int:
        return 0


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one chunk, so that a few pages are many of them."""
    monkeypatch.setattr(blocks, "_SMALLEST_PIECE", PAGE)


class Machine:
    """A host and one accelerator, and segments in both."""

    def __init__(self, host_pages: int, device_pages: int, eviction: str | EvictionPolicy) -> None:
        self.memory = MemoryTiers(host_pages * PAGE, device_pages * PAGE, eviction)
        self.device = PlainDevice()
        self.tier = self.add("one", self.device)
        self.host = self.memory.host

    def add(self, name: str, device: PlainDevice) -> DeviceTier:
        index = {"one": 0, "two": 1}[name]
        return self.memory._add_device(torch.device("cuda", index), device)

    def table(self, key: str, chunks: int = 16) -> SegmentTable:
        table = self.memory.table(fake_segment(key, chunks=chunks))
        assert table is not None
        return table

    def load(self, table: SegmentTable, *wanted: int, worth: float | None = None) -> None:
        """Chunks come from disk onto the device, all of them."""
        if worth is not None:
            table.importance[list(wanted)] = worth
        slots = self.tier.take(PAGE, len(wanted))
        assert len(slots) == len(wanted)
        self.tier.blocks(PAGE).write(slots, content_of(table.number, places(*wanted), PAGE))
        self.tier.keep(table, places(*wanted), slots, PAGE)
        self.tier.release(slots, PAGE)

    def finish(self, table: SegmentTable, *used: int) -> None:
        self.memory.finished(usage(Joined(table), *used))
        self.memory.catch_up()

    def check(self) -> None:
        """Nobody uses anything, so no buffer is leased and no slot in use."""
        for tier in self.memory.tiers:
            assert 0 <= tier.held_bytes <= tier.peak_bytes <= tier.max_bytes
            assert (tier._buffer_bytes, tier._keys.held_bytes) == (0, 0)
            for arena in tier._arenas.values():
                check_arena(arena)
                assert not arena.users.any()


# ---- victims ----


def test_victims_arrive_on_the_host_with_their_bytes_once_their_copy_has_ended() -> None:
    machine = Machine(64, 16, ByImportance())
    table = machine.table("a", chunks=32)
    machine.load(table, *range(16), worth=1.0)
    machine.device.late = True
    machine.load(table, 16, 17, worth=2.0)
    machine.tier.drain()
    assert here(machine.host, table) == [], "the copy is under way"
    machine.device.copies[-1].happened = True
    machine.tier.drain()
    assert here(machine.host, table) == [0, 1]
    slots = machine.host.find(table, places(0, 1))
    assert torch.equal(machine.host.blocks(PAGE).select(slots), content_of(table.number, places(0, 1), PAGE))
    machine.host.release(slots, PAGE)
    assert table.resident == 18
    machine.check()


@pytest.mark.parametrize(("worth", "moves"), [(1.0, False), (3.0, True)])
@pytest.mark.parametrize(("pages", "slots"), [(33, 32), pytest.param(32, 30, id="a block that does not fit")])
def test_victims_move_only_if_they_outscore_the_least_of_the_host(
    pages: int, slots: int, worth: float, moves: bool
) -> None:
    """The host has blocks of two slots; its books take up less than a page."""
    machine = Machine(pages, 16, ByImportance())
    there, table = machine.table("a", chunks=32), machine.table("b", chunks=32)
    assert load(machine.host, there, np.arange(32), worth=[2.0] * 32) == slots
    machine.load(table, *range(16), worth=worth)
    machine.load(table, 16, worth=5.0)
    assert len(machine.device.copies) == int(moves)
    machine.tier.drain()
    assert here(machine.host, table) == ([0] if moves else [])
    machine.check()


@pytest.mark.parametrize("eviction", ["lru", "lfu", "expected-use"])
def test_a_victim_is_worth_on_the_host_what_it_was_worth_on_the_device(eviction: str) -> None:
    machine = Machine(64, 16, eviction)
    old, new = machine.table("a", chunks=16), machine.table("b", chunks=16)
    machine.load(old, *range(8))
    machine.finish(old, *range(8))
    machine.tier._arenas[PAGE].return_blocks(8)
    for _ in range(3):
        machine.load(new, *[place for place in range(10) if place not in here(machine.tier, new)])
        machine.finish(new, *range(10))
    moved = here(machine.host, old)
    assert moved
    worth = machine.host._arenas[PAGE].worth[old.slots_in("host")[moved]]
    assert worth.tolist() == machine.memory.policy.worth(old.uses_of(places(*moved))).tolist()


# ---- what fails ----


def fail_once(function: Callable[..., Any]) -> Callable[..., Any]:
    calls = 0

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError("a copy went wrong")
        return function(*args, **kwargs)

    return failing


def demoting(count: int) -> tuple[Machine, SegmentTable]:
    """So many moves to the host are under way, one chunk each, and their copies have ended."""
    machine = Machine(64, 16, ByImportance())
    table = machine.table("a", chunks=32)
    machine.load(table, *range(16), worth=1.0)
    for place in range(16, 16 + count):
        machine.load(table, place, worth=2.0)
    assert len(machine.tier._demotions) == count
    return machine, table


def drain(machine: Machine) -> None:
    """As often as it takes; an error is that of one move."""
    for _ in range(4):
        with contextlib.suppress(RuntimeError):
            machine.tier.drain()


@pytest.mark.parametrize("broken", ["take", "keep"])
def test_a_single_move_that_fails_gives_its_buffer_back(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    machine, _ = demoting(1)
    monkeypatch.setattr(machine.host, broken, fail_once(getattr(machine.host, broken)))
    drain(machine)
    assert machine.host._buffer_bytes == 0


def test_a_move_that_fails_gives_its_slots_back(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, _ = demoting(1)
    monkeypatch.setattr(machine.host, "keep", fail_once(machine.host.keep))
    drain(machine)
    machine.check()


def test_a_move_that_fails_does_not_take_the_others_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, table = demoting(3)
    monkeypatch.setattr(machine.host, "take", fail_once(machine.host.take))
    drain(machine)
    assert len(here(machine.host, table)) == 2
    machine.check()


def test_moves_under_way_go_with_their_segment_or_their_store() -> None:
    machine, table = demoting(2)
    machine.memory.forget(["a"])
    machine.tier.drain()
    assert table.resident == 0
    machine.check()
    machine, table = demoting(2)
    machine.memory.close()
    machine.tier.drain()
    assert machine.memory.bytes_by_tier == {"device": 0, "host": 0}


# ---- limits and books ----


def test_with_another_accelerator_each_gets_its_share() -> None:
    machine = Machine(64, 16, ByImportance())
    machine.load(machine.table("a"), *range(16), worth=1.0)
    other = machine.add("two", PlainDevice())
    assert (machine.tier.max_bytes, other.max_bytes) == (8 * PAGE, 8 * PAGE)
    assert machine.tier.held_bytes <= 8 * PAGE


def test_with_another_accelerator_what_is_in_use_goes_later_and_the_rest_at_once() -> None:
    machine = Machine(64, 16, ByImportance())
    table = machine.table("a", chunks=32)
    machine.load(table, *range(16), worth=1.0)
    held = machine.tier.find(table, np.arange(10))
    machine.add("two", PlainDevice())
    assert machine.tier.held_bytes == 10 * PAGE, "what nobody uses goes now"
    machine.tier.release(held, PAGE)
    machine.load(table, 16, worth=2.0)
    assert machine.tier.held_bytes <= 8 * PAGE


def test_tables_made_for_both_tiers_are_counted_and_given_back() -> None:
    machine = Machine(64, 16, "lru")
    table = machine.table("a")
    assert machine.host.table_bytes == table.nbytes == 16 * (4 * 4 + 8 + 2 * 8) + 2 * 4 * table.layers
    machine.load(table, 0)
    machine.memory.forget(["a"])
    assert machine.host.table_bytes == 0


@pytest.mark.parametrize("order", ["an accelerator that came later", "device_bytes=0"])
def test_books_are_counted_with_all_tiers_and_end_at_nothing(order: str) -> None:
    machine = Machine(64, 16 if "later" in order else 0, "lru")
    table = machine.table("a")
    tier = machine.add("two", PlainDevice()) if "later" in order else machine.tier
    tier.find(table, places(0))
    counted = machine.host.table_bytes
    machine.memory.forget(["a"])
    assert (counted, machine.host.table_bytes) == (table.nbytes, 0)


def test_after_close_there_are_no_new_tables_or_tiers_with_room() -> None:
    machine = Machine(64, 16, "lru")
    machine.memory.close()
    assert machine.memory.table(fake_segment("a")) is None
    assert machine.add("two", PlainDevice()).max_bytes == 0
