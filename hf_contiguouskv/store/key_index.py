"""The key index: keys in 8 bits, from which chunks are chosen."""

from __future__ import annotations

import torch


def build_key_index(keys: torch.Tensor, chunk_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise keys to int8 with one scale per KV head and channel.

    Args:
        keys: `(kv_heads, tokens, head_dim)`, any float dtype, on any device.
        chunk_size: tokens per chunk; missing tokens of the last chunk become zeros.

    Returns:
        index: int8 `(kv_heads, chunk_size, chunks, head_dim)`, contiguous, on the device of the keys.
        scale: float32 `(kv_heads, head_dim)`, there as well; `index * scale` approximates the keys.
    """
    kv_heads, tokens, head_dim = keys.shape
    chunks = -(-tokens // chunk_size)
    peak = keys.abs().amax(1).float()
    # (Divided by a tensor: by a number, a GPU multiplies with its reciprocal. Each device makes the same index.)
    scale = torch.where(peak > 0, peak / torch.full((), 127.0, device=peak.device), torch.ones_like(peak))
    quantised = (keys.float() / scale[:, None]).round_().to(torch.int8)
    index = torch.zeros(kv_heads, chunk_size, chunks, head_dim, dtype=torch.int8, device=keys.device)
    whole = tokens // chunk_size
    full = quantised[:, : whole * chunk_size].view(kv_heads, whole, chunk_size, head_dim)
    index[:, :, :whole].copy_(full.transpose(1, 2))
    if tokens % chunk_size:
        index[:, : tokens % chunk_size, whole].copy_(quantised[:, whole * chunk_size :])
    return index, scale
