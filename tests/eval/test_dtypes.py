"""Models run in what is fast on this machine, say so, and runs in different dtypes do not get mixed."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_running import Animals, config_of, rows_of
from tiny_model import save_tiny_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from eval import dtypes
from eval.ablation.__main__ import app as ablation
from eval.ablation.table import as_markdown
from eval.dtypes import choose_dtype, fast_dtype
from eval.models import ModelNotAvailableError, load_model
from eval.report import RunError, write_report
from eval.running import RunConfig, RunFolderError, run
from eval.tasks import TASKS

SLOW, QUICK = 10.0, 2.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """What was measured is kept for the process: not from one test to the next."""
    dtypes._fast_on_processor.cache_clear()
    yield
    dtypes._fast_on_processor.cache_clear()


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, float], list[int]]:
    """Makes a processor whose products take so long in bfloat16 and float32; returns a list that grows by one with
    each measurement."""

    def make(bfloat16: float, float32: float) -> list[int]:
        dtypes._fast_on_processor.cache_clear()
        measured: list[int] = []

        def product_seconds(_: object) -> dict[torch.dtype, float]:
            measured.append(1)
            return {torch.bfloat16: bfloat16, torch.float32: float32}

        monkeypatch.setattr(dtypes, "_product_seconds", product_seconds)
        return measured

    return make


# -- choosing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bfloat16", "float32", "expected", "reason"),
    [
        (QUICK, SLOW, torch.bfloat16, "float32 takes 5.0 times as long"),
        (SLOW, QUICK, torch.float32, "bfloat16 takes 5.0 times as long"),
        (QUICK, QUICK, torch.bfloat16, "float32 takes 1.0 times as long"),
    ],
)
def test_the_faster_dtype_is_chosen_and_half_the_bytes_where_both_are(
    processor: Callable[..., list[int]], bfloat16: float, float32: float, expected: torch.dtype, reason: str
) -> None:
    measured = processor(bfloat16, float32)
    for asked in ("auto", "auto"):
        choice = choose_dtype(asked, "cpu")
        assert choice.dtype is expected
        assert reason in choice.reason
    assert choice == fast_dtype()
    assert len(measured) == 1


def test_what_is_asked_for_is_not_measured(processor: Callable[..., list[int]]) -> None:
    measured = processor(SLOW, QUICK)
    for name in ("bfloat16", "float16", "float32"):
        choice = choose_dtype(name)
        assert (choice.dtype, choice.name, choice.reason) == (getattr(torch, name), name, "as asked")
    assert measured == []


@pytest.mark.parametrize(("has_bfloat16", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_gpus_run_in_16_bits(
    processor: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch, has_bfloat16: bool, expected: torch.dtype
) -> None:
    measured = processor(SLOW, QUICK)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bfloat16)
    assert fast_dtype("cuda:0").dtype is expected
    assert measured == []


def test_the_real_measurement_leaves_threads_as_they_were() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        seconds = dtypes._product_seconds((torch.bfloat16, torch.float32))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert all(0 < one < float("inf") for one in seconds.values())


# -- loading -----------------------------------------------------------------------------------------------------------


def test_a_model_runs_in_what_is_fast_and_says_why(processor: Callable[..., list[int]], folder: Path) -> None:
    processor(SLOW, QUICK)
    model, _ = load_model(str(folder))
    assert model.dtype is torch.float32
    assert model.runs_in == "float32 on cpu (bfloat16 takes 5.0 times as long for a matrix product on this processor)"
    processor(QUICK, SLOW)
    assert load_model(str(folder))[0].dtype is torch.bfloat16
    assert load_model(str(folder), dtype="float16")[0].runs_in == "float16 on cpu (as asked)"
    assert load_model(str(folder), dtype=torch.float16)[0].dtype is torch.float16


@pytest.mark.parametrize("own", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("is_said", [True, False])
def test_its_own_dtype_is_what_from_pretrained_gives(
    processor: Callable[..., list[int]], tmp_path: Path, own: torch.dtype, is_said: bool
) -> None:
    measured = processor(QUICK, SLOW)
    folder = save_tiny_model(tmp_path)
    AutoModelForCausalLM.from_pretrained(folder).to(own).save_pretrained(folder)
    if not is_said:  # Then weights alone tell.
        config = json.loads((folder / "config.json").read_text())
        del config["dtype"]
        (folder / "config.json").write_text(json.dumps(config))
    model, _ = load_model(str(folder), dtype="own")
    assert model.dtype is own is AutoModelForCausalLM.from_pretrained(folder).dtype
    assert "configuration" in model.runs_in
    assert measured == []


def test_a_folder_of_no_known_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelNotAvailableError, match=str(tmp_path)):
        load_model(str(tmp_path))


# -- programs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "program",
    [
        "eval.__main__.run",
        "eval.storing.main",
        "eval.timeline.record",
        "eval.ablation.__main__.run",
        "eval.policies.__main__.record",
        "eval.commands.bench",
        "examples.demo.main",
        "examples.chat.main",
        "examples.batch_questions.main",
    ],
)
def test_every_program_with_a_model_takes_a_dtype(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "examples"))
    module, _, name = program.removeprefix("examples.").rpartition(".")
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    assert parameters["dtype"].default == "auto"


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch, folder: Path) -> RunConfig:
    monkeypatch.setitem(TASKS, "animals", lambda data_dir: Animals("animals"))
    systems = ("in_memory",)
    return config_of(model=str(folder), dtype="auto", tasks=("animals",), systems=systems, requests=1)


def of_dtype(config: RunConfig, dtype: str, **changes: Any) -> RunConfig:
    return RunConfig(**vars(config) | {"dtype": dtype} | changes)


def recorded(out: Path) -> str:
    found: str = json.loads((out / "config.json").read_text())["dtype"]
    return found


def test_a_run_records_what_it_ran_in_and_goes_on_in_that(
    processor: Callable[..., list[int]], config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    processor(SLOW, QUICK)
    run(config, tmp_path / "run")
    assert recorded(tmp_path / "run") == "float32"
    assert "runs in float32 on cpu (bfloat16 takes 5.0 times as long" in capsys.readouterr().err
    processor(QUICK, SLOW)  # The same machine, and something else kept it busy.
    run(of_dtype(config, "auto", systems=("in_memory", "contiguouskv@0.1")), tmp_path / "run")
    assert recorded(tmp_path / "run") == "float32"
    assert "as the run that is continued" in capsys.readouterr().err
    assert len(rows_of(tmp_path / "run")) == 2
    with pytest.raises(RunFolderError, match=r"dtype is .bfloat16', was 'float32'"):
        run(of_dtype(config, "bfloat16"), tmp_path / "run", progress=False)


def test_a_report_has_runs_of_one_dtype(config: RunConfig, tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        run(of_dtype(config, dtype), tmp_path / dtype, progress=False)
    with pytest.raises(RunError, match=r"dtype is .bfloat16. in bfloat16 and .float32. in float32"):
        write_report([tmp_path / "float32", tmp_path / "bfloat16"], tmp_path / "report")


def test_rows_of_an_ablation_have_one_dtype(config: RunConfig, tmp_path: Path) -> None:
    """Rows that do not say it are in bfloat16, as all were before they did."""
    old = tmp_path / "old.jsonl"
    row = {"task": "animals", "number": 0, "set": "full", "variant": "full", "score": 1.0, "kl": 0.0}
    old.write_text(json.dumps(row) + "\n")
    before = old.read_text()
    arguments = ["--set", "published", "--task", "animals", "--requests", "1", "--model", str(config.model)]
    refused = CliRunner().invoke(ablation, ["run", str(old), *arguments, "--dtype", "float32"])
    assert refused.exit_code == 2
    assert "bfloat16" in refused.output
    assert old.read_text() == before
    new = tmp_path / "new.jsonl"
    done = CliRunner().invoke(ablation, ["run", str(new), *arguments, "--dtype", "float32"])
    assert done.exit_code == 0, done.output
    assert "runs in float32 on cpu (as asked)" in done.output
    assert {json.loads(line)["dtype"] for line in new.read_text().splitlines()} == {"float32"}
    with pytest.raises(ValueError, match="bfloat16 and float32"):
        as_markdown([old, new])
