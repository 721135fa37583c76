"""Streams, events and the memory of an accelerator, on a fake one that records and delays (`fake_device.py`)."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from unit.device_log import HOST, Entry, Touch, races
from unit.fake_device import EARLY, LATE, SCHEDULES, Machine, Watch, install

from hf_contiguouskv.hardware.accelerator import StreamOrder
from hf_contiguouskv.memory import MemoryTiers, blocks
from hf_contiguouskv.memory.device_tier import DeviceTier, OrderedBlocks
from hf_contiguouskv.memory.history import SegmentTable
from hf_contiguouskv.memory.policies import AttentionGuided

CPU = torch.device("cpu")
SLOT = 4096


def slots(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


def rows(*values: int) -> torch.Tensor:
    return torch.stack([torch.full((SLOT,), value, dtype=torch.uint8) for value in values])


# ---- the checker ----

WRITE = Touch(0, 0, 16, True)
READ = Touch(0, 8, 24, False)


@pytest.mark.parametrize(
    ("log", "faults"),
    [
        ([Entry("copy in", "in", (WRITE,), event=0), Entry("compute", "a", (READ,))], 1),
        (
            [Entry("copy in", "in", (WRITE,), event=0), Entry("wait", "a", after=(0,)), Entry("compute", "a", (READ,))],
            0,
        ),
        (
            [Entry("copy in", "in", (WRITE,), event=0), Entry("wait", "b", after=(0,)), Entry("compute", "a", (READ,))],
            1,
        ),
        ([Entry("compute", "a", (READ,)), Entry("copy in", "in", (WRITE,), event=0)], 1),
        ([Entry("compute", "a", (READ,)), Entry("mark", "a", event=0), Entry("copy in", "in", (WRITE,), (0,), 1)], 0),
        ([Entry("mark", "a", event=0), Entry("compute", "a", (READ,)), Entry("copy in", "in", (WRITE,), (0,), 1)], 1),
        ([Entry("compute", "a", (READ,)), Entry("compute", "b", (READ,))], 0),
        ([Entry("compute", "a", (WRITE,)), Entry("compute", "b", (Touch(0, 16, 24, True),))], 0),
        ([Entry("copy in", "in", (READ,), event=0), Entry("host", HOST, (WRITE,))], 1),
        ([Entry("copy in", "in", (READ,), event=0), Entry("seen", HOST, after=(0,)), Entry("host", HOST, (WRITE,))], 0),
        ([Entry("host", HOST, (WRITE,)), Entry("copy in", "in", (READ,), event=0)], 0),
        ([Entry("mixed", HOST)], 1),
    ],
    ids=[
        "use without a wait",
        "use behind a wait",
        "another stream waited",
        "overwritten in use",
        "overwritten behind the use",
        "marked before the use",
        "two readers",
        "neighbours",
        "the host writes under a copy",
        "the host asked first",
        "the host writes first",
        "host and device in one operation",
    ],
)
def test_the_checker_finds_what_nothing_keeps_in_order(log: list[Entry], faults: int) -> None:
    assert len(races(log)) == faults


def test_the_fake_gives_poison_until_a_copy_was_waited_for() -> None:
    machine = Machine(LATE)
    device = machine.device_of(CPU)
    source, target = machine.pinned(8).fill_(7), device.empty(8, for_copies=True)
    copied = device.copy_in(source, target)
    assert not copied.query()
    assert target.view(torch.float32).isnan().all()
    device.wait(copied)
    assert target.tolist() == [7] * 8
    assert copied.query()
    with pytest.raises(AssertionError, match="the host waited"):
        copied.synchronize()


def test_the_fake_gives_freed_memory_out_again_unless_a_recorded_stream_still_uses_it() -> None:
    machine = Machine(LATE)
    device = machine.device_of(CPU)
    first = device.empty(8)
    address = first.data_ptr()
    del first
    second = device.empty(8)
    assert second.data_ptr() == address
    target = machine.pinned(8)
    device.copy_out(second, target)
    del second
    third = device.empty(8)
    assert third.data_ptr() != address
    machine.run_all()
    assert device.empty(8).data_ptr() == address
    machine.check()


# ---- StreamOrder ----


@pytest.fixture
def machine() -> Iterator[Machine]:
    """A machine that sees what this thread computes."""
    made = Machine(LATE)
    with Watch(made):
        yield made


def use(machine: Machine, order: StreamOrder, memory: torch.Tensor, stream: str, kind: str) -> None:
    with machine.on_stream(stream):
        if kind == "write":
            order.before_write()
            memory.fill_(1)
            order.after_write()
        else:
            order.before_read()
            memory.clone()
            order.after_read()


@pytest.mark.parametrize("seed", range(20))
def test_any_uses_by_any_streams_are_kept_in_order(machine: Machine, seed: int) -> None:
    device = machine.device_of(CPU)
    order, memory = StreamOrder(device), device.empty(64)
    random = np.random.default_rng(seed)
    use(machine, order, memory, "default", "write")  # Where it was allocated.
    for _ in range(30):
        use(machine, order, memory, f"stream {random.integers(4)}", random.choice(["read", "read", "write"]))
    machine.check()


def test_readers_do_not_wait_for_each_other_and_one_stream_waits_for_nothing(machine: Machine) -> None:
    device = machine.device_of(CPU)
    order, memory = StreamOrder(device), device.empty(64)
    for kind in ("write", "read", "write", "read"):
        use(machine, order, memory, "default", kind)
    assert not machine.copies("wait")
    use(machine, order, memory, "b", "read")
    use(machine, order, memory, "c", "read")
    assert [entry.agent for entry in machine.copies("wait")] == ["cpu/b", "cpu/c"]
    use(machine, order, memory, "d", "write")
    # The writer and three readers, of which the writer's stream is one.
    assert [entry.agent for entry in machine.copies("wait")][2:] == ["cpu/d"] * 4


# ---- OrderedBlocks ----


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_SMALLEST_PIECE", 2 * SLOT)


@pytest.fixture
def ordered(machine: Machine, small_pieces: None) -> OrderedBlocks:
    """Four blocks of two slots."""
    made = OrderedBlocks(SLOT, 8 * SLOT, machine.device_of(CPU))
    assert (made.slots_per_block, made.max_blocks) == (2, 4)
    for block in range(4):
        made.take(block)
    return made


@pytest.mark.parametrize("wanted", [(0,), (0, 1), (1, 2), (7, 0, 3), (4, 5), (5, 4)], ids=str)
def test_what_was_selected_stays_as_it_was(machine: Machine, ordered: OrderedBlocks, wanted: tuple[int, ...]) -> None:
    ordered.write(slots(*range(8)), rows(*range(8)))
    found = ordered.select(slots(*wanted))
    ordered.write(slots(*range(8)), rows(*range(100, 108)))
    assert found[:, 0].tolist() == list(wanted)
    assert ordered.select(slots(*wanted))[:, -1].tolist() == [100 + slot for slot in wanted]
    machine.check()


def test_slots_written_and_read_on_several_streams_are_kept_in_order(machine: Machine, ordered: OrderedBlocks) -> None:
    ordered.write(slots(0, 1, 2), rows(1, 2, 3))
    with machine.on_stream("reader"):
        found = ordered.select(slots(0, 2))
    with machine.on_stream("writer"):
        ordered.write(slots(0, 2), rows(8, 9))
    with machine.on_stream("reader"):
        assert ordered.select(slots(0, 2))[:, 0].tolist() == [8, 9]
    assert found[:, 0].tolist() == [1, 3]
    machine.check()


def test_memory_of_dropped_blocks_is_given_out_behind_its_last_use(machine: Machine, ordered: OrderedBlocks) -> None:
    ordered.write(slots(0, 1), rows(1, 2))
    with machine.on_stream("reader"):
        found = ordered.select(slots(0, 1))
    ordered.drop([0])
    other = machine.device_of(CPU).empty(2 * SLOT)
    other.fill_(9)
    assert found[:, 0].tolist() == [1, 2]
    machine.check()


def test_a_block_may_be_written_first_on_another_stream_than_it_was_allocated_for(
    machine: Machine, small_pieces: None
) -> None:
    device = machine.device_of(CPU)
    earlier = device.empty(2 * SLOT)
    earlier.fill_(1)
    del earlier  # Its memory is free for the stream that it was allocated for, behind what that stream does with it.
    fresh = OrderedBlocks(SLOT, 8 * SLOT, device)
    fresh.take(0)
    with machine.on_stream("other"):
        fresh.write(slots(0), rows(7))
    machine.check()


def test_a_read_between_the_halves_of_a_write_is_not_forgotten(machine: Machine, ordered: OrderedBlocks) -> None:
    """Two threads with their own streams: one reads slot 0 while the other is in the middle of writing slot 1."""
    ordered.write(slots(0, 1), rows(1, 2))
    inner, started = ordered._blocks.write, threading.Event()

    def reads() -> None:
        started.set()
        with Watch(machine), machine.on_stream("reader"):
            ordered.select(slots(0))

    def interrupted(where: np.ndarray, content: torch.Tensor) -> None:
        thread.start()
        started.wait()
        thread.join(0.5)  # With a lock, the reader goes on after the write.
        inner(where, content)

    thread = threading.Thread(target=reads)
    ordered._blocks.write = interrupted  # type: ignore[method-assign]
    with machine.on_stream("writer"):
        ordered.write(slots(1), rows(9))
    thread.join()
    ordered._blocks.write = inner  # type: ignore[method-assign]
    with machine.on_stream("writer"):
        ordered.write(slots(0), rows(8))  # The reader has released slot 0; its next user writes.
    assert not [fault for fault in races(machine.log) if "low=0" in fault]


# ---- DeviceTier: what it lets go moves to the host ----


class TwoTiers:
    """A device with room for `device` chunks, a host with room for `host`, and one segment of 16 chunks."""

    def __init__(self, machine: Machine, device: int, host: int) -> None:
        self.memory = MemoryTiers(host * SLOT, device * SLOT, AttentionGuided())
        found = self.memory.on(CPU)
        assert found is not None
        self.device: DeviceTier = found
        self.host = self.memory.host
        self.table = SegmentTable(1, "segment", 1, 16, SLOT)
        self.memory._tables[1] = self.table

    def judge(self, importance: dict[int, float]) -> None:
        for place, value in importance.items():
            self.table.importance[place] = value
        for tier in self.memory.tiers:
            tier.judge(self.table)

    def put(self, *places: int) -> None:
        """Load chunks into the device's slots; chunk `j` is full of `j`."""
        taken = self.device.take(SLOT, len(places))
        assert len(taken) == len(places)
        self.device.blocks(SLOT).write(taken, rows(*places))
        self.device.keep(self.table, slots(*places), taken, SLOT)
        self.device.release(taken, SLOT)

    def host_has(self, *places: int) -> None:
        taken = self.host.take(SLOT, len(places))
        assert len(taken) == len(places)
        self.host.blocks(SLOT).write(taken, rows(*places))
        self.host.keep(self.table, slots(*places), taken, SLOT)
        self.host.release(taken, SLOT)

    @property
    def on_host(self) -> dict[int, int]:
        """Chunks in the host's tier, and what is in their slots."""
        known = self.table.slots_in("host")
        return {
            int(place): int(self.host.blocks(SLOT).select(known[place : place + 1])[0, 0])
            for place in np.flatnonzero(known >= 0)
        }

    @property
    def on_device(self) -> set[int]:
        return set(np.flatnonzero(self.table.slots_in(self.device.name) >= 0).tolist())


