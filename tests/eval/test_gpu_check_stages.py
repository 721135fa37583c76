"""Stages of the GPU check as processes: hangs and crashes cost no more than what they hit, and results stay whole."""

from __future__ import annotations

import json
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from eval.gpu_check import stages
from eval.gpu_check.results import BrokenDeviceError, Clock, Record, Results, marker_of, said
from eval.gpu_check.settings import Settings
from eval.gpu_check.stages import Runner

# What a stage's process is given, and how it says what it found.
BEGINNING = """
import os, signal, sys, time, faulthandler
from pathlib import Path
from eval.gpu_check.results import Clock, Record, Results
from eval.gpu_check.settings import Settings
stage, saved, until = sys.argv[1:]
settings = Settings.load(Path(saved))
results = Results(settings.out)
record = Record(results, stage, Clock(float(until)), settings.folder)
"""


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    for name in ("out", "folder"):
        (tmp_path / name).mkdir()
    return Settings.rehearsal(str(tmp_path / "out"), str(tmp_path / "folder"), scale=0.1)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "START_S", 1.5)
    monkeypatch.setattr(stages, "WORTH_ANOTHER_S", 0.1)


def runner(settings: Settings, program: str) -> Runner:
    script = Path(settings.folder) / "stage.py"
    script.write_text(BEGINNING + textwrap.dedent(program))
    return Runner(settings, Results(settings.out), (sys.executable, str(script)))


def read(settings: Settings) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(settings.out) / "gpu.json").read_text())
    return found["stages"]


def log(settings: Settings) -> str:
    return (Path(settings.out) / "log.txt").read_text()


def test_a_stage_that_hangs_is_killed_and_the_next_one_runs(settings):
    run = runner(
        settings,
        """
        record.step("quick", lambda: 1)
        if stage == "where":
            import subprocess
            faulthandler.register(signal.SIGUSR1)
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            results.stage(stage)["child"] = child.pid
            results.flush()
            record.attempt("endless", lambda: time.sleep(600), limit_s=600)
        """,
    )
    assert run.run("where")["status"] == "killed"
    assert run.run("tests")["status"] == "complete"
    found = read(settings)
    assert found["where"]["found"] == found["tests"]["found"] == {"quick": 1}
    assert found["where"]["killed_in"] == "endless"
    assert "its deadline is over" in log(settings)
    # Its last words: where it hung.
    assert "in attempt" in log(settings)
    # The processes that it started are gone as well.
    alive = Path(f"/proc/{found['where']['child']}/stat")
    assert not alive.exists() or alive.read_text().split()[2] == "Z"


@pytest.mark.parametrize(
    ("death", "code"), [("os.kill(os.getpid(), signal.SIGSEGV)", -11), ("os._exit(7)", 7)], ids=["signal", "exit"]
)
def test_a_stage_goes_on_behind_the_step_that_killed_its_process(settings, death, code):
    run = runner(
        settings,
        f"""
        record.step("first", lambda: 1)
        record.step("deadly", lambda: {death})
        record.step("last", lambda: 3)
        """,
    )
    own = run.run("time")
    assert own["status"] == "complete"
    assert own["found"] == {"first": 1, "last": 3}
    assert list(own["failed"]) == ["deadly"]
    assert own["deaths"] == [{"exit_code": code, "in": "deadly"}]


def test_a_step_that_hangs_ends_its_process_with_all_stacks(settings):
    run = runner(
        settings,
        """
        record.step("first", lambda: 1)
        record.step("slow", lambda: time.sleep(600), limit_s=0.3)
        record.step("last", lambda: 3)
        """,
    )
    own = run.run("time")
    assert own["status"] == "complete"
    assert own["found"] == {"first": 1, "last": 3}
    assert "slow" in own["failed"]
    assert "Timeout" in log(settings)


def test_a_stage_that_fails_by_itself_is_not_run_again(settings):
    run = runner(settings, "record.step('first', lambda: 1); sys.exit(1)")
    own = run.run("time")
    assert own["status"] == "failed"
    assert len(own["deaths"]) == 1
    assert own["found"] == {"first": 1}


def test_a_stage_that_dies_each_time_is_given_up(settings):
    run = runner(settings, "record.step(f'step {time.time()}', lambda: os._exit(9))")
    own = run.run("time")
    assert own["status"] == "failed"
    assert len(own["deaths"]) == stages.PROCESSES


def test_the_total_bounds_what_stages_take(settings, monkeypatch):
    monkeypatch.setattr("eval.gpu_check.settings.TOTAL_S", 3.0)
    run = runner(settings, "time.sleep(600 if stage != 'table' else 0)")
    found = [run.run(stage)["status"] for stage in ("where", "tests", "time", "table")]
    assert found[0] == "killed"
    assert found[2] == "no time"


def test_results_are_whole_whatever_is_written(tmp_path):
    results = Results(tmp_path)
    results.stage("time")["found"] = {"infinite": float("inf"), 7: {1, 2}, "path": tmp_path, "nan": float("nan")}
    results.flush()
    found = json.loads((tmp_path / "gpu.json").read_text(), parse_constant=pytest.fail)["stages"]["time"]["found"]
    assert found == {"infinite": "inf", "7": [1, 2], "path": str(tmp_path), "nan": "nan"}
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]
    again = Results(tmp_path)
    assert again.stage("time")["found"]["infinite"] == "inf"
    again.flush(pretty=True)
    assert (tmp_path / "gpu.json").read_text().count("\n") > 5


def test_a_step_that_fails_is_said_and_left_behind(tmp_path, capsys):
    results = Results(tmp_path)
    record = Record(results, "where", Clock(time.time() + 60), tmp_path)
    assert record.step("bad", lambda: 1 / 0) is None
    assert record.step("bad", lambda: pytest.fail("again")) is None
    assert record.step("good", lambda: 2) == 2
    assert record.step("good", lambda: pytest.fail("again")) == 2
    assert "ZeroDivisionError" in record.failed["bad"]
    assert "test_gpu_check_stages.py" in record.failed["bad"]
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert not marker_of(tmp_path, "where").exists()
    assert json.loads((tmp_path / "gpu.json").read_text())["stages"]["where"]["found"] == {"good": 2}


def test_a_device_that_is_broken_needs_a_new_process(tmp_path):
    def dead() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    record = Record(Results(tmp_path), "time", Clock(time.time() + 60), tmp_path, dead)
    assert record.step("good", lambda: 1) == 1
    with pytest.raises(BrokenDeviceError, match="illegal memory access"):
        record.step("bad", lambda: 1 / 0)
    later = Record(Results(tmp_path), "time", Clock(time.time() + 60), tmp_path)
    assert list(later.failed) == ["bad"]


def test_clocks_share_what_is_left():
    clock = Clock(time.time() + 100)
    assert 99 < clock.left <= 100
    assert 24 < clock.share(0.25).left <= 25
    assert Clock(time.time() - 5).share(0.5).left <= 0


def test_settings_survive_their_file(tmp_path):
    for one in (Settings(str(tmp_path), "f"), Settings.rehearsal(str(tmp_path), "f", scale=0.5)):
        one.save(tmp_path / "settings.json")
        assert Settings.load(tmp_path / "settings.json") == one
    assert one.deadline("time") == 135


def test_errors_are_said_with_their_place():
    with pytest.raises(ValueError, match="xxx") as caught:
        raise ValueError("x" * 2000)
    assert len(said(caught.value)) < 800
    assert "(test_gpu_check_stages.py:" in said(caught.value)
