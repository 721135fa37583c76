"""Rivals at their best on an accelerator: the same attention for a `DynamicCache` as for the library's own caches.

Behind a prefix there is a mask, and with a mask transformers copies K and V for each query head before attention: seven
times 67 MB in each layer of a 7B model behind 32K tokens. Caches made here go past that, as ours do. (On a CPU
`TRANSFORMERS_SDPA_FORCE_GQA=1` does the same, and nothing is changed here.)
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from hf_contiguouskv.errors import UnsupportedModelError
from hf_contiguouskv.model.attention import Installation, tagged
from hf_contiguouskv.model.served_model import ServedModel

from .states import on_accelerator


class GroupedLayer(DynamicLayer):
    """A layer of a `DynamicCache` whose K and V the library's attention takes as they are. One row, no padding."""

    plain = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        super().update(key_states, value_states, *args, **kwargs)
        return self.shown()

    def shown(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V for attention, all of them."""
        return (tagged(self.keys, self) if on_accelerator(self.keys.device) else self.keys), self.values

    def visible_kv(
        self, query: torch.Tensor, attention_mask: torch.Tensor | None, options: Mapping[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.keys, self.values


def grouped_cache(model: Any) -> DynamicCache:
    """An empty `DynamicCache` for `model`, of such layers where they are of use."""
    if not on_accelerator(model.device):
        return DynamicCache(config=model.config)
    plan = ServedModel(model).layers
    if len(plan.full_layers) < len(plan.windows):
        return DynamicCache(config=model.config)
    cache = DynamicCache()
    cache.layers = [GroupedLayer() for _ in plan.windows]
    cache.layer_class_to_replicate = None
    return cache


class GroupedAttention:
    """Has a model use the library's attention while a request runs.

    Args:
        model: whose requests. On a CPU nothing is changed, nor where it does not use torch's own attention.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._installation: Installation | None = None

    def begin(self) -> None:
        """A request begins; one that was given up is over."""
        self.end()
        if on_accelerator(self._model.device):
            with suppress(UnsupportedModelError):
                self._installation = ServedModel(self._model).installation()
                self._installation.activate()

    def end(self) -> None:
        """The request is over."""
        if self._installation is not None:
            self._installation.release()
            self._installation = None
