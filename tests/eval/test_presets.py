"""Presets fill in what a command leaves out; tasks for time alone, budgets in tokens, and the table after a run."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import report_rows
import torch
from test_running import label, rows_of
from tiny_model import save_tiny_model, tiny_tokenizer
from typer.testing import CliRunner, Result

from eval import running
from eval.__main__ import app
from eval.models import load_model
from eval.presets import PRESETS
from eval.report import RunError, write_report
from eval.running import NotServedError, RunConfig, run
from eval.running.folder import key_of
from eval.running.requests import asked_of
from eval.summary import print_summary
from eval.systems import Setting
from eval.tasks import TooFewRowsError, task_named
from eval.time_model.__main__ import main as time_model
from eval.time_model.validation import medians


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), context=1024)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[Any, Any]:
    return load_model(str(folder), dtype="float32")


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def as_text(result: Result) -> str:
    """What was printed, wherever its lines were broken, without the frame around errors."""
    return " ".join(result.output.replace("│", " ").split())


# -- tasks for time alone ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["text:200+8", "random:200+8"])
def test_requests_of_given_lengths_share_a_prefix(name: str) -> None:
    task, tokenizer = task_named(name), tiny_tokenizer()
    assert (task.name, task.metric) == (name, "")
    first, more, other = task.requests(tokenizer, 3), task.requests(tokenizer, 5), task.requests(tokenizer, 3, seed=1)
    for number, (one, two) in enumerate(zip(first, more, strict=False)):
        assert (one.key, one.prefix, one.answers) == (f"{name}/{number}", 0, ())
        assert (len(one.prefix_ids), len(one.suffix_ids)) == (200, 8)
        assert one.prefix_ids.dtype == one.suffix_ids.dtype == torch.int64
        assert torch.equal(one.prefix_ids, two.prefix_ids)
        assert torch.equal(one.suffix_ids, two.suffix_ids)
        assert one.computed is name.startswith("text:")
    assert len({tuple(one.suffix_ids.tolist()) for one in more}) == 5
    assert not torch.equal(first[0].prefix_ids, other[0].prefix_ids)


def test_text_goes_on_behind_its_prefix_and_ends() -> None:
    tokenizer = tiny_tokenizer()
    (one, two) = task_named("text:30+10").requests(tokenizer, 2)
    whole = task_named("text:49+1").requests(tokenizer, 1)[0].prefix_ids
    assert torch.cat([one.prefix_ids, one.suffix_ids, two.suffix_ids])[:49].tolist() == whole.tolist()
    with pytest.raises(TooFewRowsError, match="the built-in document has"):
        task_named("text:90000000+1").requests(tokenizer, 1)


@pytest.mark.parametrize("name", ["text:", "text:8128", "text:0+32", "text:8128+x", "random:8128+0", "random:8,192+1"])
def test_lengths_that_are_none_are_refused(name: str) -> None:
    kind = name.partition(":")[0]
    with pytest.raises(ValueError, match=rf"{kind}:.* must follow {kind}:, as in {kind}:8128\+32"):
        task_named(name)


# -- presets -----------------------------------------------------------------------------------------------------------


def test_presets_are_configurations_that_say_what_they_measure(tmp_path: Path) -> None:
    known = {field.name for field in fields(RunConfig)}
    listed = as_text(invoke("list"))
    told = as_text(invoke("run", "--help"))
    for name, preset in PRESETS.items():
        assert set(preset.fields) <= known
        assert RunConfig(**preset.fields).settings(8192)
        assert f"preset {name}: {preset.about}" in listed
        assert name in told
    assert "random:PREFIX+SUFFIX" in listed
    result = invoke("run", tmp_path / "run", "--preset", "bencj")
    assert (result.exit_code, "preset must be one of" in as_text(result)) == (2, True)


def test_options_change_a_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[RunConfig] = []
    monkeypatch.setattr(running, "run", lambda config, out, **_: found.append(config))
    out = tmp_path / "run"
    for arguments in (
        ["--preset", "growth"],
        ["--preset", "growth", "--task", "random:64+8", "--timed-requests", "5", "--model", "random:llama"],
        ["--preset", "growth", "--budget", "0.1"],
        ["--preset", "bench", "--kept-tokens", "64"],
        ["--kept-tokens", "64", "--task", "text:64+8"],
    ):
        result = invoke("run", out, *arguments)
        assert result.exit_code == 0, result.output
    growth, changed, shares, tokens, plain = found
    assert growth == RunConfig(**PRESETS["growth"].fields)
    assert (changed.tasks, changed.timed_requests, changed.model) == (("random:64+8",), 5, "random:llama")
    assert (changed.systems, changed.states) == (growth.systems, growth.states)
    assert (shares.budgets, shares.kept_tokens) == ((0.1,), None)
    assert tokens.budgets_for(640) == (0.1,)
    assert plain.budgets_for(128) == (0.5,)
    for arguments in (["--budget", "0.1", "--kept-tokens", "8"], ["--kept-tokens", "0"]):
        assert invoke("run", out, *arguments).exit_code == 2
    with pytest.raises(ValueError, match=r"for tasks of one length.*not for needle"):
        RunConfig(tasks=("text:64+8", "needle"), systems=("contiguouskv",), kept_tokens=8)
    with pytest.raises(ValueError, match="not for streams"):
        RunConfig(streams=("conversations",), systems=("contiguouskv",), kept_tokens=8)


def test_tokens_are_a_budget_for_each_length() -> None:
    config = RunConfig(tasks=("random:64+8",), systems=("impress@0.3", "contiguouskv", "no_prefix"), kept_tokens=64)
    assert config.settings(256) == [Setting("impress", 0.3), Setting("contiguouskv", 0.25), Setting("no_prefix", 1.0)]
    assert config.settings(32)[1] == Setting("contiguouskv", 1.0)


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory, loaded: tuple[Any, Any]) -> Path:
    """The preset `growth` on shorter prefixes, one of which is longer than the model's context."""
    changes = {"tasks": ("random:256+5", "random:2048+5"), "kept_tokens": 64, "timed_requests": 2}
    config = RunConfig(**PRESETS["growth"].fields | changes, dtype="float32")
    return run(config, tmp_path_factory.mktemp("grown"), progress=False, loaded=loaded)


