"""Where the tensors of a segment lie; all of it follows from the geometry and the numbers of chunks and tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..hardware.aligned_memory import PAGE
from ..model.kv_geometry import SAFETENSORS_DTYPES, KVGeometry

_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1, "I64": 8, "U64": 8}


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor of a segment lies: `start` and `nbytes` in bytes from the beginning of the data section."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


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
    for layer in g.indexed_layers:
        yield f"key_scale.{layer}", "F32", (g.kv_heads, g.head_dim), 8
    for layer in g.packed_layers:
        yield f"values4.{layer}", "U8", (chunks, g.packed_bytes), PAGE
    yield "token_ids", "I64", (tokens,), 8
    yield "checksums.payload", "U64", (g.num_layers, chunks), 8
    if g.packed_layers:
        yield "checksums.values4", "U64", (len(g.packed_layers), chunks), 8
    checked = g.num_groups + len(g.leader_layers) + 2 * len(g.indexed_layers) + len(g.packed_layers) + 1
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
        nbytes = _ITEM_BYTES[dtype]
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
