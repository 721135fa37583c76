"""Says why automatic mode did nothing for a prompt: counted for the request and the store, logged once a process."""

from __future__ import annotations

import logging

from ..stats import RequestStats, StoreCounters

logger = logging.getLogger("hf_contiguouskv")
_logged: set[str] = set()


class Unserved:
    """Where one cache notes what it could not serve or store.

    Attributes:
        stats: of the request that is running.
        counters: of the store, or `None`.
    """

    def __init__(self, stats: RequestStats) -> None:
        self.stats = stats
        self.counters: StoreCounters | None = None

    def copy_for(self, stats: RequestStats) -> Unserved:
        """The same for a copy of the cache."""
        twin = Unserved(stats)
        twin.counters = self.counters
        return twin

    def note(self, reason: str, *, served_only: bool = False) -> None:
        """Count `reason`, and log it if it is the first of its kind in this process.

        Args:
            reason: what the caller did, in a few words.
            served_only: the prompt is stored all the same.
        """
        self.stats.passed_over[reason] = self.stats.passed_over.get(reason, 0) + 1
        if self.counters is not None:
            self.counters.add(f"passed_over.{reason}")
        if reason not in _logged:
            _logged.add(reason)
            what = "not served from the store" if served_only else "neither served from the store nor stored"
            logger.warning("a prompt was %s: %s (logged once)", what, reason)
