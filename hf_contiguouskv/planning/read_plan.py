"""What a request will read of its prefix: the only module that turns a budget into numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ..config import ContiguousKVConfig, IndexedKeys
from ..errors import ConfigError
from ..hardware.aligned_memory import PAGE
from ..model.layer_plan import LayerPlan
from ..store.attached_prefix import AttachedPrefix, Chunks
from ..store.reads import DEFAULT_GAP
from ..store.segment import Segment
from ..store.tensor_places import index_tensors

# Storage delivers this many bytes in the time that one more read costs (measured: 1.7 GB/s, 10 us of processor time).
WORTH_READING_BYTES = DEFAULT_GAP
# If a CPU computes, packed layers up to this size are read whole, ahead of the model: the same storage delivers them in
# less time than a layer takes to compute, and reading chunks by name costs extra processor time (docs/research.md). So
# it is where the speed of the disk is not known yet.
WHOLE_LAYER_BYTES = 2 * 2**20
# Keys of neighbouring layers, and small layers that are read whole, are read together up to this size, if a CPU
# computes: the same storage delivers them in a millisecond, and asking for each costs a fifth of that
# (docs/research.md).
TOGETHER_BYTES = 2 * 2**20
# Single tokens come from this many times as many chunks as the budget keeps: their keys are scored once more, and where
# chunks are read by name, all of these may be read (docs/research.md).
NOMINEES = 2
# So many chunks are kept whole before single tokens get anything: with fewer, half of the needles are lost
# (docs/research.md).
LEAST_WHOLE_CHUNKS = 8
# Number of leader layers whose keys are read ahead if every layer is a leader. In a longer period there is time to read
# the next leader's keys after using this one's.
KEYS_AHEAD = 3
# Minimum number of whole layers read ahead if they cross to an accelerator: one is read, one hashed, one copied.
LAYERS_AHEAD = 3


def chunks_kept(budget: float | str, whole_chunks: int) -> int:
    """Number of chunks that a budget keeps of `whole_chunks`: `ceil(whole_chunks * budget)`, at least one.

    Raises:
        ConfigError: the budget is "auto", which `AutoBudget` must first decide for the prefix.
    """
    if isinstance(budget, str):
        raise ConfigError("budget is 'auto': it is decided when a prefix is attached")
    if whole_chunks == 0:
        return 0
    # Guard against 0.1 * 30 == 3.0000000000000004 becoming 4.
    return min(whole_chunks, max(1, math.ceil(whole_chunks * budget - 1e-9)))


class ChoosingCost(NamedTuple):
    """What it costs to read chosen chunks by name, in bytes that storage delivers in that time.

    Attributes:
        per_chunk: for one more chunk.
        per_layer: for waiting once more, where a layer has chosen.
        rounding: bytes that are read beside a chunk that is read by name.
        most: larger layers are read by name, unless they are not larger than `WORTH_READING_BYTES` for each chosen
            chunk.
        in_flight: bytes that must be under way to keep storage busy, however little is waited for.
    """

    per_chunk: int
    per_layer: int
    rounding: int = 0
    most: int | None = None
    in_flight: int = 0

    def outweighs(self, chunks: int, chosen: int, extent_bytes: int) -> bool:
        """Whether reading `chosen` of a layer's `chunks` by name costs as much as reading all of them."""
        whole = chunks * extent_bytes
        spared = whole - chosen * (extent_bytes + self.rounding)
        small = self.most is None or whole <= max(self.most, chosen * WORTH_READING_BYTES)
        return small and spared <= chosen * self.per_chunk + self.per_layer


