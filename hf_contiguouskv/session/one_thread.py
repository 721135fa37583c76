"""A cache belongs to one thread at a time: two would mix their tokens, and store what no forward computed."""

from __future__ import annotations

import threading
import weakref

from ..errors import InputError
from ..model.transformers_internals import in_use_on_thread


class OneThread:
    """Which thread used a cache last. A cache may move from thread to thread between two calls, not during one.

    Args:
        cache: held weakly.
    """

    def __init__(self, cache: object) -> None:
        self._cache = weakref.ref(cache)
        self._lock = threading.Lock()
        self._last: int | None = None

    def claim(self) -> None:
        """This thread uses the cache now.

        Raises:
            InputError: a `generate` or a forward with it is running on another thread.
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
        """Whether this thread is the one that used the cache last."""
        return self._last == threading.get_ident()
