"""The configuration of a cache, in frozen dataclasses: what is used, how it is chosen, how it is read."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from .errors import ConfigError

Payload = Literal["packed", "exact"]
IndexBits = Literal[8, 2]
Budget = float | Literal["auto"]


@dataclass(frozen=True)
class Selection:
    """How chunks of the prefix are chosen. Use one of its kinds: `IndexedKeys` or `AttentionMass`.

    Args:
        queries: number of suffix tokens per row whose queries vote, padding excluded; `None`: all of them.
        recent: how many of these are the last tokens of the suffix. The others are spread evenly over the suffix before
            them. If `recent >= queries`, only the last tokens vote.
        concentration: exponent on a chunk's attention mass per (head, query) before the sum. 1 favours breadth,
            4 favours needles. The published rule is 1.
        keep_first: chunks at the beginning of the prefix that are always kept (attention sinks).
        keep_last: whole chunks at the end of the prefix that are always kept (recent window).
        period: consecutive full-attention layers that share one selection. The first of them is the leader layer.
        subperiod: layers of a period after which reads of the current selection start for the next period
            (inter-period prefetch). Equal to `period`: none. 0 stands for half of the period, as published.

    Raises:
        ConfigError: a field is out of its range.
    """

    queries: int | None = None
    recent: int = 4
    concentration: float = 1.0
    keep_first: int = 0
    keep_last: int = 0
    period: int = 1
    subperiod: int = 0

    def __post_init__(self) -> None:
        if type(self) is Selection:
            raise ConfigError("selection must be IndexedKeys(...) or AttentionMass(...), not their base class")
        if self.queries is not None:
            _require_integer(self, "queries", 1, 2**20)
        _require_integer(self, "recent", 0, 2**20)
        number = isinstance(self.concentration, int | float) and not isinstance(self.concentration, bool)
        if not number or not (math.isfinite(self.concentration) and 0.0 < self.concentration <= 16.0):
            raise ConfigError(f"concentration must be in (0, 16], got {self.concentration!r}")
        _require_integer(self, "keep_first", 0, 2**20)
        _require_integer(self, "keep_last", 0, 2**20)
        _require_integer(self, "period", 1, 4096)
        if self.subperiod == 0 and not isinstance(self.subperiod, bool):
            object.__setattr__(self, "subperiod", (self.period + 1) // 2)
        _require_integer(self, "subperiod", 1, self.period)


@dataclass(frozen=True)
class IndexedKeys(Selection):
    """Score chunks with the resident index of all keys, and reward concentrated attention. The default.

    The other fields are those of `Selection`; every layer leads its own period of one.

    Args:
        single_tokens: part of the budget, from 0 to 1, that is spent on single tokens of other chunks, each chosen by
            its own score. Whole chunks find an answer whose tokens stand side by side; single tokens find what counts
            one by one, as the labels of many examples do. Eight chunks are kept whole before single tokens get any of
            the budget. Attention sees as many tokens as without. Needs `payload="packed"`; of prefixes with an index in
            2 bits chunks alone are chosen. It costs time (docs/research.md, section 12), which `budget="auto"` does not
            know.

    Raises:
        ConfigError: a field is out of its range.
    """

    queries: int | None = 16
    concentration: float = 2.0
    keep_first: int = 1
    keep_last: int = 1
    single_tokens: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        share = self.single_tokens
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0.0 <= share <= 1.0:
            raise ConfigError(f"single_tokens is a part of the budget and must be from 0 to 1, got {share!r}")


@dataclass(frozen=True)
class AttentionMass(Selection):
    """The published rule: softmax over the exact keys of the leader layer, in float32, summed over queries and tokens,
    averaged over heads (arXiv 2601.13631: p = 8, sp = 4).

    The fields are those of `Selection`. Needs `payload="exact"`: a packed prefix takes its keys from the index, which
    this rule does not read.
    """

    period: int = 8


@dataclass(frozen=True)
class ReadOptions:
    """How the bytes of a prefix are read.

    Args:
        lookahead_bytes: bytes that may be read ahead of compute when every chunk is used.
        verify: compare the checksum of every extent that is read from disk, and refuse numbers that are not finite. A
            store with a key is always verified.

    Raises:
        ConfigError: a field is out of its range.
    """

    lookahead_bytes: int = 64 * 2**20
    verify: bool = True

    def __post_init__(self) -> None:
        _require_integer(self, "lookahead_bytes", 1, 2**40)
        if not isinstance(self.verify, bool):
            raise ConfigError(f"verify must be True or False, got {self.verify!r}")


@dataclass(frozen=True)
class ContiguousKVConfig:
    """How a cache chooses, reads and keeps the chunks of its prefix.

    The plain constructor is the best default we know; `paper()` is the published algorithm.

    Args:
        budget: share of the prefix chunks that attention uses in every full-attention layer, in (0, 1].
            1.0 uses every chunk and gives the exact answer. `"auto"`: the budget of at least `least_budget` with which
            a cold request is predicted to take the least time, by speeds that are measured once per model and store.
        chunk_size: tokens per ContiguousChunk, a power of two from 1 to 256.
        payload: form of the selected chunks. `"exact"`: K and V as the model computed them. `"packed"`: values in 4
            bits (a seventh of the bytes) and keys in 8 bits from the key index; needs `selection=IndexedKeys(...)`.
            Prefixes that were stored without packed values, `budget=1.0`, and layers with a sliding window are always
            exact.
        index_bits: bits per number of the key index of prefixes that are stored from now on. 8: the index takes a
            quarter of the KV in 16 bits, and attention gets its keys from it. 2: the index takes a 14th, in the store
            and in memory, and chosen chunks bring their keys along, in 8 bits; needs a `chunk_size` of 4 or more. A
            prefix that continues a stored one takes its form, and stored prefixes are served in their own.
        layers_per_group: so many consecutive layers have their exact chunks side by side in prefixes that are stored
            from now on. With `payload="exact"`, and as many layers in a period of the selection, one read brings a
            chunk for all of them: worth it over a network (docs/fleet.md). What is read of single layers takes more
            reads then: layers with a sliding window, leader layers of other periods than 8. Packed chunks lie layer
            by layer all the same.
        selection: how chunks are scored: `IndexedKeys(...)` or `AttentionMass(...)`.
        reading: how bytes are read.
        prefill_block: tokens per forward when a prefix that is not stored yet is prefilled. Smaller blocks need less
            memory and more time: attention of all but the first block cannot use a plain causal kernel.
        timeline: record when each layer read, waited, identified, copied and computed (`ContiguousKVCache.timeline`).
        least_budget: the smallest share that `budget="auto"` may choose, in (0, 1]. `contiguouskv calibrate` finds the
            share that your own questions need.
        reselect_every: choose the chunks again whenever the answer has grown by this many tokens, by the queries of the
            question and of the latest tokens; only chunks that are missing are read. Rows that share their chunks
            (beams, samples of one prompt) choose together. `None`: choose once, by the question. So far only choosing
            at every token was seen to help, and a larger budget helped more (docs/research.md, section 15).

    Raises:
        ConfigError: a field is out of its range, or payload and selection cannot work together.
    """

    budget: Budget = 0.25
    chunk_size: int = 16
    payload: Payload = "packed"
    index_bits: IndexBits = 8
    layers_per_group: int = 1
    selection: Selection = field(default_factory=IndexedKeys)
    reading: ReadOptions = field(default_factory=ReadOptions)
    prefill_block: int = 8192
    timeline: bool = False
    least_budget: float = 0.25
    reselect_every: int | None = None

    @classmethod
    def paper(cls, budget: Budget = 0.05, **overrides: Any) -> ContiguousKVConfig:
        """The published algorithm and nothing else (arXiv 2601.13631: c = 16, p = 8, sp = 4).

        `overrides`: other fields, for example `selection=AttentionMass(period=4)`.
        """
        published: dict[str, Any] = {"payload": "exact", "selection": AttentionMass()}
        try:
            return cls(budget=budget, **(published | overrides))
        except TypeError as error:
            known = ", ".join(cls.__dataclass_fields__)
            raise ConfigError(
                f"unknown option in {sorted(overrides)}; the options are {known}; those of the selection are fields "
                "of selection=AttentionMass(...)"
            ) from error

    def __post_init__(self) -> None:
        if isinstance(self.budget, bool) or not (isinstance(self.budget, int | float) or self.budget == "auto"):
            raise ConfigError(f"budget must be a number in (0, 1] or 'auto', got {self.budget!r}")
        if not _is_share(self.least_budget):
            raise ConfigError(f"least_budget is a share of chunks and must be in (0, 1], got {self.least_budget!r}")
        if self.budget != "auto" and not _is_share(self.budget):
            raise ConfigError(f"budget is the share of chunks to use and must be in (0, 1], got {self.budget!r}")
        _require_integer(self, "chunk_size", 1, 256)
        if self.chunk_size & (self.chunk_size - 1):
            raise ConfigError(f"chunk_size must be a power of two, got {self.chunk_size}")
        if self.payload not in get_args(Payload):
            raise ConfigError(f"payload must be one of {get_args(Payload)}, got {self.payload!r}")
        if self.index_bits not in get_args(IndexBits) or isinstance(self.index_bits, bool | float):
            raise ConfigError(f"index_bits must be one of {get_args(IndexBits)}, got {self.index_bits!r}")
        if self.index_bits == 2 and self.chunk_size < 4:
            raise ConfigError(f"index_bits=2 needs a chunk_size of 4 or more, got {self.chunk_size}")
        _require_integer(self, "layers_per_group", 1, 4096)
        if not isinstance(self.selection, Selection):
            raise ConfigError(f"selection must be IndexedKeys(...) or AttentionMass(...), got {self.selection!r}")
        if self.payload == "packed" and not isinstance(self.selection, IndexedKeys):
            raise ConfigError(
                f"payload='packed' takes keys from the key index, which {type(self.selection).__name__} does not read: "
                "pass payload='exact' with it, or selection=IndexedKeys(...)"
            )
        if isinstance(self.selection, IndexedKeys) and self.selection.single_tokens:
            if self.payload == "exact":
                raise ConfigError("single_tokens needs payload='packed': chunks that are exact are used as a whole")
            if self.reselect_every is not None:
                raise ConfigError("single_tokens and reselect_every do not go together: only chunks are chosen again")
        if not isinstance(self.reading, ReadOptions):
            raise ConfigError(f"reading must be ReadOptions(...), got {self.reading!r}")
        _require_integer(self, "prefill_block", self.chunk_size, 2**20)
        if self.reselect_every is not None:
            _require_integer(self, "reselect_every", 1, 2**20)


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0.0 < value <= 1.0


def _require_integer(owner: object, name: str, low: int, high: int) -> None:
    value = getattr(owner, name)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name} must be a whole number from {low} to {high}, got {value!r}")
