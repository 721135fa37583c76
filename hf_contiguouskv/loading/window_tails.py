"""What a sliding-window layer sees of a prefix: its tail, exactly."""

from __future__ import annotations

from contextlib import closing

import torch

from ..planning.read_plan import ReadPlan
from ..stats import RequestStats
from .chunk_accounts import Arrival
from .chunk_loader import ChunkLoader
from .placement import copy_in_order


def load_tail(
    loader: ChunkLoader, plan: ReadPlan, layer: int, window: int, stats: RequestStats
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V `(1, kv_heads, min(tokens, window - 1), head_dim)` of a layer whose tail was wanted, on its device."""
    prefix, g, chunks = plan.prefix, plan.prefix.geometry, plan.tail_chunks(window)
    first, before = plan.tail_start(window), int(chunks[0]) * g.chunk_size
    with torch.inference_mode(False):
        shape = 2, g.kv_heads, len(chunks), g.chunk_size, g.head_dim
        kv = torch.empty(*shape, dtype=g.dtype, device=plan.layers.devices[layer])
    arrived = []
    with closing(loader.take(layer)) as parts:
        for part in parts:
            copy_in_order(prefix, part, int(chunks[0]), kv)
            arrived.append(Arrival.of(part))
    for one in arrived:
        loader.accounts.count_hits(layer, one)
    loader.accounts.note_used(layer, chunks)
    # Without the tokens before the window and after the prefix.
    tokens = kv.flatten(2, 3)[:, None, :, first - before : prefix.tokens - before]
    stats.bytes_used += tokens.shape[3] * prefix.token_bytes()
    return tokens[0], tokens[1]
