"""From the extents of a batch to the rows of K and V that attention reads."""

from __future__ import annotations

import numpy as np
import torch

from .prefix import AttachedPrefix, Chunks
from .residency import Batch


def chosen(chunks: Chunks, selected: Chunks | None, keep: int) -> Chunks | None:
    """Positions in `chunks` that a row uses, int64 `(n,)`; `None`: all of them.

    Args:
        chunks: int64, what a batch holds.
        selected: int64, ascending, what the row has selected; `None`: the first `keep` chunks of the prefix.
        keep: how many chunks the row uses.
    """
    used = chunks < keep if selected is None else np.isin(chunks, selected, assume_unique=True)
    return None if used.all() else np.flatnonzero(used)


def fill(destination: torch.Tensor, start: int, kv: torch.Tensor) -> None:
    """From `(n, 2, kv_heads, c, head_dim)` to `(2, kv_heads, kept, c, head_dim)`, from position `start` on."""
    destination.narrow(2, start, kv.shape[0]).copy_(kv.permute(1, 2, 0, 3, 4))


def copy_in_order(prefix: AttachedPrefix, batch: Batch, first_chunk: int, destination: torch.Tensor) -> None:
    """Put every chunk of a batch where it belongs in `destination` `(2, kv_heads, chunks, c, head_dim)`."""
    kv = prefix.kv_view(batch.extents(None)).permute(1, 2, 0, 3, 4)
    chunks = batch.chunks
    if len(chunks) == int(chunks[-1]) - int(chunks[0]) + 1 and bool((np.diff(chunks) == 1).all()):
        destination.narrow(2, int(chunks[0]) - first_chunk, len(chunks)).copy_(kv)
    else:
        where = torch.from_numpy(chunks - first_chunk).to(destination.device, non_blocking=True)
        destination.index_copy_(2, where, kv)
