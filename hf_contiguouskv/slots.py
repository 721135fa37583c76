"""From the extents of a batch to the rows of K and V that attention reads."""

from __future__ import annotations

import numpy as np
import torch

from .memory.blocks import neighbours
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


def place(kv: torch.Tensor, positions: Chunks, destination: torch.Tensor) -> None:
    """Put chunks where they belong.

    Args:
        kv: `(n, 2, kv_heads, c, head_dim)`.
        positions: int64 `(n,)`, each once.
        destination: `(2, kv_heads, chunks, c, head_dim)`.
    """
    turned = kv.permute(1, 2, 0, 3, 4)
    if neighbours(positions):
        destination.narrow(2, int(positions[0]), len(positions)).copy_(turned)
    else:
        where = torch.from_numpy(positions).to(destination.device, non_blocking=True)
        destination.index_copy_(2, where, turned)


def copy_in_order(prefix: AttachedPrefix, batch: Batch, first_chunk: int, destination: torch.Tensor) -> None:
    """Put all chunks of a batch into `destination` `(2, kv_heads, chunks, c, head_dim)`, from `first_chunk` on."""
    place(prefix.kv_view(batch.extents(None)), batch.chunks - first_chunk, destination)
