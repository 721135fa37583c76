"""Values in 4 bits: what a packed extent holds, and back.

A packed extent is the values of one chunk of one layer, three arrays one after the other:

    codes   uint8     [kv_heads, c, head_dim / 2]   lower half of byte i: channel i; upper: channel i + head_dim / 2
    lowest  bfloat16  [kv_heads, c, scales]         one per token and `channels_per_scale` neighbouring channels
    step    bfloat16  [kv_heads, c, scales]

and a value is `lowest + code * step`. Nothing is shared between tokens, so any chunk can be packed by itself.
"""

from __future__ import annotations

import torch

from ..model.kv_geometry import KVGeometry, channels_per_scale

_LARGEST_CODE = 15


def pack_values(values: torch.Tensor) -> torch.Tensor:
    """Round values to 4 bits.

    Args:
        values: `(chunks, kv_heads, c, head_dim)`, any float dtype, on any device; `head_dim` is even.

    Returns:
        uint8 `(chunks, packed_bytes)`, contiguous, on that device: the same bytes on each.
    """
    head_dim = values.shape[-1]
    groups = values.float().unflatten(-1, (-1, channels_per_scale(head_dim)))
    lowest = groups.amin(-1).bfloat16()
    # Above zero, or what is alike in all channels would be divided by nothing.
    # (Divided by a tensor: by a number, a GPU multiplies with its reciprocal.)
    largest = torch.full((), float(_LARGEST_CODE), device=values.device)
    step = ((groups.amax(-1) - lowest.float()) / largest).bfloat16()
    step = torch.where(step > 0, step, torch.ones_like(step))
    # As codes are multiplied with what is stored, they are found with what is stored.
    codes = (groups - lowest.float()[..., None]) / step.float()[..., None]
    codes = codes.round_().clamp_(0, _LARGEST_CODE).to(torch.uint8).flatten(-2)
    half = head_dim // 2
    both = codes[..., :half] | (codes[..., half:] << 4)
    return torch.cat([both.flatten(1), _octets(lowest), _octets(step)], dim=1)


def _octets(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.flatten(1).view(torch.uint8)


def unpack_values(extents: torch.Tensor, geometry: KVGeometry, out: torch.Tensor) -> None:
    """The inverse of `pack_values`, into `out`.

    Args:
        extents: uint8 `(chunks, packed_bytes)`, rows contiguous.
        geometry: whose they are.
        out: `(chunks, kv_heads, c, head_dim)`, any float dtype, any strides, on the same device.
    """
    g = geometry
    half, scales = g.head_dim // 2, g.head_dim // channels_per_scale(g.head_dim)
    count = g.kv_heads * g.chunk_size * half
    codes = extents[:, :count].view(-1, g.kv_heads, g.chunk_size, half)
    pairs = extents[:, count:].contiguous().view(torch.bfloat16).view(-1, 2, g.kv_heads, g.chunk_size, scales)
    lowest, step = pairs.to(out.dtype)[..., None].unbind(1)
    out[..., :half].copy_(codes & _LARGEST_CODE)
    out[..., half:].copy_(codes >> 4)
    # Two passes: where an operand has one number for a whole row, fused kernels on a CPU go number by number.
    out.unflatten(-1, (scales, -1)).mul_(step).add_(lowest)
