"""Several machines that share a store, in one process: each has a folder of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from store_helpers import FINGERPRINT, expected_kv, read_back

from hf_contiguouskv.store import PrefixStore, StoredPrefix
from hf_contiguouskv.store.fleet.engine import SharedEngine
from hf_contiguouskv.store.hashing import TokenIds

CHUNK = 4
# The helpers' prefixes have three layers.
LAYERS = range(3)


class Machines:
    """Opens stores on one shared store.

    Args:
        url: of the shared store.
        folder: for what each machine keeps.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self._folder = folder
        self._open: dict[str, PrefixStore] = {}

    def __call__(self, name: str, **options: Any) -> PrefixStore:
        """The store of the machine `name`; opened now, unless it is open."""
        store = self._open.get(name)
        if store is None or store.is_closed:
            store = self._open[name] = PrefixStore(self.url, cache=self._folder / name, **options)
        return store

    def __enter__(self) -> Machines:
        return self

    def __exit__(self, *error: object) -> None:
        for store in self._open.values():
            store.close()


def engine_of(store: PrefixStore) -> SharedEngine:
    """The engine of a shared store."""
    assert store.inner.fleet is not None
    return store.inner.fleet.engine


def found(store: PrefixStore, ids: TokenIds, count: bool = True) -> StoredPrefix | None:
    """What a look-up on this machine finds."""
    return store.inner.lookup(FINGERPRINT, ids, CHUNK, count=count)


def found_tokens(store: PrefixStore, ids: TokenIds) -> int:
    """How many tokens a look-up on this machine finds."""
    stored = found(store, ids)
    return stored.tokens if stored is not None else 0


def is_right(store: PrefixStore, stored: StoredPrefix, ids: TokenIds) -> bool:
    """Whether all K and V of a found prefix, read through this machine with checksums, are those of `ids`."""
    geometry = stored.spans[0].segment.geometry
    read = read_back(store, stored, LAYERS)
    used, whole = ids[: stored.tokens], stored.tokens // CHUNK
    return all(
        torch.equal(kv[:whole], expected_kv(geometry, used, layer)[:whole])
        for layer, kv in zip(LAYERS, read, strict=True)
    )


def remote(store: PrefixStore) -> dict[str, int]:
    """The counters of the shared store, those that are not zero, without single requests."""
    return {
        name: count for name, count in store.stats.remote.items() if count and name not in engine_of(store).requests
    }
