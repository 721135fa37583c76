"""The stores that this process has open, and the one that a path alone leads to."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Generic, Protocol, TypeVar


class OpenStore(Protocol):
    """What is asked of a store (`PrefixStore`)."""

    path: Path

    @property
    def has_key(self) -> bool:
        """Whether it was opened with a key."""
        ...

    @property
    def is_usable(self) -> bool:
        """Whether it is open, and its folder is still at its path."""
        ...

    def close(self) -> None:
        """Close it; may be called more than once."""
        ...


Store = TypeVar("Store", bound=OpenStore)


class OpenStores(Generic[Store]):
    """Keeps no store open: it refers to them weakly. Those that are open when the interpreter exits are closed."""

    def __init__(self) -> None:
        self._all: weakref.WeakSet[Store] = weakref.WeakSet()
        self._by_path: weakref.WeakValueDictionary[str, Store] = weakref.WeakValueDictionary()
        self._lock = threading.RLock()
        atexit.register(self.close)

    def add(self, store: Store, *, by_path: bool) -> None:
        """Note an open store.

        Args:
            store: just opened.
            by_path: whether its path may lead to it. One without a key does not replace another, usable one; one with
                a key replaces one without.
        """
        self._all.add(store)
        if not by_path:
            return
        path = os.path.realpath(store.path)
        with self._lock:
            earlier = self._by_path.get(path)
            # (A store with a key uses fewer segments, and a path must not lead around its key.)
            if earlier is None or not earlier.is_usable or (store.has_key and not earlier.has_key):
                self._by_path[path] = store

    def at(self, path: str | os.PathLike[str], make: Callable[[], Store]) -> Store:
        """The usable store at `path`, or what `make` returns."""
        with self._lock:
            store = self._by_path.get(os.path.realpath(path))
            return store if store is not None and store.is_usable else make()

    def close(self) -> None:
        """Close all of them, so that no use is lost and no reader thread is cut off inside a read."""
        for store in list(self._all):
            store.close()
