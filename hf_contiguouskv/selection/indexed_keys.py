"""Choosing chunks by a resident copy of the keys in few bits, and an integer matrix product.

The index of a layer is int8 `(kv_heads, c, chunks, head_dim)` with a float32 scale `(kv_heads, head_dim)` per channel,
or is expanded to that from 2 bits (`index_parts`). The position in the chunk is the leading axis, so that a chunk's
maximum is taken over whole rows, not over 16 neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from ..hardware.accelerator import send
from .attention_mass import squash
from .base import ChunkScores, SelectionInput, scores_of_rows
from .device_products import device_product
from .index_parts import IndexPart, KeyIndex
from .integer_products import IntegerProduct, Scratch, fastest_product

Floats = npt.NDArray[np.float32]


class IndexedKeysScorer:
    """Softmax over the chunks' best logits, raised to `concentration`, summed over queries and heads.

    A chunk's strongest token stands for the chunk. That needs one exponential per chunk instead of one per token, and
    it separates a chunk that holds an answer from one that is vaguely related.

    Args:
        parts: the index of each segment of the prefix, in order.
        whole_chunks: number of candidate chunks, counted from the beginning (a partial last chunk is not one).
        concentration: exponent on a chunk's share per head and query.
        scratch, expanded: memory shared by the layers of a request, on a CPU: for products, and for an index that is
            expanded.
        on_device: whether to use the accelerator's code path; by default, if the parts are on an accelerator.
    """

    def __init__(
        self,
        parts: Sequence[IndexPart],
        whole_chunks: int,
        concentration: float,
        scratch: Scratch | None = None,
        expanded: Scratch | None = None,
        on_device: bool | None = None,
    ) -> None:
        self.parts = parts
        self.whole_chunks = whole_chunks
        self.concentration = concentration
        self._scratch = Scratch() if scratch is None else scratch
        self._expanded = Scratch() if expanded is None else expanded
        self._on_device = parts[0].scale.device.type != "cpu" if on_device is None else on_device

    def of_tokens(self, chunks: npt.NDArray[np.int64]) -> tuple[IndexedKeysScorer, npt.NDArray[np.int64]]:
        """A scorer of single tokens, as if each were a chunk, and which tokens these are.

        Args:
            chunks: whose tokens, int64 `(n,)`, ascending. All parts must be in 8 bits.

        Returns:
            the scorer, and its tokens, int64 `(n * c,)`, in the order of its scores.
        """
        parts: list[IndexPart] = []
        tokens: list[npt.NDArray[np.int64]] = []
        begin = first = 0
        for part in self.parts:
            if not isinstance(part, KeyIndex):
                raise TypeError(f"single tokens are scored from a key index in 8 bits, not from {type(part).__name__}")
            c, end = part.numbers.shape[1], begin + part.shape[1]
            last = int(np.searchsorted(chunks, end))
            own = chunks[first:last]
            if len(own):
                numbers = part.of_chunks(send(torch.from_numpy(own - begin), part.numbers.device))
                # A copy of the keys lies by position in the chunk, and so do the tokens.
                parts.append(KeyIndex(numbers.flatten(1, 2)[:, None], part.scale))
                tokens.append((own * c + np.arange(c)[:, None]).ravel())
            begin, first = end, last
        every = tokens[0] if len(tokens) == 1 else np.concatenate(tokens)
        scorer = IndexedKeysScorer(
            parts, len(every), self.concentration, self._scratch, self._expanded, self._on_device
        )
        return scorer, every

    def __call__(self, inputs: SelectionInput) -> ChunkScores:
        """Importance and mass per chunk; the mass is its strongest token's share among all chunks' strongest tokens."""
        score = self._row_on_device if self._on_device else self._row_on_cpu
        return scores_of_rows([score(inputs, row) for row in range(inputs.queries.shape[0])])

    def _row_on_cpu(self, inputs: SelectionInput, row: int) -> ChunkScores:
        # With a few thousand numbers per layer and a hundred layers, numpy calls take a third of the time of torch
        # calls. One row per chunk and one column per head and query: maximum and sums then run over whole rows, and
        # weighted sums are matrix-vector products.
        kv_heads, _, head_dim = self.parts[0].shape
        voting = _voting(inputs.queries[row], inputs.voters[row]).detach().float()
        queries = voting.numpy().reshape(kv_heads, -1, head_dim)
        chunks = sum(part.shape[1] for part in self.parts)
        peaks = np.empty((chunks, kv_heads, queries.shape[1]), dtype=np.float32)
        begin = 0
        for part in self.parts:
            end = begin + part.shape[1]
            peaks_on_cpu(queries, part, inputs.scaling, self._scratch, self._expanded, peaks[begin:end])
            begin = end
        best = peaks[: self.whole_chunks].reshape(self.whole_chunks, -1)
        if inputs.softcap is not None:
            best = squash(torch.from_numpy(best), inputs.softcap).numpy()
        best -= best.max(axis=0)
        unnormalised = np.exp(best, out=best)
        per_share = 1.0 / unnormalised.sum(axis=0, dtype=np.float32)
        # Not numpy's product: for a large matrix its threads compete with torch's.
        mass = torch.mv(
            torch.from_numpy(unnormalised), torch.from_numpy(per_share / np.float32(inputs.queries.shape[1]))
        )
        if self.concentration == 1.0:
            return ChunkScores(mass, mass)
        power = np.float32(self.concentration)
        raised = np.square(unnormalised, out=unnormalised) if power == 2.0 else unnormalised**power
        return ChunkScores(torch.mv(torch.from_numpy(raised), torch.from_numpy(per_share**power)), mass)

    def _row_on_device(self, inputs: SelectionInput, row: int) -> ChunkScores:
        kv_heads, _, head_dim = self.parts[0].shape
        queries = inputs.queries[row][:, inputs.voters[row]].detach().float().reshape(kv_heads, -1, head_dim)
        peaks = [peaks_on_device(queries, part, inputs.scaling) for part in self.parts]
        best = peaks[0] if len(peaks) == 1 else torch.cat(peaks, dim=-1)
        share = torch.softmax(squash(best[..., : self.whole_chunks], inputs.softcap), dim=-1).flatten(0, 1)
        mass = share.sum(0) / inputs.queries.shape[1]
        if self.concentration == 1.0:
            return ChunkScores(mass, mass)
        return ChunkScores(share.pow_(self.concentration).sum(0), mass)


def _voting(queries: torch.Tensor, voters: torch.Tensor) -> torch.Tensor:
    """The queries at `voters` (ascending) of `(heads, q, head_dim)`; consecutive ones (a short suffix) without a
    copy."""
    first, last = int(voters[0]), int(voters[-1])
    if last - first == len(voters) - 1:
        return queries[:, first : last + 1]
    return queries[:, voters]


def peaks_on_cpu(
    queries: Floats,
    part: IndexPart,
    scaling: float,
    scratch: Scratch,
    expanded: Scratch,
    out: Floats,
    product: IntegerProduct | None = None,
) -> None:
    """The largest `q . k` in each chunk, by an integer product.

    Args:
        queries: float32 `(kv_heads, n, head_dim)`, the query heads of each KV head.
        part: the index of a segment.
        scaling: factor on every product.
        scratch: memory for the products.
        expanded: memory for an index that is expanded.
        out: float32 `(chunks, kv_heads, n)`, is filled.
        product: how to multiply keys and queries; `None` for the fastest way. All give the same numbers.
    """
    kv_heads, _, head_dim = part.shape
    rows = queries.shape[1]
    scaled = queries * part.scale.numpy()[:, None]
    # Each query gets its own scale, so that the product can run in integers.
    peak = np.abs(scaled).max(axis=-1, keepdims=True)
    np.maximum(peak, np.float32(1e-20), out=peak)
    scaled *= np.float32(127.0) / peak
    rounded = torch.from_numpy(np.rint(scaled, out=scaled).astype(np.int8))
    if product is None:
        product = fastest_product(head_dim, rows)
    best = torch.empty(kv_heads, part.stored_chunks, rows, dtype=product.dtype, device="cpu")
    for heads, index in part.pieces(expanded):
        product.maxima(index, rounded[heads], scratch, best[heads])
    peak *= np.float32(scaling / 127.0)
    np.multiply(
        part.scored(best, 1).numpy().transpose(1, 0, 2), peak[:, :, 0], out=out, dtype=np.float32, casting="unsafe"
    )


def peaks_on_device(queries: torch.Tensor, part: IndexPart, scaling: float) -> torch.Tensor:
    """The largest `q . k` in each chunk, by an integer product: same operations and numbers as `peaks_on_cpu`.

    Args:
        queries: float32 `(kv_heads, n, head_dim)`.
        part: the index of a segment.
        scaling: factor on every product.

    Returns:
        float32 `(kv_heads, n, chunks)`.
    """
    ((_, index),) = part.pieces(None)
    scaled = queries * part.scale[:, None]
    peak = scaled.abs().amax(-1, keepdim=True).clamp_min_(1e-20)
    # (Not `127.0 / peak`, which torch computes as a product with a reciprocal.)
    rounded = scaled.mul_(torch.full_like(peak, 127.0).div_(peak)).round_().to(torch.int8)
    best = device_product(index.device, index.shape[-1]).maxima(index, rounded)
    return part.scored(best, 2).float().mul_(peak.mul_(float(np.float32(scaling / 127.0))))
