"""When a segment was computed, by the clock of the engine.

What was deleted for all machines must not come back from a machine that had not sent its copy yet. So a copy is
compared with the deletion. Clocks of machines may be wrong, so only the engine's clock says when something was. A
machine counts the seconds that have passed since it stored the copy, and takes them from what the engine's clock says
now. It counts them within one process: of a copy that an earlier process left, it is not known when it was computed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

# Object stores tell whole seconds.
RESOLUTION_S = 1.0
# Clocks that nobody corrects run so much too fast or too slow.
_DRIFT = 1e-3

# Gives the moment at which a segment was computed, at the earliest, in seconds since the epoch by the engine's clock.
Computed = Callable[[], float]


def ticks() -> float:
    """Seconds that never go back, and go on while the machine sleeps, where the system counts these."""
    number = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if number is None else time.clock_gettime(number)


def unknown() -> float:
    """Of what an earlier process computed: before every deletion."""
    return -math.inf


def in_any_case() -> float:
    """Of what is sent whatever was deleted: after every deletion."""
    return math.inf


class Since:
    """A `Computed` for what this process computed.

    Args:
        then: `ticks()` when the segment was stored here.
        now: what the engine's clock says now, seconds since the epoch; it is asked where that matters alone.
        count: as `ticks`.

    Raises:
        OSError: (when called) the engine failed.
    """

    def __init__(self, then: float, now: Callable[[], float], count: Callable[[], float] = ticks) -> None:
        self._then, self._now, self._count = then, now, count

    def __call__(self) -> float:
        now = self._now()
        # (Counted to the end of the answer: the moment may come out too early, never too late.)
        return now - (1 + _DRIFT) * (self._count() - self._then)
