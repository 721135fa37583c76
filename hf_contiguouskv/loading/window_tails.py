"""What a sliding-window layer sees of a prefix: its tail, exactly."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import torch

from ..memory import Usage
from ..stats import RequestStats
from ..store.attached_prefix import AttachedPrefix, Chunks
from .hit_counting import count_hits
from .payload_reads import PayloadReads
from .placement import copy_in_order


class WindowTails:
    """Brings tails of one prefix, whose chunks were asked for before.

    Args:
        prefix: in its exact form.
        payload: where its chunks are asked for.
        stats, usage: count what is loaded and used.
    """

    def __init__(self, prefix: AttachedPrefix, payload: PayloadReads, stats: RequestStats, usage: Usage) -> None:
        self.payload = payload
        self._prefix = prefix
        self._stats = stats
        self._usage = usage

    def first_token(self, window: int) -> int:
        """The first that a layer with this window can see."""
        return max(0, self._prefix.tokens - window + 1)

    def chunks(self, window: int) -> Chunks:
        """Those that a layer with this window needs, int64 `(n,)`."""
        return np.arange(self.first_token(window) // self._prefix.geometry.chunk_size, self._prefix.chunks)

    def load(self, layer: int, window: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V `(1, kv_heads, min(tokens, window - 1), head_dim)` on `device`."""
        g, chunks = self._prefix.geometry, self.chunks(window)
        before = int(chunks[0]) * g.chunk_size
        with torch.inference_mode(False):
            kv = torch.empty(2, g.kv_heads, len(chunks), g.chunk_size, g.head_dim, dtype=g.dtype, device=device)
        batches = []
        with closing(self.payload.take(layer)) as arriving:
            for one in arriving:
                copy_in_order(self._prefix, one, int(chunks[0]), kv)
                batches.append(one)
        for one in batches:
            count_hits(self._stats, self._usage, one, self._prefix.extent_bytes)
        self._usage.used(self.payload.tables, layer, chunks)
        # Without the tokens before the window and after the prefix.
        tokens = kv.flatten(2, 3)[:, None, :, self.first_token(window) - before : self._prefix.tokens - before]
        self._stats.bytes_used += tokens.shape[3] * self._prefix.token_bytes()
        return tokens[0], tokens[1]
