"""What a request is going to read of its prefix: the only place where a budget becomes numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from ..config import ContiguousKVConfig, IndexedKeys
from ..errors import ConfigError
from ..hardware.aligned_memory import PAGE
from ..model.layer_plan import LayerPlan
from ..store.attached_prefix import AttachedPrefix
from ..store.reads import DEFAULT_GAP

# Storage delivers this much in the time that one more read costs (1.7 GB/s, 10 us of processor time: measured).
WORTH_READING_BYTES = DEFAULT_GAP
# Where a CPU computes, packed layers up to this size are read whole, ahead of the model: the same storage delivers them
# in less time than a layer takes to compute, and asking for chunks by name costs processor time that reading does not
# (docs/research.md). On storage that is many times slower this costs time instead.
WHOLE_LAYER_BYTES = 2 * 2**20


def chunks_kept(budget: float | str, whole_chunks: int) -> int:
    """How many of `whole_chunks` chunks a budget keeps: `ceil(whole_chunks * budget)`, at least one.

    Raises:
        ConfigError: the budget is "auto"; `AutoBudget` decides it for each prefix.
    """
    if isinstance(budget, str):
        raise ConfigError("budget is 'auto': it is decided when a prefix is attached")
    if whole_chunks == 0:
        return 0
    # Guard against 0.1 * 30 == 3.0000000000000004 becoming 4.
    return min(whole_chunks, max(1, math.ceil(whole_chunks * budget - 1e-9)))


@dataclass(frozen=True)
class ReadPlan:
    """What one request uses of its prefix, and how that is read.

    Attributes:
        prefix: in its exact form: what sliding-window layers see.
        served: the same prefix in the form in which full-attention layers get it.
        keep: whole chunks that each full-attention layer uses.
        layers: of the model.
        config: with a budget that is a number.
    """

    prefix: AttachedPrefix
    served: AttachedPrefix
    keep: int
    layers: LayerPlan
    config: ContiguousKVConfig

    @classmethod
    def of(cls, prefix: AttachedPrefix, config: ContiguousKVConfig, layers: LayerPlan) -> ReadPlan:
        """The plan for `prefix`.

        Raises:
            ConfigError: the budget is "auto".
        """
        keep, full = chunks_kept(config.budget, prefix.whole_chunks), layers.full_layers
        packs = config.payload == "packed" and keep < prefix.whole_chunks and bool(full)
        served = prefix.packed() if packs and prefix.packable.issuperset(full) else prefix
        return cls(prefix, served, keep, layers, config)

    def on(self, prefix: AttachedPrefix) -> ReadPlan:
        """The same plan for another prefix of the same tokens."""
        return ReadPlan.of(prefix, self.config, self.layers)

    @property
    def keeps_all(self) -> bool:
        """Whether every chunk is used: no selection, the exact answer."""
        return self.keep == self.prefix.whole_chunks

    @property
    def kept_tokens(self) -> int:
        """Prefix tokens that a full-attention layer shows to attention: the same for every layer and row."""
        return self.keep * self.prefix.geometry.chunk_size + self.prefix.tail_tokens

    @property
    def packed(self) -> bool:
        """Whether values come in 4 bits, and keys from the key index."""
        return self.served.form == "packed"

    @cached_property
    def reads_whole_layers(self) -> bool:
        """Whether reading all chunks of a layer costs no more time than reading the `keep` selected ones.

        Then nothing has to wait for a selection: layers are read ahead, in one piece each.
        """
        layer_bytes = self.served.whole_chunks * self.served.extent_bytes
        small = WHOLE_LAYER_BYTES if all(device.type == "cpu" for device in self.layers.devices) else 0
        return self.packed and layer_bytes <= max(small, self.keep * WORTH_READING_BYTES)

    @cached_property
    def indexed_layers(self) -> frozenset[int]:
        """Layers whose chunks are scored from the int8 key index."""
        indexed = isinstance(self.config.selection, IndexedKeys)
        return self.prefix.layers_with("indexed_layers") if indexed else frozenset()

    def is_leader(self, layer: int) -> bool:
        """Whether a full-attention layer chooses the chunks of its period."""
        return self.layers.full_layers.index(layer) % self.config.selection.period == 0

    def bytes_to_read(self, per_read: int = PAGE) -> int:
        """About how many bytes a request reads of a prefix of which nothing is in memory.

        A chunk that is read by itself counts as `per_read` bytes at least: with `WORTH_READING_BYTES`, what storage
        would have delivered in that time.
        """
        prefix, served, g = self.prefix, self.served, self.prefix.geometry
        tails = sum(min(prefix.tokens, window) for window in self.layers.windows if window is not None)
        found = tails * g.extent_bytes // g.chunk_size
        full = self.layers.full_layers
        if self.keeps_all:
            return found + len(full) * prefix.chunks * g.extent_bytes
        leading = prefix.layers_with("leader_layers")
        for layer in full:
            leads = self.is_leader(layer)
            if layer in self.indexed_layers and (leads or self.packed):
                found += prefix.chunks * g.keys_bytes // g.itemsize
            elif leads:
                found += prefix.chunks * (g.keys_bytes if layer in leading else g.extent_bytes)
        if self.reads_whole_layers:
            return found + len(full) * prefix.chunks * served.extent_bytes
        return found + len(full) * self.keep * max(per_read, -(-served.extent_bytes // PAGE) * PAGE)
