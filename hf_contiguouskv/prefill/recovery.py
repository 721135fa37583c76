"""Recovery of a request whose stored prefix is damaged or unreadable: it computes the lost tokens again and goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from ..errors import SegmentCorruptError, SegmentReadError
from ..store.attached_prefix import AttachedPrefix
from ..store.segment import Segment
from .exact_prefill import Prefill

logger = logging.getLogger("hf_contiguouskv")

# After this many attempts with the store, the whole prefix is computed and kept in memory, where no read can fail.
_MAX_ATTEMPTS_WITH_STORE = 16


class Recovery:
    """Replaces the prefix of a running request by a sound one.

    The damaged segment is taken out of service. Its tokens are computed exactly, by a forward with its own cache inside
    the waiting forward, and stored.

    Args:
        prefill: computes and stores the tokens.
        ids: the whole prefix, int64 `(n,)`; the request may use only its beginning.
        report: called with the sound prefix of all `ids`, and the number of its tokens that came from the store.
    """

    def __init__(self, prefill: Prefill, ids: torch.Tensor, report: Callable[[AttachedPrefix, int], None]) -> None:
        self._prefill = prefill
        self._ids = ids
        self._report = report

    def __call__(
        self, prefix: AttachedPrefix, error: SegmentCorruptError | SegmentReadError, attempt: int
    ) -> AttachedPrefix:
        """A readable prefix with the same tokens as `prefix`.

        Args:
            prefix: the prefix that was being read.
            error: the error of the read.
            attempt: 1, 2, ... within one request.

        Raises:
            error: the tokens cannot be computed, because the model was changed or is in training mode.
            InputError: the model no longer exists.
        """
        store, ids = self._prefill.store, self._ids
        if attempt == 1:
            store.counters.add("recovered")
            store.counters.add("misses.corrupt")
        lasting = isinstance(error, SegmentCorruptError) or error.damage
        if lasting and isinstance(error.segment, Segment):
            store.discard(error.segment, str(error))
        if not self._prefill.is_current:
            raise error  # This model no longer computes the K/V that were stored.
        # Each segment may turn out to be damaged, one after the other.
        in_memory = not lasting or attempt > min(1 + len(prefix.spans), _MAX_ATTEMPTS_WITH_STORE)
        known = None if in_memory else self._prefill.look_up(ids.numpy())
        known_tokens = 0 if known is None else known.tokens
        logger.warning("%d tokens of the prefix are computed again: %s", max(0, len(ids) - known_tokens), error)
        whole = AttachedPrefix.of(self._prefill.complete(ids, known, in_memory=in_memory), len(ids))
        self._report(whole, known_tokens)
        return whole.truncated(prefix.tokens)
