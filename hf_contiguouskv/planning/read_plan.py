"""What a request needs of its prefix: in which form, read in which pieces, and how many bytes that is."""

from __future__ import annotations

from ..config import ContiguousKVConfig
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


def served_prefix(prefix: AttachedPrefix, config: ContiguousKVConfig, plan: LayerPlan) -> AttachedPrefix:
    """The prefix in the form in which full-attention layers get it (windows see exact K and V)."""
    full = plan.full_layers
    wanted = config.payload == "packed" and config.selection == "indexed_keys" and bool(full)
    selects = config.chunks_kept(prefix.whole_chunks) < prefix.whole_chunks
    return prefix.packed() if wanted and selects and prefix.packable.issuperset(full) else prefix


def reads_whole_layers(served: AttachedPrefix, keep: int, plan: LayerPlan) -> bool:
    """Whether reading all chunks of a layer costs no more time than reading the `keep` selected ones.

    Then nothing has to wait for a selection: layers are read ahead, in one piece each.
    """
    layer_bytes = served.whole_chunks * served.extent_bytes
    small = WHOLE_LAYER_BYTES if all(device.type == "cpu" for device in plan.devices) else 0
    return served.form == "packed" and layer_bytes <= max(small, keep * WORTH_READING_BYTES)


def bytes_to_read(prefix: AttachedPrefix, config: ContiguousKVConfig, plan: LayerPlan, per_read: int = PAGE) -> int:
    """About how many bytes a request reads of a prefix of which nothing is in memory.

    A chunk that is read by itself counts as `per_read` bytes at least: with `WORTH_READING_BYTES`, what storage would
    have delivered in that time.
    """
    keep, chunks, g = config.chunks_kept(prefix.whole_chunks), prefix.chunks, prefix.geometry
    tails = sum(min(prefix.tokens, window) for window in plan.windows if window is not None)
    found = tails * g.extent_bytes // g.chunk_size
    full = plan.full_layers
    if keep == prefix.whole_chunks:
        return found + len(full) * chunks * g.extent_bytes
    served = served_prefix(prefix, config, plan)
    indexed = prefix.layers_with("indexed_layers") if config.selection == "indexed_keys" else frozenset()
    leading = prefix.layers_with("leader_layers")
    for position, layer in enumerate(full):
        leads = position % config.period == 0
        if layer in indexed and (leads or served.form == "packed"):
            found += chunks * g.keys_bytes // g.itemsize
        elif leads:
            found += chunks * (g.keys_bytes if layer in leading else g.extent_bytes)
    if reads_whole_layers(served, keep, plan):
        return found + len(full) * chunks * served.extent_bytes
    return found + len(full) * keep * max(per_read, -(-served.extent_bytes // PAGE) * PAGE)
