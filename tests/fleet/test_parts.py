"""Do the small parts keep their promises: merged ranges, sets of ranges, the breaker, the records?"""

from __future__ import annotations

import itertools
import threading
from pathlib import Path

import pytest
from clock import Clock
from hypothesis import given
from hypothesis import strategies as st

from hf_contiguouskv.store.directory import Directory
from hf_contiguouskv.store.fleet.breaker import FIRST_PAUSE_S, LONGEST_PAUSE_S, CircuitBreaker
from hf_contiguouskv.store.fleet.engine import EngineUnavailableError
from hf_contiguouskv.store.fleet.merging import join_ranges
from hf_contiguouskv.store.fleet.names import SharedSegment
from hf_contiguouskv.store.fleet.records import NAME, Records
from hf_contiguouskv.store.fleet.spans import Spans

_RANGES = st.lists(st.tuples(st.integers(0, 500), st.integers(1, 60)), max_size=20)


@given(ranges=_RANGES, most=st.integers(1, 100), waste=st.sampled_from([0.0, 0.1, 1.0]))
def test_joined_ranges_bring_every_byte(ranges: list[tuple[int, int]], most: int, waste: float) -> None:
    content = bytes(range(256)) * 3
    buffers = [bytearray(length) for _, length in ranges]
    joined = join_ranges(
        [(offset, memoryview(into)) for (offset, _), into in zip(ranges, buffers, strict=True)], waste=waste, most=most
    )
    for part in joined:
        assert 0 < part.end - part.begin <= most
        for offset, into in part.parts:
            assert part.begin <= offset <= offset + into.nbytes <= part.end
            into[:] = content[offset : offset + into.nbytes]
    for (offset, length), into in zip(ranges, buffers, strict=True):
        assert into == content[offset : offset + length]
    wanted = sum(length for _, length in ranges)
    assert sum(part.end - part.begin for part in joined) <= (1 + waste) * wanted


def test_neighbours_and_small_gaps_are_one_request() -> None:
    buffers = [memoryview(bytearray(1000)) for _ in range(4)]
    joined = join_ranges([(0, buffers[0]), (1000, buffers[1]), (2300, buffers[2]), (9000, buffers[3])])
    assert [(part.begin, part.end) for part in joined] == [(0, 3300), (9000, 10000)]


@given(ranges=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60))), asked=st.tuples(*[st.integers(0, 60)] * 2))
def test_spans_are_a_set_of_numbers(ranges: list[tuple[int, int]], asked: tuple[int, int]) -> None:
    spans, numbers = Spans(), set()
    for begin, end in ranges:
        spans.add(begin, end)
        numbers |= set(range(begin, end))
    assert spans.total == len(numbers)
    assert (asked in spans) == (set(range(*asked)) <= numbers)
    listed = list(spans)
    assert all(two[0] > one[1] for one, two in itertools.pairwise(listed))
    begin, end = min(asked), max(asked)
    assert spans.within(begin, end) == len(numbers & set(range(begin, end)))
    gap = set(range(*spans.first_gap(begin, end)))
    missing = set(range(begin, end)) - numbers
    assert gap <= missing
    assert bool(gap) == bool(missing)
    assert not missing or min(gap) == min(missing)


class TestBreaker:
    def breaker(self) -> tuple[CircuitBreaker, list[float]]:
        now = [100.0]
        return CircuitBreaker("place", 0.01, lambda: now[0]), now

    def test_calls_are_refused_after_a_failure_and_then_one_tries(self) -> None:
        breaker, now = self.breaker()
        breaker.enter()
        breaker.failed("no answer")
        assert breaker.is_open
        with pytest.raises(EngineUnavailableError, match="place did not answer"):
            breaker.enter()
        now[0] += FIRST_PAUSE_S
        assert not breaker.is_open
        breaker.enter()
        with pytest.raises(EngineUnavailableError):
            breaker.enter()
        breaker.succeeded()
        breaker.enter()
        breaker.enter()
        assert breaker.refused == 2

    def test_others_wait_for_the_one_that_tries(self) -> None:
        breaker, now = self.breaker()
        breaker._patience_s = 30.0
        for ends in (breaker.failed, breaker.succeeded):
            breaker.enter()
            if ends is breaker.failed:
                breaker.failed("no answer")
                now[0] += FIRST_PAUSE_S
                breaker.enter()
            outcome: list[str] = []

            def other(outcome: list[str] = outcome) -> None:
                try:
                    breaker.enter()
                    outcome.append("entered")
                except EngineUnavailableError:
                    outcome.append("refused")

            threads = [threading.Thread(target=other) for _ in range(4)]
            for thread in threads:
                thread.start()
            ends("no answer") if ends is breaker.failed else breaker.succeeded()
            for thread in threads:
                thread.join()
            assert outcome == ["refused" if ends is breaker.failed else "entered"] * 4
            now[0] += 100 * FIRST_PAUSE_S

    def test_pauses_grow_up_to_a_bound(self) -> None:
        breaker, now = self.breaker()
        pauses = []
        for _ in range(8):
            breaker.enter()
            breaker.failed("no answer")
            began = now[0]
            while breaker.is_open:
                now[0] += 1.0
            pauses.append(now[0] - began)
        assert pauses[:3] == [FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S]
        assert max(pauses) == pauses[-1] == LONGEST_PAUSE_S

    def test_failures_of_calls_that_were_under_way_count_once(self) -> None:
        breaker, now = self.breaker()
        for _ in range(5):
            breaker.enter()
        for _ in range(5):
            breaker.failed("no answer")
        assert breaker.opened == 1
        now[0] += FIRST_PAUSE_S
        breaker.enter()


