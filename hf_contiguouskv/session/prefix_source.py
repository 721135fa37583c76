"""Provides prefixes to a cache: from the store, or computed by the model."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

import numpy as np
import torch

from ..config import ContiguousKVConfig
from ..model.served_model import ServedModel
from ..planning.auto_budget import AutoBudget, BudgetChoice
from ..prefill.exact_prefill import Prefill
from ..prefill.recovery import Recovery
from ..store import PrefixStore
from ..store.attached_prefix import AttachedPrefix
from ..store.entries import StoredPrefix
from .arguments import require_storable


@dataclass(frozen=True)
class CompletePrefix:
    """A prefix that covers all requested tokens.

    Attributes:
        prefix: the whole prefix.
        from_store: number of its tokens that were already stored.
        recomputed: why it was computed although it was stored, or `None`.
    """

    prefix: AttachedPrefix
    from_store: int
    recomputed: BudgetChoice | None = None


class PrefixSource:
    """Finds and computes the prefixes of one model in one store.

    Args:
        model: the model that computes the prefixes.
        store: the store that holds them.
        config: the cache's configuration.

    Attributes:
        model, store, config: as passed.
        geometry: what is stored from now on.
        fingerprint, layers: of the model, at the last `refresh`.

    Raises:
        UnsupportedModelError: the model cannot be served correctly.
    """

    def __init__(self, model: ServedModel, store: PrefixStore, config: ContiguousKVConfig) -> None:
        self.model = model
        self.store = store
        self.config = config
        self.refresh()

    def refresh(self) -> None:
        """Read the model's state again, because its weights, adapters, dtype or devices may have changed."""
        config, inside = self.config, self.store.inner
        self.geometry = self.model.geometry(config.chunk_size, config.index_bits, config.layers_per_group)
        self.layers = self.model.layers
        self.fingerprint = self.model.fingerprint()
        self._prefill = Prefill(self.model, self.fingerprint, self.geometry, inside, config.prefill_block)
        self._auto_budget = AutoBudget(self.model, inside, self.config) if self.config.budget == "auto" else None

    @property
    def is_changed(self) -> bool:
        """Whether the model now computes other K/V than at the last `refresh`."""
        return self.model.fingerprint() != self.fingerprint

    def look_up(self, ids: np.ndarray[Any, np.dtype[np.int64]]) -> StoredPrefix | None:
        """The longest stored beginning of `ids`. The store's statistics count this look-up."""
        return self._prefill.look_up(ids, count=True)

    def complete(self, ids: torch.Tensor) -> CompletePrefix:
        """The prefix `ids`, int64 `(n,)`. What is not stored is computed and stored now.

        Raises:
            InputError: the missing part must not be stored.
        """
        numbers = ids.numpy().astype(np.int64)
        stored = self.look_up(numbers)
        found = 0 if stored is None else stored.tokens
        recomputed: BudgetChoice | None = None
        if stored is None or found < len(numbers):
            require_storable(self.model.lm, ids)
            stored = self._prefill.complete(ids, stored)
        elif not self.model.lm.training:
            recomputed = self.faster_to_compute(AttachedPrefix.of(stored, found), self.config)
            if recomputed is not None:
                stored, found = self._prefill.complete(ids, None, in_memory=True), 0
        return CompletePrefix(AttachedPrefix.of(stored, len(numbers)), found, recomputed)

    def choose_budget(self, prefix: AttachedPrefix, config: ContiguousKVConfig) -> BudgetChoice | None:
        """The choice for `prefix` if `config` has `budget="auto"`; `None` if the budget is a number."""
        if config.budget != "auto" or self._auto_budget is None:
            return None
        return self._auto_budget.choose(prefix)

    def faster_to_compute(self, prefix: AttachedPrefix, config: ContiguousKVConfig) -> BudgetChoice | None:
        """Why a stored prefix should be computed again, if `budget="auto"` finds that faster than loading; else
        `None`."""
        choice = self.choose_budget(prefix, config)
        return replace(choice, budget=1.0) if choice is not None and choice.recompute else None

    def recovery(self, ids: torch.Tensor, report: Callable[[AttachedPrefix, int], None]) -> Recovery:
        """How a request on `ids`, int64 `(n,)`, recovers from damage. It does not keep the owner of `report` alive.

        Args:
            ids: the whole prefix.
            report: a bound method, called with the sound prefix and the number of its tokens that came from the store.
        """
        assert isinstance(report, MethodType)
        weak: weakref.WeakMethod[Callable[[AttachedPrefix, int], None]] = weakref.WeakMethod(report)

        def report_if_alive(prefix: AttachedPrefix, from_store: int) -> None:
            method = weak()
            if method is not None:
                method(prefix, from_store)

        return Recovery(self._prefill, ids, report_if_alive)
