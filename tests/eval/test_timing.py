"""The measuring helpers: what they call cold is cold, and what they call a median is one."""

import gc
import os
import subprocess
import weakref
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eval import timing
from eval.running import timed as timed_module
from eval.running.stamp import commit, instruction_sets, probe_disk, same_commit, stamp
from eval.running.timed import timed_request
from eval.systems import State
from eval.tasks import Request
from eval.timing import (
    bytes_to_ready,
    drop_page_cache,
    interleave,
    machine,
    median_spread,
    ready_memory,
    resident_pages,
    time_to_first_token,
)
from hf_contiguouskv import RequestStats
from hf_contiguouskv.model.transformers_internals import cache_argument

PAGE = os.sysconf("SC_PAGE_SIZE")


def test_pages_that_were_just_read_are_resident(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(64 * PAGE))
    path.read_bytes()
    assert resident_pages(path) == 64


def test_a_last_partial_page_counts(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * (PAGE + 1))
    assert resident_pages(path) == 2


def test_an_empty_file_has_no_pages(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    assert resident_pages(path) == 0


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        resident_pages(tmp_path / "missing")


def test_dropping_makes_files_cold_and_keeps_their_bytes() -> None:
    # Not in tmp_path: on tmpfs, files are nothing but page cache, and dropping cannot empty it.
    path = Path(__file__).with_name(f".cold-{os.getpid()}")
    content = os.urandom(64 * PAGE)
    try:
        path.write_bytes(content)
        drop_page_cache([path])
        if resident_pages(path) == 64:
            pytest.skip("this file system keeps its pages whatever it is advised")
        assert resident_pages(path) == 0
        assert path.read_bytes() == content
        assert resident_pages(path) == 64
    finally:
        path.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("values", "median", "low", "high"),
    [
        ([3.0], 3.0, 3.0, 3.0),
        ([3.0, 1.0, 2.0], 2.0, 1.0, 3.0),
        ([5.0, 1.0, 2.0, 3.0, 4.0], 3.0, 2.0, 4.0),
    ],
)
def test_median_spread(values: list[float], median: float, low: float, high: float) -> None:
    spread = median_spread(values)
    assert (spread.median, spread.low, spread.high, spread.count) == (median, low, high, len(values))


def test_a_median_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one value"):
        median_spread([])


