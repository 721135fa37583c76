"""Records why automatic mode did nothing for a prompt: counted per request and store, logged once per process."""

from __future__ import annotations

import logging

from .prefix_slot import PrefixSlot

logger = logging.getLogger("hf_contiguouskv")
_logged: set[str] = set()


def note_unserved(slot: PrefixSlot, reason: str, *, stored: bool = False) -> None:
    """Count `reason` in the request and the store of `slot`, and log its first occurrence in this process.

    Args:
        slot: the cache's slot.
        reason: what the caller did, in a few words.
        stored: whether the prompt is stored nevertheless.
    """
    passed_over = slot.stats.passed_over
    passed_over[reason] = passed_over.get(reason, 0) + 1
    slot.source.store.inner.counters.add(f"passed_over.{reason}")
    if reason not in _logged:
        _logged.add(reason)
        what = "not served from the store" if stored else "neither served from the store nor stored"
        logger.warning("a prompt was %s: %s (logged once)", what, reason)
