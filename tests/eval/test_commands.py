"""`contiguouskv bench`, which this package adds to the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import eval.bench
import eval.models
from eval.commands import bench_app


def bench(*arguments: object) -> Result:
    return CliRunner().invoke(bench_app, [str(argument) for argument in arguments])


def test_bench_runs_in_the_dtype_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(eval.bench, "main", lambda *arguments: calls.append(arguments))
    assert bench().exit_code == bench("--dtype", "float32").exit_code == 0
    assert [call[-1] for call in calls] == ["auto", "float32"]


@pytest.mark.parametrize("as_json", [False, True])
def test_a_missing_model_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool) -> None:
    def load_model(name: str | None, dtype: str) -> None:
        raise eval.models.ModelNotAvailableError(f"no {name}\n- tried this\n- and that")

    monkeypatch.setattr(eval.models, "load_model", load_model)
    result = bench("--model", "nobody/nothing", *(["--json", tmp_path / "numbers.json"] if as_json else []))
    assert (result.exit_code, result.stderr) == (2, "contiguouskv: no nobody/nothing - tried this - and that\n")
    if as_json:
        assert json.loads(result.stdout)["error"]["type"] == "InputError"
