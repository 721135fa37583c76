"""Does a look-up end by its one deadline, with what was found until then?"""

from __future__ import annotations

import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context

import numpy as np
import pytest
from clock import Clock
from machines import Machines, engine_of, found, found_tokens, is_right, remote
from store_helpers import some_tokens, write_prefix

from eval.network.proxy import Proxy
from hf_contiguouskv.store.fleet.breaker import FIRST_PAUSE_S, CircuitBreaker
from hf_contiguouskv.store.fleet.deadline import Deadline, seconds_left
from hf_contiguouskv.store.fleet.engine import DeadlineError, EngineUnavailableError, Fetched
from hf_contiguouskv.store.fleet.objects import ObjectStorage

IDS = some_tokens(1001)
LONGER = np.concatenate([IDS[:1000], some_tokens(500, seed=1)])


class TestDeadline:
    def test_it_counts_down_and_stops_at_zero(self, clock: Clock) -> None:
        deadline = Deadline(3.0, clock)
        clock.now += 2
        assert deadline.left_s == pytest.approx(1)
        assert not deadline.has_passed
        clock.now += 2
        assert deadline.left_s == 0
        assert deadline.has_passed

    def test_pauses_do_not_count(self, clock: Clock) -> None:
        deadline = Deadline(3.0, clock)
        with deadline.paused():
            clock.now += 100
        assert deadline.left_s == pytest.approx(3)

    def test_it_holds_inside_its_context_and_in_copies_of_it(self, clock: Clock) -> None:
        assert seconds_left() == math.inf
        with Deadline(3.0, clock).applied(), ThreadPoolExecutor(1) as threads:
            assert seconds_left() == pytest.approx(3)
            assert threads.submit(seconds_left).result() == math.inf
            assert threads.submit(copy_context().run, seconds_left).result() == pytest.approx(3)
        assert seconds_left() == math.inf


def test_a_look_up_that_waits_for_another_one_that_tries_has_its_own_patience() -> None:
    now = [0.0]
    breaker = CircuitBreaker("place", math.inf, lambda: now[0])
    breaker.failed("no answer")
    now[0] += FIRST_PAUSE_S
    breaker.enter()  # (It never ends.)
    with pytest.raises(EngineUnavailableError):
        breaker.enter(within_s=0.01)


def test_after_the_deadline_an_engine_is_not_asked(tmp_path: object) -> None:
    engine = ObjectStorage(f"file://{tmp_path}/x")
    engine.put("folder/a", b"there")
    with Deadline(0.0).applied():
        with pytest.raises(DeadlineError):
            engine.list_each(["folder/"], 10)
        with pytest.raises(DeadlineError):
            engine.read_ranges("folder/a", [(0, memoryview(bytearray(5)))])
    assert not engine.breaker.is_open
    assert len(engine.list_each(["folder/"], 10)[0]) == 1
    engine.close()


def test_answers_that_come_slowly_but_steadily_are_bounded_together(distant_machines: Machines, proxy: Proxy) -> None:
    write_prefix(distant_machines("one"), IDS)
    distant_machines("one").flush()
    hasty, patient = distant_machines("two", remote_timeout_s=2.0), distant_machines("three", remote_timeout_s=60.0)
    # Each answer comes in time; a look-up needs two of them at least.
    proxy.delay_s = 1.2
    assert found_tokens(hasty, IDS) == 0
    assert remote(hasty)["failures"] == 1
    assert found_tokens(patient, IDS) == len(IDS)
    # Look-ups of the hasty one pause now, and what it reads does not: the engine answers.
    assert not engine_of(hasty).breaker.is_open  # type: ignore[attr-defined]
    proxy.delay_s = 0.0
    asked = proxy.answered
    assert found_tokens(hasty, IDS) == 0
    assert proxy.answered == asked
    assert remote(hasty)["failures"] == 2


def test_what_was_found_until_the_deadline_is_used(folder_machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    one = folder_machines("one")
    write_prefix(one, IDS[:1000])
    late = write_prefix(one, LONGER, first_chunk=250).spans[-1].segment.key
    one.flush()
    two = folder_machines("two", remote_timeout_s=1.0)
    engine = engine_of(two)
    read_ranges, asked = engine.read_ranges, threading.Event()

    def slow(name: str, *more: object) -> Fetched:
        if late in name and not asked.is_set():
            asked.set()
            time.sleep(seconds_left())
            raise DeadlineError("it is over")
        return read_ranges(name, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(engine, "read_ranges", slow)
    stored = found(two, LONGER)
    assert asked.is_set()
    assert stored is not None
    assert stored.tokens == 1000
    assert is_right(two, stored, LONGER)
    assert "failures" not in remote(two)
    # That it was late is not held against it.
    stored = found(two, LONGER)
    assert stored is not None
    assert stored.tokens == 1500
    assert is_right(two, stored, LONGER)
