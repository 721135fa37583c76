"""The stage `tests` of the GPU check: tests that hang, die or break the device cost no more than themselves."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from eval.gpu_check import device_tests
from eval.gpu_check.device_tests import GROUPS, LOG, REHEARSED, Group, run_group
from eval.gpu_check.results import Clock
from eval.gpu_check.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.xdist_group("gpu_check")


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a group that is one file of tests."""
    for name in ("out", "folder"):
        (tmp_path / name).mkdir()
    settings = Settings.rehearsal(str(tmp_path / "out"), str(tmp_path / "folder"))
    monkeypatch.setattr(device_tests, "ROOT", tmp_path)
    monkeypatch.setattr(device_tests, "WORTH_A_PROCESS_S", 1.0)
    monkeypatch.setattr(device_tests, "HUNG_S", 1.0)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run(
        program: str, seconds: float = 60.0, files: tuple[str, ...] = ("test_some.py",), **more: Any
    ) -> dict[str, Any]:
        (tmp_path / "test_some.py").write_text(textwrap.dedent(program))
        return run_group(settings, Group("some", files, 1.0, **more), Clock(time.time() + seconds))

    return run


def test_tests_go_on_behind_one_that_hangs_and_one_that_dies(check: Any, tmp_path: Path) -> None:
    found = check(
        """
        import os, time, pytest
        def test_first(record_property): record_property("waits", 4)
        def test_hangs(): time.sleep(600)
        def test_second(): pass
        def test_dies(): os._exit(9)
        def test_fails(): assert 1 == 2
        def test_skipped(): pytest.skip("not here")
        """
    )
    assert found["counts"] == {"passed": 2, "failed": 1, "skipped": 1}
    assert [one["test"] for one in found["failures"]] == ["test_some.py::test_fails"]
    assert "assert 1 == 2" in found["failures"][0]["message"]
    assert sorted(found["not_ended"]) == ["test_some.py::test_dies", "test_some.py::test_hangs"]
    # A hang ends with 1, as failures do.
    assert found["exit_codes"] == [1, 9, 1]
    assert found["noted"] == {"test_first": {"waits": 4}}
    assert not found["killed"]
    log = (tmp_path / "out" / LOG).read_text()
    assert "Timeout" in log  # With all stacks.
    assert "test_fails" in log
    assert "<testsuite " in log


def test_a_broken_device_takes_one_test_along(check: Any) -> None:
    found = check(
        """
        import eval.gpu_check.pytest_recorder as recorder
        broken = False
        recorder._is_broken = lambda: broken
        def test_breaks():
            global broken
            broken = True
            assert False
        def test_other(): pass
        def test_fails(): assert False
        """
    )
    assert found["exit_codes"] == [70, 1]
    assert found["counts"] == {"failed": 2, "passed": 1}
    assert found["not_ended"] == []


def test_tests_are_killed_when_time_is_over(check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_tests, "HUNG_S", 600.0)
    found = check("import time\ndef test_a(): pass\ndef test_b(): time.sleep(600)", seconds=6.0)
    assert found["killed"]
    assert found["exit_codes"] == [None]
    assert found["counts"] == {"passed": 1}
    assert found["not_ended"] == ["test_some.py::test_b"]


def test_only_wanted_tests_of_a_file_run(check: Any) -> None:
    found = check("def test_real(): pass\ndef test_fake(): assert False", wanted={"some.py": "real"})
    assert found["counts"] == {"passed": 1}


def test_a_file_that_cannot_be_read_is_a_failure_and_others_run(check: Any, tmp_path: Path) -> None:
    (tmp_path / "test_other.py").write_text("def test_good(): pass")
    found = check("import no_such_module", files=("test_some.py", "test_other.py"))
    assert found["counts"] == {"failed": 1, "passed": 1}
    assert "no_such_module" in found["failures"][0]["message"]
    assert found["exit_codes"] == [1]


def test_groups_name_files_that_are_there() -> None:
    for group in (*GROUPS, *REHEARSED):
        files = [one for one in group.arguments if one.endswith(".py")]
        assert files
        assert all((ROOT / file).exists() for file in files)
        for name, part in group.wanted.items():
            (file,) = [one for one in files if one.endswith(name)]
            assert re.search(rf"def test_\w*{part}", (ROOT / file).read_text())


def test_the_tests_of_methods_pass_on_the_stand_in_for_a_device() -> None:
    """They are written for a GPU, which is rarely at hand: here at least every line of them runs."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/contract/test_cuda_methods.py"]
    environment = os.environ | {"CUDA_METHODS_DEVICE": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
