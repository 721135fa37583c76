"""`gpu.json`: the results so far, valid at every moment, even if a stage is killed."""

from __future__ import annotations

import faulthandler
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAME = "gpu.json"


class BrokenDeviceError(Exception):
    """No call on the device works any more; a new process must continue."""


class FatalError(Exception):
    """No stage can run on this machine."""


class Results:
    """The file. One process writes at a time: a stage while it runs, and between stages the command that runs them.

    Args:
        out: folder of the file.

    Attributes:
        content: the content of the file; values that JSON cannot hold are turned into text.
    """

    def __init__(self, out: Path | str) -> None:
        self.path = Path(out) / NAME
        self.content: dict[str, Any] = {"stages": {}}
        self.read()

    def read(self) -> None:
        """Read what another process has written."""
        if self.path.exists():
            self.content = json.loads(self.path.read_text())

    def stage(self, name: str) -> dict[str, Any]:
        """The results of a stage."""
        found: dict[str, Any] = self.content.setdefault("stages", {}).setdefault(name, {})
        return found

    def flush(self, pretty: bool = False) -> None:
        """Write the file atomically: if this process is killed, the old content stays.

        Args:
            pretty: whether to add line breaks, which takes several times as long.
        """
        layout: dict[str, Any] = {"indent": 1} if pretty else {"separators": (",", ":")}
        try:
            text = json.dumps(self.content, allow_nan=False, **layout)
        except (TypeError, ValueError):
            text = json.dumps(_plain(self.content), **layout)
        partial = self.path.with_name(self.path.name + ".part")
        partial.write_text(text + "\n")
        partial.replace(self.path)


class Clock:
    """Tells how much time is left.

    Args:
        until: the end, in seconds of `time.time()`.
    """

    def __init__(self, until: float) -> None:
        self.until = until

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.until - time.time()

    def share(self, share: float) -> Clock:
        """A clock for a share of the time left."""
        return Clock(time.time() + max(0.0, self.left) * share)


class Record:
    """The results of one stage, step by step. A step that killed its process is not tried again.

    Args:
        results: the file.
        stage: name of the stage.
        clock: clock of the stage.
        folder: folder for the marker that names the running step.
        alive: raises if the device does not work any more; called after a step has failed.

    Attributes:
        found: results of steps by name, and other results of the stage.
        failed: errors by step.
    """

    def __init__(
        self,
        results: Results,
        stage: str,
        clock: Clock,
        folder: Path | str,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        self.results = results
        self.clock = clock
        self._alive = alive
        self._marker = marker_of(folder, stage)
        own = results.stage(stage)
        self.found: dict[str, Any] = own.setdefault("found", {})
        self.failed: dict[str, str] = own.setdefault("failed", {})
        if self._marker.exists():
            self.failed[self._marker.read_text()] = "the process died or hung in it: see log.txt"
            self._marker.unlink()
        results.flush()

    def step(self, name: str, action: Callable[[], Any], limit_s: float = 60.0) -> Any:
        """Run `action` once, and record its result or error under `name`. See `attempt`."""
        if name not in self.found:
            value = self.attempt(name, action, limit_s)
            if name not in self.failed:
                self.found[name] = value
            self.results.flush()
        return self.found.get(name)

    def attempt(self, name: str, action: Callable[[], Any], limit_s: float = 60.0) -> Any:
        """Run `action`, unless an action of this name failed before.

        Args:
            name: name of the action.
            action: the function to call.
            limit_s: seconds after which it counts as hung; the process then ends, with all stacks in the log.

        Returns:
            The result of `action`; `None` if it failed, now or earlier.

        Raises:
            BrokenDeviceError: the action failed, and the device does not work any more.
        """
        if name in self.failed:
            return None
        self._marker.write_text(name)
        faulthandler.dump_traceback_later(limit_s, exit=True, file=sys.__stderr__ or 2)
        try:
            return action()
        except Exception as error:
            self._fail(name, error)
            return None
        finally:
            faulthandler.cancel_dump_traceback_later()
            self._marker.unlink(missing_ok=True)

    def _fail(self, name: str, error: Exception) -> None:
        print(f"--- {name} failed", flush=True)
        traceback.print_exception(error)
        self.failed[name] = said(error)
        self.results.flush()
        try:
            self._alive()
        except Exception as broken:
            raise BrokenDeviceError(f"after {name}: {said(broken)}") from error


def marker_of(folder: Path | str, stage: str) -> Path:
    """The file with the name of the step that a stage's process is running."""
    return Path(folder) / f"{stage}.running"


def said(error: BaseException) -> str:
    """An error in a line or two, with the place that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {str(error)[:600]}{where}"


def _plain(value: Any) -> Any:
    """`value` in types that JSON has: infinities, NaN and unknown types become text."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(one) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    return os.fspath(value) if isinstance(value, os.PathLike) else str(value)
