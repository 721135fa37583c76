"""Predictions stand beside what was measured; only named rows lend speeds; the page can be remade."""

from __future__ import annotations

import json
import lzma
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.plan_check import page
from eval.plan_check.measured import DATA, LENDER, RUNS, CheckedRun, check, speeds_of
from eval.plan_check.paper import LENGTHS, PaperRow, paper_rows
from eval.report import RunError
from eval.report.paper import SPEED_UPS
from eval.systems import State
from eval.time_model import totals
from eval.time_model.counting import load, method_named
from eval.time_model.machines import MACHINES
from eval.time_model.predict import predict
from eval.time_model.shapes import QWEN_7B
from hf_contiguouskv.model.configured_model import configured_model
from hf_contiguouskv.planning import chunk_choices, full_loads, token_choices
from hf_contiguouskv.planning.costs import Case
from hf_contiguouskv.planning.forecast import systems
from hf_contiguouskv.planning.machine import ACCELERATORS, Storage, machine_with

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "plan.md"


@pytest.fixture(scope="module")
def lender() -> CheckedRun:
    return check(DATA / LENDER)


@pytest.fixture(scope="module")
def paper() -> list[PaperRow]:
    return paper_rows()


def test_a_kept_run_is_predicted_within_a_factor_of_two(lender: CheckedRun) -> None:
    assert {one.setting.system for one in lender.settings} >= {"recompute", "reload", "contiguouskv"}
    for one in lender.settings:
        assert 0.5 < one.ratio < 2.0, one
        if one.bytes_ratio is not None:
            assert 0.85 < one.bytes_ratio < 1.15, one


def test_only_rows_that_gave_speeds_are_marked(lender: CheckedRun) -> None:
    assert [one.setting.system for one in lender.settings if one.known] == ["no_prefix", "recompute"]
    assert lender.speeds.source.startswith(f"{LENDER}: ")
    assert lender.host_source.startswith(f"{LENDER}: ")
    assert page.of_run(lender)[0].startswith(f"**{LENDER}**")


def test_speeds_are_what_the_longest_recomputed_prefix_took(tmp_path: Path) -> None:
    rows = [
        {"prefix_tokens": 1000, "suffix_tokens": 24, "ttft_s": 99.0, "phases": {"attention": 9.0}},
        {"prefix_tokens": 2024, "suffix_tokens": 24, "ttft_s": 3.0, "phases": {"attention": 1.0}},
    ]
    _write(tmp_path, rows)
    found = speeds_of(tmp_path)
    assert found is not None
    assert found.flops_s == pytest.approx(2 * 106_168_320 * 2048 / 2.0)
    assert found.attention_flops_s == pytest.approx(4 * 2048 * 2049 / 2 * 30 * 9 * 64 / 1.0)


def test_a_run_without_recompute_needs_a_lender(tmp_path: Path) -> None:
    _write(tmp_path, [{"system": "reload", "prefix_tokens": 2024, "suffix_tokens": 24, "ttft_s": 0.3}])
    with pytest.raises(RunError, match="speeds"):
        check(tmp_path)
    found = check(tmp_path, DATA / LENDER)
    assert found.speeds.source.startswith(LENDER)
    assert found.host_source.startswith(LENDER)
    assert not any(one.known for one in found.settings)


def _write(folder: Path, rows: list[dict[str, Any]]) -> None:
    common = {"task": "t", "number": 0, "prefix_key": "k", "system": "recompute", "budget": 1.0, "state": "cold"}
    lines = "".join(json.dumps(common | row) + "\n" for row in rows)
    (folder / "rows.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    config = {"model": "HuggingFaceTB/SmolLM2-135M-Instruct", "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "machine.json").write_text(json.dumps({"disk_gbps": 2.0}))


