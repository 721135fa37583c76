"""Turns K/V that a model has just computed into the chunks, exact and in few bits, and the key index of a segment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate

import torch

from ..hardware import accelerator as hardware
from ..hardware.accelerator import Device
from ..store.layer_index import layer_index
from ..store.packing import pack_chunks
from ..store.small_forms import small_forms
from ..store.tensor_places import index_tensors
from ..store.writer import SegmentWriter

# Tensors that cross together are aligned to this many bytes, so that any dtype can be read in place.
_ALIGNED = 64


class SegmentFeed:
    """Feeds the K/V of one token sequence to a segment writer, chunk by chunk, as they become known.

    Chunks are arranged, packed and indexed on the device that holds the K/V. From an accelerator they cross on a side
    stream to pinned memory; only the writer thread waits for that.

    Args:
        writer: a writer for the chunks from `first_chunk` on.
        first_chunk: the first chunk to write; K/V of earlier tokens are ignored.
        tokens: length of the whole sequence.
    """

    def __init__(self, writer: SegmentWriter, first_chunk: int, tokens: int) -> None:
        self._writer = writer
        self._geometry = geometry = writer.header.geometry
        self._first = first_chunk
        self._tokens = tokens
        self._written = [first_chunk] * geometry.num_layers

    def feed(self, layer: int, keys: torch.Tensor, values: torch.Tensor, start: int) -> None:
        """Write the chunks that are complete now.

        Args:
            layer: layer index.
            keys, values: `(kv_heads, t, head_dim)` of tokens `[start, start + t)`.
            start: position of the first token, at or before the first chunk not yet written.
        """
        c = self._geometry.chunk_size
        there = hardware.device_of(keys.device)
        end = start + keys.shape[1]
        first = self._written[layer]
        last = end // c if end < self._tokens else -(-end // c)
        if last > first:
            part = slice(first * c - start, min(last * c, end) - start)
            # Arrange extents on the thread that computed the K/V: a queued view would keep all of the cache's tokens
            # alive, and on an accelerator another thread would have to know the stream that computes them.
            extents = _to_extents(keys[:, part], values[:, part], c)
            if there is None:
                self._writer.write_chunks(layer, first - self._first, extents)
            else:
                forms = [one.form for one in small_forms(self._geometry) if layer in one.layers]
                found, ready = _leave(there, [extents, *(pack_chunks(form, extents) for form in forms)])
                small = found[1] if forms else None
                self._writer.write_chunks(layer, first - self._first, found[0], small=small, ready=ready)
            self._written[layer] = last
        if end == self._tokens and index_tensors(self._geometry, layer):
            index = layer_index(keys[:, self._first * c - start :], self._geometry, layer)
            if there is None:
                self._writer.write_index(layer, *index)
            else:
                found, ready = _leave(there, index)
                self._writer.write_index(layer, *found, ready=ready)


def _leave(there: Device, tensors: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], Callable[[], None]]:
    """Start one copy of contiguous tensors from an accelerator to the host; the copies, and a function that waits."""
    ends = list(accumulate(-(-tensor.nbytes // _ALIGNED) * _ALIGNED for tensor in tensors))
    source, target = there.empty(ends[-1]), hardware.pinned_buffer(ends[-1])
    found = []
    for tensor, begin in zip(tensors, [0, *ends], strict=False):
        source[begin : begin + tensor.nbytes].copy_(tensor.reshape(-1).view(torch.uint8))
        found.append(target[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
    copied = there.copy_out(source, target)
    return found, partial(there.finish, copied)


def _to_extents(keys: torch.Tensor, values: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """K and V `(kv_heads, t, head_dim)` as `(chunks, 2, kv_heads, c, head_dim)` on their device, padded with zeros."""
    kv_heads, tokens, head_dim = keys.shape
    chunks = -(-tokens // chunk_size)
    out = torch.empty(chunks, 2, kv_heads, chunk_size, head_dim, dtype=keys.dtype, device=keys.device)
    whole = tokens // chunk_size
    for half, states in enumerate((keys, values)):
        full = states[:, : whole * chunk_size].unflatten(1, (whole, chunk_size)) if whole else None
        if full is not None:
            out[:whole, half].copy_(full.transpose(0, 1))
        if tokens % chunk_size:
            out[whole, half].zero_()
            out[whole, half, :, : tokens % chunk_size].copy_(states[:, whole * chunk_size :])
    return out
