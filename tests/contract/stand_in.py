"""A `DynamicCache` prefilled with the prefix, behind the constructor of `ContiguousKVCache`.

`CONTRACT_STAND_IN=1 pytest tests/contract` runs the suite against it: what fails then is wrong in a test, not in the
library. It knows no store, no budget and no padding before the prefix; tests of those are marked `needs_library`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from .models import CACHE


class StandInStore:
    def __init__(self, path: str | Path, **_: Any) -> None:
        self.path = Path(path)

    def __enter__(self) -> StandInStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing is open."""


class StandInCache(DynamicCache):
    def __init__(self, model: Any, prefix_ids: torch.Tensor | None = None, **_: Any) -> None:
        super().__init__(config=model.config)
        self.prefix_ids = prefix_ids
        if prefix_ids is not None:
            with torch.no_grad():
                model(prefix_ids.reshape(1, -1), **{CACHE: self})
        self._kept = [
            (layer.keys, layer.values, getattr(layer, "cumulative_length", 0)) if layer.is_initialized else None
            for layer in self.layers
        ]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        if layer_idx < len(self.layers) and self.layers[layer_idx].is_initialized:
            layer = self.layers[layer_idx]
            if layer.keys.shape[0] == 1 and key_states.shape[0] > 1:
                layer.keys = layer.keys.expand(key_states.shape[0], -1, -1, -1)
                layer.values = layer.values.expand(key_states.shape[0], -1, -1, -1)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def reset(self) -> None:
        super().reset()
        for layer, kept in zip(self.layers, self._kept, strict=False):
            if kept is not None:
                layer.lazy_initialization(kept[0], kept[1])
                layer.keys, layer.values = kept[0], kept[1]
                if hasattr(layer, "cumulative_length"):
                    layer.cumulative_length = kept[2]

    def close(self) -> None:
        """Nothing is open."""
