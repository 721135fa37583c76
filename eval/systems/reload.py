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

from hf_contiguouskv import ContiguousKVConfig, RequestStats
from hf_contiguouskv.model.served_model import ServedModel

from ..timing import drop_page_cache, storage_bytes_read
from .attention import GroupedAttention, grouped_cache
from .base import NotStoredError, key_of, require_states
from .in_memory import prefill
from .states import State, require_state
from .throttle import bucket_of

_PIECE = 2**24


class Reload:
    """One file for each prefix.

    Args:
        model: whose prefixes.
        folder: where files lie.
        read_gbps: what comes from the disk comes no faster, in GB/s; `None`: as fast as the disk.
    """

    name = "reload"
    states = (State.COLD, State.WARM_HOST)

    def __init__(self, model: Any, folder: Path, *, read_gbps: float | None = None) -> None:
        self._model = model
        self._folder = folder
        self._bucket = bucket_of(read_gbps)
        self._stats = RequestStats()
        self._stored: dict[bytes, Path] = {}
        self._attention = GroupedAttention(model)
        folder.mkdir(parents=True, exist_ok=True)

    def _file(self, prefix_ids: torch.Tensor) -> Path:
        return self._folder / f"{hashlib.blake2b(key_of(prefix_ids), digest_size=16).hexdigest()}.safetensors"

    def store(self, prefix_ids: torch.Tensor, states: DynamicCache | None = None) -> None:
        path, key = self._file(prefix_ids), key_of(prefix_ids)
        if path.exists():
            return
        if states is None:
            states = prefill(self._model, prefix_ids)
        else:
            geometry = ServedModel(self._model).geometry(ContiguousKVConfig().chunk_size)
            require_states(states, len(prefix_ids), geometry)
        for before in [one for one in self._stored if key.startswith(one)]:
            self._stored.pop(before).unlink()  # A chat goes on: nobody asks for its beginning any more.
        tensors = {}
        for number, layer in enumerate(states.layers):
            tensors[f"keys.{number}"] = layer.keys.cpu().contiguous()
            tensors[f"values.{number}"] = layer.values.cpu().contiguous()
        if len({tensor.data_ptr() for tensor in tensors.values()}) < len(tensors):
            # Layers of made-up states share their memory, which a safetensors file does not allow.
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        save_file(tensors, path)
        self._stored[key] = path

    def files(self) -> list[Path]:
        return sorted(self._folder.glob("*.safetensors"))

    def enter(self, state: State, prefix_ids: torch.Tensor, suffix_ids: torch.Tensor | None = None) -> None:
        """See `System`. Host memory is the page cache here: nothing else is left of a request."""
        require_state(self.name, state, self.states)
        path = self._stored_file(prefix_ids)
        if state is State.COLD:
            drop_page_cache([path])
            return
        with path.open("rb") as file:
            while file.read(_PIECE):
                pass

    def _stored_file(self, prefix_ids: torch.Tensor) -> Path:
        path = self._file(prefix_ids)
        if not path.exists():
            raise NotStoredError(f"there is no {path}")
        return path

    def cache(self, prefix_ids: torch.Tensor) -> Any:
        """See `System`.

        Raises:
            NotStoredError: the prefix was not stored.
        """
        path = self._stored_file(prefix_ids)
        self._attention.begin()
        began = 0.0 if self._bucket is None else self._bucket.reserve(0)
        started, before = time.perf_counter(), storage_bytes_read()
        cache = grouped_cache(self._model)
        with safe_open(path, framework="pt", device=str(self._model.device)) as file:
            layers = len(file.keys()) // 2
            for layer in range(layers):
                cache.update(file.get_tensor(f"keys.{layer}"), file.get_tensor(f"values.{layer}"), layer)
                if self._bucket is not None:
                    # The disk tells only afterwards what came from it: a slower one would have taken until then.
                    read = storage_bytes_read() - before
                    self._bucket.wait_until(began + read / self._bucket.bytes_per_s)
        # All of it is read before the model starts, and all of it is used.
        waited = time.perf_counter() - started
        read = storage_bytes_read() - before
        self._stats = RequestStats(
            prefix_tokens=len(prefix_ids),
            tokens_from_store=len(prefix_ids),
            bytes_read=read,
            bytes_used=path.stat().st_size,
            io_wait_s=waited,
            hits={"device": 0, "host": 0 if read else layers, "disk": layers if read else 0},
        )
        return cache

    def timeline(self, cache: Any) -> None:
        """See `System`."""

    def finish(self, cache: Any) -> RequestStats:
        self._attention.end()
        return self._stats

    def details(self) -> dict[str, Any]:
        """See `System`."""
        return self._attention.details()

    def __enter__(self) -> Reload:
        return self

    def __exit__(self, *exception: object) -> None:
        self._attention.end()
