"""The knobs of a cache, in one frozen dataclass."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from .errors import ConfigError

PAYLOADS = ("packed", "exact")
SELECTIONS = ("attention_mass", "indexed_keys")


@dataclass(frozen=True)
class ContiguousKVConfig:
    """How a cache chooses, reads and keeps the chunks of its prefix.

    The plain constructor is the best default we know; `paper()` is the published algorithm.

    Args:
        budget: share of the prefix chunks that attention uses in every full-attention layer, in (0, 1].
            1.0 uses every chunk and gives the exact answer. `"auto"`: the largest one whose reads hide behind compute,
            by speeds measured here (`auto_budget`).
        chunk_size: tokens per ContiguousChunk, a power of two from 1 to 256.
        payload: what attention gets of the selected chunks. `"exact"`: K and V as the model computed them. `"packed"`:
            values in 4 bits, a seventh of the bytes, and the keys of the key index, in 8 bits. Always exact: where a
            prefix was stored without packed values, at `budget=1.0`, layers with a sliding window, and without
            `selection="indexed_keys"`.
        selection: how chunks are scored. `"attention_mass"` is the published rule: softmax over the exact keys of
            the leader layer, in float32, summed over queries and tokens, averaged over heads.
            `"indexed_keys"` scores with a resident int8 copy of the keys and rewards concentrated attention.
        period: consecutive full-attention layers that share one selection. The first of them is the leader layer.
        subperiod: layers of a period after which reads of the current selection start for the next period
            (inter-period prefetch). Equal to `period`: none.
        suffix_queries: how many of the real suffix tokens (per row) vote; `None` is all of them.
        recent_queries: how many of these are the last ones; the others are spread evenly over the suffix before them.
            As many as `suffix_queries`, or more: only the last ones vote.
        concentration: exponent on a chunk's attention mass per (head, query) before the sum. 1 favours breadth,
            4 favours needles. The published rule is 1.
        keep_first: chunks at the beginning of the prefix that are always kept (attention sinks).
        keep_last: whole chunks at the end of the prefix that are always kept (recent window).
        prefill_block: tokens per forward when a prefix that is not stored yet is prefilled. Smaller blocks need less
            memory and more time: attention of all but the first block cannot use a plain causal kernel.
        lookahead_bytes: how many bytes of payload may be read ahead of compute when every chunk is used.
        verify: compare the checksum of every extent that is read from disk, and refuse numbers that are not finite. A
            store with a key is always verified.
        timeline: record when each layer read, waited, identified, copied and computed (`ContiguousKVCache.timeline`).

    Raises:
        ConfigError: a field is out of its range.
    """

    budget: float | Literal["auto"] = 0.25
    chunk_size: int = 16
    payload: str = "packed"
    selection: str = "indexed_keys"
    period: int = 1
    subperiod: int = 1
    suffix_queries: int | None = 16
    recent_queries: int = 4
    concentration: float = 2.0
    keep_first: int = 1
    keep_last: int = 1
    prefill_block: int = 8192
    lookahead_bytes: int = 64 * 2**20
    verify: bool = True
    timeline: bool = False

    @classmethod
    def paper(cls, budget: float | Literal["auto"] = 0.05, **overrides: Any) -> ContiguousKVConfig:
        """The published algorithm and nothing else (arXiv 2601.13631: c = 16, p = 8, sp = 4)."""
        published: dict[str, Any] = {
            "payload": "exact",
            "selection": "attention_mass",
            "period": 8,
            "subperiod": 4,
            "suffix_queries": None,
            "concentration": 1.0,
            "keep_first": 0,
            "keep_last": 0,
        }
        return cls(budget=budget, **(published | overrides))

    def __post_init__(self) -> None:
        if isinstance(self.budget, bool) or not (isinstance(self.budget, int | float) or self.budget == "auto"):
            raise ConfigError(f"budget must be a number in (0, 1] or 'auto', got {self.budget!r}")
        if self.budget != "auto" and not (math.isfinite(self.budget) and 0.0 < self.budget <= 1.0):
            raise ConfigError(f"budget is the share of chunks to use and must be in (0, 1], got {self.budget!r}")
        self._integer("chunk_size", 1, 256)
        if self.chunk_size & (self.chunk_size - 1):
            raise ConfigError(f"chunk_size must be a power of two, got {self.chunk_size}")
        if self.payload not in PAYLOADS:
            raise ConfigError(f"payload must be one of {PAYLOADS}, got {self.payload!r}")
        if self.selection not in SELECTIONS:
            raise ConfigError(f"selection must be one of {SELECTIONS}, got {self.selection!r}")
        self._integer("period", 1, 4096)
        self._integer("subperiod", 1, self.period)
        if self.suffix_queries is not None:
            self._integer("suffix_queries", 1, 2**20)
        self._integer("recent_queries", 0, 2**20)
        if not (math.isfinite(self.concentration) and 0.0 < self.concentration <= 16.0):
            raise ConfigError(f"concentration must be in (0, 16], got {self.concentration!r}")
        self._integer("keep_first", 0, 2**20)
        self._integer("keep_last", 0, 2**20)
        self._integer("prefill_block", self.chunk_size, 2**20)
        self._integer("lookahead_bytes", 1, 2**40)

    def _integer(self, field: str, low: int, high: int) -> None:
        value = getattr(self, field)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ConfigError(f"{field} must be a whole number from {low} to {high}, got {value!r}")

    def chunks_kept(self, whole_chunks: int) -> int:
        """How many of `whole_chunks` chunks the budget keeps: `ceil(whole_chunks * budget)`, at least one.

        Raises:
            ConfigError: the budget is "auto"; a cache decides it for each prefix.
        """
        if self.budget == "auto":
            raise ConfigError("budget is 'auto': it is decided when a prefix is attached")
        if whole_chunks == 0:
            return 0
        # Guard against 0.1 * 30 == 3.0000000000000004 becoming 4.
        return min(whole_chunks, max(1, math.ceil(whole_chunks * self.budget - 1e-9)))
