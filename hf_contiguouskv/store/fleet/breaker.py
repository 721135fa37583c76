"""A circuit breaker: an engine that does not answer costs its time-out once, not once for each request."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable

from .engine import EngineUnavailableError

logger = logging.getLogger("hf_contiguouskv")

# An engine that failed is not asked for so long; twice as long each time that it fails again, up to the second number.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 5.0, 120.0


class CircuitBreaker:
    """Keeps calls from an engine that did not answer lately. Thread-safe.

    After a failure all calls are refused at once for a while. Then one call may try, and others wait for what comes of
    it: if it succeeds, all may again; if not, the next pause is twice as long.

    Args:
        name: of the engine, for messages.
        patience_s: how long a call waits for another one that tries.
        clock: seconds, never going back.

    Attributes:
        refused: calls that were refused.
        opened: how often a failure began or prolonged a pause.
    """

    def __init__(self, name: str, patience_s: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.refused = 0
        self.opened = 0
        self._name = name
        self._clock = clock
        self._patience_s = patience_s
        self._lock = threading.Lock()
        self._tried = threading.Condition(self._lock)
        self._pause_s = 0.0
        self._until = 0.0
        self._trying = False

    @property
    def is_open(self) -> bool:
        """Whether calls are refused now."""
        with self._lock:
            return self._pause_s > 0 and (self._trying or self._clock() < self._until)

    def enter(self, within_s: float = math.inf) -> None:
        """Ask whether a call may be made; its end must be told by `succeeded`, `failed` or `gave_up`.

        Args:
            within_s: wait for another call that tries no longer than this.

        Raises:
            EngineUnavailableError: it may not.
        """
        with self._lock:
            if not self._pause_s:
                return
            patience = min(self._patience_s, within_s)
            if self._trying and self._tried.wait_for(lambda: not self._trying, patience) and not self._pause_s:
                return
            left = self._until - self._clock()
            if left <= 0 and not self._trying:
                self._trying = True
                return
            self.refused += 1
        raise EngineUnavailableError(f"{self._name} did not answer and is not asked again for {max(left, 0.0):.0f} s")

    def succeeded(self) -> None:
        """A call was answered: with what was asked for, or with a refusal of the engine."""
        with self._lock:
            if not self._pause_s:
                return
            self._pause_s, self._trying = 0.0, False
            self._tried.notify_all()
        logger.warning("%s answers again", self._name)

    def gave_up(self) -> None:
        """A call was given up, which says nothing of the engine."""
        with self._lock:
            self._trying = False
            self._tried.notify_all()

    def failed(self, why: object) -> None:
        """A call was not answered, or not in time."""
        with self._lock:
            # (Calls that were under way when the first one failed say nothing new.)
            if self._pause_s and not self._trying and self._clock() < self._until:
                return
            self._pause_s = min(LONGEST_PAUSE_S, 2 * self._pause_s) if self._pause_s else FIRST_PAUSE_S
            self._until = self._clock() + self._pause_s
            self._trying = False
            self._tried.notify_all()
            self.opened += 1
            pause = self._pause_s
        logger.warning("%s does not answer (%s); it is left alone for %.0f s", self._name, why, pause)
