"""A pytest plugin (`-p eval.gpu_check.pytest_recorder`): a line per test as it ends, so that a hang loses no other."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

# Names the file.
VARIABLE = "GPU_CHECK_TEST_RECORD"
_LONGEST = 1500


def pytest_runtest_logstart(nodeid: str, location: Any) -> None:
    """A test begins."""
    _write({"test": nodeid, "begins": True})


def pytest_runtest_logreport(report: Any) -> None:
    """A test, or its preparation, is over."""
    if report.when != "call" and report.outcome == "passed":
        return
    row = {"test": report.nodeid, "outcome": report.outcome, "when": report.when, "seconds": report.duration}
    if report.outcome == "failed":
        row["message"] = _message(report)
    elif report.outcome == "skipped":
        row["message"] = str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr)[:300]
    for name, value in getattr(report, "user_properties", ()):
        row.setdefault("noted", {})[name] = value
    _write(row)


def pytest_collectreport(report: Any) -> None:
    """A file cannot be collected."""
    if report.failed:
        _write(
            {"test": report.nodeid, "outcome": "failed", "when": "collect", "message": str(report.longrepr)[-_LONGEST:]}
        )


def _message(report: Any) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    where = f"{crash.path}:{crash.lineno}: {crash.message}" if crash is not None else str(report.longrepr)
    return where[:_LONGEST]


def _write(row: dict[str, Any]) -> None:
    with Path(os.environ[VARIABLE]).open("a") as file:
        file.write(json.dumps(row, default=str) + "\n")
