"""What a segment says twice must be the same: copies and approximations are made again from the exact keys and values.

Key index, leader keys and chunks in few bits steer what is chosen and what attention gets at budgets below 1.0.
Their checksums show that they arrived as they were sent, not that they are what the payload gives.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..errors import SegmentCorruptError
from .layer_index import layer_index
from .output import SegmentOutput
from .packing import pack_chunks
from .segment import Segment
from .small_forms import small_forms
from .tensor_places import index_tensors


def derived_problems(segment: Segment) -> Iterator[str]:
    """What in a segment, whose checksums match, is not what its payload gives; in words, layer by layer.

    Memory for a few copies of one layer is taken, `[chunks, 2, kv_heads, c, head_dim]`, however many lie in a group.

    Raises:
        SegmentCorruptError: it was cut, or holds numbers that are not finite, or others than its checksums tell.
        SegmentReadError: the storage failed.
    """
    g, tokens = segment.geometry, segment.num_tokens
    in_last = tokens - (segment.num_chunks - 1) * g.chunk_size
    for layer in range(g.num_layers):
        kv = exact_layer(segment, layer)
        if in_last < g.chunk_size and _octets(kv[-1, :, :, in_last:]).any():
            yield f"payload of layer {layer}: what lies past the last token is not zeros"
        if layer in g.leader_layers and not _same(segment, f"leader_keys.{layer}", kv[:, 0]):
            yield f"leader_keys.{layer}: not the keys of the payload"
        names = index_tensors(g, layer)
        if names:
            in_order = kv[:, 0].transpose(0, 1).flatten(1, 2)[:, :tokens]
            made = layer_index(in_order, g, layer)
            # The scales first: where they are wrong, so is all that is measured by them.
            for name, tensor in reversed(list(zip(names, made, strict=True))):
                if not _same(segment, name, tensor):
                    yield f"{name}: not that of the payload's keys"
                    break
        for small in small_forms(g):
            if layer in small.layers and not _same(segment, small.tensor(layer), pack_chunks(small.form, kv)):
                yield f"{small.tensor(layer)}: not the payload in few bits"


def exact_layer(segment: Segment, layer: int) -> torch.Tensor:
    """K and V of a layer, `[chunks, 2, kv_heads, c, head_dim]`, compared with their checksums.

    Raises:
        SegmentCorruptError: it was cut, or holds numbers that are not finite, or others than its checksums tell.
        SegmentReadError: the storage failed.
    """
    g = segment.geometry
    if g.layers_per_group == 1:
        return segment.read_tensor(f"payload.{layer}")[:, 0]
    places, pieces = segment.extents(), []
    for chunk, checksum in enumerate(segment.run_checksums(layer, 0, segment.num_chunks)):
        offset = places.offset(layer, chunk)
        octets = segment.read_bytes(offset, places.nbytes)
        if segment.checksum(octets) != checksum:
            where = segment.describe(offset)
            raise SegmentCorruptError(f"{segment.name}: {where}: bytes do not match their checksum", segment)
        segment.require_finite(offset, memoryview(octets))
        pieces.append(octets)
    shape = (segment.num_chunks, 2, g.kv_heads, g.chunk_size, g.head_dim)
    return torch.frombuffer(bytearray(b"".join(pieces)), dtype=g.dtype).reshape(shape)


def write_again(segment: Segment, output: SegmentOutput) -> None:
    """Write the exact K and V of `segment`, compared with their checksums, and all that is made of them."""
    geometry, tokens = output.header.geometry, segment.num_tokens
    for layer in range(geometry.num_layers):
        kv = exact_layer(segment, layer)
        output.write_chunks(layer, 0, kv)
        if index_tensors(geometry, layer):
            keys = kv[:, 0].transpose(0, 1).flatten(1, 2)[:, :tokens]
            output.write_index(layer, layer_index(keys, geometry, layer))


def _same(segment: Segment, name: str, made: torch.Tensor) -> bool:
    return torch.equal(_octets(segment.read_tensor(name)), _octets(made))


def _octets(tensor: torch.Tensor) -> torch.Tensor:
    # Bits, not numbers: -0.0 is not 0.0 here.
    return tensor.contiguous().reshape(-1).view(torch.uint8)
