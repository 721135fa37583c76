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


def disk_cost(bytes_per_s: float) -> ChoosingCost:
    """What chunks by name cost on a disk of this speed, where a CPU computes."""
    return ChoosingCost(int(bytes_per_s * CHUNK_S), int(bytes_per_s * LAYER_S), PAGE // 2, MOST_WHOLE_BYTES)


def choosing_cost(store: StoreInner, prefix: AttachedPrefix, layers: LayerPlan) -> ChoosingCost | None:
    """What chunks by name cost, by what is known of the way to `prefix`; `None`: nothing is known."""
    network = network_cost(store, prefix)
    if network is not None:
        return network
    speed = store.disk_bytes_per_s if all(device.type == "cpu" for device in layers.devices) else None
    return None if speed is None else disk_cost(speed)
