"""Keys in 8 bits and values in 4 bits: what packed and compact extents hold, and back.

A packed extent is the values of one chunk of one layer, three arrays one after the other:

    codes   uint8     [kv_heads, c, head_dim / 2]   lower half of byte i: channel i; upper: channel i + head_dim / 2
    lowest  bfloat16  [kv_heads, c, scales]         one per token and `channels_per_scale` neighbouring channels
    step    bfloat16  [kv_heads, c, scales]

and a value is `lowest + code * step`. Nothing is shared between tokens, so any chunk can be packed by itself.

A compact extent is the keys and the values of one chunk of one layer, five arrays:

    keys    int8      [kv_heads, c, head_dim]
    codes   uint8     [kv_heads, c, head_dim / 2]   of the values, as above
    scale   bfloat16  [kv_heads, head_dim]          a key is `key * scale`
    lowest  bfloat16  [kv_heads, c, scales]
    step    bfloat16  [kv_heads, c, scales]
"""

from __future__ import annotations

import torch

from ..memory.segments import Form
from ..model.kv_geometry import KVGeometry, channels_per_scale

_LARGEST_CODE = 15
_LARGEST_KEY = 127


def pack_chunks(form: Form, kv: torch.Tensor) -> torch.Tensor:
    """Chunks in a form in few bits.

    Args:
        form: `"packed"` or `"compact"`.
        kv: `(chunks, 2 (K, V), kv_heads, c, head_dim)`, any float dtype, on any device; `head_dim` is even.

    Returns:
        uint8 `(chunks, packed_bytes or compact_bytes)`, contiguous, on that device: the same bytes on each.
    """
    return pack_values(kv[:, 1]) if form == "packed" else _pack_compact(kv[:, 0], kv[:, 1])


def _pack_compact(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    largest = torch.full((), float(_LARGEST_KEY), device=keys.device)
    peak = keys.abs().amax(2, keepdim=True).float()
    # As keys are multiplied with what is stored, they are found with what is stored.
    scale = (peak / largest).bfloat16()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    rounded = (keys.float() / scale.float()).round_().clamp_(-_LARGEST_KEY, _LARGEST_KEY).to(torch.int8)
    codes, lowest, step = _packed_values(values)
    return torch.cat([_octets(one) for one in (rounded, codes, scale, lowest, step)], dim=1)


def pack_values(values: torch.Tensor) -> torch.Tensor:
    """Round values to 4 bits.

    Args:
        values: `(chunks, kv_heads, c, head_dim)`, any float dtype, on any device; `head_dim` is even.

    Returns:
        uint8 `(chunks, packed_bytes)`, contiguous, on that device: the same bytes on each.
    """
    return torch.cat([_octets(one) for one in _packed_values(values)], dim=1)


def _packed_values(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, lowest values and steps."""
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
    return both, lowest, step


def _octets(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.contiguous().flatten(1).view(torch.uint8)


def unpack_values(extents: torch.Tensor, geometry: KVGeometry, out: torch.Tensor) -> None:
    """The inverse of `pack_values`, into `out`.

    Args:
        extents: uint8 `(chunks, packed_bytes)`, rows contiguous.
        geometry: whose they are.
        out: `(chunks, kv_heads, c, head_dim)`, any float dtype, any strides, on the same device.
    """
    count = geometry.kv_heads * geometry.chunk_size * (geometry.head_dim // 2)
    _unpack_values(extents[:, :count], extents[:, count:], geometry, out)


def unpack_compact(extents: torch.Tensor, geometry: KVGeometry, keys: torch.Tensor, values: torch.Tensor) -> None:
    """The inverse of `pack_chunks` with the form `"compact"`, into `keys` and `values`.

    Args:
        extents: uint8 `(chunks, compact_bytes)`, rows contiguous.
        geometry: whose they are.
        keys, values: `(chunks, kv_heads, c, head_dim)`, any float dtype, any strides, on the same device.
    """
    g = geometry
    count, scales = g.kv_heads * g.chunk_size * g.head_dim, 2 * g.kv_heads * g.head_dim
    numbers = extents[:, count + count // 2 :]
    scale = numbers[:, :scales].contiguous().view(torch.bfloat16).view(-1, g.kv_heads, 1, g.head_dim)
    # Two passes, as below.
    keys.copy_(extents[:, :count].view(torch.int8).unflatten(1, (g.kv_heads, g.chunk_size, g.head_dim)))
    keys.mul_(scale.to(keys.dtype))
    _unpack_values(extents[:, count : count + count // 2], numbers[:, scales:], g, values)


def _unpack_values(codes: torch.Tensor, numbers: torch.Tensor, g: KVGeometry, out: torch.Tensor) -> None:
    """Values from their codes, uint8 `(chunks, n)`, and the bytes of lowest values and steps."""
    half, scales = g.head_dim // 2, g.head_dim // channels_per_scale(g.head_dim)
    codes = codes.unflatten(1, (g.kv_heads, g.chunk_size, half))
    pairs = numbers.contiguous().view(torch.bfloat16).view(-1, 2, g.kv_heads, g.chunk_size, scales)
    _values(codes, pairs, out)


def unpack_values_of_tokens(
    extents: torch.Tensor, rows: torch.Tensor, places: torch.Tensor, geometry: KVGeometry, out: torch.Tensor
) -> None:
    """The values of single tokens, into `out`: the same numbers as `unpack_values` gives.

    Args:
        extents: uint8 `(chunks, packed_bytes)`, rows contiguous.
        rows, places: of each token, int64 `(n,)`: its row of `extents`, and its position in the chunk.
        geometry: whose they are.
        out: `(n, kv_heads, head_dim)`, any float dtype, any strides, on the same device.
    """
    g = geometry
    half, scales = g.head_dim // 2, g.head_dim // channels_per_scale(g.head_dim)
    count = g.kv_heads * g.chunk_size * half
    # Eight bytes at a time, where there are so many: they are copied one by one.
    wide = (
        torch.int64
        if half % 8 == 0 and extents.stride(0) % 8 == 0 and extents.storage_offset() % 8 == 0
        else torch.uint8
    )
    codes = extents[:, :count].view(wide).unflatten(1, (g.kv_heads, g.chunk_size, -1))[rows, :, places]
    octets = extents[:, count:].unflatten(1, (2, g.kv_heads, g.chunk_size, 2 * scales))[rows, :, :, places]
    _values(codes.view(torch.uint8), octets.view(torch.bfloat16), out)


def _values(codes: torch.Tensor, pairs: torch.Tensor, out: torch.Tensor) -> None:
    """Values from their codes, `(n, ..., head_dim / 2)`, and the lowest values and steps, `(n, 2, ..., scales)`."""
    half, scales = codes.shape[-1], pairs.shape[-1]
    lowest, step = pairs.to(out.dtype)[..., None].unbind(1)
    out[..., :half].copy_(codes & _LARGEST_CODE)
    out[..., half:].copy_(codes >> 4)
    # Two passes: where an operand has one number for a whole row, fused kernels on a CPU go number by number.
    out.unflatten(-1, (scales, -1)).mul_(step).add_(lowest)