def test_the_paper_has_three_ratios_for_each_of_its_models(paper: list[PaperRow]) -> None:
    assert [row.paper for row in paper] == list(SPEED_UPS.values()) * 3
    for row in paper:
        assert set(row.well_read) == set(row.one_by_one) == set(LENGTHS)
        # A baseline that reads block after block is slower, and a longer prefix gains more.
        assert all(row.one_by_one[tokens] > row.well_read[tokens] for tokens in LENGTHS)
        assert row.well_read[LENGTHS[-1]] > row.well_read[LENGTHS[0]]


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("attentionstore", "attentionstore"),
        ("attentionstore+overlap", "attentionstore+overlap"),
        ("attentionstore_h2o", "attentionstore_h2o 5%"),
        ("contiguouskv_paper", "published 5%"),
        ("contiguouskv", "default 25%"),
        ("contiguouskv@1", "exact"),
    ],
)
@pytest.mark.parametrize(("machine", "card"), [(MACHINES[0], "a800"), (MACHINES[1], "h100")])
def test_it_agrees_with_the_replay_of_recorded_requests(name: str, method: str, machine: Any, card: str) -> None:
    """The model of time that replays every event of a request, on cards that nobody has measured."""
    model = configured_model(QWEN_7B.config(), torch.bfloat16)
    storage = Storage(machine.disk.bytes_s, machine.disk.latency_s)
    there = machine_with(ACCELERATORS[card], storage, torch.bfloat16)
    system = next(one for one in systems(overlap=False) if one.name == name)
    for tokens in (8192, 32_768):
        replayed = predict(load(), machine, QWEN_7B, method_named(method), State.OPEN, tokens).timing.ttft
        planned = system.timing(Case(model, there, tokens, 32)).ttft_s
        assert 0.8 < planned / replayed < 1.2, tokens


@pytest.mark.parametrize(
    ("work", "method", "state"),
    [
        (full_loads._BY_LAYERS, "attentionstore", State.OPEN),
        (full_loads._OVERLAPPED, "attentionstore+overlap", State.OPEN),
        (chunk_choices._EXACT, "exact", State.WARM_HOST),
        (chunk_choices._DEFAULT, "default 25%", State.WARM_HOST),
        (chunk_choices._PUBLISHED, "published 5%", State.WARM_HOST),
        (token_choices._H2O, "attentionstore_h2o 5%", State.WARM_HOST),
        (token_choices._IMPRESS, "impress 5%", State.WARM_HOST),
    ],
)
def test_what_the_host_does_is_what_was_counted(work: Any, method: str, state: State) -> None:
    counts = load()
    layer = totals.per_layer(counts.record(QWEN_7B.name, method, state), 32_768)
    cold = totals.before(counts.record(QWEN_7B.name, method, State.OPEN), 32_768)
    assert work.calls == pytest.approx(layer.calls, rel=0.1)
    assert work.operations == pytest.approx(layer.operations, rel=0.1)
    assert work.kernels == pytest.approx(layer.kernels, rel=0.1)
    assert work.before == pytest.approx(cold.calls, rel=0.1)


def test_the_page_can_be_remade(tmp_path: Path, lender: CheckedRun, paper: list[PaperRow]) -> None:
    copy = tmp_path / "plan.md"
    shutil.copy(PAGE, copy)
    page.rewrite(copy, [lender], paper)
    text = copy.read_text()
    before, after = PAGE.read_text().split(page.BEGIN)[0], PAGE.read_text().split(page.END)[1]
    assert text.startswith(before)
    assert text.endswith(after)
    assert page.summary([lender]) in text


def test_the_page_shows_the_kept_runs(paper: list[PaperRow]) -> None:
    text = PAGE.read_text()
    for name in RUNS:
        assert f"**{name}**" in text
    for row in paper:
        assert f"| {row.model} | {row.baseline} | {row.paper:.2f} |" in text


def test_the_command_compares_a_run(tmp_path: Path) -> None:
    _write(tmp_path, [{"prefix_tokens": 2024, "suffix_tokens": 24, "ttft_s": 3.0, "phases": {"attention": 1.0}}])
    done = subprocess.run(
        [sys.executable, "-m", "eval.plan_check", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "recompute" in done.stdout
    assert "Qwen2.5-14B" in done.stdout
