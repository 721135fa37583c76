"""What the layers of a model are: which attend to everything, which through a window, and where each one is."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LayerPlan:
    """What the model's layers are, in order.

    Attributes:
        windows: sliding window in tokens per layer, `None` for full attention.
        devices: where each layer's K and V live.
    """

    windows: tuple[int | None, ...]
    devices: tuple[torch.device, ...]

    @property
    def full_layers(self) -> list[int]:
        """Layers with full attention: the ones that budgets apply to."""
        return [layer for layer, window in enumerate(self.windows) if window is None]
