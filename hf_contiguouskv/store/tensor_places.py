"""Where the tensors of a segment lie; all of it follows from the geometry and the numbers of chunks and tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..hardware.aligned_memory import PAGE
from ..model.kv_geometry import SAFETENSORS_DTYPES, KVGeometry
from .small_forms import small_forms

# Tokens that share the levels of a coarse index, if a chunk has no more.
_BLOCK_TOKENS = 64

TORCH_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I64": torch.int64,
    "U64": torch.uint64,
}


def block_chunks(chunk_size: int) -> int:
    """Chunks of `chunk_size` tokens that share the levels of a coarse index (`coarse_index`)."""
    return max(1, _BLOCK_TOKENS // chunk_size)


def block_count(chunk_size: int, chunks: int) -> int:
    """Blocks of a coarse index of `chunks` chunks; the last one may lack some."""
    return -(-chunks // block_chunks(chunk_size))


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor of a segment lies: `start` and `nbytes` in bytes from the beginning of the data section."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def index_tensors(geometry: KVGeometry, layer: int) -> tuple[str, ...]:
    """Names of the tensors of a layer's key index; empty: it has none."""
    if layer in geometry.indexed_layers:
        return f"key_index.{layer}", f"key_scale.{layer}"
    if layer in geometry.compact_layers:
        return f"coarse_index.{layer}", f"coarse_levels.{layer}", f"key_scale.{layer}"
    return ()


def _tensors(geometry: KVGeometry, chunks: int, tokens: int) -> Iterator[tuple[str, str, tuple[int, ...], int]]:
    """Name, dtype, shape and alignment of every tensor of a segment, in file order."""
    g = geometry
    dtype = SAFETENSORS_DTYPES[g.dtype]
    for group in range(g.num_groups):
        shape = (chunks, g.group_layers(group), 2, g.kv_heads, g.chunk_size, g.head_dim)
        yield f"payload.{group}", dtype, shape, PAGE
    for layer in g.leader_layers:
        yield f"leader_keys.{layer}", dtype, (chunks, g.kv_heads, g.chunk_size, g.head_dim), PAGE
    for layer in g.indexed_layers:
        yield f"key_index.{layer}", "I8", (g.kv_heads, g.chunk_size, chunks, g.head_dim), PAGE
    per_block, blocks = block_chunks(g.chunk_size), block_count(g.chunk_size, chunks)
    for layer in g.compact_layers:
        codes = (g.kv_heads, g.chunk_size // 4, per_block, blocks, g.head_dim)
        yield f"coarse_index.{layer}", "U8", codes, PAGE
    for layer in g.compact_layers:
        yield f"coarse_levels.{layer}", "I8", (g.kv_heads, 2, blocks, g.head_dim), 8
    for layer in sorted(g.indexed_layers + g.compact_layers):
        yield f"key_scale.{layer}", "F32", (g.kv_heads, g.head_dim), 8
    for small in small_forms(g):
        for layer in small.layers:
            yield small.tensor(layer), "U8", (chunks, small.nbytes), PAGE
    yield "token_ids", "I64", (tokens,), 8
    yield "checksums.payload", "U64", (g.num_layers, chunks), 8
    for small in small_forms(g):
        yield small.checksums, "U64", (len(small.layers), chunks), 8
    checked = g.num_groups + len(g.leader_layers) + 2 * len(g.indexed_layers) + len(g.packed_layers) + 1
    checked += 4 * len(g.compact_layers)
    yield "checksums.tensors", "U64", (checked,), 8


def place_tensors(geometry: KVGeometry, chunks: int, tokens: int) -> dict[str, TensorPlace]:
    """The place of every tensor of a segment of `chunks` chunks and `tokens` tokens, padding included."""
    places: dict[str, TensorPlace] = {}
    end = 0
    for name, dtype, shape, alignment in _tensors(geometry, chunks, tokens):
        gap = -end % alignment
        if gap:
            # The format allows no holes between tensors, so the gap is a tensor too.
            places[f"padding.{len(places)}"] = TensorPlace("U8", (gap,), end, gap)
            end += gap
        nbytes = TORCH_DTYPES[dtype].itemsize
        for size in shape:
            nbytes *= size
        places[name] = TensorPlace(dtype, shape, end, nbytes)
        end += nbytes
    return places


def places_as_json(places: Mapping[str, TensorPlace]) -> dict[str, Any]:
    """The places as a safetensors header writes them."""
    return {
        name: {"dtype": p.dtype, "shape": list(p.shape), "data_offsets": [p.start, p.start + p.nbytes]}
        for name, p in places.items()
    }