def test_interleave_runs_every_system_once_per_round_and_repeats_for_a_seed() -> None:
    order = list(interleave(["a", "b", "c"], rounds=20, seed=1))
    assert order == list(interleave(["a", "b", "c"], rounds=20, seed=1))
    rounds = [tuple(name for number, name in order if number == each) for each in range(20)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len(set(rounds)) > 1


def test_machine_names_what_the_numbers_depend_on() -> None:
    facts = machine()
    assert facts["cores"] >= 1
    assert facts["memory_gib"] > 0
    assert facts["torch"] == torch.__version__
    assert facts["cpu"]


def test_the_timer_includes_building_the_cache() -> None:
    events = []

    def generate(ids: torch.Tensor, **arguments: object) -> torch.Tensor:
        events.append(("generate", arguments.pop(cache_argument()), arguments))
        return torch.cat([ids, torch.tensor([[7]])], dim=1)

    def make_cache() -> str:
        events.append("make_cache")
        return "cache"

    model = SimpleNamespace(device=torch.device("cpu"), generate=generate)
    seconds, first, cache = time_to_first_token(model, torch.tensor([[1, 2]]), make_cache)
    assert first == 7
    assert cache == "cache"
    assert seconds > 0
    assert events == ["make_cache", ("generate", "cache", {"max_new_tokens": 1, "do_sample": False})]


class Waiting:
    """A system that looks for garbage collections while it makes a cache."""

    def __init__(self, departs: bool = False, garbage: weakref.ref[Any] | None = None) -> None:
        self.enabled: list[bool] = []
        self.garbage = garbage
        self.is_collected: bool | None = None
        self.entered: list[State] = []
        self._departs = departs

    def enter(self, state: State, prefix_ids: torch.Tensor, suffix_ids: torch.Tensor) -> None:
        self.entered.append(state)

    def files(self) -> list[Path]:
        return []

    def cache(self, prefix_ids: torch.Tensor) -> str:
        self.enabled.append(gc.isenabled())
        self.is_collected = self.garbage is not None and self.garbage() is None
        return "cache"

    def timeline(self, cache: str) -> None:
        return None

    def finish(self, cache: str) -> RequestStats:
        return RequestStats(hits={"host": 1, "disk": 0, "device": 0} if self._departs else {})

    def details(self) -> dict[str, int]:
        return {"told": 3}


class Ring:
    """Garbage that only a collection frees."""

    def __init__(self) -> None:
        self.itself = self


class Echo:
    """A model that answers at once."""

    device = torch.device("cpu")

    def __init__(self, fails: bool = False) -> None:
        self._fails = fails

    def generate(self, ids: torch.Tensor, **_: object) -> torch.Tensor:
        if self._fails:
            raise RuntimeError("out of memory")
        return torch.cat([ids, torch.tensor([[7]])], dim=1)


REQUEST = Request("task", 0, torch.arange(4), 0, torch.arange(2), ("a",))


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_is_collected_before_a_request_and_not_in_it(enabled: bool, fails: bool) -> None:
    system = Waiting(garbage=weakref.ref(Ring()))
    (gc.enable if enabled else gc.disable)()
    try:
        with (
            pytest.raises(RuntimeError, match="out of memory") if fails else nullcontext(),
            timed_request(Echo(fails), system, REQUEST, State.OPEN),
        ):
            assert gc.isenabled() is enabled
        assert gc.isenabled() is enabled
    finally:
        gc.enable()
    assert (system.enabled, system.is_collected, system.entered) == ([False], True, [State.OPEN])


def test_memory_is_made_ready_after_the_state_and_before_the_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[object] = []

    class Noted(Waiting):
        def enter(self, *arguments: Any) -> None:
            events.append("state")

        def cache(self, prefix_ids: torch.Tensor) -> str:
            events.append("cache")
            return "cache"

    def timer(model: Any, ids: torch.Tensor, make_cache: Any) -> tuple[float, int, Any]:
        events.append("timer")
        return 0.5, 7, make_cache()

    monkeypatch.setattr(timed_module, "ready_memory", events.append)
    monkeypatch.setattr(timed_module, "time_to_first_token", timer)
    with timed_request(Echo(), Noted(), REQUEST, State.OPEN, 12) as timed:
        assert timed.seconds == 0.5
    assert events == ["state", 12, "timer", "cache"]


def test_ready_memory_is_written_and_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[torch.Tensor]] = []
    written: list[int] = []

    class Octets(torch.Tensor):
        def fill_(self, value: int) -> torch.Tensor:
            written.append(len(self))
            return super().fill_(value)

    def buffer(nbytes: int) -> torch.Tensor:
        found = torch.empty(nbytes, dtype=torch.uint8).as_subclass(Octets)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(timing, "aligned_buffer", buffer)
    ready_memory(10_000)
    ready_memory(0)
    assert written == [10_000]
    assert [one() for one in made] == [None]
    # Never more than half of what is free: a prefix of a large model may be as large as the memory.
    monkeypatch.setattr(os, "sysconf", {"SC_AVPHYS_PAGES": 3, "SC_PAGE_SIZE": 4096}.__getitem__)
    ready_memory(10**12)
    assert written[1:] == [3 * 4096 // 2]
    monkeypatch.setattr(os, "sysconf", {"SC_AVPHYS_PAGES": 0, "SC_PAGE_SIZE": 4096}.__getitem__)
    ready_memory(10**12)
    assert len(written) == 2
    # More than K and V of the prefix and a copy of them, at any length.
    assert bytes_to_ready(0) > 0
    assert bytes_to_ready(10**9) > 2 * 10**9


@pytest.mark.parametrize(
    ("state", "departure"),
    [(State.COLD, "cold: chunks came from {'host': 1} besides 0 from disk"), (State.WARM_HOST, None), (None, None)],
)
def test_a_request_says_whether_it_found_its_state(state: State | None, departure: str | None) -> None:
    system = Waiting(departs=True)
    with timed_request(Echo(), system, REQUEST, state) as timed:
        assert timed.cache == "cache"
        assert timed.first_token == 7
    assert timed.departure == departure
    assert timed.fields()["details"] == {"told": 3}
    assert system.entered == [state] * (state is not None)


# -- stamps ------------------------------------------------------------------------------------------------------------


def test_instruction_sets_are_those_of_the_processor(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor : 0\nflags\t: fpu sse2 fma avx2 avx512f amx_int8\n\nflags : amx_bf16\n")
    assert instruction_sets(cpuinfo) == ["avx2", "fma", "avx512f", "amx_int8"]
    cpuinfo.write_text("processor : 0\nFeatures : fp asimd asimddp bf16\n")
    assert instruction_sets(cpuinfo) == ["neon", "asimddp", "bf16"]
    assert isinstance(instruction_sets(tmp_path / "nothing"), list)


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_the_commit_is_that_of_the_checkout_and_tells_changes(tmp_path: Path) -> None:
    package = tmp_path / "eval"
    package.mkdir()
    (package / "code.py").write_text("1\n")
    assert commit(package) is None
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    revision = git(tmp_path, "rev-parse", "HEAD")
    assert commit(package) == revision
    (tmp_path / "results.md").write_text("no code\n")
    assert commit(package) == revision
    (package / "code.py").write_text("2\n")
    assert commit(package) == f"{revision}+changes"
    assert same_commit(f"{revision}+changes", revision)
    assert same_commit(None, None)
    assert not same_commit(None, revision)
    # A package that is installed somewhere inside another checkout has no commit.
    inner = tmp_path / "environment" / "eval"
    inner.mkdir(parents=True)
    assert commit(inner) is None


def test_a_stamp_has_the_machine_and_the_code() -> None:
    found = stamp()
    assert set(found) == {*machine(), "instruction_sets", "commit"}


def test_the_disk_is_probed_in_its_own_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speed = probe_disk(tmp_path, size=2**24)
    assert speed is None or speed > 0
    assert list(tmp_path.iterdir()) == []

    def refuse(*_: object) -> int:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr("eval.running.stamp.os.open", refuse)
    assert probe_disk(tmp_path) is None