def test_growth_uses_as_many_tokens_of_every_prefix(grown: Path) -> None:
    rows = rows_of(grown)
    assert len({key_of(row) for row in rows}) == len(rows) == 2 * 2 * 9
    # K and V of a token: 2 x 3 layers x 2 heads x 12 channels x 4 bytes.
    for row in rows:
        tokens = row["prefix_tokens"]
        assert row["task"] == f"random:{tokens}+5"
        assert (row["departure"], row["score"], row["kl"], row["metric"]) == (None, None, None, "")
        stats = row["stats"]
        if row["system"].startswith("contiguouskv"):
            assert row["budget"] == 64 / tokens
            assert stats["chunks_used"] == [4] * 3
            assert 0 < stats["bytes_read"] < row["prefix_bytes"]
        elif row["system"] in ("attentionstore", "reload"):
            assert stats["bytes_read"] >= row["prefix_bytes"] == tokens * 576
        else:
            assert (row["system"], row["state"], stats["bytes_read"]) == ("no_prefix", "cold", 0)
    config = json.loads((grown / "config.json").read_text())
    assert (config["budgets"], config["kept_tokens"]) == ([0.25, 0.03125], 64)
    assert config["skipped"] == [
        "reload is left out in the state keys_resident: its states are cold, warm_host",
        "attentionstore+overlap is left out in the state keys_resident: its states are cold, open, warm_host",
    ]


