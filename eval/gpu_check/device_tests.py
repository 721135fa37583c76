"""The stage `tests`: runs the tests of the device path on the device."""

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

from .pytest_recorder import HUNG_S as HUNG_S_NAME
from .pytest_recorder import RECORD, WANTED, read_lines
from .results import Clock, Record, Results
from .run_stage import die_with_parent
from .settings import Settings
from .stages import ROOT

LOG = "tests.txt"
# Seconds after which a test counts as hung, and the maximum number of processes per group.
HUNG_S, PROCESSES = 25.0, 6
# With less time left, a process could not do more than start.
WORTH_A_PROCESS_S = 12.0


@dataclass(frozen=True)
class Group:
    """Tests that one pytest process runs, in this order.

    Attributes:
        name: name in the results.
        arguments: arguments of pytest.
        share: share of the time left.
        wanted: for some files, a part that names of their tests must have.
        environment: additional environment variables.
    """

    name: str
    arguments: tuple[str, ...]
    share: float
    wanted: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


# Tests of answers come before tests for races. One process runs many tests, because each process takes seconds to
# start.
GROUPS = (
    Group(
        "device",
        (
            "tests/contract/test_cuda_methods.py",
            "tests/contract/test_cuda.py",
            "tests/eval/test_systems_on_device.py",
        ),
        0.75,
        {"test_systems_on_device.py": "real_accelerator"},
    ),
    Group(
        "sanitizer",
        (
            "tests/contract/test_cuda.py",
            "-k",
            "answers_as_a_dynamic_cache or warm_request or select_as_on_a_cpu",
        ),
        1.0,
        environment={"TORCH_CUDA_SANITIZER": "1"},
    ),
)
# On a CPU, a few of the same tests and of the stand-in's own tests.
REHEARSED = (
    Group(
        "methods",
        (
            "tests/contract/test_cuda_methods.py",
            "-k",
            "(index_on_the_device and 4-4-64-1-16) or masked_one and index-165-2 or scores_of_leaders and warm-paper",
        ),
        0.7,
        environment={"CUDA_METHODS_DEVICE": "cpu"},
    ),
    Group("pipeline", ("tests/contract/test_device_pipeline.py",), 1.0, {"test_device_pipeline.py": "one_copy_brings"}),
)


def run(settings: Settings, results: Results, clock: Clock) -> None:
    """Run each group separately; its results are kept even if it is killed."""
    record = Record(results, "tests", clock, settings.folder)
    for group in REHEARSED if settings.rehearse else GROUPS:
        own_clock = clock.share(group.share)
        record.step(group.name, partial(run_group, settings, group, own_clock), max(1.0, own_clock.left) + 30)
    counts: dict[str, int] = {}
    for one in record.found.values():
        for outcome, count in one["counts"].items():
            counts[outcome] = counts.get(outcome, 0) + count
    results.stage("tests")["counts"] = counts
    results.flush()


def run_group(settings: Settings, group: Group, clock: Clock) -> dict[str, Any]:
    """Run pytest until all tests have ended or time is over; returns the results, ready for JSON."""
    scratch = Path(settings.folder)
    lines = scratch / f"{group.name}.jsonl"
    environment = os.environ | group.environment
    environment |= {RECORD: str(lines), HUNG_S_NAME: str(HUNG_S), WANTED: json.dumps(group.wanted)}
    environment["HF_HUB_OFFLINE"] = "1"
    began, codes = time.time(), []
    for number in range(PROCESSES):
        code = _pytest(settings, group, environment, clock, scratch / f"{group.name}-{number}")
        codes.append(code)
        if any("finished" in row for row in read_lines(lines)) or clock.left < WORTH_A_PROCESS_S:
            break
    killed = codes[-1] is None
    return summary(read_lines(lines)) | {"exit_codes": codes, "killed": killed, "seconds": time.time() - began}


def _pytest(settings: Settings, group: Group, environment: dict[str, str], clock: Clock, scratch: Path) -> int | None:
    """The exit code of one pytest process; `None` if it was killed when time was over."""
    junit = scratch.with_suffix(".xml")
    command = [
        *(sys.executable, "-m", "pytest", *group.arguments),
        *("-vv", "--tb=short", "--color=no", "--durations=5", "-p", f"{__package__}.pytest_recorder"),
        *("-p", "no:cacheprovider", "--continue-on-collection-errors"),
        *(f"--junitxml={junit}", f"--basetemp={scratch}"),
    ]
    began, log = time.time(), Path(settings.out) / LOG
    with log.open("ab") as out:
        out.write(f"\n=== {group.name}: {' '.join(group.arguments)} {group.environment or ''}\n".encode())
        out.flush()
        code = _until(command, environment, out, clock)
        if junit.exists():
            out.write(b"\n" + junit.read_bytes() + b"\n")
        said = "killed" if code is None else f"ended with {code}"
        out.write(f"\n=== {group.name}: {said} after {time.time() - began:.0f} s\n".encode())
    return code


def _until(command: Sequence[str], environment: dict[str, str], out: Any, clock: Clock) -> int | None:
    """The exit code of a command; `None` if it was killed when time was over."""
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


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts by outcome, failures with messages, reasons for skipping, notes of tests, and tests that did not end."""
    counts: dict[str, int] = {}
    begun: dict[str, bool] = {}
    failures: list[dict[str, str]] = []
    skipped: dict[str, int] = {}
    noted: dict[str, Any] = {}
    for row in rows:
        if "finished" in row:
            continue
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
