"""Calls that may never come back, in threads of their own."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from ..engine import EngineUnavailableError

Result = TypeVar("Result")

# So many calls are under way at once, those that were given up included.
_THREADS = 32
# Where so many were given up and have not returned, no others are made.
_HANGING = 16


class Call(Generic[Result]):
    """A call under way.

    Args:
        function: what is called.
        release: called once the call is over, if nobody took its result: frees what the call used.
    """

    def __init__(self, function: Callable[[], Result], release: Callable[[], object]) -> None:
        self._function, self._release = function, release
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._result: list[Result] = []
        self._error: BaseException | None = None
        self.is_given_up = False

    def run(self) -> None:
        """Make the call, in this thread; one that was given up before it began is not made."""
        try:
            if not self.is_given_up:
                self._result.append(self._function())
        except BaseException as error:
            self._error = error
        with self._lock:
            self._over.set()
            is_given_up = self.is_given_up
        if is_given_up:
            self._release()

    def wait(self, seconds: float) -> Result:
        """What the call returns, or raises. After an error, what it used is freed once it is over.

        Raises:
            TimeoutError: it was not over after so many seconds.
        """
        try:
            if not self._over.wait(seconds):
                raise TimeoutError
            if self._error is not None:
                raise self._error
        except BaseException:
            self.give_up()
            raise
        return self._result[0]

    def give_up(self) -> None:
        """Take no result; what the call used is freed once it is over."""
        with self._lock:
            if self.is_given_up:
                return
            self.is_given_up = True
            is_over = self._over.is_set()
        if is_over:
            self._release()

    @property
    def is_hanging(self) -> bool:
        """Whether it was given up and is not over."""
        with self._lock:
            return self.is_given_up and not self._over.is_set()


class CallThreads:
    """Threads that make calls, started as they are needed.

    They are daemons, since the interpreter must be able to end while a call hangs.

    Args:
        name: of the threads.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._changed = threading.Condition()
        self._waiting: deque[Call[Any]] = deque()
        self._running: set[Call[Any]] = set()
        self._threads = 0
        self._idle = 0
        self._closed = False

    def start(self, function: Callable[[], Result], release: Callable[[], object] = lambda: None) -> Call[Result]:
        """Begin a call.

        Args:
            function: what is called.
            release: called once the call is over, if `Call.wait` raised or `Call.give_up` was called; at once if this
                method raises.

        Raises:
            EngineUnavailableError: too many calls hang, or it was closed.
        """
        call = Call(function, release)
        with self._changed:
            hanging = sum(one.is_hanging for one in self._running)
            refused = "the store was closed" if self._closed else None
            if hanging >= _HANGING:
                refused = f"{hanging} calls have not returned"
            if refused is None:
                self._waiting.append(call)
                if self._idle < len(self._waiting) and self._threads < _THREADS:
                    self._threads += 1
                    threading.Thread(target=self._work, name=self._name, daemon=True).start()
                self._changed.notify_all()
        if refused is not None:
            release()
            raise EngineUnavailableError(refused)
        return call

    def close(self, seconds: float) -> bool:
        """Begin no more calls; whether those under way ended within so many seconds."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            return self._changed.wait_for(lambda: not self._waiting and not self._running, seconds)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._idle += 1
                self._changed.wait_for(lambda: self._waiting or self._closed)
                self._idle -= 1
                if not self._waiting:
                    self._threads -= 1
                    return
                call = self._waiting.popleft()
                self._running.add(call)
            call.run()
            with self._changed:
                self._running.discard(call)
                self._changed.notify_all()
            # (What it returned must not live until the next one comes.)
            del call
