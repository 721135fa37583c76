"""What systems that keep prefixes in a `PrefixStore` have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch

from hf_contiguouskv import ContiguousKVCache, ContiguousKVConfig, PrefixStore, RequestStats
from hf_contiguouskv.timeline import Timeline


class Stored:
    """A store in a folder, opened anew after `forget`.

    Args:
        name: of the system.
        model: whose prefixes.
        folder: of the store.
        config: how prefixes are stored.
        store_options: of `PrefixStore` (limits, eviction).
    """

    def __init__(self, name: str, model: Any, folder: Path, config: ContiguousKVConfig, **store_options: Any) -> None:
        self._name = name
        self._model = model
        self._folder = folder
        self._config = config
        self._options = store_options
        self._store: PrefixStore | None = None

    @property
    def name(self) -> str:
        """See `System`."""
        return self._name

    def opened(self) -> PrefixStore:
        """The store."""
        if self._store is None:
            self._store = PrefixStore(self._folder, **self._options)
        return self._store

    def store(self, prefix_ids: torch.Tensor) -> None:
        """See `System`. Through another store: a cache reads ahead, and what it reads must not stay in our memory."""
        with PrefixStore(self._folder, host_bytes=0) as store:
            ContiguousKVCache(self._model, prefix_ids, store=store, config=self._config).close()

    def files(self) -> list[Path]:
        """See `System`."""
        return sorted(self._folder.rglob("*.safetensors"))

    def finish(self, cache: Any) -> RequestStats:
        """See `System`."""
        cache.close()
        found: RequestStats = cache.stats
        return found

    def timeline(self, cache: Any) -> Timeline | None:
        """See `System`."""
        found: Timeline | None = cache.timeline
        return found

    def forget(self) -> None:
        """See `System`: the store is opened again inside the timer."""
        if self._store is not None:
            self._store.close()
            self._store = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.forget()
