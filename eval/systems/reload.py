"""What a transformers user does today: the whole cache saved as one safetensors file, loaded, used."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import DynamicCache

from hf_contiguouskv import RequestStats

from .base import NotStoredError, key_of
from .in_memory import prefill


class Reload:
    """One file for each prefix.

    Args:
        model: whose prefixes.
        folder: where files lie.
    """

    name = "reload"

    def __init__(self, model: Any, folder: Path) -> None:
        self._model = model
        self._folder = folder
        self._stats = RequestStats()
        folder.mkdir(parents=True, exist_ok=True)

    def _file(self, prefix_ids: torch.Tensor) -> Path:
        return self._folder / f"{hashlib.blake2b(key_of(prefix_ids), digest_size=16).hexdigest()}.safetensors"

    def store(self, prefix_ids: torch.Tensor) -> None:
        """See `System`."""
        if self._file(prefix_ids).exists():
            return
        tensors = {}
        for number, layer in enumerate(prefill(self._model, prefix_ids).layers):
            tensors[f"keys.{number}"] = layer.keys.cpu().contiguous()
            tensors[f"values.{number}"] = layer.values.cpu().contiguous()
        save_file(tensors, self._file(prefix_ids))

    def files(self) -> list[Path]:
        """See `System`."""
        return sorted(self._folder.glob("*.safetensors"))

    def forget(self) -> None:
        """See `System`: nothing stays in the process."""

    def cache(self, prefix_ids: torch.Tensor) -> Any:
        """See `System`.

        Raises:
            NotStoredError: the prefix was not stored.
        """
        path = self._file(prefix_ids)
        if not path.exists():
            raise NotStoredError(f"there is no {path}")
        started = time.perf_counter()
        cache = DynamicCache(config=self._model.config)
        with safe_open(path, framework="pt", device=str(self._model.device)) as file:
            for layer in range(len(file.keys()) // 2):
                cache.update(file.get_tensor(f"keys.{layer}"), file.get_tensor(f"values.{layer}"), layer)
        nbytes = path.stat().st_size
        # All of it is read before the model starts, and all of it is used.
        self._stats = RequestStats(bytes_read=nbytes, bytes_used=nbytes, io_wait_s=time.perf_counter() - started)
        return cache

    def timeline(self, cache: Any) -> None:
        """See `System`."""

    def finish(self, cache: Any) -> RequestStats:
        """See `System`."""
        return self._stats

    def __enter__(self) -> Reload:
        return self

    def __exit__(self, *exception: object) -> None:
        pass
