"""Ensures that only one thread uses a cache at a time: two threads would mix their tokens, and store wrong K/V."""

from __future__ import annotations

import threading
import weakref

from ..errors import InputError
from ..model.transformers_internals import in_use_on_thread


class OneThread:
    """Remembers which thread used a cache last. A cache may move to another thread between calls, not during one.

    Args:
        cache: the cache, held weakly.
    """

    def __init__(self, cache: object) -> None:
        self._cache = weakref.ref(cache)
        self._lock = threading.Lock()
        self._last: int | None = None

    def claim(self) -> None:
        """Note that this thread uses the cache now.

        Raises:
            InputError: another thread is running a `generate` or a forward with the cache.
        """
        me = threading.get_ident()
        with self._lock:
            if self._last not in (None, me) and in_use_on_thread(self._cache(), self._last):
                raise InputError(
                    "this cache is in use by a generate or forward call on another thread; give each thread a cache "
                    "of its own (they share one PrefixStore)"
                )
            self._last = me

    def is_mine(self) -> bool:
        """Whether this thread used the cache last."""
        return self._last == threading.get_ident()
