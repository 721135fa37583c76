"""FlexGen's role: see `FlexGen`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .attentionstore import AttentionStore


class FlexGen(AttentionStore):
    """All KV, without chunks and without pruning; shares of it stay in memory.

    Args:
        model: whose prefixes.
        folder: of the files.
        device_share: share of each layer that stays on the accelerator.
        host_share: share of each layer that stays in host memory.
        store_options: limits.
    """

    def __init__(
        self, model: Any, folder: Path, *, device_share: float = 0.0, host_share: float = 0.0, **store_options: Any
    ) -> None:
        super().__init__(model, folder, overlap=True, **store_options)
