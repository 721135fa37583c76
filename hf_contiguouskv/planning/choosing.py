"""Whether layers are read whole: what it costs to read chosen chunks by name, where a prefix lies."""

from __future__ import annotations

from ..hardware.aligned_memory import PAGE
from ..model.layer_plan import LayerPlan
from ..store.attached_prefix import AttachedPrefix
from ..store.inner import StoreInner
from .network import network_cost
from .read_plan import ChoosingCost

# By so many seconds a request is longer for each chunk that it reads by name, and for each layer that waits for its own
# (measured: docs/research.md, section 17).
CHUNK_S, LAYER_S = 18e-6, 1.5e-3
# Larger layers are not read whole for this reason: all that is read wants memory, and checking.
MOST_WHOLE_BYTES = 8 * 2**20
# Nor are they where all layers of one prefix would fill more than this part (1 / n) of the host's tier.
WHOLE_SHARE = 2


def disk_cost(bytes_per_s: float, most: int = MOST_WHOLE_BYTES) -> ChoosingCost:
    """What chunks by name cost on a disk of this speed, where a CPU computes.

    Args:
        bytes_per_s: of long reads.
        most: bytes of the largest layer that is read whole for this reason.
    """
    return ChoosingCost(int(bytes_per_s * CHUNK_S), int(bytes_per_s * LAYER_S), PAGE // 2, min(most, MOST_WHOLE_BYTES))


def choosing_cost(store: StoreInner, prefix: AttachedPrefix, layers: LayerPlan) -> ChoosingCost | None:
    """What chunks by name cost, by what is known of the way to `prefix`; `None`: nothing is known.

    The speed of the disk is that of what was read of local files. Of a prefix that came over a network and is all on
    this machine by now, nothing is known where the store has no prefixes of its own.
    """
    network = network_cost(store, prefix)
    if network is not None or not layers.on_cpu:
        return network
    speed, full = store.disk_bytes_per_s, layers.full_layers
    if speed is None or not full:
        return None
    return disk_cost(speed, store.memory.host.max_bytes // (WHOLE_SHARE * len(full)))
