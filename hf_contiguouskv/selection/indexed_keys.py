"""Choosing chunks by a resident copy of the keys in few bits, and an integer matrix product.

The index of a layer is int8 `(kv_heads, c, chunks, head_dim)` with a float32 scale `(kv_heads, head_dim)` per channel,
or is expanded to that from 2 bits (`index_parts`). The position in the chunk is the leading axis, so that a chunk's
maximum is taken over whole rows, not over 16 neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ..hardware.accelerator import send
from .attention_mass import squash
from .base import ChunkScores, SelectionInput, scores_of_rows
from .device_products import BYTES_AT_ONCE, device_product
from .index_parts import IndexPart, KeyIndex
from .integer_products import SCRATCH_BYTES, IntegerProduct, Scratch, fastest_product

Floats = npt.NDArray[np.float32]


class Rounded(NamedTuple):
    """Queries in 8 bits, for one part of the index.

    Attributes:
        numbers: int8 `(kv_heads, n, head_dim)`.
        factor: float32 `(kv_heads, n, 1)`; a logit is the product of a key's and a query's numbers times this.
    """

    numbers: torch.Tensor
    factor: torch.Tensor


class LastQueries(NamedTuple):
    """Of one row of a call: what single tokens are scored with.

    Attributes:
        queries: for each part of the index.
        totals: logarithm of the sum of the chunks' exponentials, float32 `(kv_heads, n)`.
        softcap: see `SelectionInput`.
    """

    queries: Sequence[Rounded]
    totals: torch.Tensor
    softcap: float | None


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
        keeps_queries: whether each call keeps what `of_tokens` needs.
    """

    def __init__(
        self,
        parts: Sequence[IndexPart],
        whole_chunks: int,
        concentration: float,
        scratch: Scratch | None = None,
        expanded: Scratch | None = None,
        on_device: bool | None = None,
        *,
        keeps_queries: bool = False,
    ) -> None:
        self.parts = parts
        self.whole_chunks = whole_chunks
        self.concentration = concentration
        self._scratch = Scratch() if scratch is None else scratch
        self._expanded = Scratch() if expanded is None else expanded
        self._last: list[LastQueries] | None = [] if keeps_queries else None
        self._on_device = parts[0].scale.device.type != "cpu" if on_device is None else on_device

    def of_tokens(self, row: int, chunks: npt.NDArray[np.int64]) -> tuple[torch.Tensor, npt.NDArray[np.int64]]:
        """How important single tokens of some chunks are, for the inputs of the last call (`keeps_queries`).

        A token's share is what its chunk would have, if the chunk had no stronger token; its importance is the largest
        share of any head and query. (Sums of squares, as of chunks, choose a little better and take twice as long.)

        Args:
            row: of the inputs.
            chunks: int64 `(n,)`, ascending. All parts must be in 8 bits.

        Returns:
            logarithms of shares, float32 `(n * c,)`, and the tokens' positions in the prefix, int64 `(n * c,)`, in the
            same order.
        """
        assert self._last is not None
        last = self._last[row]
        found: list[torch.Tensor] = []
        tokens: list[npt.NDArray[np.int64]] = []
        begin = first = 0
        for part, queries in zip(self.parts, last.queries, strict=True):
            if not isinstance(part, KeyIndex):
                raise TypeError(f"single tokens are scored from a key index in 8 bits, not from {type(part).__name__}")
            end = begin + part.shape[1]
            behind = int(np.searchsorted(chunks, end))
            if behind > first:
                own = chunks[first:behind]
                # They lie by position in the chunk.
                numbers = part.of_chunks(send(torch.from_numpy(own - begin), part.numbers.device)).flatten(1, 2)
                if self._on_device:
                    found.append(_tokens_on_device(queries, numbers, last))
                else:
                    found.append(_tokens_on_cpu(queries, numbers, last, self._scratch))
                c = part.numbers.shape[1]
                tokens.append((own * c + np.arange(c)[:, None]).ravel())
            begin, first = end, behind
        if len(found) == 1:
            return found[0], tokens[0]
        return torch.cat(found), np.concatenate(tokens)

    def __call__(self, inputs: SelectionInput) -> ChunkScores:
        """Importance and mass per chunk; the mass is its strongest token's share among all chunks' strongest tokens."""
        if self._last is not None:
            self._last.clear()
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
        begin, rounded = 0, []
        for part in self.parts:
            end = begin + part.shape[1]
            rounded.append(peaks_on_cpu(queries, part, inputs.scaling, self._scratch, self._expanded, peaks[begin:end]))
            begin = end
        best = peaks[: self.whole_chunks].reshape(self.whole_chunks, -1)
        if inputs.softcap is not None:
            best = squash(torch.from_numpy(best), inputs.softcap).numpy()
        largest = best.max(axis=0)
        best -= largest
        unnormalised = np.exp(best, out=best)
        total = unnormalised.sum(axis=0, dtype=np.float32)
        if self._last is not None:
            totals = torch.from_numpy(largest + np.log(total)).view(kv_heads, -1)
            self._last.append(LastQueries(rounded, totals, inputs.softcap))
        per_share = 1.0 / total
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
        peaks, rounded = zip(*(peaks_on_device(queries, part, inputs.scaling) for part in self.parts), strict=True)
        best = peaks[0] if len(peaks) == 1 else torch.cat(peaks, dim=-1)
        logits = squash(best[..., : self.whole_chunks], inputs.softcap)
        if self._last is not None:
            self._last.append(LastQueries(rounded, logits.logsumexp(-1), inputs.softcap))
        share = torch.softmax(logits, dim=-1).flatten(0, 1)
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
) -> Rounded:
    """The largest `q . k` in each chunk, by an integer product.

    Args:
        queries: float32 `(kv_heads, n, head_dim)`, the query heads of each KV head.
        part: the index of a segment.
        scaling: factor on every product.
        scratch: memory for the products.
        expanded: memory for an index that is expanded.
        out: float32 `(chunks, kv_heads, n)`, is filled.
        product: how to multiply keys and queries; `None` for the fastest way. All give the same numbers.

    Returns:
        the queries as they were multiplied.
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
    return Rounded(rounded, torch.from_numpy(peak))


def _tokens_on_cpu(queries: Rounded, numbers: torch.Tensor, last: LastQueries, scratch: Scratch) -> torch.Tensor:
    """Logarithms of the largest shares of tokens, int8 `(kv_heads, tokens, head_dim)`: float32 `(tokens,)`."""
    kv_heads, count, head_dim = numbers.shape
    rows = queries.numbers.shape[1]
    product = fastest_product(head_dim, rows)
    factor, subtrahend = queries.factor.mT, last.totals.neg()[:, None]
    found = []
    step = max(1, SCRATCH_BYTES // (4 * kv_heads * (2 * rows + head_dim)))
    for begin in range(0, count, step):
        logits = product.products(numbers[:, begin : begin + step], queries.numbers, scratch)
        if last.softcap is None:
            torch.addcmul(subtrahend, logits, factor, out=logits)
        else:
            logits = squash(logits.mul_(factor), last.softcap).add_(subtrahend)
        found.append(logits.amax(2).amax(0))
    return found[0] if len(found) == 1 else torch.cat(found)


def peaks_on_device(queries: torch.Tensor, part: IndexPart, scaling: float) -> tuple[torch.Tensor, Rounded]:
    """The largest `q . k` in each chunk, by an integer product: same operations and numbers as `peaks_on_cpu`.

    Args:
        queries: float32 `(kv_heads, n, head_dim)`.
        part: the index of a segment.
        scaling: factor on every product.

    Returns:
        float32 `(kv_heads, n, chunks)`, and the queries as they were multiplied.
    """
    ((_, index),) = part.pieces(None)
    scaled = queries * part.scale[:, None]
    peak = scaled.abs().amax(-1, keepdim=True).clamp_min_(1e-20)
    # (Not `127.0 / peak`, which torch computes as a product with a reciprocal.)
    rounded = scaled.mul_(torch.full_like(peak, 127.0).div_(peak)).round_().to(torch.int8)
    best = device_product(index.device, index.shape[-1]).maxima(index, rounded)
    peak.mul_(float(np.float32(scaling / 127.0)))
    return part.scored(best, 2).float().mul_(peak), Rounded(rounded, peak)


def _tokens_on_device(queries: Rounded, numbers: torch.Tensor, last: LastQueries) -> torch.Tensor:
    """As `_tokens_on_cpu`. A product with chunks of one token is that of every token."""
    product = device_product(numbers.device, numbers.shape[-1])
    step = max(1, BYTES_AT_ONCE // (8 * queries.factor.numel()))
    found = []
    for some in numbers.split(step, 1):
        logits = squash(
            product.maxima(some[:, None].contiguous(), queries.numbers).float().mul_(queries.factor), last.softcap
        )
        found.append(logits.sub_(last.totals[..., None]).amax((0, 1)))
    return found[0] if len(found) == 1 else torch.cat(found)
