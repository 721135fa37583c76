"""How fast the shared store reaches this machine: a running estimate from what its requests read."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

# A read of fewer bytes tells how long a round trip takes, one of more how fast bytes cross.
_TELLING_BYTES = 128 * 1024
# The first reads of a connection say little: so many bytes of long reads tell how fast it is.
TELLING_BYTES = 8 * 2**20
# Round trips that are remembered.
_TRIPS = 32
# Once so many bytes were counted, older ones count half: networks change.
_REMEMBERED_BYTES = 256 * 2**20
# Reads that follow each other without a pause are counted each time that so many seconds have passed.
_LONGEST_S = 2.0
# At least this share of the time of long reads is counted as transfer: round trips may not explain all of it.
_LEAST_SHARE = 0.1


@dataclass(frozen=True)
class Link:
    """Speeds of the way to a shared store.

    Attributes:
        bytes_per_s: that cross it, all reads together.
        round_trip_s: seconds until a short read has been answered.
    """

    bytes_per_s: float
    round_trip_s: float


@dataclass
class CountedRead:
    """A read that is under way.

    Attributes:
        nbytes: that crossed; set by the reader when they have.
    """

    nbytes: int = 0


class LinkMeter:
    """Counts bytes, and the time in which at least one read is under way. Thread-safe.

    Time in which several reads are under way counts once, so reads that share the link are not taken for slow ones.
    Time in which one failed is not counted.

    Args:
        clock: seconds, never going back.

    Attributes:
        known: what an earlier process measured, if any did.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.known: Link | None = None
        self._clock = clock
        self._lock = threading.Lock()
        self._under_way = 0
        self._began = 0.0
        self._nbytes = 0
        self._sound = True
        self._trips: deque[float] = deque(maxlen=_TRIPS)
        self._bytes = self._seconds = self._count = 0.0

    @contextlib.contextmanager
    def counting(self) -> Iterator[CountedRead]:
        """Within it, a read is under way."""
        with self._lock:
            if not self._under_way:
                self._begin()
            self._under_way += 1
        read, done = CountedRead(), False
        try:
            yield read
            done = True
        finally:
            with self._lock:
                self._under_way -= 1
                self._nbytes += read.nbytes
                self._sound = self._sound and done
                seconds = self._clock() - self._began
                if not self._under_way or seconds > _LONGEST_S:
                    if self._sound:
                        self._note(self._nbytes, seconds)
                    self._begin()

    def _begin(self) -> None:
        self._began, self._nbytes, self._sound = self._clock(), 0, True

    def note(self, nbytes: int, seconds: float) -> None:
        """Count bytes that crossed in so many seconds without a pause."""
        with self._lock:
            self._note(nbytes, seconds)

    def _note(self, nbytes: int, seconds: float) -> None:
        if nbytes <= 0:
            return
        if nbytes < _TELLING_BYTES:
            self._trips.append(seconds)
            return
        if self._bytes > _REMEMBERED_BYTES:
            self._bytes, self._seconds, self._count = self._bytes / 2, self._seconds / 2, self._count / 2
        self._bytes += nbytes
        self._seconds += seconds
        self._count += 1

    def estimate(self, least_bytes: int = 1) -> Link | None:
        """Speeds by what was counted, or else as they are `known`; `None`: too little was read to tell.

        Args:
            least_bytes: of long reads that must have been counted.
        """
        return self.measured(least_bytes) or self.known

    def measured(self, least_bytes: int = 1) -> Link | None:
        """As `estimate`, by what was counted alone."""
        with self._lock:
            if self._bytes < least_bytes:
                return None
            trip = min(self._trips, default=0.0)
            transfer = max(self._seconds - self._count * trip, _LEAST_SHARE * self._seconds, 1e-9)
            return Link(self._bytes / transfer, trip)
