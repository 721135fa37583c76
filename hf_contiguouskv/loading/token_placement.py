"""Single tokens of stored chunks, into the rows of K and V that attention reads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..hardware.accelerator import send
from ..selection.index_parts import KeyIndex
from ..store.attached_prefix import AttachedPrefix, Chunks
from ..store.packing import unpack_values_of_tokens
from .placement import put
from .residency import LoadedChunks


def place_tokens(prefix: AttachedPrefix, part: LoadedChunks, tokens: Chunks, destination: torch.Tensor) -> None:
    """Copy those of `tokens` that lie in chunks of `part`. (Of a packed prefix, values alone: see `place_token_keys`.)

    Args:
        prefix: in the form in which the chunks were read.
        part: chunks that have arrived.
        tokens: int64 `(n,)`, ascending.
        destination: `(2 (K, V), kv_heads, n, head_dim)`.
    """
    c = prefix.geometry.chunk_size
    rows = np.full(prefix.chunks, -1)
    rows[part.chunks] = np.arange(len(part.chunks))
    rows = rows[tokens // c]
    there = np.flatnonzero(rows >= 0)
    if not len(there):
        return
    device = destination.device
    if prefix.form == "packed":
        destination = destination[1:]
    every = len(there) == len(tokens)
    out = destination if every else destination.new_empty(*destination.shape[:2], len(there), destination.shape[3])
    offsets = send(torch.from_numpy(tokens[there] % c), device)
    if prefix.form == "packed":
        octets = part.extents(None)
        unpack_values_of_tokens(
            octets, send(torch.from_numpy(rows[there]), device), offsets, prefix.geometry, out[0].transpose(0, 1)
        )
    else:
        # (Only where a prefix lost its packed form in mid-request.)
        used, back = np.unique(rows[there], return_inverse=True)
        whole = out.new_empty(len(out), 1, out.shape[1], len(used), c, out.shape[3])
        put(prefix, part.extents(used), np.arange(len(used)), whole)
        out.copy_(whole[:, 0, :, send(torch.from_numpy(back), device), offsets])
    if not every:
        destination.index_copy_(2, send(torch.from_numpy(there), device), out)


def place_token_keys(
    prefix: AttachedPrefix, parts: Sequence[KeyIndex], tokens: Chunks, destination: torch.Tensor
) -> None:
    """Put the keys of single tokens, in 8 bits, where attention looks.

    Args:
        prefix: whose keys.
        parts: index and scale per segment (see `placement.place_keys`).
        tokens: int64 `(n,)`, ascending.
        destination: `(kv_heads, n, head_dim)`, on the device of the parts.
    """
    c = prefix.geometry.chunk_size
    begin = 0
    for span, part in zip(prefix.spans, parts, strict=True):
        end = int(np.searchsorted(tokens, (span.first_chunk + span.chunks) * c))
        if end > begin:
            own = send(torch.from_numpy(tokens[begin:end] - span.first_chunk * c), part.numbers.device)
            some = destination[:, begin:end]
            some.copy_(part.of_tokens(own))
            some.mul_(part.scale.to(some.dtype)[:, None])
        begin = end
