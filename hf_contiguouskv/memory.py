"""Memory tiers above the disk: what this process keeps so that it need not read it again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable

import torch

from .errors import ConfigError


class HostTier:
    """A thread-safe table of CPU tensors in host memory, bounded in bytes; the least recently used go first.

    Args:
        max_bytes: bound on the bytes of all tensors together; 0 keeps nothing.

    Raises:
        ConfigError: `max_bytes` is negative.

    Tensors are shared, not copied: treat what `get` returns, and what was given to `put`, as read-only.
    """

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 0:
            raise ConfigError(f"max_bytes must be 0 or more, got {max_bytes}")
        self.max_bytes = max_bytes
        self._tensors: OrderedDict[Hashable, torch.Tensor] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> torch.Tensor | None:
        """The tensor kept under `key`, or `None`."""
        with self._lock:
            tensor = self._tensors.get(key)
            if tensor is not None:
                self._tensors.move_to_end(key)
            return tensor

    def put(self, key: Hashable, tensor: torch.Tensor) -> None:
        """Keep `tensor` under `key`, in place of what was there; a tensor larger than the bound is not kept."""
        with self._lock:
            old = self._tensors.pop(key, None)
            if old is not None:
                self._bytes -= _held_bytes(old)
            size = _held_bytes(tensor)
            if size > self.max_bytes:
                return
            self._tensors[key] = tensor
            self._bytes += size
            while self._bytes > self.max_bytes:
                _, victim = self._tensors.popitem(last=False)
                self._bytes -= _held_bytes(victim)

    @property
    def bytes_used(self) -> int:
        """Bytes of all tensors that are kept."""
        return self._bytes

    def __len__(self) -> int:
        return len(self._tensors)

    def clear(self) -> None:
        """Forget all tensors."""
        with self._lock:
            self._tensors.clear()
            self._bytes = 0


def _held_bytes(tensor: torch.Tensor) -> int:
    # A view keeps the whole storage alive, so that is what it costs.
    return tensor.untyped_storage().nbytes()