@pytest.fixture(params=SCHEDULES, ids=str)
def busy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """A machine with every schedule, in place; slots are blocks of their own."""
    made = Machine(request.param)
    install(monkeypatch, made)
    monkeypatch.setattr(blocks, "_SMALLEST_PIECE", SLOT)
    with Watch(made):
        yield made
    made.check()


def test_victims_are_in_the_hosts_slots_after_a_drain_that_finds_their_copy_done(busy: Machine) -> None:
    two = TwoTiers(busy, device=4, host=12)
    two.put(0, 1, 2, 3)
    two.judge({0: 5, 1: 1, 2: 4, 3: 2})
    two.put(8, 9)
    assert two.on_device == {0, 2, 8, 9}
    if busy.schedule == LATE:
        two.device.drain()
        assert two.on_host == {}, "a copy that has not run was taken for done"
    while two.device._demotions:
        busy.run_all()
        two.device.drain()
    assert two.on_host == {1: 1, 3: 3}
    assert two.host._buffer_bytes == 0
    assert two.host.peak_bytes <= two.host.max_bytes


def test_slots_of_victims_may_be_written_before_their_copy_has_run(busy: Machine) -> None:
    two = TwoTiers(busy, device=2, host=12)
    for first in range(0, 8, 2):
        two.judge(dict.fromkeys(range(16), 1.0))
        two.put(first, first + 1)
    while two.device._demotions:
        busy.run_all()
        two.device.drain()
    assert all(place == content for place, content in two.on_host.items())
    assert set(two.on_host) <= set(range(6))
    assert len(two.on_host) >= 2


