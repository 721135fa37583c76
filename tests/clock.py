"""A clock that tests move."""

from __future__ import annotations

import time


class Clock:
    """Stands still at `now`, seconds since the epoch, until a test changes it."""

    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now
