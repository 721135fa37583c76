"""The layers of a model: which use full attention, which a sliding window, and the device of each."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LayerPlan:
    """The model's layers, in order.

    Attributes:
        windows: sliding window in tokens per layer, `None` for full attention.
        devices: the device of each layer's K and V.
    """

    windows: tuple[int | None, ...]
    devices: tuple[torch.device, ...]

    @property
    def on_cpu(self) -> bool:
        """Whether a CPU computes all of them."""
        return all(device.type == "cpu" for device in self.devices)

    @property
    def full_layers(self) -> list[int]:
        """Layers with full attention, to which budgets apply."""
        return [layer for layer, window in enumerate(self.windows) if window is None]
