"""Uses of segments, collected in memory and written to the index now and then."""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from ..errors import StoreError
from .rows import mark_used

logger = logging.getLogger("hf_contiguouskv")

_MARKS_BEFORE_FLUSH = 256
_FLUSH_AFTER_S = 5.0


class PendingUses:
    """Counts uses by segment, so that a look-up writes nothing. Thread-safe.

    Args:
        write: runs a change of the index as one transaction.
        ttl_s: seconds after which an unused segment expires; `None`: never. Other processes evict and expire by what
            the index says, so a short one makes flushes more frequent.
    """

    def __init__(self, write: Callable[[Callable[[sqlite3.Connection], Any]], Any], ttl_s: float | None) -> None:
        self._write = write
        self._flush_after_s = min(_FLUSH_AFTER_S, _FLUSH_AFTER_S if ttl_s is None else ttl_s / 4)
        self._lock = threading.RLock()
        self._uses: dict[str, tuple[int, float]] = {}
        self._flushed = time.time()

    def mark(self, keys: Iterable[str]) -> bool:
        """Count one use of each of these segments, now; whether it is time for a `flush`."""
        now = time.time()
        with self._lock:
            for key in keys:
                count, _ = self._uses.get(key, (0, 0.0))
                self._uses[key] = (count + 1, now)
            due = len(self._uses) >= _MARKS_BEFORE_FLUSH or now - self._flushed > self._flush_after_s
            if due:
                self._flushed = now  # Before the flush itself, so that look-ups until then do not ask for another.
        return due

    def last_use(self, key: str) -> float:
        """When the segment was last used, in seconds since the epoch; 0 where the index knows of all uses."""
        with self._lock:
            return self._uses.get(key, (0, 0.0))[1]

    def pending(self) -> dict[str, tuple[int, float]]:
        """By key, how many uses the index does not know of, and when the last one was."""
        with self._lock:
            return dict(self._uses)

    def flush(self) -> None:
        """Write the uses to the index. Where that fails, they are lost and a warning is logged."""
        with self._lock:
            uses, self._uses = self._uses, {}
            self._flushed = time.time()
        try:
            if uses:
                self._write(lambda db: mark_used(db, [(count, when, key) for key, (count, when) in uses.items()]))
        except StoreError as error:
            logger.warning("counters of use are lost: %s", error)
