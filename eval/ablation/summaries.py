"""Scores of chunks from exact keys, or from a summary of them: an eighth of the keys, or less, instead of all."""

from __future__ import annotations

import torch

from hf_contiguouskv.selection import ChunkScores, SelectionInput

# The expected largest of 16 numbers from a normal distribution, in standard deviations.
_LARGEST_OF_16 = 1.766
# `"every"` is none: the exact keys themselves.
SUMMARIES = ("every", "bounds", "mean", "expected")


class SummaryScorer:
    """As `IndexedKeysScorer`, with an estimate in place of a chunk's largest `q . k`.

    Args:
        keys: `(kv_heads, tokens, head_dim)`; a partial last chunk is not a candidate.
        chunk_size: tokens per chunk.
        power: exponent on a chunk's share per head and query.
        summary: `"every"`: each key, exact, the reference of all others; `"bounds"`: the largest product that the
            smallest and largest number of each channel allow (Quest, Tang et al., ICML 2024); `"mean"`: the product
            with the mean key; `"expected"`: the expected maximum of keys with this mean and these variances, channel by
            channel.

    Raises:
        ValueError: `summary` is none of these.
    """

    def __init__(self, keys: torch.Tensor, chunk_size: int, power: float, summary: str) -> None:
        if summary not in SUMMARIES:
            raise ValueError(f"summary must be one of {', '.join(SUMMARIES)}, got {summary!r}")
        whole = keys.shape[1] // chunk_size
        chunks = keys[:, : whole * chunk_size].float().unflatten(1, (whole, chunk_size))
        self._power, self._summary = power, summary
        if summary == "every":
            self._parts: tuple[torch.Tensor, ...] = (chunks,)
        elif summary == "bounds":
            self._parts = chunks.amin(2), chunks.amax(2)
        else:
            variance, mean = torch.var_mean(chunks, dim=2, correction=0)
            self._parts = mean, variance

    def __call__(self, inputs: SelectionInput) -> ChunkScores:
        """Scores of one row."""
        first, *others = self._parts
        queries = inputs.queries[0][:, inputs.voters[0]].float().reshape(len(first), -1, first.shape[-1])
        if self._summary == "every":
            peaks = (queries @ first.flatten(1, 2).mT).unflatten(2, first.shape[1:3]).amax(-1)
        elif self._summary == "bounds":
            peaks = queries.clamp(max=0) @ first.mT + queries.clamp(min=0) @ others[0].mT
        else:
            peaks = queries @ first.mT
            if self._summary == "expected":
                peaks = peaks + _LARGEST_OF_16 * (queries.square() @ others[0].mT).sqrt()
        share = torch.softmax(peaks * inputs.scaling, dim=-1).flatten(0, 1)
        return ChunkScores(share.pow(self._power).sum(0)[None], share.sum(0)[None])