@dataclass(frozen=True)
class ReadPlan:
    """What one request uses of its prefix, and how to read it.

    It has many methods because it answers every question about quantities: each is a few lines of arithmetic.

    Attributes:
        prefix: the prefix in exact form, which sliding-window layers use.
        served: the same prefix in the form that full-attention layers use.
        keep: number of whole chunks that each full-attention layer uses, or would use instead of single tokens.
        layers: the model's layers.
        config: the configuration; its budget is a number.
        choosing: what chunks by name cost; `None`: what they cost on a usual disk.
    """

    prefix: AttachedPrefix
    served: AttachedPrefix
    keep: int
    layers: LayerPlan
    config: ContiguousKVConfig
    choosing: ChoosingCost | None = None

    @classmethod
    def of(
        cls,
        prefix: AttachedPrefix,
        config: ContiguousKVConfig,
        layers: LayerPlan,
        choosing: ChoosingCost | None = None,
    ) -> ReadPlan:
        """The plan for `prefix`.

        Raises:
            ConfigError: the budget is "auto".
        """
        keep, full = chunks_kept(config.budget, prefix.whole_chunks), layers.full_layers
        packs = config.payload == "packed" and keep < prefix.whole_chunks and bool(full)
        return cls(prefix, prefix.in_few_bits(full) if packs else prefix, keep, layers, config, choosing)

    def on(self, prefix: AttachedPrefix) -> ReadPlan:
        """The same plan for another prefix of the same tokens."""
        return ReadPlan.of(prefix, self.config, self.layers, self.choosing)

    @property
    def keeps_all(self) -> bool:
        """Whether every chunk is used: no selection, the exact answer."""
        return self.keep == self.prefix.whole_chunks

    @property
    def kept_tokens(self) -> int:
        """Prefix tokens that attention sees in a full-attention layer; equal for all layers and rows."""
        return self.keep * self.prefix.geometry.chunk_size + self.prefix.tail_tokens

    @property
    def in_few_bits(self) -> bool:
        """Whether attention gets keys in 8 bits and values in 4."""
        return self.served.form != "exact"

    @property
    def keys_from_index(self) -> bool:
        """Whether attention gets its keys from the key index, and chunks are values only."""
        return self.served.form == "packed"

    @cached_property
    def single_tokens(self) -> int:
        """How many tokens of each full-attention layer are chosen one by one, instead of as many in whole chunks."""
        rule = self.config.selection
        if self.keeps_all or not self.keys_from_index:
            return 0
        share = rule.single_tokens if isinstance(rule, IndexedKeys) else 0.0
        # (Chunks at both ends are kept as a whole.)
        others = max(0, self.keep - max(LEAST_WHOLE_CHUNKS, rule.keep_first + rule.keep_last))
        return min(others, round(self.keep * share)) * self.prefix.geometry.chunk_size

    @property
    def chosen_chunks(self) -> int:
        """Number of chunks that a full-attention layer uses as a whole; the `single_tokens` come from others."""
        return self.keep - self.single_tokens // self.prefix.geometry.chunk_size

    @property
    def nominees(self) -> int:
        """Number of chunks, the best, that a full-attention layer may take tokens from."""
        return min(self.prefix.whole_chunks, NOMINEES * self.keep) if self.single_tokens else self.keep

    @cached_property
    def reads_whole_layers(self) -> bool:
        """Whether reading all chunks of a layer costs no more time than reading the selected ones.

        Reads then need not wait for a selection: each layer is read ahead in one piece.
        """
        served = self.served
        if self.choosing is not None:
            return self.in_few_bits and self.choosing.outweighs(served.whole_chunks, self.nominees, served.extent_bytes)
        layer_bytes = served.whole_chunks * served.extent_bytes
        small = WHOLE_LAYER_BYTES if self.layers.on_cpu else 0
        return self.in_few_bits and layer_bytes <= max(small, self.nominees * WORTH_READING_BYTES)

    def layers_together(self, accelerated: bool) -> int:
        """Whole layers that are read as one; one at a time if the store serves an accelerator (`accelerated`)."""
        layer_bytes = self.served.chunks * self.served.extent_bytes
        return 1 if accelerated else max(1, TOGETHER_BYTES // layer_bytes)

    @cached_property
    def indexed_layers(self) -> frozenset[int]:
        """Layers whose chunks are scored from a key index, in 8 bits or in 2."""
        indexed = isinstance(self.config.selection, IndexedKeys)
        return self.prefix.layers_with("indexed_layers", "compact_layers") if indexed else frozenset()

    @cached_property
    def prefixes(self) -> tuple[AttachedPrefix, ...]:
        """Per layer, the prefix in the form that the layer reads."""
        return tuple(self.served if window is None else self.prefix for window in self.layers.windows)

    # -- leaders and periods ------------------------------------------------------------------------------------------

    @cached_property
    def _ordinals(self) -> dict[int, int]:
        return {layer: ordinal for ordinal, layer in enumerate(self.layers.full_layers)}

    def is_leader(self, layer: int) -> bool:
        """Whether a full-attention layer chooses the chunks of its period."""
        return self._ordinals[layer] % self.config.selection.period == 0

    def period_of(self, leader: int) -> list[int]:
        """The full-attention layers that use the chunks that `leader` chooses, itself included."""
        start = self._ordinals[leader]
        return self.layers.full_layers[start : start + self.config.selection.period]

    @property
    def waits(self) -> int:
        """How often a request waits for a round trip to storage: at its beginning, and where chunks are chosen."""
        if self.keeps_all or self.reads_whole_layers:
            return 1
        return 1 + sum(map(self.is_leader, self.layers.full_layers))

    def to_speculate(self, layer: int) -> list[int]:
        """Layers of the next period whose reads start once `layer` has its chunks; empty except at a subperiod
        boundary."""
        ordinal, rule = self._ordinals[layer], self.config.selection
        if rule.subperiod == rule.period or ordinal % rule.period != rule.subperiod:
            return []
        start = ordinal - rule.subperiod + rule.period
        members = self.layers.full_layers[start : start + rule.period]
        # If the next leader is scored from its payload, all of its chunks are read for that anyway.
        return members[1:] if members and self.scored_from_payload(members[0]) else members

    # -- keys ---------------------------------------------------------------------------------------------------------

    @cached_property
    def _leader_layers(self) -> frozenset[int]:
        return self.prefix.layers_with("leader_layers")

    def key_tensors(self, segment: Segment, layer: int) -> tuple[str, ...]:
        """Names of the tensors of `segment` from which `layer` is scored; empty if it is scored from its payload."""
        if layer in self.indexed_layers:
            return index_tensors(segment.geometry, layer)
        return (f"leader_keys.{layer}",) if layer in self._leader_layers else ()

    def scored_from_payload(self, layer: int) -> bool:
        """Whether scoring `layer` needs to read all its chunks."""
        return layer not in self.indexed_layers and layer not in self._leader_layers

    def keys_bytes(self, layer: int) -> int:
        """Bytes to read to score `layer`."""
        if self.scored_from_payload(layer):
            return self.prefix.chunks * self.prefix.geometry.extent_bytes
        segments = [span.segment for span in self.prefix.spans]
        return sum(one.tensor_extent(name)[1] for one in segments for name in self.key_tensors(one, layer))

    @cached_property
    def key_layers(self) -> list[int]:
        """Layers whose keys a request needs: leaders, or all layers where attention gets its keys from the index."""
        if self.keeps_all:
            return []
        return [layer for layer in self.layers.full_layers if self.keys_from_index or self.is_leader(layer)]

    def keys_together(self, accelerated: bool) -> int:
        """Keys of neighbouring layers up to this size are read as one, and kept as one.

        Only where every layer needs its index, or what lies between would be read for nothing; and where the store
        serves no accelerator (`accelerated`), or the first layer would wait for the others to cross.
        """
        together = not accelerated and self.indexed_layers.issuperset(self.key_layers)
        return TOGETHER_BYTES if together and self.config.selection.period == 1 else 0

    # -- windows ------------------------------------------------------------------------------------------------------

    def tail_start(self, window: int) -> int:
        """The first token that a layer with a sliding window of `window` tokens can see."""
        return max(0, self.prefix.tokens - window + 1)

    def tail_chunks(self, window: int) -> Chunks:
        """The chunks that a layer with a sliding window of `window` tokens can see, int64 `(n,)`."""
        return np.arange(self.tail_start(window) // self.prefix.geometry.chunk_size, self.prefix.chunks)

    # -- bytes --------------------------------------------------------------------------------------------------------

    def lookahead_bytes(self, crosses: bool) -> int:
        """Bytes that may be read ahead of compute.

        Reads are served in order, so keys that are not needed soon must not delay chunks that were just selected.

        Args:
            crosses: whether chunks cross to an accelerator.
        """
        limit = self.config.reading.lookahead_bytes
        full = self.layers.full_layers
        if self.keeps_all or not full or self.reads_whole_layers:
            # No selected chunks can be delayed. While a layer crosses to an accelerator, the next layer is read,
            # however large the layers are.
            return max(limit, LAYERS_AHEAD * self.prefix.chunks * self.served.extent_bytes if crosses else 0)
        layers_ahead = KEYS_AHEAD if self.config.selection.period == 1 else 1
        in_flight = 0 if self.choosing is None else self.choosing.in_flight
        return min(limit, max(in_flight, layers_ahead * self.keys_bytes(full[0])))

    def bytes_to_read(self, per_read: int = PAGE) -> int:
        """Estimated bytes that a request reads of a prefix of which nothing is in memory.

        A chunk that is read separately counts as at least `per_read` bytes. `WORTH_READING_BYTES` stands for the bytes
        that storage delivers in the time of one read.
        """
        prefix, served, g = self.prefix, self.served, self.prefix.geometry
        tails = sum(min(prefix.tokens, window) for window in self.layers.windows if window is not None)
        found = tails * g.extent_bytes // g.chunk_size
        full = self.layers.full_layers
        if self.keeps_all:
            return found + len(full) * prefix.chunks * g.extent_bytes
        for layer in full:
            leads = self.is_leader(layer)
            if layer in self.indexed_layers and (leads or self.keys_from_index):
                numbers = prefix.chunks * g.keys_bytes // g.itemsize
                # (A coarse index takes 2 bits for each, and two numbers of 8 bits for every 64.)
                found += numbers if layer in g.indexed_layers else numbers * 9 // 32
            elif leads:
                found += prefix.chunks * (g.keys_bytes if layer in self._leader_layers else g.extent_bytes)
        if self.reads_whole_layers:
            return found + len(full) * prefix.chunks * served.extent_bytes
        return found + len(full) * self.nominees * max(per_read, -(-served.extent_bytes // PAGE) * PAGE)
