"""The stage `tests`: the tests of the device path, on the device."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from . import pytest_recorder
from .results import Clock, Record, Results
from .run_stage import die_with_parent
from .settings import Settings
from .stages import ROOT

LOG = "tests.txt"
# Stacks of a test that takes so long are printed; pytest itself goes on.
SLOW_TEST_S = 25


@dataclass(frozen=True)
class Group:
    """Tests that one pytest runs.

    Attributes:
        name: in results.
        arguments: of pytest.
        share: of the time that is left.
        environment: besides what there is.
    """

    name: str
    arguments: tuple[str, ...]
    share: float
    environment: dict[str, str] = field(default_factory=dict)


# What answers wrongly comes before what waits too often, and both before what only may be a race.
GROUPS = (
    Group("methods", ("tests/contract/test_cuda_methods.py",), 0.5),
    Group("pipeline", ("tests/contract/test_cuda.py",), 0.6),
    Group("rivals", ("tests/eval/test_systems_on_device.py", "-k", "real_accelerator"), 0.6),
    Group(
        "sanitizer",
        (
            "tests/contract/test_cuda.py",
            "-k",
            "answers_as_a_dynamic_cache or warm_request or select_as_on_a_cpu",
        ),
        1.0,
        {"TORCH_CUDA_SANITIZER": "1"},
    ),
)
# On a CPU a handful of the same tests, and of the stand-in's own.
REHEARSED = (
    Group(
        "methods",
        (
            "tests/contract/test_cuda_methods.py",
            "-k",
            "(index_on_the_device and 4-4-64-1-16) or masked_one and index-165-2 or scores_of_leaders and warm-paper",
        ),
        0.7,
        {"CUDA_METHODS_DEVICE": "cpu"},
    ),
    Group("pipeline", ("tests/contract/test_device_pipeline.py", "-k", "several_tiers or one_copy_brings"), 1.0),
)


def run(settings: Settings, results: Results, clock: Clock) -> None:
    """Each group in a process of its own; what it has found is kept whatever becomes of it."""
    record = Record(results, "tests", clock, settings.folder)
    for group in REHEARSED if settings.rehearse else GROUPS:
        own_clock = clock.share(group.share)
        record.step(group.name, partial(run_group, settings, group, own_clock), own_clock.left + 30)
    groups = [one for one in record.found.values() if isinstance(one, dict) and "counts" in one]
    totals: dict[str, int] = {}
    for one in groups:
        for outcome, count in one["counts"].items():
            totals[outcome] = totals.get(outcome, 0) + count
    results.stage("tests")["counts"] = totals
    results.flush()


def run_group(settings: Settings, group: Group, clock: Clock) -> dict[str, Any]:
    """Run pytest until the clock is over; what it found, ready for JSON."""
    scratch = Path(settings.folder)
    lines, junit = scratch / f"{group.name}.jsonl", scratch / f"{group.name}.xml"
    lines.unlink(missing_ok=True)
    command = [
        *(sys.executable, "-m", "pytest", *group.arguments),
        *("-vv", "--tb=short", "--color=no", "--durations=5", "-p", "eval.gpu_check.pytest_recorder"),
        *("-p", "no:cacheprovider", "-o", f"faulthandler_timeout={SLOW_TEST_S}"),
        *(f"--junitxml={junit}", f"--basetemp={scratch / group.name}"),
    ]
    environment = os.environ | {pytest_recorder.VARIABLE: str(lines), "HF_HUB_OFFLINE": "1"} | group.environment
    began = time.time()
    log = Path(settings.out) / LOG
    with log.open("ab") as out:
        out.write(f"\n=== {group.name}: {' '.join(group.arguments)} {group.environment or ''}\n".encode())
        out.flush()
        code = _until(command, environment, out, clock)
        if code is None:
            out.write(f"\n=== {group.name} was killed after {time.time() - began:.0f} s\n".encode())
    found = summary(read_lines(lines))
    if junit.exists():
        with log.open("ab") as out:
            out.write(b"\n" + junit.read_bytes() + b"\n")
    return found | {"exit_code": code, "killed": code is None, "seconds": time.time() - began}


def _until(command: Sequence[str], environment: dict[str, str], out: Any, clock: Clock) -> int | None:
    """The exit code of a command; `None`: it was killed when the clock was over."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=subprocess.STDOUT,
        process_group=0,
        preexec_fn=die_with_parent,
    )
    try:
        return process.wait(max(0.5, clock.left))
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What `pytest_recorder` has written; a line that was cut off is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts by outcome, failures with their messages, why tests were skipped, what tests noted, and what hung."""
    counts: dict[str, int] = {}
    begun: dict[str, bool] = {}
    failures, skipped, noted = [], {}, {}
    for row in rows:
        if row.get("begins"):
            begun[row["test"]] = True
            continue
        begun.pop(row["test"], None)
        outcome = row["outcome"]
        counts[outcome] = counts.get(outcome, 0) + 1
        if outcome == "failed":
            failures.append({"test": row["test"], "when": row["when"], "message": row.get("message", "")})
        elif outcome == "skipped":
            reason = row.get("message", "")
            skipped[reason] = skipped.get(reason, 0) + 1
        if row.get("noted"):
            noted[row["test"].rpartition("::")[2]] = row["noted"]
    return {"counts": counts, "failures": failures, "skipped": skipped, "noted": noted, "not_ended": list(begun)}
