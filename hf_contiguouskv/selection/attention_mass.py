"""The published rule: attention mass from the exact keys of the leader layer (arXiv 2601.13631; DESIGN: `paper()`)."""

from __future__ import annotations

import torch

from .base import SelectionInput


class AttentionMass:
    """`A_j`: softmax over [prefix ; suffix, causal] in float32, summed over queries, mean over heads, sum per chunk.

    Args:
        prefix_keys: `(kv_heads, prefix_tokens, head_dim)`, all keys of the leader layer (a partial last chunk's
            tokens included: they take part in the softmax), in the model's dtype.
        chunk_size: tokens per chunk.
        suffix_queries: how many of the last voting queries count; `None` is all (published).
        concentration: exponent on a chunk's mass per head and query before the sum; 1 is published.
    """

    def __init__(
        self,
        prefix_keys: torch.Tensor,
        chunk_size: int,
        suffix_queries: int | None = None,
        concentration: float = 1.0,
    ) -> None:
        self.prefix_keys = prefix_keys
        self.chunk_size = chunk_size
        self.suffix_queries = suffix_queries
        self.concentration = concentration

    def __call__(self, inputs: SelectionInput) -> torch.Tensor:
        """Importance, float32 `(rows, whole_chunks)`."""
        rows = inputs.queries.shape[0]
        keys = self.prefix_keys.float()
        return torch.stack([self._row(inputs, row, keys) for row in range(rows)])

    def _row(self, inputs: SelectionInput, row: int, prefix_keys: torch.Tensor) -> torch.Tensor:
        kv_heads, prefix_tokens, head_dim = prefix_keys.shape
        whole = prefix_tokens // self.chunk_size
        voters = voting_queries(inputs.voting[row], self.suffix_queries)
        group = inputs.queries.shape[1] // kv_heads
        # (kv_heads, group * voters, head_dim): one matrix product per KV head serves all its query heads.
        queries = inputs.queries[row][:, voters].float().reshape(kv_heads, -1, head_dim) * inputs.scaling
        on_prefix = squash(torch.bmm(queries, prefix_keys.transpose(1, 2)), inputs.softcap)
        on_suffix = squash(torch.bmm(queries, inputs.suffix_keys[row].float().transpose(1, 2)), inputs.softcap)
        length = inputs.suffix_keys.shape[2]
        causal = voters[:, None] >= torch.arange(length, device=voters.device)[None, :]
        allowed = (causal & inputs.visible[row][None, :]).repeat(group, 1)
        on_suffix = on_suffix.masked_fill(~allowed[None], float("-inf"))

        # exp in place and one product with 1/denominator: the weights themselves are never written.
        peak = torch.maximum(on_prefix.amax(-1, keepdim=True), on_suffix.amax(-1, keepdim=True))
        mass = on_prefix.sub_(peak).exp_()
        denominator = mass.sum(-1) + (on_suffix - peak).exp_().sum(-1)
        if self.concentration == 1.0:
            per_token = torch.bmm((1.0 / denominator).unsqueeze(1), mass).sum((0, 1))
            per_chunk = per_token[: whole * self.chunk_size].view(whole, self.chunk_size).sum(-1)
        else:
            chunks = mass[..., : whole * self.chunk_size].unflatten(-1, (whole, self.chunk_size)).sum(-1)
            per_chunk = (chunks / denominator[..., None]).pow_(self.concentration).sum((0, 1))
        return per_chunk / inputs.queries.shape[1]


def voting_queries(voting: torch.Tensor, suffix_queries: int | None) -> torch.Tensor:
    """Positions `(n,)` int64 of the queries that count, at most the last `suffix_queries`; never empty.

    A row of nothing but padding (it may happen in a padded batch) lets its last query vote.
    """
    positions = voting.nonzero().squeeze(-1)
    if positions.numel() == 0:
        return torch.tensor([voting.shape[0] - 1], device=voting.device)
    return positions if suffix_queries is None else positions[-suffix_queries:]


def squash(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Logits under the model's soft cap, if it has one."""
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap
