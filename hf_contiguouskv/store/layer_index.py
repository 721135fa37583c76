"""The key index of a layer, in the form in which its geometry stores it."""

from __future__ import annotations

import torch

from ..model.kv_geometry import KVGeometry
from .coarse_index import build_coarse_index
from .key_index import build_key_index


def layer_index(keys: torch.Tensor, geometry: KVGeometry, layer: int) -> tuple[torch.Tensor, ...]:
    """Make the key index of a layer that has one.

    Args:
        keys: `(kv_heads, tokens, head_dim)` of a segment, any float dtype, on any device.
        geometry: of the segment.
        layer: layer index.

    Returns:
        Its tensors in the order of `tensor_places.index_tensors`, contiguous, on the device of the keys.
    """
    index, scale = build_key_index(keys, geometry.chunk_size)
    if layer not in geometry.compact_layers:
        return index, scale
    return *build_coarse_index(index, keys.shape[1]), scale
