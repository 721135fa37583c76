"""This library: the published method, and our default."""

from __future__ import annotations

from typing import Any

import torch

from hf_contiguouskv import ContiguousKVCache

from .stored import Stored


class ContiguousKV(Stored):
    """Requests are served as prefixes are stored: by the `config` of `Stored`, which has the arguments."""

    def cache(self, prefix_ids: torch.Tensor) -> Any:
        return ContiguousKVCache(self._model, prefix_ids, store=self.opened(), config=self._config)