def test_what_the_host_has_already_is_not_copied_again(busy: Machine) -> None:
    two = TwoTiers(busy, device=2, host=12)
    two.host_has(0, 1)
    two.put(0, 1)
    two.put(2, 3)
    assert not busy.copies("copy out")


def test_without_a_host_tier_victims_are_dropped(busy: Machine) -> None:
    two = TwoTiers(busy, device=2, host=0)
    two.put(0, 1)
    two.put(2, 3)
    assert not busy.copies("copy out")
    assert two.on_device == {2, 3}


def settled(busy: Machine, two: TwoTiers) -> set[int]:
    while two.device._demotions:
        busy.run_all()
        two.device.drain()
    return set(two.on_host)


@pytest.mark.parametrize(("worth", "moved"), [(2.0, False), (3.0, False), (4.0, True)])
def test_a_victim_moves_only_if_it_outscores_the_hosts_least(busy: Machine, worth: float, moved: bool) -> None:
    two = TwoTiers(busy, device=2, host=4)
    two.host_has(4, 5, 6, 7)
    two.judge({0: worth, 1: 100, 4: 3, 5: 10, 6: 10, 7: 10})
    two.put(0, 1)
    two.judge({0: worth, 1: 100})
    two.put(2)
    assert two.on_device == {1, 2}
    assert (0 in settled(busy, two)) == moved