class TestRecords:
    ONE = SharedSegment("a" * 32, "00000001", 0, 100, 4096)
    OTHER = SharedSegment("a" * 32, "00000002", 0, 100, 4096)

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Directory:
        return Directory.open(tmp_path)

    def test_what_is_noted_is_known_to_others(self, folder: Directory, clock: Clock) -> None:
        records, others = Records(folder), Records(folder)
        assert records.get(self.ONE.key) is None
        records.see([self.ONE], 12.5)
        records.keep(self.ONE.key, 7, [(0, 10), (20, 30)])
        seen = others.get(self.ONE.key)
        assert seen is not None
        assert (seen.segment, seen.modified, seen.stored) == (self.ONE, 12.5, 0)
        assert others.kept(self.ONE.key, 7) == [(0, 10), (20, 30)]
        assert others.kept(self.ONE.key, 8) == []
        records.keep(self.ONE.key, 7, [(5, 20), (2, 3)])
        assert others.kept(self.ONE.key, 7) == [(0, 30)]
        records.keep(self.ONE.key, 8, [(1, 2)])
        assert others.kept(self.ONE.key, 7) == []
        assert others.keys() == {self.ONE.key}
        records.set_stored(self.ONE.key, 20)
        assert records.get(self.ONE.key).stored == 20  # type: ignore[union-attr]
        assert records.forget(self.ONE.key)
        assert not records.forget(self.ONE.key)
        assert records.kept(self.ONE.key, 8) == []

    def test_bytes_of_another_upload_are_forgotten(self, folder: Directory) -> None:
        records = Records(folder)
        records.see([self.ONE], 1.0)
        records.keep(self.ONE.key, 7, [(0, 10)])
        records.see([self.ONE], 2.0)
        assert records.kept(self.ONE.key, 7) == [(0, 10)]
        records.see([self.OTHER], 3.0)
        assert records.kept(self.ONE.key, 7) == []
        assert records.get(self.ONE.key).segment == self.OTHER  # type: ignore[union-attr]

    def test_sent_and_refused(self, folder: Directory) -> None:
        records = Records(folder)
        records.note_sent("b")
        records.note_sent("b")
        records.refuse("c", "1")
        assert records.sent() == {"b"}
        assert records.is_refused("c", "1")
        assert not records.is_refused("c", "2")
        records.forget_sent(["b"])
        assert records.sent() == set()

    @pytest.mark.parametrize("content", [b"", b"nonsense" * 1000, b"SQLite format 3\0" + bytes(5000)])
    def test_a_damaged_file_is_begun_again(self, folder: Directory, content: bytes) -> None:
        Path(folder.name, NAME).write_bytes(content)
        Path(folder.name, NAME).chmod(0o600)
        records = Records(folder)
        records.see([self.ONE], 1.0)
        assert records.keys() == {self.ONE.key}

    def test_a_link_is_not_followed(self, folder: Directory, tmp_path: Path) -> None:
        outside = tmp_path / "outside"
        outside.write_bytes(b"of others")
        Path(folder.name, NAME).symlink_to(outside)
        records = Records(folder)
        records.see([self.ONE], 1.0)
        assert records.keys() == {self.ONE.key}
        assert outside.read_bytes() == b"of others"
