"""The coarse index: the key index in 2 bits per number, from which chunks are chosen.

Each number of the key index (`key_index`) is rounded to one of four levels. For each KV head and channel, the tokens of
a *block* of neighbouring chunks share the lowest level and the step from each level to the next. Both are int8 numbers
on the scale of the key index, so the rounded index is an int8 key index as well.

    codes   uint8  [kv_heads, c / 4, n, blocks, head_dim]   chunk `b * n + j` of the segment at [:, :, j, b]; bits 2i
                                                            and 2i + 1: its position `i * c / 4 + p`, at [:, p]
    levels  int8   [kv_heads, 2 (lowest, step), blocks, head_dim]

with `n` chunks in a block. The blocks of a position follow each other, so levels are added to long rows. All arithmetic
is in integers: each device makes the same bytes.
"""

from __future__ import annotations

import torch

from .tensor_places import block_chunks, block_count

_LARGEST_CODE = 3
_LARGEST = 127


def build_coarse_index(index: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a key index to 2 bits.

    Args:
        index: int8 `(kv_heads, c, chunks, head_dim)` from -127 to 127, on any device; `c` is a multiple of 4.
        tokens: how many of its tokens there are; the last chunk may be partial.

    Returns:
        codes and levels (see the module's docstring), contiguous, on that device. Missing tokens have code 0.
    """
    kv_heads, c, chunks, head_dim = index.shape
    per_block, blocks = block_chunks(c), block_count(c, chunks)
    # Missing tokens repeat the last one, so that they change no level.
    in_order = index.transpose(1, 2).flatten(1, 2)[:, :tokens]
    missing = blocks * per_block * c - tokens
    numbers = torch.cat([in_order, in_order[:, -1:].expand(-1, missing, -1)], dim=1).to(torch.int16)
    # (kv_heads, blocks, tokens of a block, head_dim)
    grouped = numbers.unflatten(1, (blocks, -1))
    smallest, largest = grouped.amin(2), grouped.amax(2)
    # Levels lie in the middle of four equal parts of the range.
    step = (largest - smallest + 2) // 4
    lowest = (smallest + largest - 3 * step) // 2
    twice = 2 * (grouped - lowest[:, :, None]) + step[:, :, None]
    codes = (twice // (2 * step[:, :, None]).clamp_min(1)).clamp_(0, _LARGEST_CODE)
    codes = codes.flatten(1, 2)
    codes[:, tokens:] = 0
    # (kv_heads, c, chunks of a block, blocks, head_dim)
    arranged = codes.to(torch.uint8).view(kv_heads, blocks, per_block, c, head_dim).permute(0, 3, 2, 1, 4)
    first, second, third, fourth = arranged.unflatten(1, (4, -1)).unbind(1)
    packed = first | (second << 2) | (third << 4) | (fourth << 6)
    return packed.contiguous(), torch.stack([lowest, step], dim=1).to(torch.int8)


def expand_coarse_index(codes: torch.Tensor, levels: torch.Tensor, out: torch.Tensor) -> None:
    """The rounded key index.

    Args:
        codes, levels: as `build_coarse_index` returns them, of some or all KV heads.
        out: int8 `(kv_heads, c, n, blocks, head_dim)`, contiguous, on the same device, is filled; chunks are in the
            order of the codes.
    """
    lowest, step = levels[:, 0, None, None], levels[:, 1, None, None]
    unsigned = out.view(torch.uint8)
    quarter = codes.shape[1]
    for place in range(4):
        plane = slice(place * quarter, (place + 1) * quarter)
        if place == 0:
            torch.bitwise_and(codes, _LARGEST_CODE, out=unsigned[:, plane])
        else:
            torch.bitwise_right_shift(codes, 2 * place, out=unsigned[:, plane])
            if place < 3:
                unsigned[:, plane].bitwise_and_(_LARGEST_CODE)
    out.mul_(step).add_(lowest)


def in_order_of_text(chunks: torch.Tensor, dim: int) -> torch.Tensor:
    """`(..., n, blocks, ...)` in the order of the codes, `n` along `dim`, as `(..., n * blocks, ...)` in that of the
    text."""
    return chunks.transpose(dim, dim + 1).flatten(dim, dim + 1)
