"""Choosing from a resident int8 copy of the keys: an eighth to a half of the reads, and an integer matrix product.

The index of a layer is int8 `(kv_heads, c, chunks, head_dim)` with a float32 scale `(kv_heads, head_dim)` per channel:
token-in-chunk is the leading axis, so that a chunk's maximum is taken over whole rows, not over 16 neighbours.
"""

from __future__ import annotations

import torch

from .attention_mass import squash
from .base import ChunkScores, SelectionInput, scores_of_rows


def build_key_index(keys: torch.Tensor, chunk_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise keys to int8 with one scale per KV head and channel.

    Args:
        keys: `(kv_heads, tokens, head_dim)`, any float dtype, on any device.
        chunk_size: tokens per chunk; missing tokens of the last chunk become zeros.

    Returns:
        index: int8 `(kv_heads, chunk_size, chunks, head_dim)`, contiguous, on the CPU.
        scale: float32 `(kv_heads, head_dim)`, on the CPU; `index * scale` approximates the keys.
    """
    kv_heads, tokens, head_dim = keys.shape
    chunks = -(-tokens // chunk_size)
    peak = keys.abs().amax(1).float()
    scale = torch.where(peak > 0, peak / 127.0, torch.ones_like(peak))
    quantised = (keys.float() / scale[:, None]).round_().to(torch.int8)
    index = torch.zeros(kv_heads, chunk_size, chunks, head_dim, dtype=torch.int8)
    whole = tokens // chunk_size
    full = quantised[:, : whole * chunk_size].view(kv_heads, whole, chunk_size, head_dim)
    index[:, :, :whole].copy_(full.transpose(1, 2))
    if tokens % chunk_size:
        index[:, : tokens % chunk_size, whole].copy_(quantised[:, whole * chunk_size :])
    return index, scale.cpu()


class IndexedKeys:
    """Softmax over the chunks' best logits, raised to `concentration`, summed over queries and heads.

    The strongest token of a chunk stands for the chunk: that needs one exponential per chunk instead of one per token,
    and it is what separates a chunk that holds an answer from one that is vaguely related.

    Args:
        parts: one `(index, scale)` pair per segment of the prefix, in order (see the module's docstring).
        whole_chunks: how many chunks at the beginning are candidates (a partial last one is not).
        concentration: exponent on a chunk's share per head and query.
    """

    def __init__(
        self,
        parts: list[tuple[torch.Tensor, torch.Tensor]],
        whole_chunks: int,
        concentration: float,
    ) -> None:
        self.parts = parts
        self.whole_chunks = whole_chunks
        self.concentration = concentration

    def __call__(self, inputs: SelectionInput) -> ChunkScores:
        """See `ChunkScorer`. A chunk's mass is the share of its strongest token among those of all chunks."""
        return scores_of_rows([self._row(inputs, row) for row in range(inputs.queries.shape[0])])

    def _row(self, inputs: SelectionInput, row: int) -> ChunkScores:
        kv_heads = self.parts[0][0].shape[0]
        queries = _voting(inputs.queries[row], inputs.voters[row]).unflatten(0, (kv_heads, -1))
        peaks = [chunk_peaks(queries, index, scale, inputs.scaling) for index, scale in self.parts]
        best = peaks[0] if len(peaks) == 1 else torch.cat(peaks, dim=-1)
        if best.shape[-1] != self.whole_chunks:
            best = best[..., : self.whole_chunks]
        share = torch.softmax(squash(best, inputs.softcap), dim=-1).flatten(0, 1)
        mass = share.sum(0)
        mass /= inputs.queries.shape[1]
        if self.concentration == 1.0:
            return ChunkScores(mass, mass)
        share = share.square_() if self.concentration == 2.0 else share.pow_(self.concentration)
        return ChunkScores(share.sum(0), mass)


def _voting(queries: torch.Tensor, voters: torch.Tensor) -> torch.Tensor:
    """Rows `voters` (ascending) of `(heads, q, head_dim)`; neighbours, as they nearly always are, without a copy."""
    if queries.device.type == "cpu":
        first, last = int(voters[0]), int(voters[-1])
        if last - first == len(voters) - 1:
            return queries[:, first : last + 1]
    return queries[:, voters]


def chunk_peaks(queries: torch.Tensor, index: torch.Tensor, scale: torch.Tensor, scaling: float = 1.0) -> torch.Tensor:
    """The largest `q . k` in each chunk.

    Args:
        queries: `(kv_heads, group, n, head_dim)`, the query heads of each KV head, any float dtype.
        index: int8 `(kv_heads, c, chunks, head_dim)`.
        scale: float32 `(kv_heads, head_dim)`.
        scaling: factor on every product.

    Returns:
        float32 `(kv_heads, group * n, chunks)`.
    """
    kv_heads, c, chunks, head_dim = index.shape
    # Hundreds of small calls per request: each of these is as short as it can be. One pass for scale, dtype and order.
    scaled = torch.empty(queries.shape, dtype=torch.float32, device=queries.device)
    torch.mul(queries, scale[:, None, None], out=scaled)
    scaled = scaled.view(kv_heads, -1, head_dim)
    if index.device.type != "cpu":
        logits = torch.bmm(scaled.to(torch.bfloat16), index.view(kv_heads, -1, head_dim).to(torch.bfloat16).mT)
        return logits.view(kv_heads, -1, c, chunks).amax(2).float() * scaling
    # Each query row gets its own scale, so that the product can run in integers.
    peak = scaled.abs().amax(-1, keepdim=True).clamp_min_(1e-20)
    rounded = scaled.mul_(127.0 / peak).round_().to(torch.int8).mT
    # Keys as the left factor: a tall product with few columns is several times faster here than its transpose.
    rows = rounded.shape[2]
    products = torch.empty(c, chunks, rows, dtype=torch.int32)
    flat = products.view(-1, rows)
    peaks = torch.empty(kv_heads, chunks, rows, dtype=torch.int32)
    keys = index.view(kv_heads, -1, head_dim)
    for head in range(kv_heads):
        torch._int_mm(keys[head], rounded[head], out=flat)
        torch.amax(products, 0, out=peaks[head])
    # Turned as integers first: whatever follows runs along the chunks.
    return peaks.mT.contiguous() * peak.mul_(scaling / 127.0)
