"""From the extents of a batch to the rows of K and V that attention reads."""

from __future__ import annotations

import numpy as np
import torch

from .memory.blocks import neighbours
from .prefix import AttachedPrefix, Chunks
from .residency import Batch


def chosen(
    chunks: Chunks, selected: Chunks | None, keep: int, *, selected_only: bool = False
) -> tuple[Chunks | None, Chunks]:
    """What a row uses of a batch, and where each of these chunks goes.

    Args:
        chunks: int64, each once, what the batch holds.
        selected: int64 `(keep,)`, ascending, what the row has selected; `None`: the first `keep` chunks of the prefix.
        keep: how many chunks the row uses.
        selected_only: it is known that `chunks` holds nothing else, but for a partial last chunk.

    Returns:
        positions in `chunks` (`None`: all of them), and which of the row's chunks each is, int64 `(n,)` both.
    """
    places = chunks if selected is None else np.searchsorted(selected, chunks)
    used = places < keep
    if selected is not None and not selected_only:
        used &= selected[np.minimum(places, keep - 1)] == chunks
    if used.all():
        return None, places
    take = np.flatnonzero(used)
    return take, places[take]


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
