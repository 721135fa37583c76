"""A small run of the store's benchmark: the numbers are there, add up, and are checked while they are taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer import Typer
from typer.testing import CliRunner

from eval import store_bench
from eval.store_bench import accounting, checksums, lookups, publishing
from eval.store_fixtures import Sizes, fill, some_ids
from hf_contiguouskv import PrefixStore
from hf_contiguouskv.store.inner import StoreInner

SMALL = Sizes(segments=12, chunks=100, tokens=256, layers=2, parameters=200_000, rounds=2)


def spreads(found: Any) -> list[dict[str, float]]:
    """All medians with their quartiles, wherever they are."""
    if not isinstance(found, dict):
        return []
    if {"median", "low", "high"} <= set(found):
        return [found]
    return [spread for value in found.values() for spread in spreads(value)]


def test_the_large_store_is_what_it_says(tmp_path: Path) -> None:
    made = fill(tmp_path / "store", SMALL)
    assert made["segments"] == 12
    assert made["chunks"] >= 100
    with PrefixStore(tmp_path / "store") as store:
        assert len(store.entries()) == 12
        chained = store.inner.lookup(store_bench.MODEL, some_ids(256, 2), store_bench.CHUNK)
        assert chained is not None
        assert (chained.tokens, len(chained.spans)) == (256, 8)
        assert store.verify() == []


def test_look_ups_are_timed_and_their_answers_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "store", SMALL)
    found = lookups(tmp_path / "store", SMALL)
    assert len(found["prompts"]) == 4
    for parts in found["prompts"].values():
        assert parts["look_up_ms"]["count"] == 40
        assert parts["look_up_of_a_new_prompt_ms"]["median"] > parts["index_query_ms"]["median"] > 0
    figures = [parts[name]["median"] for parts in found["prompts"].values() for name in ("match_ms", "look_up_ms")]
    assert found["met"] == (max(figures) < 1)
    monkeypatch.setattr(StoreInner, "lookup", lambda *_: None)
    with pytest.raises(AssertionError, match="0 tokens are found, 256 are stored"):
        lookups(tmp_path / "store", SMALL)


def test_reads_are_cold_and_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = checksums(tmp_path / "store", SMALL)
    assert found["all chunks"]["bytes"] == 2 * 16 * 2 * 3 * 16 * 64 * 2
    assert found["10% of the chunks"]["bytes"] == 2 * 2 * 2 * 3 * 16 * 64 * 2
    assert found["all chunks"]["verified_ms"]["count"] == 4
    assert found["verify"]["bytes"] >= found["all chunks"]["bytes"]
    monkeypatch.setattr(store_bench, "drop_page_cache", lambda paths: [path.read_bytes() for path in paths])
    with pytest.raises(AssertionError, match="page cache"):
        checksums(tmp_path / "another", SMALL)


def test_what_is_taken_up_is_compared_with_what_the_system_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publishing(tmp_path / "store", SMALL)
    found = accounting({"one": tmp_path / "store"})
    assert found["stores"]["one"]["segments"] == 2 * 2 * 2
    assert abs(found["worst"]) < 0.01
    assert found["met"]
    monkeypatch.setattr(store_bench, "PrefixStore", _Boaster)
    assert not accounting({"one": tmp_path / "store"})["met"]


class _Boaster(PrefixStore):
    @property
    def stats(self) -> Any:
        stats = super().stats
        stats.disk_bytes = stats.disk_bytes * 102 // 100
        return stats


def test_the_command_line_measures_and_writes(tmp_path: Path) -> None:
    app = Typer()
    app.command()(store_bench.main)
    sizes = {"segments": 12, "chunks": 100, "tokens": 256, "layers": 2, "parameters": 200_000, "rounds": 1}
    options = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    result = CliRunner().invoke(app, ["--json", str(tmp_path / "out.json"), "--folder", str(tmp_path), *options])
    assert result.exit_code == 0, result.output
    numbers = json.loads((tmp_path / "out.json").read_text())
    assert {path.name for path in tmp_path.iterdir()} == {"out.json"}
    assert len(spreads(numbers)) >= 4 * 4 + 2 + 6 + 1 + 4 + 2
    assert all(0 <= spread["low"] <= spread["median"] <= spread["high"] for spread in spreads(numbers["look_up"]))
    assert numbers["opening"]["met"] == (numbers["opening"]["new_process_ms"]["median"] < 100)
    assert numbers["fingerprint"]["parameter_bytes"] > 10_000
    for text in ("share of checksums", "fingerprint, first", "disk_bytes against du", "< 1 ms"):
        assert text in result.output


def test_published_results_are_a_full_run() -> None:
    path = Path(__file__).parents[2] / "docs" / "results" / "store-bench.json"
    numbers = json.loads(path.read_text())
    assert numbers["large_store"]["segments"] == 10_000
    assert numbers["large_store"]["chunks"] >= 100_000
    assert numbers["look_up"]["prompt_tokens"] == 8192 + 32
    assert numbers["checksums"]["all chunks"]["bytes"] == 30 * 512 * 2 * 3 * 16 * 64 * 2
    assert numbers["fingerprint"]["parameter_bytes"] > 10**9
    for part in ("look_up", "opening", "fingerprint", "accounting"):
        assert isinstance(numbers[part]["met"], bool)
