"""Keys of a packed prefix: from the key index that chose the chunks to the rows of K that attention reads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..hardware.accelerator import send
from ..selection.indexed_keys import Part
from ..store.attached_prefix import AttachedPrefix, Chunks


def place_keys(
    prefix: AttachedPrefix, parts: Sequence[Part], selected: Sequence[Chunks], destination: torch.Tensor
) -> None:
    """Put the keys of selected chunks, in 8 bits, where attention looks.

    Args:
        prefix: whose keys.
        parts: index and scale per segment, for all chunks of the prefix (see `selection.indexed_keys`).
        selected: per row int64 `(keep,)`, ascending.
        destination: `(rows, kv_heads, kept_tokens, head_dim)`, on the device of the parts; a partial last chunk comes
            behind the others.
    """
    c, tail = prefix.geometry.chunk_size, prefix.tail_tokens
    for row, own in enumerate(selected):
        chunks = destination[row, :, : len(own) * c].unflatten(1, (-1, c))
        begin, ends = 0, [len(own)]
        if len(parts) > 1:
            ends = np.searchsorted(own, [span.first_chunk + span.chunks for span in prefix.spans]).tolist()
        for span, part, end in zip(prefix.spans, parts, ends, strict=True):
            if end > begin:
                _copy(part, own[begin:end] - span.first_chunk, chunks[:, begin:end])
            begin = end
    if tail:
        index, scale = parts[-1]
        last = index[:, :tail, prefix.whole_chunks - prefix.spans[-1].first_chunk] * scale[:, None]
        destination[:, :, destination.shape[2] - tail :] = last.to(destination.dtype)


def _copy(part: Part, chunks: Chunks, destination: torch.Tensor) -> None:
    """Keys of `chunks` of one segment into `(kv_heads, n, c, head_dim)`."""
    index, scale = part
    where = send(torch.from_numpy(chunks), index.device)
    if index.shape[-1] % 8 == 0:
        # Eight channels at a time: a GPU copies element by element.
        found = index.view(torch.int64).index_select(2, where).view(torch.int8)
    else:
        found = index.index_select(2, where)
    # Two steps in the dtype of the destination, which are several times as fast as one product of mixed dtypes.
    destination.copy_(found.transpose(1, 2))
    destination.mul_(scale.to(destination.dtype)[:, None, None])
