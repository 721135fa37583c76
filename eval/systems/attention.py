"""The same attention for all systems: that of the library, for caches that are no `ContiguousKVCache`.

Behind a prefix there is a mask, and with a mask transformers copies K and V for each query head before attention, and
makes the mask of the kernel again in every layer. Caches made here go past that, as ours do, on a CPU and on an
accelerator.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from hf_contiguouskv.errors import UnsupportedModelError
from hf_contiguouskv.model.attention import Installation, tagged
from hf_contiguouskv.model.served_model import ServedModel

# Tokens for which there is room behind a prefix.
ROOM = 256


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
        return tagged(self.keys, self), self.values

    def visible_kv(
        self, query: torch.Tensor, attention_mask: torch.Tensor | None, options: Mapping[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.keys, self.values


class BufferedLayer(GroupedLayer):
    """A layer with room behind what it holds: new K and V are written there, and nothing is copied.

    Args:
        buffer: K and V, `(2, 1, kv_heads, capacity, head_dim)`; the caller's, and written to.
        tokens: tokens that it holds already.
    """

    def __init__(self, buffer: torch.Tensor, tokens: int = 0) -> None:
        super().__init__()
        self.use(buffer, tokens)

    def use(self, buffer: torch.Tensor, tokens: int) -> None:
        """Hold the first `tokens` tokens of a buffer from now on."""
        self._buffer = buffer
        self.dtype, self.device, self.is_initialized = buffer.dtype, buffer.device, True
        self._hold(tokens)

    def _hold(self, tokens: int) -> None:
        self._tokens = tokens
        self.keys, self.values = self._buffer[0, :, :, :tokens], self._buffer[1, :, :, :tokens]

    def reserve(self, capacity: int) -> None:
        """Have room for `capacity` tokens; where there is none yet, what is held moves to a larger buffer."""
        two, rows, heads, before, head_dim = self._buffer.shape
        if capacity > before:
            larger = self._buffer.new_empty(two, rows, heads, capacity, head_dim)
            larger[:, :, :, : self._tokens] = self._buffer[:, :, :, : self._tokens]
            self._buffer = larger
            self._hold(self._tokens)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        begin = self._tokens
        end = begin + key_states.shape[2]
        if end > self._buffer.shape[3]:
            self.reserve(end + max(ROOM, end // 8))
        self._buffer[0, :, :, begin:end] = key_states
        self._buffer[1, :, :, begin:end] = value_states
        self._hold(end)
        return self.shown()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens.

        Args:
            tokens_to_remove: a negative number: so many go.

        Raises:
            ValueError: it is positive.
        """
        if tokens_to_remove > 0:
            raise ValueError("crop takes a negative number")
        self._hold(self._tokens + tokens_to_remove)

    def reset(self) -> None:
        self._hold(0)

    def get_seq_length(self) -> int:
        return self._tokens


class PrunedLayer(BufferedLayer):
    """A layer that holds some tokens of a prefix and is as long as the whole prefix.

    What it holds counts as the last tokens of the prefix, as in the library's own layers.

    Attributes:
        missing: tokens of the prefix that it does not hold.
    """

    missing = 0

    def get_seq_length(self) -> int:
        return self.missing + self._tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._tokens + query_length, self.missing


def why_not_grouped(model: Any) -> str | None:
    """Why a model cannot use the library's attention in caches of this module; `None`: it can."""
    try:
        served = ServedModel(model)
        if any(window is not None for window in served.windows):
            return "the model has layers with sliding windows: transformers' own attention and layers are used"
        served.installation()
    except UnsupportedModelError as error:
        return f"transformers' own attention is used: {error}"
    return None


def grouped_cache(model: Any) -> DynamicCache:
    """An empty `DynamicCache` for `model`, of layers for the library's attention if the model can use it."""
    if why_not_grouped(model) is not None:
        return DynamicCache(config=model.config)
    return cache_of([GroupedLayer() for _ in ServedModel(model).windows])


def cache_of(layers: list[Any]) -> DynamicCache:
    """A `DynamicCache` of these layers."""
    cache = DynamicCache()
    cache.layers = layers
    cache.layer_class_to_replicate = None
    return cache


class GroupedAttention:
    """Has a model use the library's attention while a request runs.

    Args:
        model: whose requests.

    Attributes:
        note: why the model uses its own attention instead; `None`: it does not.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._installation: Installation | None = None
        self.note = why_not_grouped(model)

    def begin(self) -> None:
        """A request begins; one that was given up is over."""
        self.end()
        if self.note is None:
            self._installation = ServedModel(self._model).installation()
            self._installation.activate()

    def end(self) -> None:
        """The request is over."""
        if self._installation is not None:
            self._installation.release()
            self._installation = None

    def details(self) -> dict[str, Any]:
        """See `System.details`."""
        return {} if self.note is None else {"attention": self.note}
