"""AttentionStore (ATC'24): the whole prefix KV loaded layer by layer.

With `+overlap` (as it deserves) all layers are asked for at once, in order, and a layer's attention waits for that
layer alone; without (as papers that compare with it run it) a layer is asked for when attention gets there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .layer_system import LayerSystem


class AttentionStore(LayerSystem):
    """All KV of the prefix from a file of its own layout (`layer_file`): large reads that land where attention uses
    them, on an accelerator one copy for each layer. What was read stays in memory, where the least recently used layers
    go first.

    Args:
        model: whose prefixes.
        folder: of the files.
        overlap: whether reads run ahead of compute.
        store_options: `host_bytes`, `device_bytes` and `read_gbps` of `LayerSystem`.
    """

    def __init__(self, model: Any, folder: Path, overlap: bool = False, **store_options: Any) -> None:
        name = "attentionstore+overlap" if overlap else "attentionstore"
        super().__init__(name, model, folder, ahead=None if overlap else 0, **store_options)
