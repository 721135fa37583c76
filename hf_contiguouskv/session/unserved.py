"""Says why automatic mode did nothing for a prompt: counted for the request and the store, logged once a process."""

from __future__ import annotations

import logging

from .prefix_slot import PrefixSlot

logger = logging.getLogger("hf_contiguouskv")
_logged: set[str] = set()


def note_unserved(slot: PrefixSlot, reason: str, *, stored: bool = False) -> None:
    """Count `reason` in the request and the store of `slot`, and log it if it is the first of its kind in this process.

    Args:
        slot: of the cache.
        reason: what the caller did, in a few words.
        stored: the prompt is stored all the same.
    """
    passed_over = slot.stats.passed_over
    passed_over[reason] = passed_over.get(reason, 0) + 1
    slot.source.store.counters.add(f"passed_over.{reason}")
    if reason not in _logged:
        _logged.add(reason)
        what = "not served from the store" if stored else "neither served from the store nor stored"
        logger.warning("a prompt was %s: %s (logged once)", what, reason)
