"""No stored prefix: everything is computed, every time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from hf_contiguouskv import RequestStats

from .attention import GroupedAttention, grouped_cache
from .states import State, require_state


class Recompute:
    """What transformers does without any help.

    Args:
        model: whose requests.
    """

    name = "recompute"
    states = (State.COLD,)

    def __init__(self, model: Any) -> None:
        self._model = model
        self._attention = GroupedAttention(model)

    def store(self, prefix_ids: torch.Tensor, states: DynamicCache | None = None) -> None:
        """See `System`: nothing is kept."""

    def files(self) -> list[Path]:
        return []

    def enter(self, state: State, prefix_ids: torch.Tensor, suffix_ids: torch.Tensor | None = None) -> None:
        """See `System`: nothing is stored anywhere."""
        require_state(self.name, state, self.states)

    def cache(self, prefix_ids: torch.Tensor) -> Any:
        """See `System`: an empty one."""
        self._attention.begin()
        return grouped_cache(self._model)

    def timeline(self, cache: Any) -> None:
        """See `System`."""

    def finish(self, cache: Any) -> RequestStats:
        """See `System`. There are no tiers that anything could come from."""
        self._attention.end()
        return RequestStats(hits={})

    def details(self) -> dict[str, Any]:
        """See `System`."""
        return self._attention.details()

    def __enter__(self) -> Recompute:
        return self

    def __exit__(self, *exception: object) -> None:
        self._attention.end()
