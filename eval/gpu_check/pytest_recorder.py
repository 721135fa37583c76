"""A pytest plugin (`-p eval.gpu_check.pytest_recorder`): it writes a line when a test ends, so that a hang loses no
results.

A test that hangs, or that leaves a broken device, ends the process. The next process runs only tests that have not
begun. Environment variables configure the plugin (see below).
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from pathlib import Path
from typing import Any

# The variables: the file of lines; seconds after which a test counts as hung; and the wanted tests of some files, as a
# JSON object that maps the end of a file's path to a part of the tests' names.
RECORD, HUNG_S, WANTED = "GPU_CHECK_TEST_RECORD", "GPU_CHECK_TEST_HUNG_S", "GPU_CHECK_TEST_WANTED"
BROKEN = 70
_LONGEST = 1500
# An error stream that pytest does not capture.
_errors: Any = sys.__stderr__


def pytest_addoption(parser: Any) -> None:
    """Duplicate standard error. This is the first hook, called before pytest captures output."""
    global _errors
    _errors = os.fdopen(os.dup(2), "w")


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Deselect tests that are not wanted, and tests that began in an earlier process."""
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
    """Record the beginning of a test, and limit its time."""
    _write({"test": nodeid, "begins": True})
    faulthandler.dump_traceback_later(float(os.environ.get(HUNG_S, "60")), exit=True, file=_errors)


def pytest_runtest_logfinish(nodeid: str, location: Any) -> None:
    """Cancel the time limit of a test."""
    faulthandler.cancel_dump_traceback_later()


def pytest_runtest_logreport(report: Any) -> None:
    """Record the result of a test, or of its failed preparation."""
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
    """Record that all tests have ended, in this process or earlier ones."""
    _write({"finished": int(exitstatus)})


def pytest_collectreport(report: Any) -> None:
    """Record that a file cannot be collected."""
    if report.failed:
        message = str(report.longrepr)[-_LONGEST:]
        _write({"test": report.nodeid, "outcome": "failed", "when": "collect", "message": message})


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines written so far, without a line that was cut off."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def _is_broken() -> bool:
    """Whether all CUDA calls fail."""
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
