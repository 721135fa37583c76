"""Memory that attention reads K and V from."""

from __future__ import annotations

import math

import torch

from ..memory import MemoryTiers


def attention_memory(memory: MemoryTiers, like: torch.Tensor, batch: int, tokens: int) -> torch.Tensor:
    """Memory for K and V, `(2, batch, kv_heads, tokens, head_dim)`, with anything in it.

    Args:
        memory: lends it on a CPU, and makes room for it on an accelerator.
        like: `(..., kv_heads, any, head_dim)`, of the dtype and on the device that are wanted.
        batch, tokens: of the shape.

    Returns:
        an ordinary tensor even in inference mode, so that a cache may be continued outside of it.
    """
    shape = (2, batch, like.shape[-3], tokens, like.shape[-1])
    nbytes = math.prod(shape) * like.dtype.itemsize
    with torch.inference_mode(False):
        if like.device.type == "cpu":
            octets = memory.workspace(nbytes)
            if octets is not None:
                return octets.view(like.dtype).view(shape)
        tier = memory.devices.get(like.device)
        if tier is None:
            return like.new_empty(shape)
        return tier.where_it_fits(nbytes, lambda: like.new_empty(shape))
