"""No stored prefix: everything is computed, every time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from hf_contiguouskv import RequestStats

from .states import State, require_state


class Recompute:
    """What transformers does without any help."""

    name = "recompute"
    states = (State.COLD,)

    def __init__(self, model: Any) -> None:
        self._model = model

    def store(self, prefix_ids: torch.Tensor, states: DynamicCache | None = None) -> None:
        """See `System`: nothing is kept."""

    def files(self) -> list[Path]:
        return []

    def enter(self, state: State, prefix_ids: torch.Tensor, suffix_ids: torch.Tensor | None = None) -> None:
        """See `System`: nothing is stored anywhere."""
        require_state(self.name, state, self.states)

    def cache(self, prefix_ids: torch.Tensor) -> Any:
        """See `System`: an empty one."""
        return DynamicCache()

    def timeline(self, cache: Any) -> None:
        """See `System`."""

    def finish(self, cache: Any) -> RequestStats:
        return RequestStats(hits={})

    def details(self) -> dict[str, Any]:
        """See `System`."""
        return {}

    def __enter__(self) -> Recompute:
        return self

    def __exit__(self, *exception: object) -> None:
        pass
