"""What a request does when stored bytes of its prefix are wrong or unreadable: it computes them again, and goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from ..errors import SegmentCorruptError, SegmentReadError
from ..store.attached_prefix import AttachedPrefix
from ..store.segment import Segment
from .exact_prefill import Prefill

logger = logging.getLogger("hf_contiguouskv")

# After so many attempts with the store, the whole prefix is computed and kept in memory, where nothing can go wrong.
_MAX_ATTEMPTS_WITH_STORE = 16


class Recovery:
    """Replaces the prefix of one request by a sound one, in the middle of the request.

    The damaged segment is taken out of service, its tokens are computed exactly (a forward of the model with a cache of
    its own, inside the forward that is waiting) and stored.

    Args:
        prefill: computes and stores.
        ids: int64 `(n,)`, the whole prefix; the request may use only the beginning of it.
        report: called with the sound prefix of all `ids`, and how many of its tokens came from the store.
    """

    def __init__(self, prefill: Prefill, ids: torch.Tensor, report: Callable[[AttachedPrefix, int], None]) -> None:
        self._prefill = prefill
        self._ids = ids
        self._report = report

    def __call__(
        self, prefix: AttachedPrefix, error: SegmentCorruptError | SegmentReadError, attempt: int
    ) -> AttachedPrefix:
        """The same tokens as `prefix`, readable.

        Args:
            prefix: what was being read.
            error: what showed.
            attempt: 1, 2, ... within one request.

        Raises:
            error: the tokens cannot be computed: the model was changed, or is in training mode.
            InputError: the model is gone.
        """
        store, ids = self._prefill.store, self._ids
        if attempt == 1:
            store.counters.add("recovered")
            store.counters.add("misses.corrupt")
        lasting = isinstance(error, SegmentCorruptError) or error.damage
        if lasting and isinstance(error.segment, Segment):
            store.discard(error.segment, str(error))
        if not self._prefill.is_current:
            raise error  # What this model computes now is not what was stored.
        # Each segment may show its own damage, one after the other.
        in_memory = not lasting or attempt > min(1 + len(prefix.spans), _MAX_ATTEMPTS_WITH_STORE)
        known = None if in_memory else self._prefill.look_up(ids.numpy())
        known_tokens = 0 if known is None else known.tokens
        logger.warning("%d tokens of the prefix are computed again: %s", max(0, len(ids) - known_tokens), error)
        whole = AttachedPrefix.of(self._prefill.complete(ids, known, in_memory=in_memory), len(ids))
        self._report(whole, known_tokens)
        return whole.truncated(prefix.tokens)
