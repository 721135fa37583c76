"""This library: the published method, and our default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from hf_contiguouskv import ContiguousKVCache, ContiguousKVConfig
from hf_contiguouskv.model.transformers_internals import cache_argument

from .stored import Stored


class ContiguousKV(Stored):
    """Requests are served as prefixes are stored: by the `config` of `Stored`.

    Args:
        name, model, folder, config, store_options: see `Stored`.
        keys_stay: whether `forget` leaves keys in memory: they are brought there before the first request, and the
            store stays open, as in a process that serves requests. Chunks are cold all the same.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        folder: Path,
        config: ContiguousKVConfig,
        keys_stay: bool = False,
        **store_options: Any,
    ) -> None:
        super().__init__(name, model, folder, config, **store_options)
        self._keys_stay = keys_stay

    def store(self, prefix_ids: torch.Tensor, states: DynamicCache | None = None) -> None:
        super().store(prefix_ids, states)
        if self._keys_stay:
            cache = self.cache(prefix_ids)
            with torch.no_grad():
                last = prefix_ids[-1:][None].to(self._model.device)
                self._model(input_ids=last, **{cache_argument(self._model): cache})
            self.finish(cache)

    def cache(self, prefix_ids: torch.Tensor) -> Any:
        return ContiguousKVCache(self._model, prefix_ids, store=self.opened(), config=self._config)

    def forget(self) -> None:
        if self._keys_stay and self._store is not None:
            self._store.inner.memory.drop_chunks()
        else:
            super().forget()
