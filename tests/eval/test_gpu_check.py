"""The GPU check from end to end, on a CPU: what it leaves, what it refuses, and what it needs."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.gpu_check.requirements import unmet
from eval.gpu_check.settings import STAGES

ROOT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, "-m", "eval.gpu_check")
# One of them at a time: they are processes that start processes.
pytestmark = pytest.mark.xdist_group("gpu_check")


def on_any_disk() -> dict[str, str]:
    """As a checkout runs that was not installed."""
    return os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}


def check(*arguments: str, timeout: float = 400) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], cwd=ROOT, env=on_any_disk(), capture_output=True, text=True, timeout=timeout
    )


def read(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "gpu.json").read_text(), parse_constant=pytest.fail)
    return found


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """By the script that a session with a GPU runs."""
    out = tmp_path_factory.mktemp("gpu") / "results"
    done = subprocess.run(
        [ROOT / "scripts" / "gpu_session.sh", out, "--rehearse", "--any-file-system"],
        cwd=out.parent,
        env=on_any_disk() | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=600,
    )
    return out, done


def test_a_rehearsal_completes_every_stage(rehearsed: Any) -> None:
    out, done = rehearsed
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:] + (out / "log.txt").read_text()[-4000:]
    stages = read(out)["stages"]
    assert tuple(stages) == STAGES
    for name, stage in stages.items():
        assert stage["status"] == "complete", name
        assert not stage.get("failed"), name
        assert "deaths" not in stage


def test_few_files_with_plain_names_come_out(rehearsed: Any) -> None:
    out, _ = rehearsed
    names = sorted(path.name for path in out.iterdir())
    assert len(names) <= 8
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) and (out / name).is_file() for name in names)
    assert {"gpu.json", "table.md", "tests.txt", "log.txt"} < set(names)
    assert all((out / name).stat().st_size < 16_000_000 for name in names)
    assert not Path(read(out)["store"]["folder"]).exists()


def test_every_system_is_timed_in_each_of_its_states(rehearsed: Any) -> None:
    out, _ = rehearsed
    found = read(out)["stages"]["time"]["found"]
    assert found["skipped"] == []
    for tokens, complete in (("128", True), ("256", True), ("512", False)):
        block = found["prefixes"][tokens]
        assert block["skipped"] == []
        assert block["rounds"] == 2
        assert block["prefix_effect"] > 0.2
        cases = {(one["label"], one["state"]) for one in block["requests"]}
        states = (
            ("open", "keys_resident", "warm_host", "warm_device")
            if complete
            else (
                "open",
                "keys_resident",
                "warm_device",
            )
        )
        pruned = ["default 5%", "default 25%", "published 5%"]
        assert {(label, state) for label in pruned for state in states} <= cases
        rivals = {("attentionstore_h2o 5%", "warm_host"), ("impress 5%", "open"), ("reload", "warm_host")}
        assert rivals <= cases if complete else not rivals & cases
        assert (("recompute", "cold") in cases) == (tokens == "128")
        assert ("in_memory", "warm_device") in cases
        for one in block["requests"]:
            assert one["seconds"] > 0
            assert one.get("answer_ok") in (True, None), one
            assert one.get("departure") is None, one
            if one["state"] in ("cold", "open") and one["label"] != "recompute":
                assert one["bytes_read"] > 0
        # Twice before the rounds that count, and three times in each of these.
        assert len(block["floors"]) == 2 + 3 * 2


def test_exact_systems_answer_as_the_cache_in_memory(rehearsed: Any) -> None:
    out, _ = rehearsed
    block = read(out)["stages"]["time"]["found"]["prefixes"]["256"]
    compared = {one["label"] for one in block["requests"] if one.get("compared_with") == "in_memory"}
    assert {"exact", "attentionstore", "attentionstore+overlap", "reload"} <= compared
    first = {one["first_token"] for one in block["requests"] if one["label"] in compared | {"in_memory"}}
    assert len(first) == 1


def test_suffixes_of_other_lengths_are_timed_twice_each(rehearsed: Any) -> None:
    out, _ = rehearsed
    varied = read(out)["stages"]["time"]["found"]["varied"]
    lengths = [one["suffix_tokens"] for one in varied]
    assert all(lengths.count(length) == 2 for length in lengths)
    assert [one["time_of_shape"] for one in varied] == [1, 2] * (len(varied) // 2)


def test_what_needs_a_gpu_says_so(rehearsed: Any) -> None:
    out, _ = rehearsed
    found = read(out)["stages"]["where"]["found"]
    assert found["card"] == found["copies"] == found["new attention shapes"] == "not measured: no CUDA"
    assert found["versions"]["torch"] == str(torch.__version__)
    assert found["disk"]["write_bytes_per_s"] > 0
    assert found["file system"]["kind"]


def test_tests_are_counted(rehearsed: Any) -> None:
    out, _ = rehearsed
    stage = read(out)["stages"]["tests"]
    assert stage["counts"]["passed"] >= 5
    assert "failed" not in stage["counts"]
    assert all(group["exit_codes"] == [0] and group["not_ended"] == [] for group in stage["found"].values())
    assert "<testsuite " in (out / "tests.txt").read_text()


def test_traces_open_and_are_summed_up(rehearsed: Any) -> None:
    out, _ = rehearsed
    found = read(out)["stages"]["trace"]["found"]
    for name in ("default-open", "default-warm", "published-open"):
        trace = json.loads(gzip.decompress((out / f"trace-{name}.json.gz").read_bytes()))
        assert any(one.get("cat") == "cpu_op" for one in trace["traceEvents"])
        assert found[name]["summary"]["top_host_ops"]
        assert found[name]["request"]["phases"]
        assert found[name]["seconds_untraced"] > 0


def test_the_table_says_it_all_and_that_it_is_a_rehearsal(rehearsed: Any) -> None:
    out, done = rehearsed
    text = (out / "table.md").read_text()
    assert "its times say nothing" in text
    for word in ("256 tokens of prefix", "x floor", "published 5%", "6.16", "5.83", "3.85", "Where time goes", "floor"):
        assert word in text
    assert "GPU check" in done.stdout
    assert "exit status 0" in done.stdout


def test_help_names_every_option() -> None:
    done = check("--help")
    assert done.returncode == 0
    for option in ("--out", "--store", "--rehearse", "--stages", "--scale-deadlines", "--any-file-system"):
        assert option in done.stdout


def test_an_unknown_stage_is_refused(tmp_path: Path) -> None:
    done = check("--out", str(tmp_path), "--stages", "where,when")
    assert done.returncode == 2
    assert "when" in done.stderr


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="there is no tmpfs here")
def test_a_store_in_memory_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    done = check("--rehearse", "--out", str(tmp_path), "--store", "/dev/shm")
    assert done.returncode == 2
    assert "tmpfs" in done.stdout
    assert "--any-file-system" in done.stdout
    assert not (tmp_path / "gpu.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_what_to_do(tmp_path: Path) -> None:
    done = check("--out", str(tmp_path), "--any-file-system")
    assert done.returncode == 2
    found = read(tmp_path)["stages"]
    assert found["where"]["status"] == "fatal"
    assert "--rehearse" in found["where"]["error"]
    assert "time" not in found
    assert (tmp_path / "table.md").exists()


def started(*arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*COMMAND, *arguments], cwd=ROOT, env=on_any_disk(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def until(condition: Callable[[], Any], seconds: float = 120) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError("it did not come to pass")


def requests_in(out: Path) -> list[Any]:
    if not (out / "gpu.json").exists():
        return []
    blocks = read(out)["stages"].get("time", {}).get("found", {}).get("prefixes", {})
    return [one for block in blocks.values() for one in block["requests"]]


def children_of(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_what_was_found_survives_being_killed(tmp_path: Path, number: int) -> None:
    store = tmp_path / "store"
    store.mkdir()
    tmp_path = tmp_path / "out"
    stages = ("--stages", "time,table", "--store", str(store))
    process = started("--rehearse", "--any-file-system", *stages, "--out", str(tmp_path))
    try:
        until(lambda: len(requests_in(tmp_path)) >= 5)
        (child,) = children_of(process.pid)
        process.send_signal(number)
        process.wait(120)
        # The stage ends with the command that started it.
        until(lambda: not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text())
    finally:
        process.kill()
        process.wait()
    assert len(requests_in(tmp_path)) >= 5
    if number == signal.SIGTERM:
        assert read(tmp_path)["interrupted"]
        assert "128 tokens of prefix" in (tmp_path / "table.md").read_text()
        assert process.returncode == 1


def test_time_looks_at_the_clock(tmp_path: Path) -> None:
    arguments = ("--rehearse", "--any-file-system", "--stages", "time,table", "--scale-deadlines", "0.02")
    check(*arguments, "--out", str(tmp_path))
    found = read(tmp_path)["stages"]["time"]
    assert found["status"] == "complete"
    blocks = found["found"]["prefixes"].values()
    skipped = [*found["found"]["skipped"], *(one for block in blocks for one in block["skipped"])]
    assert skipped
    assert all(one["what"] and one["why"] for one in skipped)
    assert "Not measured, and why" in (tmp_path / "table.md").read_text()


def test_it_needs_only_what_it_says() -> None:
    """Machines with a GPU may lack what the evaluation wants besides; and nothing may need its own metadata."""
    program = """
        import importlib.abc, importlib.machinery, importlib.metadata, sys

        BLOCKED = ("torchao", "bitsandbytes", "gguf", "datasets", "evaluate", "peft", "rouge_score", "nbformat")
        find_spec = importlib.machinery.PathFinder.find_spec

        def not_there(name, path=None, target=None):
            return None if name.partition(".")[0] in BLOCKED else find_spec(name, path, target)

        importlib.machinery.PathFinder.find_spec = staticmethod(not_there)
        version = importlib.metadata.version

        def unknown(name):
            if name.replace("_", "-") in (*BLOCKED, "hf-contiguouskv"):
                raise importlib.metadata.PackageNotFoundError(name)
            return version(name)

        importlib.metadata.version = unknown

        import eval.gpu_check.__main__
        from eval.gpu_check import run_stage
        for module in (*run_stage.MODULES.values(), ".requirements", ".pytest_recorder"):
            importlib.import_module(module, "eval.gpu_check")
        from eval.gpu_check.where import versions
        assert versions()["hf-contiguouskv"] is None
        loaded = [name for name in BLOCKED if name in sys.modules]
        assert not loaded, loaded
        print("imported")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, env=on_any_disk(), capture_output=True, text=True
    )
    assert done.stdout.endswith("imported\n"), done.stderr


def test_requirements_are_compared_with_what_is_there() -> None:
    assert unmet(["torch>=2.9", "numpy", "torch>=1; extra == 'other'", "nothing-like-it; python_version < '3'"]) == []
    lacking = unmet(["torch>=99", "nothing-like-it>=1"])
    assert "torch" in lacking[0]
    assert ">=99 is needed" in lacking[0]
    assert lacking[1] == "nothing-like-it is not installed, >=1 is needed"
