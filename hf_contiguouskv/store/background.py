"""One thread that runs things after each other, off the critical path."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

logger = logging.getLogger("hf_contiguouskv")


class Background:
    """Runs functions in order on one thread, which starts at the first use.

    The interpreter waits for what was submitted before it exits (a property of `ThreadPoolExecutor`). A forked child
    begins with an empty queue: its parent runs what was submitted before.
    """

    def __init__(self) -> None:
        self.failures = 0
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._executor: ThreadPoolExecutor | None = None
        self._pending: dict[Future[None], Any] = {}
        self._lock = threading.Lock()
        self._here = threading.local()

    def _after_fork(self) -> None:
        if self._pid != os.getpid():
            self._begin()  # Threads, and the owners of locks, do not survive a fork.

    def submit(self, function: Callable[[], object], label: Any = ()) -> None:
        """Run `function` after everything submitted before; an exception is logged and counted.

        Args:
            function: what to run.
            label: what `wait_for` is asked about.
        """
        self._after_fork()

        def run() -> None:
            self._here.inside = True
            try:
                function()
            except Exception as error:
                self.failures += 1
                logger.warning("a background task of the store failed: %s: %s", type(error).__name__, error)

        with self._lock:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(1, thread_name_prefix="contiguouskv-background")
            future: Future[None] | None = None
            # A refusal means that the interpreter is on its way out and starts no more work: do it here.
            with contextlib.suppress(RuntimeError):
                future = self._executor.submit(run)
                self._pending[future] = label
        if future is None:
            run()
        else:
            future.add_done_callback(self._done)

    def _done(self, future: Future[None]) -> None:
        with self._lock:
            self._pending.pop(future, None)

    def wait_for(self, helps: Callable[[Any], bool], timeout_s: float) -> bool:
        """Wait for those functions of whose label `helps` is true; whether there were any.

        From inside a background task: return at once.
        """
        self._after_fork()
        if getattr(self._here, "inside", False):
            return False
        with self._lock:
            pending = [future for future, label in self._pending.items() if helps(label)]
        wait(pending, timeout_s)
        return bool(pending)

    def flush(self) -> bool:
        """Wait for everything that was submitted before; whether there was anything to wait for.

        From inside a background task: return at once.
        """
        self._after_fork()
        if getattr(self._here, "inside", False):
            return False
        with self._lock:
            pending = set(self._pending)
        wait(pending)
        return bool(pending)

    def close(self) -> None:
        """Wait for everything, then end the thread; a later `submit` starts a new one."""
        self.flush()
        with self._lock:
            executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown(wait=not getattr(self._here, "inside", False))
