"""What a method that serves prefixes implements: `ServingMethod` for a prefix, `Strategy` for one request."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from ..loading.chunk_accounts import Arrival, RequestUsage
from ..loading.chunk_loader import ChunkLoader
from ..loading.residency import ChunkStore
from ..planning.read_plan import ReadPlan
from ..stats import RequestStats
from ..store.attached_prefix import AttachedPrefix
from ..store.format import KVGeometry
from ..timeline import SpanRecorder
from .rows import SuffixRows


@dataclass(frozen=True)
class RequestContext:
    """What a strategy works with.

    Attributes:
        plan: of the request.
        store: where the prefix is.
        stats: of the request.
        timeline: records what the request does.
        usage: what the request used, for the memory tiers. A strategy passes it to its loader.
    """

    plan: ReadPlan
    store: ChunkStore
    stats: RequestStats
    timeline: SpanRecorder
    usage: RequestUsage


class LayerInput(NamedTuple):
    """What a full-attention layer has when it needs the prefix.

    Attributes:
        layer: layer index.
        query: `(batch, heads, q, head_dim)` after RoPE.
        suffix_keys: `(batch, kv_heads, q, head_dim)` after RoPE.
        options: keyword arguments of the attention function (`scaling`, `softcap`).
        rows: of the batch.
    """

    layer: int
    query: torch.Tensor
    suffix_keys: torch.Tensor
    options: Mapping[str, Any]
    rows: SuffixRows


class Strategy(Protocol):
    """How one request serves its prefix: what it chooses, what it reads, and how it places K and V.

    `PrefixRequest` calls `start` once, then `load` or `load_tail` once for each layer, in model order. Errors of reads
    (`SegmentCorruptError`, `SegmentReadError`) may leave any of these methods: the request then closes the loader.
    """

    @property
    def loader(self) -> ChunkLoader:
        """What the strategy reads with. The request settles and closes it."""
        ...

    @property
    def keeps_all(self) -> bool:
        """Whether every layer uses the whole prefix, so that all rows share one copy of it."""
        ...

    @property
    def kept_tokens(self) -> int:
        """Prefix tokens that each full-attention layer shows to attention. They are fixed before any query exists."""
        ...

    def start(self, loaded: Collection[int]) -> None:
        """Start the reads that do not depend on the queries, except for layers that are `loaded` already."""
        ...

    def load(self, asked: LayerInput, destination: torch.Tensor) -> Sequence[Arrival]:
        """Fill `destination` with the prefix of a full-attention layer.

        Args:
            asked: by which layer, with which queries.
            destination: `(2 (K, V), rows, kv_heads, kept_tokens, head_dim)`, one row for each distinct row of the
                batch, or a single one if `keeps_all`.

        Returns:
            what arrived, for `count`.
        """
        ...

    def load_tail(self, layer: int, window: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V `(1, kv_heads, min(tokens, window - 1), head_dim)` of a layer with a sliding window."""
        ...

    def selected_chunks(self, layer: int) -> torch.Tensor | None:
        """Whole chunks that a full-attention layer uses, int64 `(distinct rows, kept)` on the CPU, ascending.

        `None`: nothing has been selected yet, or the method does not choose chunks.
        """
        ...

    def single_tokens(self, layer: int) -> torch.Tensor | None:
        """Single prefix tokens that a full-attention layer uses beside whole chunks, int64 `(distinct rows, n)` on the
        CPU, ascending; `None`: there are none."""
        ...

    def count(self, layer: int, arrived: Sequence[Arrival]) -> None:
        """Count what `load` returned for `layer`. The request calls this when no layer waits."""
        ...

    def copy_for(self, context: RequestContext) -> Strategy:
        """The same choices for another request: nothing that is under way is shared."""
        ...


class StrategyMaker(Protocol):
    """Makes the strategies of requests."""

    def strategy(self, context: RequestContext) -> Strategy:
        """The strategy of a new request."""
        ...


class ServingMethod(StrategyMaker, Protocol):
    """A method that serves prefixes in place of the library's own."""

    def attach(self, ids: torch.Tensor, geometry: KVGeometry) -> AttachedPrefix:
        """What stands for the prefix.

        The cache takes its length and its geometry from it, and looks nothing up, computes nothing and recovers from
        nothing: what is wrong with a prefix ends the request.

        Args:
            ids: int64 `(n,)`.
            geometry: of the model's KV.
        """
        ...
