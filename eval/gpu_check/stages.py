"""Runs each stage as a separate process, so that a hang or crash does not affect the others."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from .results import Results, marker_of
from .settings import STAGES, START_S, Settings

ROOT = Path(__file__).resolve().parents[2]
LOG = "log.txt"
# Exit codes of a stage's process.
COMPLETE, FAILED, FATAL, BROKEN = 0, 1, 3, 4
# If a process dies and at least this many seconds are left, a new process continues the stage, up to this many
# processes.
WORTH_ANOTHER_S, PROCESSES = 20.0, 6
# Seconds after the deadline in which a process can write its stacks.
LAST_WORDS_S = 2.0


class Runner:
    """Runs stages one after the other, within the total time.

    Args:
        settings: settings of the run.
        results: the file to which stages write.
        command: the command of a stage's process, without its arguments (tests pass other commands).
    """

    def __init__(
        self,
        settings: Settings,
        results: Results,
        command: Sequence[str] = (sys.executable, "-m", f"{__package__}.run_stage"),
    ) -> None:
        self._settings = settings
        self._results = results
        self._command = command
        self._until = time.time() + settings.total_s
        self._child: subprocess.Popen[bytes] | None = None
        self._saved = Path(settings.folder) / "settings.json"
        settings.save(self._saved)

    def run(self, stage: str) -> dict[str, Any]:
        """Run one stage to its end, or to its deadline.

        Returns:
            Its results: `status` ("complete", "failed", "killed" at its deadline, "no time" before it began) and what
            it has written.
        """
        own = self._results.stage(stage)
        own |= {"deadline_s": self._settings.deadline(stage), "status": "running"}
        self._results.flush()
        began = time.time()
        limit = began + min(self._allowed(stage), self._left_for(stage))
        status, code = "no time", None
        if limit > began + 1.0:
            status, code = self._to_the_end(stage, limit)
        self._results.read()
        own = self._results.stage(stage)
        own |= {"status": status, "seconds": time.time() - began, "exit_code": code}
        self._results.flush()
        return own

    def _allowed(self, stage: str) -> float:
        return self._settings.deadline(stage) + START_S * max(1.0, self._settings.scale)

    def _left_for(self, stage: str) -> float:
        """The rest of the total time, minus the time for the last stage, because a run needs its table."""
        last = STAGES[-1]
        reserved = 0.0 if stage == last else self._settings.deadline(last) + START_S / 2
        return self._until - reserved - time.time()

    def _to_the_end(self, stage: str, limit: float) -> tuple[str, int | None]:
        for number in range(PROCESSES):
            code = self._process(stage, limit)
            if code is None:
                self._results.read()
                self._results.stage(stage)["killed_in"] = self._running(stage)
                self._results.flush()
                return "killed", None
            if code == COMPLETE:
                return "complete", code
            self._results.read()
            own = self._results.stage(stage)
            died_in = self._running(stage)
            own.setdefault("deaths", []).append({"exit_code": code, "in": died_in})
            self._results.flush()
            died_at_work = died_in is not None or code == BROKEN
            if not died_at_work or number + 1 == PROCESSES or limit - time.time() < WORTH_ANOTHER_S:
                return ("fatal" if code == FATAL else "failed"), code
        raise AssertionError("the loop returns")

    def _running(self, stage: str) -> str | None:
        marker = marker_of(self._settings.folder, stage)
        return marker.read_text() if marker.exists() else None

    def _process(self, stage: str, limit: float) -> int | None:
        """The exit code of one process; `None` if it was killed at `limit`."""
        with (Path(self._settings.out) / LOG).open("ab") as log:
            _note(log, f"=== {stage}, {limit - time.time():.0f} s at most")
            arguments = [stage, str(self._saved), str(limit - LAST_WORDS_S)]
            environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": _paths()}
            self._child = subprocess.Popen(
                [*self._command, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
            try:
                code = self._child.wait(max(0.0, limit - time.time()))
                _note(log, f"=== {stage} ended with {code}")
            except subprocess.TimeoutExpired:
                code = None
                _note(log, f"=== {stage} is killed: its deadline is over")
                # Its handler for this signal writes all stacks to the log.
                self._signal(signal.SIGUSR1, whole_group=False)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._child.wait(LAST_WORDS_S)
            finally:
                self.kill()
        return code

    def kill(self) -> None:
        """Kill the running stage, if any, with all processes that it has started."""
        if self._child is not None:
            self._signal(signal.SIGKILL)
            self._child.wait()
            self._child = None

    def _signal(self, number: int, whole_group: bool = True) -> None:
        assert self._child is not None
        send = os.killpg if whole_group else os.kill
        with contextlib.suppress(ProcessLookupError, PermissionError):
            send(self._child.pid, number)


def _paths() -> str:
    """The import path with which a stage's process finds this package, even if it is not installed."""
    own = str(ROOT)
    others = [one for one in os.environ.get("PYTHONPATH", "").split(os.pathsep) if one and one != own]
    return os.pathsep.join([*others, own])


def _note(log: IO[bytes], text: str) -> None:
    log.write(f"{time.strftime('%H:%M:%S')} {text}\n".encode())
    log.flush()
