"""What systems that keep prefixes in a `PrefixStore` have in common."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import closing
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from transformers import DynamicCache

from hf_contiguouskv import ContiguousKVCache, ContiguousKVConfig, PrefixStore, RequestStats
from hf_contiguouskv.errors import UnsupportedModelError
from hf_contiguouskv.model.served_model import ServedModel
from hf_contiguouskv.model.transformers_internals import cache_argument
from hf_contiguouskv.prefill.persisting import persist_rows
from hf_contiguouskv.store.attached_prefix import AttachedPrefix
from hf_contiguouskv.store.local_disk import LocalDisk
from hf_contiguouskv.timeline import Timeline

from ..timing import drop_page_cache
from .base import NotStoredError, SystemUnavailableError, key_of, require_states
from .bringing import ChunkParts, Named, Parts, move_to, resident
from .states import State, require_state, warm_states
from .throttle import ThrottledBackend, bucket_of


class Stored:
    """A store in a folder. A closed one is opened by the next request.

    Args:
        name: of the system.
        model: whose prefixes.
        folder: of the store.
        config: how prefixes are stored.
        read_gbps: reads from disk are no faster, in GB/s; `None`: as fast as the disk.
        store_options: of `PrefixStore` (limits, eviction).

    Raises:
        SystemUnavailableError: the library does not serve the model.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        folder: Path,
        config: ContiguousKVConfig,
        *,
        read_gbps: float | None = None,
        **store_options: Any,
    ) -> None:
        self._name = name
        self._model = model
        try:
            _ = ServedModel(model).shape
        except UnsupportedModelError as error:
            raise SystemUnavailableError(f"{name}: {error}") from error
        self._folder = folder
        self._config = config
        self._options = store_options
        self._bucket = bucket_of(read_gbps)
        self._store: PrefixStore | None = None
        # What requests with a suffix use of a prefix, by the ids of both.
        self._named: dict[tuple[bytes, bytes], Named] = {}

    @property
    def name(self) -> str:
        return self._name

    @property
    def states(self) -> tuple[State, ...]:
        """See `System`. Where all of the prefix is used there are no keys to choose by."""
        keys = (State.KEYS_RESIDENT,) if self._config.budget != 1.0 else ()
        return (State.COLD, State.OPEN, *keys, *warm_states(self._model.device))

    def opened(self) -> PrefixStore:
        """The store."""
        if self._store is None:
            self._store = self._new_store(**self._options)
        return self._store

    def _new_store(self, **options: Any) -> PrefixStore:
        if self._bucket is not None:
            if not self._folder.exists():
                PrefixStore(self._folder).close()  # Only a folder that is a store may hold segments.
            options["backend"] = ThrottledBackend(LocalDisk(self._folder), self._bucket)
        return PrefixStore(self._folder, **options)

    def store(self, prefix_ids: torch.Tensor, states: DynamicCache | None = None) -> None:
        """See `System`. Through another store: a cache reads ahead, and what it reads must not stay in our memory. (The
        folder remembers how fast it was read, so that has our speed.)"""
        with self._new_store(host_bytes=0) as store:
            if states is None:
                ContiguousKVCache(self._model, prefix_ids, store=store, config=self._config).close()
            else:
                self._store_states(prefix_ids, states, store)

    def _store_states(self, prefix_ids: torch.Tensor, states: DynamicCache, store: PrefixStore) -> None:
        served = ServedModel(self._model)
        config = self._config
        geometry = served.geometry(config.chunk_size, config.index_bits, config.layers_per_group)
        require_states(states, len(prefix_ids), geometry)
        layers = [(layer.keys[0], layer.values[0], 0) for layer in states.layers]
        persist_rows([(prefix_ids.numpy().astype(np.int64), layers)], store.inner, served.fingerprint(), geometry)
        if store.match(self._model, prefix_ids) < len(prefix_ids):
            raise OSError(f"the prefix of {len(prefix_ids)} tokens could not be stored in {self._folder}")

    def files(self) -> list[Path]:
        return sorted(self._folder.rglob("*.safetensors"))

    @abstractmethod
    def cache(self, prefix_ids: torch.Tensor) -> Any:
        """See `System`."""

    def finish(self, cache: Any) -> RequestStats:
        cache.close()
        found: RequestStats = cache.stats
        return found

    def timeline(self, cache: Any) -> Timeline | None:
        found: Timeline | None = cache.timeline
        return found

    def details(self) -> dict[str, Any]:
        """See `System`."""
        return {}

    def close_store(self) -> None:
        """Let go of everything that is in memory."""
        if self._store is not None:
            self._store.close()
            self._store = None

    # -- states -------------------------------------------------------------------------------------------------------

    def enter(self, state: State, prefix_ids: torch.Tensor, suffix_ids: torch.Tensor | None = None) -> None:
        """See `System`. But for `COLD` the store is open afterwards, and host memory is registered with the device."""
        require_state(self.name, state, self.states)
        if state is State.COLD:
            self.close_store()
        elif state is State.OPEN:
            self.close_store()
            memory = self.opened().inner.memory
            for device in ServedModel(self._model).layers.devices:
                memory.on(device)
        else:
            warm = state is not State.KEYS_RESIDENT
            named = self._named_by(prefix_ids, suffix_ids) if warm else None
            with closing(self.parts(prefix_ids, state is State.WARM_HOST)) as parts:
                move_to(state, parts, self.opened().inner.memory, named)
        drop_page_cache(self.files())

    def parts(self, prefix_ids: torch.Tensor, on_host: bool) -> Parts:
        """What is stored of a prefix. To be closed.

        Args:
            prefix_ids: int64 `(n,)`.
            on_host: bring it to the host's tier, whatever the layers' devices are.

        Raises:
            NotStoredError: it is not stored.
        """
        served = ServedModel(self._model)
        store, ids = self.opened(), prefix_ids.numpy().astype(np.int64)
        found = store.inner.lookup(served.fingerprint(), ids, self._config.chunk_size, count=False)
        if found is None or found.tokens < len(ids):
            raise NotStoredError(f"a prefix of {len(ids)} tokens is not stored in full")
        prefix = AttachedPrefix.of(found, len(ids))
        return ChunkParts(prefix, self._config, served.layers, store, on_host)

    def _named_by(self, prefix_ids: torch.Tensor, suffix_ids: torch.Tensor | None) -> Named | None:
        """What a request with this suffix leaves in memory (found out once); `None`: no suffix was given."""
        if suffix_ids is None:
            return None
        key = key_of(prefix_ids), key_of(suffix_ids)
        if key not in self._named:
            self.close_store()
            cache = self.cache(prefix_ids)
            with torch.no_grad():
                ids = suffix_ids[None].to(self._model.device)
                self._model(input_ids=ids, logits_to_keep=1, **{cache_argument(self._model): cache})
            self.finish(cache)
            with closing(self.parts(prefix_ids, False)) as parts:
                self._named[key] = resident(parts)
        return self._named[key]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close_store()