def test_victims_that_outscore_only_the_very_least_displace_nothing_better(busy: Machine) -> None:
    two = TwoTiers(busy, device=4, host=4)
    two.host_has(8, 9, 10, 11)
    two.judge({8: 1, 9: 10, 10: 10, 11: 10, 0: 2, 1: 2, 2: 2, 3: 50})
    two.put(0, 1, 2, 3)
    two.judge({0: 2, 1: 2, 2: 2, 3: 50})
    two.put(12, 13, 14)
    assert {9, 10, 11} <= settled(busy, two)


def test_chunks_of_a_segment_that_is_gone_arrive_nowhere(busy: Machine) -> None:
    two = TwoTiers(busy, device=2, host=12)
    two.put(0, 1)
    two.put(2, 3)
    for tier in two.memory.tiers:
        tier.forget(two.table)
    del two.memory._tables[1]
    assert settled(busy, two) == set()
    assert two.host._buffer_bytes == 0


def test_a_new_limit_makes_room_at_once(busy: Machine) -> None:
    two = TwoTiers(busy, device=8, host=12)
    two.put(0, 1, 2, 3, 4, 5)
    two.device.limit(2 * SLOT)
    assert two.device.held_bytes <= 2 * SLOT
    settled(busy, two)
    assert two.host.held_bytes <= two.host.max_bytes


@pytest.mark.parametrize("reused", ["host", "device"])
@pytest.mark.parametrize("schedule", [LATE, EARLY], ids=str)
def test_buffers_are_lent_again_only_when_copies_are_through_with_them(
    monkeypatch: pytest.MonkeyPatch, schedule: str, reused: str
) -> None:
    machine = Machine(schedule)
    install(monkeypatch, machine)
    two = TwoTiers(machine, device=64, host=64)
    tier = two.host if reused == "host" else two.device
    source, target = two.host.lease(SLOT), two.device.lease(SLOT)
    assert source is not None
    assert target is not None
    source.busy = target.busy = two.device.device.copy_in(source.data, target.data)
    for one, of in ((source, two.host), (target, two.device)):
        of.give_back(one)
    again = tier.lease(SLOT)
    assert again is not None
    # A stream can be made to wait for the buffer; the host takes another one.
    same = again is (source if reused == "host" else target)
    assert same == (reused == "device" or schedule == EARLY)
