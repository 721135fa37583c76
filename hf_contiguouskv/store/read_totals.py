"""How much was read, and how fast storage is."""

from __future__ import annotations

import threading

# From this size on a ticket tells how fast storage is, if its reads have this size on average (of shorter ones, the
# interpreter decides); and so much at a time, where there is no pause between reads.
TELLING_BYTES, TELLING_READ, MOST_TOLD_BYTES = 2**20, 2**16, 2**26


class ReadTotals:
    """Bytes read by all tickets of a reader, and how fast.

    Only long tickets tell how fast storage is. Time in which several of them are under way counts once.

    Attributes:
        nbytes: bytes read.
        measured: a running estimate of the bytes per second; `None`: no ticket was long enough to tell.
        known: what an earlier process measured, if any did.
    """

    __slots__ = ("_bytes", "_lock", "_since", "_under_way", "known", "measured", "nbytes")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.nbytes = 0
        self.measured: float | None = None
        self.known: float | None = None
        # Long tickets that are being read, what those that have ended meanwhile read, and since when.
        self._under_way = self._bytes = 0
        self._since = 0.0

    def continued(self) -> ReadTotals:
        """The same in a fork of the process, in which nothing is under way."""
        other = ReadTotals()
        other.nbytes, other.measured, other.known = self.nbytes, self.measured, self.known
        return other

    @property
    def bytes_per_second(self) -> float | None:
        """As measured, or else as it is known."""
        return self.known if self.measured is None else self.measured

    def begins(self, now: float) -> None:
        """The first read of a long ticket begins, at `now` (seconds on `time.perf_counter`)."""
        with self._lock:
            if not self._under_way:
                self._bytes, self._since = 0, now
            self._under_way += 1

    def ends(self, began: float, now: float, nbytes: int) -> None:
        """A long ticket that `began` has ended, well or badly, after reading `nbytes`."""
        with self._lock:
            self._under_way -= 1
            seconds = now - self._since
            if seconds <= 0 or now <= began:
                return
            # (Of one that began before what is counted now, as much as belongs to that time.)
            self._bytes += int(nbytes * min(1.0, seconds / (now - began)))
            if self._bytes < TELLING_BYTES or (self._under_way and self._bytes < MOST_TOLD_BYTES):
                return
            found, before = self._bytes / seconds, self.measured
            self.measured = found if before is None else before + (found - before) / 4
            self._bytes, self._since = 0, now

    def add(self, nbytes: int) -> None:
        with self._lock:
            self.nbytes += nbytes
