"""What a request does when stored bytes of its prefix prove wrong or unreadable: it computes them anew, and goes on."""

from __future__ import annotations

import logging
import weakref
from typing import TYPE_CHECKING

from ..errors import SegmentCorruptError, SegmentReadError
from ..model.fingerprint import model_fingerprint
from ..store.attached_prefix import AttachedPrefix
from ..store.segment import Segment
from .exact_prefill import Prefill, geometry_of

if TYPE_CHECKING:
    from ..cache.contiguous_cache import ContiguousKVCache

logger = logging.getLogger("hf_contiguouskv")

# After so many attempts with the store, the whole prefix is computed and kept in memory, where nothing can go wrong.
_MAX_ATTEMPTS_WITH_STORE = 16


class Recovery:
    """Replaces the attached prefix of one cache by a sound one, in the middle of a request.

    The damaged segment is taken out of service, its tokens are computed exactly (a forward of the model with a cache of
    its own, inside the forward that is waiting) and stored. The cache is held weakly: its request holds this.
    """

    def __init__(self, cache: ContiguousKVCache) -> None:
        self._cache = weakref.ref(cache)

    def __call__(
        self, prefix: AttachedPrefix, error: SegmentCorruptError | SegmentReadError, attempt: int
    ) -> AttachedPrefix:
        """The same tokens as `prefix`, readable.

        Args:
            prefix: what was being read.
            error: what showed.
            attempt: 1, 2, ... within one request.

        Raises:
            error: the tokens cannot be computed: the model is gone, was changed, or is in training mode.
        """
        cache = self._cache()
        if cache is None or cache.store is None or cache.prefix_ids is None:
            raise error
        store = cache.store
        if attempt == 1:
            store.counters.add("recovered")
            store.counters.add("misses.corrupt")
        lasting = isinstance(error, SegmentCorruptError) or error.damage
        if lasting and isinstance(error.segment, Segment):
            store.discard(error.segment, str(error))
        model = cache._living_model()
        if model.training or model_fingerprint(model) != cache._fingerprint:
            raise error  # What this model computes now is not what was stored.
        ids = cache.prefix_ids
        # Each segment may show its own damage, one after the other.
        in_memory = not lasting or attempt > min(1 + len(prefix.spans), _MAX_ATTEMPTS_WITH_STORE)
        known = None
        if not in_memory:
            c = cache.config.chunk_size
            geometry = geometry_of(cache._support, c)
            known = store.lookup(cache._fingerprint, ids.numpy(), c, geometry=geometry, count=False)
        known_tokens = 0 if known is None else known.tokens
        logger.warning("%d tokens of the prefix are computed again: %s", max(0, len(ids) - known_tokens), error)
        prefill = Prefill(model, store, cache._fingerprint, cache._support, cache.config)
        whole = AttachedPrefix.of(prefill.complete(ids, known, in_memory=in_memory), len(ids))
        cache.prefix_recovered(whole, known_tokens)
        return whole.truncated(prefix.tokens)
