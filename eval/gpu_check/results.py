"""`gpu.json`: what was found so far, valid at every moment, even if a stage is killed."""

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
    """Nothing works on the device any more; a new process has to go on."""


class FatalError(Exception):
    """No stage can do anything here."""


class Results:
    """The file. One process writes at a time: a stage while it runs, the command that runs the stages in between.

    Args:
        out: folder.

    Attributes:
        content: what is in the file; anything that JSON can say (and what it cannot is turned into text).
    """

    def __init__(self, out: Path | str) -> None:
        self.path = Path(out) / NAME
        self.content: dict[str, Any] = {"stages": {}}
        self.read()

    def read(self) -> None:
        """Take over what another process has written."""
        if self.path.exists():
            self.content = json.loads(self.path.read_text())

    def stage(self, name: str) -> dict[str, Any]:
        """What is known of a stage."""
        found: dict[str, Any] = self.content.setdefault("stages", {}).setdefault(name, {})
        return found

    def flush(self, pretty: bool = False) -> None:
        """Write it: all of it or, if this is killed, what was there before.

        Args:
            pretty: with line breaks, which takes several times as long.
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
    """How much time is left.

    Args:
        until: on `time.time()`.
    """

    def __init__(self, until: float) -> None:
        self.until = until

    @property
    def left(self) -> float:
        """Seconds."""
        return self.until - time.time()

    def share(self, share: float) -> Clock:
        """A clock for a part of what is left."""
        return Clock(time.time() + max(0.0, self.left) * share)


class Record:
    """What one stage has found, step by step. A step that killed its process is not tried again.

    Args:
        results: the file.
        stage: its name.
        clock: of the stage.
        folder: for the marker that tells which step runs.
        alive: raises where the device does not work any more; called after a step has failed.

    Attributes:
        found: what steps returned, by their names, and whatever else a stage puts there.
        failed: what went wrong, by step.
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
        """Do one thing once, and write down under its name what it returns or raises. See `attempt`."""
        if name not in self.found:
            value = self.attempt(name, action, limit_s)
            if name not in self.failed:
                self.found[name] = value
            self.results.flush()
        return self.found.get(name)

    def attempt(self, name: str, action: Callable[[], Any], limit_s: float = 60.0) -> Any:
        """Do one thing, unless something of this name failed before.

        Args:
            name: of what is done.
            action: what to do.
            limit_s: seconds after which it counts as hung: the process ends, with all stacks in the log.

        Returns:
            What `action` returned; `None` if it failed, now or earlier.

        Raises:
            BrokenDeviceError: it failed, and the device does not work any more.
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
    """The file that holds the name of the step that a stage's process is in."""
    return Path(folder) / f"{stage}.running"


def said(error: BaseException) -> str:
    """An error in a line or two, with the place that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {str(error)[:600]}{where}"


def _plain(value: Any) -> Any:
    """What JSON can say: infinities and the like become text, and so does anything unknown."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(one) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    return os.fspath(value) if isinstance(value, os.PathLike) else str(value)
