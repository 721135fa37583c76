"""Memory that attention reads from: lent to one request after the other, never to two, within its share."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from memory_helpers import check_tier, load, new_table, new_tier, places

from hf_contiguouskv.hardware.aligned_memory import PAGE
from hf_contiguouskv.memory import MemoryTiers, Tier
from hf_contiguouskv.memory.lending import workspace_capacity

LIMIT = 64 * PAGE  # Of which attention's memory may be 8 pages.


def tier_of(limit: int = LIMIT) -> Tier:
    return new_tier(limit, [new_table(1)])


def address(memory: torch.Tensor | None) -> int:
    assert memory is not None
    return memory.untyped_storage().data_ptr()


@given(st.integers(1, 2**34))
def test_pieces_are_whole_pages_and_hardly_larger_than_what_is_asked_for(nbytes: int) -> None:
    capacity = workspace_capacity(nbytes)
    assert capacity % PAGE == 0
    assert nbytes <= capacity < nbytes + max(PAGE, nbytes // 4 + 1)
    assert workspace_capacity(capacity) == capacity


def test_the_next_request_gets_the_memory_of_the_last_one() -> None:
    tier = tier_of()
    first = tier.workspace(2 * PAGE)
    where = address(first)
    assert address(tier.workspace(2 * PAGE)) != where, "two requests at a time share nothing"
    del first
    assert address(tier.workspace(2 * PAGE - 100)) == where
    check_tier(tier)


def test_memory_is_in_use_for_as_long_as_any_view_of_it_is() -> None:
    tier = tier_of()
    view = tier.workspace(PAGE).view(torch.bfloat16).view(2, -1)[1]  # type: ignore[union-attr]
    where = address(view)
    assert address(tier.workspace(PAGE)) != where
    array = view.view(torch.int16).numpy()
    del view
    assert address(tier.workspace(PAGE)) != where
    view = torch.from_numpy(array).view(torch.bfloat16)
    del array
    copy = view.clone()
    del view
    assert address(copy) != where
    assert address(tier.workspace(PAGE)) == where


def test_it_counts_whether_it_is_lent_or_not_and_the_limit_holds() -> None:
    tier = tier_of()
    assert tier.workspace(9 * PAGE) is None, "more than its share"
    lent = [tier.workspace(2 * PAGE) for _ in range(5)]
    assert [memory is not None for memory in lent] == [True] * 4 + [False]
    assert tier.held_bytes == tier.bytes_by_use["buffers"] == 8 * PAGE
    lent.clear()
    assert tier.held_bytes == 8 * PAGE
    check_tier(tier)


def test_sizes_that_nobody_asks_for_any_more_make_way() -> None:
    tier = tier_of()
    lent = [tier.workspace(PAGE) for _ in range(8)]
    assert tier.workspace(4 * PAGE) is None, "all of it is in use"
    del lent[:4]
    assert tier.workspace(4 * PAGE) is not None
    assert tier.held_bytes == 8 * PAGE
    check_tier(tier)


def test_what_would_not_help_stays() -> None:
    tier = tier_of()
    lent = [tier.workspace(PAGE) for _ in range(8)]
    del lent[0]
    assert tier.workspace(4 * PAGE) is None
    assert tier.held_bytes == 8 * PAGE
    where = {address(memory) for memory in lent}
    assert address(tier.workspace(PAGE)) not in where


def test_the_size_that_was_not_asked_for_the_longest_goes_first() -> None:
    tier = tier_of()
    two, one = tier.workspace(2 * PAGE), tier.workspace(PAGE)
    where = address(two)
    del two, one
    again = tier.workspace(2 * PAGE)
    assert address(again) == where
    del again
    four = tier.workspace(6 * PAGE)
    assert four is not None
    assert tier._workspace.held_bytes == 8 * PAGE
    assert address(tier.workspace(2 * PAGE)) == where, "the single page made way"
    check_tier(tier)


def test_reads_get_it_when_there_is_nothing_else_to_let_go_of() -> None:
    table = new_table(1, chunks=64)
    tier = new_tier(LIMIT, [table])
    lent = [tier.workspace(PAGE) for _ in range(8)]
    assert load(tier, table, places(*range(64))) == 56
    lent.clear()
    tier.forget(table)
    assert len(tier.take(PAGE, 64)) == 64
    check_tier(tier)


class Failing:
    """Something that is called, and fails the given number of times."""

    def __init__(self, function, times: int) -> None:  # type: ignore[no-untyped-def]
        self.function, self.times = function, times

    def __call__(self, *arguments, **options):  # type: ignore[no-untyped-def]
        if self.times:
            self.times -= 1
            raise MemoryError("on purpose")
        return self.function(*arguments, **options)


@pytest.mark.parametrize("known", [False, True], ids=["a new piece", "a piece that came back"])
@pytest.mark.parametrize("broken", ["torch.from_numpy", "weakref.finalize"])
def test_a_failure_while_lending_loses_and_doubles_nothing(monkeypatch, known: bool, broken: str) -> None:
    tier = tier_of()
    if known:
        tier.workspace(PAGE)
    module, name = {"torch": torch, "weakref": weakref}[broken.split(".")[0]], broken.split(".")[1]
    failing = Failing(getattr(module, name), 0)
    monkeypatch.setattr(f"hf_contiguouskv.memory.lending.{broken}", failing)
    failing.times = 1
    with pytest.raises(MemoryError):
        tier.workspace(PAGE)
    monkeypatch.undo()
    gc.collect()
    rented = tier._workspace
    assert rented.held_bytes == rented.free_bytes == PAGE
    first, second = tier.workspace(PAGE), tier.workspace(PAGE)
    assert address(first) != address(second)
    check_tier(tier)


def test_chunks_that_are_worth_least_make_way_for_it_and_it_makes_way_when_there_is_nothing_else() -> None:
    table = new_table(1, chunks=64)
    tier = new_tier(LIMIT, [table])
    assert load(tier, table, places(*range(64))) == 64
    lent = tier.workspace(4 * PAGE)
    assert tier.evicted == 4
    check_tier(tier)
    assert not tier.make_room(LIMIT), "it is in use"
    assert tier.evicted == 4
    del lent
    assert tier.make_room(LIMIT)
    assert tier.held_bytes == 0


def test_a_closed_tier_keeps_nothing() -> None:
    tier = tier_of()
    lent = tier.workspace(PAGE)
    tier.close()
    assert tier.held_bytes == 0
    assert tier.workspace(PAGE) is None
    lent.fill_(7)  # type: ignore[union-attr]  # A request that is still running goes on.
    del lent
    assert tier.held_bytes == 0


def test_it_outlives_its_tier() -> None:
    lent = tier_of().workspace(PAGE)
    assert lent is not None
    lent.fill_(7)
    assert bool((lent == 7).all())
    del lent


def test_it_may_come_back_in_any_thread_and_while_somebody_holds_the_lock() -> None:
    tier = tier_of()
    box = [tier.workspace(PAGE)]
    where = address(box[0])
    with tier._lock:
        thread = threading.Thread(target=box.clear)
        thread.start()
        thread.join(10)
        assert not thread.is_alive()
    assert address(tier.workspace(PAGE)) == where


def test_many_threads_never_share_memory() -> None:
    tier = tier_of()
    errors: list[str] = []

    def work(mark: int) -> None:
        for turn in range(300):
            memory = tier.workspace(PAGE * (1 + turn % 2))
            if memory is not None:
                memory.fill_(mark)
                other = tier.workspace(PAGE)
                if other is not None:
                    other.fill_(mark)
                if not bool((memory == mark).all()):
                    errors.append(f"{mark} was overwritten")

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    check_tier(tier)


@pytest.mark.parametrize("inference", [False, True])
def test_it_is_ordinary_memory_in_inference_mode_too(inference: bool) -> None:
    tier = tier_of()
    for _ in range(2):  # New, and lent again.
        with torch.inference_mode(inference):
            memory = tier.workspace(PAGE)
        assert memory is not None
        assert not memory.is_inference()
        memory.add_(1)
        del memory


def test_where_there_are_accelerators_host_memory_is_not_kept_for_attention() -> None:
    memory = MemoryTiers(LIMIT, 0, "expected-use")
    assert memory.workspace(PAGE) is not None
    memory._pinned = True
    assert memory.workspace(PAGE) is None
    memory.host.drop_workspace()
    assert memory.host.held_bytes == 0
    memory.close()


def test_rooms_of_small_layers_are_lent_together_and_are_tensors_of_their_own() -> None:
    memory = MemoryTiers(2**26, 0, "expected-use")
    like = torch.zeros(1, 2, 1, 8)
    rooms = memory.for_attention(like, 3, 5, 4)
    assert [room.shape for room in rooms] == [(2, 3, 2, 5, 8)] * 4
    assert len({address(room) for room in rooms}) == 1
    for number, room in enumerate(rooms):
        room.fill_(number)
    assert [room.unique().tolist() for room in rooms] == [[0.0], [1.0], [2.0], [3.0]]
    before = rooms[1]._version
    rooms[0].add_(1)
    assert rooms[1]._version == before, "what one layer writes is no edit of another's memory"
    held = memory.host.held_bytes
    where = address(rooms[0])
    last = rooms[3]
    del rooms, room
    assert address(memory.for_attention(like, 3, 5, 4)[0]) != where, "one of them is in use"
    del last
    assert where in [address(memory.for_attention(like, 3, 5, 4)[0]) for _ in range(1)]
    assert memory.host.held_bytes == 2 * held - memory.host.table_bytes
    memory.close()


def test_large_rooms_are_lent_one_by_one() -> None:
    memory = MemoryTiers(2**28, 0, "expected-use")
    assert len(memory.for_attention(torch.zeros(1, 8, 1, 64), 1, 1024, 30)) == 1
    memory.close()
