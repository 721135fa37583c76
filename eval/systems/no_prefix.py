"""The suffix alone: the floor of every system's time."""

from __future__ import annotations

from typing import Any

import torch

from .attention import ROOM, PrunedLayer
from .base import SystemUnavailableError
from .in_memory import buffered_cache
from .recompute import Recompute


class NoPrefix(Recompute):
    """The suffix at its place, attending to itself only. Its answers say nothing.

    Args:
        model: whose requests.

    Raises:
        SystemUnavailableError: the library's attention does not serve the model.
    """

    name = "no_prefix"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        if self._attention.note is not None:
            raise SystemUnavailableError(f"{self.name} needs the library's attention: {self._attention.note}")
        self._cache = buffered_cache(model, ROOM, PrunedLayer)

    def cache(self, prefix_ids: torch.Tensor) -> Any:
        """See `System`: one that holds nothing of the prefix, and says that the prefix is there."""
        self._attention.begin()
        for layer in self._cache.layers:
            layer.reset()
            layer.missing = len(prefix_ids)
        return self._cache
