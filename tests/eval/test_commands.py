"""`contiguouskv bench`, which this package adds to the command, and `python -m eval.storing`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_model import save_tiny_model
from typer.testing import CliRunner, Result

import eval.models
import eval.running
import eval.storing
from eval.commands import bench_app
from eval.presets import PRESETS
from eval.running import RunConfig


def bench(*arguments: object) -> Result:
    return CliRunner().invoke(bench_app, [str(argument) for argument in arguments])


def test_bench_is_the_preset_in_the_dtype_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[RunConfig] = []
    monkeypatch.setattr(eval.running, "run", lambda config, *_, **__: found.append(config))
    assert bench().exit_code == bench("--dtype", "float32", "--requests", 2).exit_code == 0
    assert found[0] == RunConfig(**PRESETS["bench"].fields)
    assert (found[1].dtype, found[1].timed_requests) == ("float32", 2)


def test_bench_prints_its_table_and_writes_the_report(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    size = ["--prefix-tokens", 300, "--suffix-tokens", 8, "--requests", 2]
    result = bench("--model", model, *size, "--folder", tmp_path / "run", "--out", tmp_path / "report")
    assert result.exit_code == 0, result.output
    for text in ("text:300+8", "no prefix", "recompute", "ContiguousKV (published)", "speed-up over reload", "MB read"):
        assert text in result.stdout
    assert (tmp_path / "run" / "rows.jsonl").exists()
    assert "text:300+8" in (tmp_path / "report" / "report.md").read_text()


def test_lengths_that_cannot_be_are_one_line() -> None:
    result = bench("--suffix-tokens", 0)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "must follow text:" in result.stderr


def test_a_missing_model_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_model(name: str | None, **options: Any) -> None:
        raise eval.models.ModelNotAvailableError(f"no {name}\n- tried this\n- and that")

    monkeypatch.setattr(eval.models, "load_model", load_model)
    result = bench("--model", "nobody/nothing")
    assert result.exit_code == 2
    assert result.stderr.endswith("contiguouskv: no nobody/nothing - tried this - and that\n")


def test_storing_is_measured_beside_computing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny_model(tmp_path / "model")
    eval.storing.main(tokens=300, rounds=1, model_name=str(model), dtype="float32", folder=tmp_path)
    assert "float32 on cpu" in (said := capsys.readouterr().out)
    assert ": storing costs " in said
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
