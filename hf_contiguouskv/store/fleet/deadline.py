"""One deadline for all that a look-up asks of the shared store.

A look-up lists names, then reads headers, token ids and checksums, one after another and from several threads. Each of
these calls has a time-out of its own. The deadline bounds all of them together. It travels with the context of the
thread, so engines and blobs need no argument for it.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar

# A call that the deadline ends tells that the engine is down if it was given this share of its time-out.
TELLING = 0.5
TIME_IS_OVER = "the time of this look-up is over"

_current: ContextVar[Deadline | None] = ContextVar("contiguouskv_deadline", default=None)


class Deadline:
    """The moment at which a look-up stops waiting for the shared store.

    Calls inside `applied()` are bounded by it. Threads that they start must run in a copy of the context.

    Args:
        seconds: from now on.
        clock: seconds, never going back.
    """

    def __init__(self, seconds: float = math.inf, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds

    @property
    def left_s(self) -> float:
        """Seconds until then; 0 once it has passed."""
        return max(0.0, self._end - self._clock())

    @property
    def has_passed(self) -> bool:
        """Whether it has passed."""
        return self.left_s <= 0

    @contextlib.contextmanager
    def applied(self) -> Iterator[Deadline]:
        """Within it, calls of the shared store are bounded."""
        token = _current.set(self)
        try:
            yield self
        finally:
            _current.reset(token)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within it, something else than the shared store is waited for: that time does not count."""
        began = self._clock()
        try:
            yield
        finally:
            self._end += self._clock() - began


def seconds_left() -> float:
    """Seconds that a call of the shared store may take by the deadline of this context; infinite without one."""
    deadline = _current.get()
    return math.inf if deadline is None else deadline.left_s
