"""Scratch memory that a request's layers reuse in turn."""

from __future__ import annotations

import math

import torch


class Scratch:
    """Memory for products of keys and queries that all layers reuse, because allocating it costs more than the
    arithmetic on it."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")

    def of(self, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        """An uninitialised CPU tensor of this shape and dtype; valid until the next call."""
        size = math.prod(shape) * dtype.itemsize
        if len(self._memory) < size:
            with torch.inference_mode(False):
                self._memory = torch.empty(size, dtype=torch.uint8, device="cpu")
        return self._memory[:size].view(dtype).view(shape)
