"""This library: the published method, and our default."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from transformers import DynamicCache

from hf_contiguouskv import AttentionMass, ContiguousKVCache
from hf_contiguouskv.model import served_model

from .stored import Stored


class ContiguousKV(Stored):
    """Requests are served as prefixes are stored: by the `config` of `Stored`, which has the arguments."""

    def store(self, prefix_ids: torch.Tensor, states: DynamicCache | None = None) -> None:
        """See `System`. The published method finds keys apart from values in every layer that chooses.

        The library keeps them for periods of eight layers. With shorter ones, all K and V of the other layers that
        choose would be read for their keys alone, and a comparison of periods would compare that.
        """
        selection = self._config.selection
        period = selection.period if isinstance(selection, AttentionMass) else served_model.LEADER_PERIOD
        with mock.patch.object(served_model, "LEADER_PERIOD", period):
            super().store(prefix_ids, states)

    def cache(self, prefix_ids: torch.Tensor) -> Any:
        return ContiguousKVCache(self._model, prefix_ids, store=self.opened(), config=self._config)
