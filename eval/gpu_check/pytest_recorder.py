"""A pytest plugin (`-p eval.gpu_check.pytest_recorder`): a line per test as it ends, so that a hang loses no other.

A test that hangs, or leaves a device on which nothing works any more, ends the process; in the next one only those run
that have not begun. It is told what to do by the environment: see the variables.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from pathlib import Path
from typing import Any

# The file of lines; seconds after which a test counts as hung; and of which files only some tests are wanted, as JSON:
# a part of their names, by the end of the file's path.
RECORD, HUNG_S, WANTED = "GPU_CHECK_TEST_RECORD", "GPU_CHECK_TEST_HUNG_S", "GPU_CHECK_TEST_WANTED"
BROKEN = 70
_LONGEST = 1500
# What pytest does not capture.
_errors: Any = sys.__stderr__


def pytest_addoption(parser: Any) -> None:
    """The first hook of all, before anything is captured."""
    global _errors
    _errors = os.fdopen(os.dup(2), "w")


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Leave out what is not wanted, and what has begun in an earlier process."""
    wanted = json.loads(os.environ.get(WANTED, "{}"))
    begun = {row["test"] for row in read_lines(_file()) if row.get("begins")}

    def runs(item: Any) -> bool:
        parts = [part for file, part in wanted.items() if item.nodeid.partition("::")[0].endswith(file)]
        return item.nodeid not in begun and all(part in item.name for part in parts)

    left_out = [item for item in items if not runs(item)]
    items[:] = [item for item in items if runs(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)


def pytest_runtest_logstart(nodeid: str, location: Any) -> None:
    """A test begins."""
    _write({"test": nodeid, "begins": True})
    faulthandler.dump_traceback_later(float(os.environ.get(HUNG_S, "60")), exit=True, file=_errors)


def pytest_runtest_logfinish(nodeid: str, location: Any) -> None:
    """A test is over, whatever came of it."""
    faulthandler.cancel_dump_traceback_later()


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
    if report.outcome == "failed" and _is_broken():
        print(
            f"{report.nodeid}: {_message(report)}\nnothing works on the device any more",
            file=_errors,
            flush=True,
        )
        os._exit(BROKEN)


def pytest_sessionfinish(session: Any, exitstatus: int) -> None:
    """All tests have ended, in this process or before."""
    _write({"finished": int(exitstatus)})


def pytest_collectreport(report: Any) -> None:
    """A file cannot be collected."""
    if report.failed:
        message = str(report.longrepr)[-_LONGEST:]
        _write({"test": report.nodeid, "outcome": "failed", "when": "collect", "message": message})


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What was written so far; a line that was cut off is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def _is_broken() -> bool:
    """Whether CUDA calls fail, whatever they are."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
        torch.ones(1, device="cuda").sum().item()
    except Exception:
        return True
    return False


def _message(report: Any) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    where = f"{crash.path}:{crash.lineno}: {crash.message}" if crash is not None else str(report.longrepr)
    return where[:_LONGEST]


def _file() -> Path:
    return Path(os.environ[RECORD])


def _write(row: dict[str, Any]) -> None:
    with _file().open("a") as file:
        file.write(json.dumps(row, default=str) + "\n")
