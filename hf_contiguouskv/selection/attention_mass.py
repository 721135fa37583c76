"""The published rule: attention mass from the exact keys of the leader layer (arXiv 2601.13631; DESIGN: `paper()`)."""

from __future__ import annotations

import torch

from .base import ChunkScores, SelectionInput, scores_of_rows

# Logits held at once (float32), so that a long suffix does not need gigabytes.
LOGITS_AT_ONCE = 2**23


class AttentionMassScorer:
    """`A_j`: softmax over [prefix ; suffix, causal] in float32, summed over queries, mean over heads, sum per chunk.

    Args:
        prefix_keys: `(kv_heads, prefix_tokens, head_dim)`, all keys of the leader layer in the model's dtype. The
            tokens of a partial last chunk are included, because they take part in the softmax.
        chunk_size: tokens per chunk.
        concentration: exponent on a chunk's mass per head and query before the sum; 1 is published.
    """

    def __init__(self, prefix_keys: torch.Tensor, chunk_size: int, concentration: float = 1.0) -> None:
        self.prefix_keys = prefix_keys
        self.chunk_size = chunk_size
        self.concentration = concentration

    def __call__(self, inputs: SelectionInput) -> ChunkScores:
        keys = self.prefix_keys.float()
        return scores_of_rows([self._row(inputs, row, keys) for row in range(inputs.queries.shape[0])])

    def _row(self, inputs: SelectionInput, row: int, prefix_keys: torch.Tensor) -> ChunkScores:
        kv_heads, tokens, head_dim = prefix_keys.shape
        voters = inputs.voters[row]
        group = inputs.queries.shape[1] // kv_heads
        # One matrix product covers all query heads of a KV head: (kv_heads, group * voters, head_dim).
        queries = inputs.queries[row][:, voters].float().reshape(kv_heads, -1, head_dim)
        suffix_keys = inputs.suffix_keys[row].float()
        length = suffix_keys.shape[1]
        at = voters if inputs.positions is None else inputs.positions[voters]
        causal = at[:, None] >= torch.arange(length, device=voters.device)[None, :]
        hidden = ~(causal & inputs.visible[row][None, :]).repeat(group, 1)
        mass = prefix_keys.new_zeros(tokens // self.chunk_size)
        importance = mass if self.concentration == 1.0 else torch.zeros_like(mass)
        step = min(queries.shape[1], max(1, LOGITS_AT_ONCE // (tokens + length)))
        # All heads share this memory, because allocating it costs more than the arithmetic on it.
        scratch = queries.new_empty(step, tokens + length)
        for head in range(kv_heads):
            for start in range(0, queries.shape[1], step):
                block = queries[head, start : start + step]
                logits = scratch[: block.shape[0]]
                for keys, part in ((prefix_keys, logits[:, :tokens]), (suffix_keys, logits[:, tokens:])):
                    # Scale the product, not the queries: unscaled 16-bit values lose nothing in a TF32 product.
                    torch.addmm(part, block, keys[head].T, beta=0, alpha=inputs.scaling, out=part)
                logits = squash(logits, inputs.softcap)
                logits[:, tokens:].masked_fill_(hidden[start : start + step], float("-inf"))
                weights = torch.softmax(logits, dim=-1, out=logits)
                mass += self._chunk_mass(weights)
                if importance is not mass:
                    importance += self._chunk_importance(weights)
        heads = inputs.queries.shape[1]
        mass /= heads
        return ChunkScores(mass if importance is mass else importance / heads, mass)

    def _chunk_mass(self, weights: torch.Tensor) -> torch.Tensor:
        """Attention weights `(n, tokens + suffix)` summed to one number per whole chunk."""
        whole = self.prefix_keys.shape[1] // self.chunk_size
        # Sum over rows first: that sum runs along the fast axis, and 16 neighbours are then summed only once.
        return weights.sum(0)[: whole * self.chunk_size].view(whole, self.chunk_size).sum(-1)

    def _chunk_importance(self, weights: torch.Tensor) -> torch.Tensor:
        """As `_chunk_mass`, but each row's chunk sum is raised to `concentration` before rows are summed."""
        whole = self.prefix_keys.shape[1] // self.chunk_size
        chunks = weights[:, : whole * self.chunk_size].reshape(-1, whole, self.chunk_size).sum(-1)
        return chunks.pow_(self.concentration).sum(0)


def squash(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Apply the model's soft cap to logits, if it has one."""
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap
