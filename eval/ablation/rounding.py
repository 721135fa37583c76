"""Rounds numbers as if they were stored in few bits."""

from __future__ import annotations

import torch


def round_values(values: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Values `(..., head_dim)` rounded to `bits` bits: per token, `group` channels share a minimum and a scale."""
    if bits == 16:
        return values
    grouped = values.float().unflatten(-1, (-1, min(group, values.shape[-1])))
    return _between_ends(grouped, bits, -1).flatten(-2).to(values.dtype)


def round_keys(keys: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Keys `(..., tokens, head_dim)` rounded to `bits` bits per channel.

    With 8 bits, all tokens share a scale, as in the key index. With fewer, `group` tokens share a minimum and a scale.
    """
    if bits == 16:
        return keys
    if bits == 8:
        scale = (keys.float().abs().amax(-2, keepdim=True) / 127).clamp_min(1e-12)
        return ((keys.float() / scale).round() * scale).to(keys.dtype)
    tokens = keys.shape[-2]
    missing = -tokens % group
    padded = torch.cat([keys.float(), keys[..., -1:, :].float().expand(*keys.shape[:-2], missing, -1)], dim=-2)
    grouped = padded.unflatten(-2, (-1, group))
    return _between_ends(grouped, bits, -2).flatten(-3, -2)[..., :tokens, :].to(keys.dtype)


# Steps of a uniform quantiser with 2^bits levels that lose least of a normal distribution, in standard deviations.
_STEPS = {1: 1.596, 2: 0.9957, 3: 0.586, 4: 0.3352}


def round_by_spread(keys: torch.Tensor, bits: int) -> torch.Tensor:
    """Keys `(..., tokens, head_dim)` rounded to 1 to 4 bits: all tokens share a channel's mean and spread."""
    numbers = keys.float()
    spread, mean = torch.std_mean(numbers, dim=-2, keepdim=True, correction=0)
    step = (spread * _STEPS[bits]).clamp_min(1e-12)
    middle = (2**bits - 1) / 2
    codes = ((numbers - mean) / step + middle).round().clamp(0, 2**bits - 1)
    found: torch.Tensor = ((codes - middle) * step + mean).to(keys.dtype)
    return found


def _between_ends(numbers: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    # Minimum and scale are bfloat16, as in packed values.
    steps = 2**bits - 1
    low = numbers.amin(dim, keepdim=True).bfloat16().float()
    scale = ((numbers.amax(dim, keepdim=True) - low) / steps).bfloat16().float().clamp_min(1e-30)
    found: torch.Tensor = ((numbers - low) / scale).round().clamp(0, steps) * scale + low
    return found
