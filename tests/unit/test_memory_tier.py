"""One tier under a hard limit: nothing held past it, no slot with two owners, nobody's bytes taken while in use."""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from memory_helpers import ByImportance, FourPerBlock, check_tier, content_of, new_table, new_tier, pageable, places

from hf_contiguouskv.hardware.aligned_memory import PAGE
from hf_contiguouskv.memory import POLICIES, Buffer, Tier
from hf_contiguouskv.memory.blocks import Slots
from hf_contiguouskv.memory.entries import KeptKeys
from hf_contiguouskv.memory.history import Clock, SegmentTable

SIZES = [PAGE // 8, PAGE, 2 * PAGE, 3 * PAGE]
CHUNKS = 12
BOUNDS = [0, PAGE - 1, PAGE, 5 * PAGE, 16 * PAGE, 40 * PAGE + 100]
KINDS = {"pageable": pageable, "tensors": FourPerBlock}


class Loan:
    """Slots that a request has: what must be in them, until it gives them back."""

    def __init__(self, table: SegmentTable, wanted: Slots, slots: Slots, loading: bool) -> None:
        self.table, self.wanted, self.slots, self.loading = table, wanted, slots, loading

    def check(self, tier: Tier) -> None:
        size = self.table.slot_bytes
        expected = content_of(self.table.number, self.wanted, size)
        assert torch.equal(tier.blocks(size).select(self.slots), expected)


class TierMachine(RuleBasedStateMachine):
    """Requests, keys and buffers in random order, against lists of what is held by whom."""

    wanted = st.sets(st.integers(0, CHUNKS - 1), min_size=1).map(lambda chosen: places(*sorted(chosen)))

    @initialize(
        bound=st.sampled_from(BOUNDS),
        kind=st.sampled_from(sorted(KINDS)),
        policy=st.sampled_from([ByImportance, *POLICIES.values()]),
        sizes=st.lists(st.sampled_from(SIZES), min_size=1, max_size=4),
    )
    def begin(self, bound: int, kind: str, policy: type, sizes: list[int]) -> None:
        self.numbers = itertools.count(1)
        self.tables = [new_table(next(self.numbers), CHUNKS, size) for size in sizes]
        self.clock = Clock()
        self.tier = new_tier(bound, self.tables, policy(), KINDS[kind], self.clock)
        self.loans: list[Loan] = []
        self.buffers: list[tuple[Buffer, int]] = []
        self.held_keys: list[tuple[KeptKeys, int]] = []
        self.rented: list[tuple[torch.Tensor, int]] = []
        self.marks = itertools.cycle(range(1, 255))

    def a_table(self, data: st.DataObject) -> SegmentTable:
        return self.tables[data.draw(st.integers(0, len(self.tables) - 1))]

    @rule(data=st.data(), wanted=wanted)
    def load(self, data: st.DataObject, wanted: Slots) -> None:
        """Find what is there, and read the rest into slots, as far as there are any."""
        table = self.a_table(data)
        size = table.slot_bytes
        slots = self.tier.find(table, wanted)
        there = slots >= 0
        if there.any():
            self.loans.append(Loan(table, wanted[there], slots[there], loading=False))
        missing = wanted[~there]
        taken = self.tier.take(size, len(missing))
        in_use = {(loan.table.slot_bytes, slot) for loan in self.loans for slot in loan.slots.tolist()}
        assert len(set(taken.tolist())) == len(taken) <= len(missing)
        assert not in_use & {(size, slot) for slot in taken.tolist()}
        if len(taken):
            loan = Loan(table, missing[: len(taken)], taken, loading=True)
            self.tier.blocks(size).write(taken, content_of(table.number, loan.wanted, size))
            self.loans.append(loan)

    @precondition(lambda self: self.loans)
    @rule(data=st.data(), keep=st.booleans())
    def give_slots_back(self, data: st.DataObject, keep: bool) -> None:
        loan = self.loans.pop(data.draw(st.integers(0, len(self.loans) - 1)))
        size, known = loan.table.slot_bytes, loan.table.slots_in("host")
        before = known[loan.wanted].copy()
        if loan.loading and keep:
            self.tier.keep(loan.table, loan.wanted, loan.slots, size)
            if loan.table in self.tables:
                assert known[loan.wanted].tolist() == np.where(before >= 0, before, loan.slots).tolist()
                fresh = loan.wanted[before < 0]
                worth = self.tier.policy.worth(loan.table.uses_on_arrival(fresh, self.clock, None))
                assert self.tier._arenas[size].worth[known[fresh]].tolist() == worth.tolist()
            else:
                assert (known == -1).all(), "what was forgotten is not kept"
        self.tier.release(loan.slots, size)

    @rule(data=st.data(), nbytes=st.integers(1, 6 * PAGE), must=st.booleans(), exact=st.booleans())
    def lease(self, data: st.DataObject, nbytes: int, must: bool, exact: bool) -> None:
        buffer = self.tier.lease(nbytes, must=must, exact=exact)
        if buffer is None:
            assert not must
            return
        assert buffer.counted in (0, len(buffer.data))
        assert must or buffer.counted
        assert len(buffer.data) == nbytes if exact else len(buffer.data) >= nbytes
        mark = next(self.marks)
        buffer.data.fill_(mark)
        self.buffers.append((buffer, mark))

    @precondition(lambda self: self.buffers)
    @rule(data=st.data(), as_keys=st.booleans(), name=st.sampled_from("abc"))
    def give_buffer_back(self, data: st.DataObject, as_keys: bool, name: str) -> None:
        buffer, mark = self.buffers.pop(data.draw(st.integers(0, len(self.buffers) - 1)))
        assert (buffer.data == mark).all()
        if as_keys:
            had, table = self.tier.has_keys(name), self.a_table(data)
            kept = self.tier.keep_keys(name, 0, buffer, table)
            assert (kept is not None) is (buffer.counted > 0 and not had)
            if kept is not None:
                assert kept.buffer is buffer
                self.held_keys.append((kept, mark))
                return
        self.tier.give_back(buffer)

    @rule(nbytes=st.integers(1, 5 * PAGE))
    def rent(self, nbytes: int) -> None:
        memory = self.tier.workspace(nbytes)
        if memory is not None:
            assert memory.shape == (nbytes,)
            mark = next(self.marks)
            memory.fill_(mark)
            self.rented.append((memory[nbytes // 2 :], mark))  # A part of it keeps all of it.

    @precondition(lambda self: self.rented)
    @rule(data=st.data())
    def end_of_rent(self, data: st.DataObject) -> None:
        del self.rented[data.draw(st.integers(0, len(self.rented) - 1))]

    @rule(name=st.sampled_from("abc"))
    def hold(self, name: str) -> None:
        found = self.tier.hold_keys(name)
        assert (found is not None) is self.tier.has_keys(name)
        if found is not None:
            self.held_keys.append((found, int(found.buffer.data[0])))

    @precondition(lambda self: self.held_keys)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        self.tier.let_go(self.held_keys.pop(data.draw(st.integers(0, len(self.held_keys) - 1)))[0])

    def keys_in_use(self) -> list[KeptKeys]:
        return list({id(keys): keys for keys, _ in self.held_keys}.values())

    @rule(data=st.data(), used=wanted, mass=st.integers(0, 4))
    def judge(self, data: st.DataObject, used: Slots, mass: int) -> None:
        table = self.a_table(data)
        table.begin_request(self.clock)
        table.count(used, self.clock)
        table.add_importance([0], int(used[0]), np.full(1, mass, dtype=np.float32))
        self.clock.tick()
        self.tier.judge(table)
        known = table.slots_in("host")
        resident = np.flatnonzero(known >= 0)
        if len(resident):
            worth = self.tier._arena_of(table).worth[known[resident]]
            assert worth.tolist() == self.tier.policy.worth(table.uses_of(resident)).tolist()

    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        """As `MemoryTiers` does: another table takes its place, requests keep what they have."""
        index = data.draw(st.integers(0, len(self.tables) - 1))
        table = self.tables[index]
        gone = {name for name, keys in self.tier._keys.items() if keys.table is table}
        self.tier.forget(table)
        assert (table.slots_in("host") == -1).all()
        assert table.resident == 0
        assert not any(self.tier.has_keys(name) for name in gone)
        del self.tier._tables[table.number]
        self.tables[index] = new_table(next(self.numbers), CHUNKS, table.slot_bytes)
        self.tier._tables[self.tables[index].number] = self.tables[index]

    @rule(data=st.data(), nbytes=st.integers(0, 20 * PAGE))
    def trim(self, data: st.DataObject, nbytes: int) -> None:
        self.tier.trim(self.a_table(data).slot_bytes, nbytes)

    @rule(nbytes=st.integers(0, 20 * PAGE))
    def make_room(self, nbytes: int) -> None:
        used = [0]
        arenas = self.tier._arenas.items()
        used += [
            len({s // a.blocks.slots_per_block for s in np.flatnonzero(a.users)}) * a.block_bytes for _, a in arenas
        ]
        used += [keys.buffer.counted for keys in self.keys_in_use()]
        used += [buffer.counted for buffer, _ in self.buffers]
        used += [len(memory.untyped_storage()) for memory, _ in self.rented]
        before = (self.tier.evicted, self.tier.held_bytes)
        if sum(used) + nbytes <= self.tier.max_bytes:
            assert self.tier.make_room(nbytes)
            assert self.tier.held_bytes + nbytes <= self.tier.max_bytes
        else:
            assert not self.tier.make_room(nbytes)
            assert (self.tier.evicted, self.tier.held_bytes) == before, "nothing goes in vain"

    @rule(data=st.data(), worth=st.lists(st.floats(0, 5), max_size=5).map(lambda worth: sorted(worth, reverse=True)))
    def would_keep(self, data: st.DataObject, worth: list[float]) -> None:
        before = (self.tier.held_bytes, self.tier.evicted)
        assert 0 <= self.tier.would_keep(np.array(worth), self.a_table(data).slot_bytes) <= len(worth)
        assert (self.tier.held_bytes, self.tier.evicted) == before, "asking changes nothing"

    @precondition(lambda self: not (self.loans or self.buffers or self.held_keys or self.rented))
    @rule()
    def forget_everything(self) -> None:
        for table in self.tables:
            self.tier.forget(table)
        assert self.tier.make_room(self.tier.max_bytes)
        assert self.tier.held_bytes == 0, "nothing is lost"

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "tier"):
            return
        forgotten = sum(keys.buffer.counted for keys in self.keys_in_use() if keys.gone)
        check_tier(self.tier, sum(buffer.counted for buffer, _ in self.buffers), forgotten)
        for loan in self.loans:
            loan.check(self.tier)
        for buffer, mark in self.buffers:
            assert (buffer.data == mark).all()
        rented = self.tier._workspace
        assert rented.held_bytes - rented.free_bytes == sum(len(m.untyped_storage()) for m, _ in self.rented)
        assert all((memory == mark).all() for memory, mark in self.rented)
        for keys, mark in self.held_keys:
            assert keys.gone is (self.tier._keys.get(keys.name) is not keys)
            assert (keys.buffer.data == mark).all()
        for table in self.tables:
            resident = np.flatnonzero(table.slots_in("host") >= 0)
            if len(resident):
                slots = table.slots_in("host")[resident]
                found = self.tier.blocks(table.slot_bytes).select(slots)
                assert torch.equal(found, content_of(table.number, resident, table.slot_bytes))


TierMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestTier = TierMachine.TestCase


# ---- several threads ----


class Crowd:
    """Threads that do what requests do, all to one tier; each checks the bytes that it was promised."""

    def __init__(self, tier: Tier, tables: list[SegmentTable], rounds: int) -> None:
        self.tier, self.tables, self.rounds = tier, tables, rounds
        self.stop = threading.Event()
        self.errors: list[BaseException] = []

    def run(self, threads: int) -> None:
        crowd = [threading.Thread(target=self.guarded, args=(self.request, seed)) for seed in range(threads)]
        watcher = threading.Thread(target=self.guarded, args=(self.watch, 0))
        for thread in (watcher, *crowd):
            thread.start()
        for thread in crowd:
            thread.join()
        self.stop.set()
        watcher.join()
        if self.errors:
            raise self.errors[0]

    def guarded(self, work, seed: int) -> None:  # type: ignore[no-untyped-def]
        try:
            work(np.random.default_rng(seed))
        except BaseException as error:
            self.errors.append(error)
            self.stop.set()

    def watch(self, rng: np.random.Generator) -> None:
        while not self.stop.wait(0.002):
            with self.tier._lock:
                check_tier(self.tier)

    def request(self, rng: np.random.Generator) -> None:
        for _ in range(self.rounds):
            if self.stop.is_set():
                return
            table = self.tables[rng.integers(len(self.tables))]
            step = rng.integers(10)
            if step < 6:
                self.load(rng, table)
            elif step < 8:
                self.use_keys(rng, table)
            elif step == 8:
                with self.tier._lock:
                    table.importance[:] = rng.integers(0, 9, len(table.importance))
                    self.tier.judge(table)
            else:
                self.tier.trim(table.slot_bytes, int(rng.integers(8 * PAGE)))
                if rng.integers(8) == 0:
                    self.tier.forget(table)

    def load(self, rng: np.random.Generator, table: SegmentTable) -> None:
        tier, size = self.tier, table.slot_bytes
        wanted = np.sort(rng.choice(table.chunks, rng.integers(1, 8), replace=False))
        slots = tier.find(table, wanted)
        there = slots >= 0
        taken = tier.take(size, int((~there).sum()))
        missing = wanted[~there][: len(taken)]
        if len(taken):
            tier.blocks(size).write(taken, content_of(table.number, missing, size))
        loans = [Loan(table, wanted[there], slots[there], False), Loan(table, missing, taken, True)]
        for loan in loans:
            if len(loan.slots):
                loan.check(tier)
                if loan.loading:
                    tier.keep(table, loan.wanted, loan.slots, size)
                    loan.check(tier)
                tier.release(loan.slots, size)

    def use_keys(self, rng: np.random.Generator, table: SegmentTable) -> None:
        name, mark = f"{table.number}/{rng.integers(3)}", table.number
        keys = self.tier.hold_keys(name)
        if keys is not None:
            assert (keys.buffer.data == mark).all()
            self.tier.let_go(keys)
            return
        buffer = self.tier.lease(int(rng.integers(1, 3)) * PAGE, exact=True)
        assert buffer is not None
        buffer.data.fill_(mark)
        keys = self.tier.keep_keys(name, 0, buffer, table)
        assert (buffer.data == mark).all()
        if keys is None:
            self.tier.give_back(buffer)
        else:
            self.tier.let_go(keys)


@pytest.fixture
def _eager_threads() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_eager_threads")
@pytest.mark.parametrize("kind", KINDS)
def test_threads_that_share_a_tier_get_their_own_bytes_and_keep_its_books(kind: str) -> None:
    tables = [new_table(number, CHUNKS, size) for number, size in enumerate([PAGE, PAGE, 2 * PAGE, PAGE // 8], 1)]
    tier = new_tier(24 * PAGE, tables, blocks=KINDS[kind])
    Crowd(tier, tables, rounds=400).run(threads=4)
    check_tier(tier, leased=0)
    assert tier.evicted > 0, "there was a need to choose"
    for arena in tier._arenas.values():
        assert not arena.users.any()
    for table in tables:
        tier.forget(table)
    assert tier.make_room(tier.max_bytes)
    assert tier.held_bytes == 0
