"""The measuring helpers: what they call cold is cold, and what they call a median is one."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from eval.timing import (
    drop_page_cache,
    interleave,
    machine,
    median_spread,
    resident_pages,
    time_to_first_token,
)
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