def test_a_report_and_the_model_of_time_take_such_a_run(
    grown: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write_report([grown], tmp_path / "report", against="no_prefix")[0].read_text()
    assert "no prefix (reference)" in text
    assert "random:2048+5" in text
    assert "3.125%" in text
    time_model(growth=grown)
    found = json.loads(capsys.readouterr().out)
    assert found["floor"]["seconds"]["count"] == 4
    rows = [(row["tokens"], row["system"], row["state"], row["seconds"]["count"]) for row in found["rows"]]
    systems = (
        ("attentionstore+overlap", "cold"),
        ("reload", "cold"),
        *((f"contiguouskv{one}", "cold") for one in ("", "_paper", "+compact")),
    )
    systems += tuple((f"contiguouskv{one}", "keys_resident") for one in ("", "_paper", "+compact"))
    assert sorted(rows) == sorted((tokens, *case, 2) for tokens in (256, 2048) for case in systems)


def test_the_table_after_a_run_has_the_figures_of_the_report(
    grown: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    print_summary(grown)
    shown = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if "│" in line]
    assert len(lines) == 2 * 9
    assert lines[0][:4] == ["random:256+5", "no prefix", "100%", "cold"]
    assert lines[0][6] == ""  # Over itself.
    for line in lines:
        assert float(line[5].split()[0]) > 0
        assert line[4] == "2"
    growing = {tuple(line[:4]): float(line[8]) for line in lines if line[8]}
    assert growing["random:2048+5", "AttentionStore +overlap", "100%", "cold"] == 1.2  # MB
    assert "x no prefix" in shown
    assert "speed-up over reload" in shown
    for name in ("config.json", "machine.json", "rows.jsonl"):
        content = (grown / name).read_text().splitlines(keepends=True)
        (tmp_path / name).write_text("".join(line for line in content if '"system": "reload"' not in line))
    print_summary(tmp_path)
    shown = capsys.readouterr().out
    assert "x no prefix" in shown
    assert "speed-up" not in shown


def test_nothing_is_said_of_a_run_without_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_summary(tmp_path)
    assert capsys.readouterr().out == ""
    with pytest.raises(RunError, match="has no row of no_prefix"):
        medians(report_rows.run_folder(tmp_path / "run", [report_rows.row(0, report_rows.OURS)]))


def test_text_is_computed_and_must_fit_the_model(tmp_path: Path, loaded: tuple[Any, Any]) -> None:
    config = RunConfig(tasks=("text:1020+8",), systems=("no_prefix",), dtype="float32", timed_requests=1)
    with pytest.raises(NotServedError, match=r"text:1020\+8 has a request of 1029 tokens .* takes 1024"):
        run(config, tmp_path / "run", progress=False, loaded=loaded)
    asked = asked_of(RunConfig(tasks=("text:20+8",), systems=("no_prefix",), timed_requests=3, first=2), loaded[1])
    assert [request.number for request, _ in asked.alone] == [2, 3, 4]


def test_bench_and_warm_begin_with_the_same_token_in_exact_systems(tmp_path: Path, loaded: tuple[Any, Any]) -> None:
    changes = {"tasks": ("text:300+8",), "timed_requests": 2, "dtype": "float32"}
    bench = rows_of(
        run(RunConfig(**PRESETS["bench"].fields | changes), tmp_path / "bench", progress=False, loaded=loaded)
    )
    assert {row["state"] for row in bench} == {"cold"}
    assert len(bench) == 2 * 8
    warm = rows_of(run(RunConfig(**PRESETS["warm"].fields | changes), tmp_path / "warm", progress=False, loaded=loaded))
    assert len(warm) == 2 * (2 + 2 * 3)
    for number in (0, 1):
        first = {(label(row), row["budget"]): row["first_token"] for row in (*bench, *warm) if row["number"] == number}
        whole = {token for (system, budget), token in first.items() if budget == 1.0 and system != "no_prefix"}
        assert len(whole) == 1, first
        for budget in (0.05, 0.25, 1.0):
            assert first["kept_tokens", budget] == first["contiguouskv", budget]
    for row in warm:
        assert row["departure"] is None
        assert row["stats"]["bytes_read"] == 0
        assert row["state"] == ("cold" if row["system"] == "no_prefix" else "warm_host")


def test_streams_have_the_floor_and_no_kept_tokens(tmp_path: Path, loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    config = RunConfig(
        streams=("shared_documents",),
        states=("warm_host",),
        systems=("no_prefix", "kept_tokens", "contiguouskv"),
        budgets=(0.25,),
        stream_requests=2,
        documents=1,
        judged_share=1.0,
        dtype="float32",
    )
    context = model.config.max_position_embeddings
    model.config.max_position_embeddings = 8192
    try:
        rows = rows_of(run(config, tmp_path, progress=False, loaded=(model, tokenizer)))
    finally:
        model.config.max_position_embeddings = context
    assert [(row["system"], row["score"] is None) for row in sorted(rows, key=lambda row: row["system"])] == [
        *[("contiguouskv", False)] * 2,
        *[("no_prefix", True)] * 2,
    ]
    skipped = json.loads((tmp_path / "config.json").read_text())["skipped"]
    assert skipped == ["kept_tokens is left out of streams: it holds what one request selects"]


def test_a_run_ends_with_its_table(tmp_path: Path, folder: Path) -> None:
    arguments = ["--preset", "needles", "--task", "text:64+8", "--timed-requests", 2, "--system", "reload"]
    arguments += ["--system", "no_prefix", "--model", folder, "--dtype", "float32"]
    result = invoke("run", tmp_path / "run", *arguments)
    assert result.exit_code == 0, result.output
    assert "x no prefix" in result.stdout
    assert "text:64+8" in result.stdout
