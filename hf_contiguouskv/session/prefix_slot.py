"""The prefix in front of a cache: found in the store or computed, attached to the layers, and served by a request."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ..config import ContiguousKVConfig
from ..model.served_model import ServedModel
from ..planning.auto_budget import AutoBudget, BudgetChoice
from ..planning.read_plan import ReadPlan
from ..prefill.exact_prefill import Prefill
from ..prefill.recovery import Recovery
from ..request.prefix_request import PrefixRequest
from ..request.strategy import ServingMethod
from ..stats import RequestStats
from ..store import PrefixStore
from ..store.attached_prefix import AttachedPrefix
from ..store.entries import StoredPrefix
from .arguments import require_storable
from .attached_request import AttachedRequest, PrefixLayer


class PrefixSlot:
    """Where a prefix is attached. It begins and ends the requests on it, and has an attribute for each part of one.

    Args:
        model: whose prefixes.
        store: where they are.
        config: how they are served.
        layers: of the cache.
        method: serves prefixes in place of the library's own method.

    Attributes:
        ids: int64 `(n,)`: the tokens of the prefix; the first `tokens` of them are attached. `None`: no prefix.
        whole: the prefix of all `ids`, where the user has named it; automatic mode has none.
        attached: what the layers share; `None`: no prefix is attached.
        stats: of the running request.
        budget_choice: what `budget="auto"` has chosen for it, or `None`.
        fingerprint: of the model, when the prefix was looked up.
    """

    def __init__(
        self,
        model: ServedModel,
        store: PrefixStore,
        config: ContiguousKVConfig,
        layers: Sequence[PrefixLayer],
        method: ServingMethod | None = None,
    ) -> None:
        self.model = model
        self.store = store
        self.config = config
        self.ids: torch.Tensor | None = None
        self.whole: AttachedPrefix | None = None
        self.attached: AttachedRequest | None = None
        self.stats = RequestStats()
        self.budget_choice: BudgetChoice | None = None
        self._layers = layers
        self._method = method
        model.shape  # noqa: B018 (A model that cannot be served is refused for that, before anything else.)
        self.installation = model.installation()
        self.refresh()

    def refresh(self) -> None:
        """Look at the model again: its weights, adapters, dtype or devices may have changed."""
        self.fingerprint = self.model.fingerprint()
        self._prefill = Prefill(self.model, self.fingerprint, self.store, self.config)
        self._auto_budget = AutoBudget(self.model, self.store, self.config) if self.config.budget == "auto" else None

    @property
    def tokens(self) -> int:
        """Tokens of the prefix that is attached now."""
        return 0 if self.attached is None else self.attached.request.prefix.tokens

    @property
    def is_damaged(self) -> bool:
        """Whether stored bytes of the prefix proved wrong, and could not be computed again."""
        return self.attached is not None and self.attached.request.damaged

    @property
    def is_changed(self) -> bool:
        """Whether the model would compute other K/V now than those of the prefix."""
        return self.model.fingerprint() != self.fingerprint

    # -- finding ------------------------------------------------------------------------------------------------------

    def look_up(self, ids: np.ndarray[Any, np.dtype[np.int64]]) -> StoredPrefix | None:
        """The longest stored beginning of `ids`."""
        return self._prefill.look_up(ids, count=True)

    def attach_ids(self, ids: torch.Tensor) -> None:
        """Attach the prefix `ids`, int64 `(n,)`: what is stored of it, and what is computed and stored now.

        Raises:
            InputError: it must not be stored.
        """
        if self._method is not None:
            self.ids, self.whole = ids, self._method.attach(ids, self.model.geometry(self.config.chunk_size))
            self.attach(self.whole)
            self.start()
            return
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
        self.ids = ids
        self.whole = AttachedPrefix.of(stored, len(numbers))
        self.attach(self.whole)
        self.budget_choice = recomputed or self.budget_choice
        self.stats.tokens_from_store, self.stats.tokens_prefilled = found, len(numbers) - found
        self.start()

    def start(self) -> None:
        """Start reading: a cache is made to be used, and `generate` takes a while to prepare its inputs."""
        if self.attached is not None:
            self.attached.request.start()

    def faster_to_compute(self, prefix: AttachedPrefix, config: ContiguousKVConfig) -> BudgetChoice | None:
        """Why a stored prefix is computed again, where `budget="auto"` finds that faster than loading it."""
        if config.budget != "auto" or self._auto_budget is None:
            return None
        choice = self._auto_budget.choose(prefix)
        return replace(choice, budget=1.0) if choice.recompute else None

    # -- attaching ----------------------------------------------------------------------------------------------------

    def attach(self, prefix: AttachedPrefix, config: ContiguousKVConfig | None = None) -> None:
        """Begin a new request on `prefix`: every layer forgets its suffix.

        `config`: for this request; the budget of the cache is not decided again.
        """
        self._end_request()
        self.budget_choice = None if config is None else self.budget_choice
        config = config or self.config
        if config.budget == "auto" and self._auto_budget is not None:
            self.budget_choice = self._auto_budget.choose(prefix)
            config = replace(config, budget=self.budget_choice.budget)
        self.stats = RequestStats(
            prefix_tokens=prefix.tokens, tokens_from_store=prefix.tokens, chunks_total=prefix.chunks
        )
        self.attached = self._attached(ReadPlan.of(prefix, config, self.model.layers))
        self.model.forget_shift()
        self._show()

    def detach(self) -> None:
        """Take the prefix away: every layer is empty afterwards."""
        self._end_request()
        self.budget_choice = None
        self.stats = RequestStats()
        self._show()

    def shorten(self, tokens: int) -> None:
        """Begin a new request on the first `tokens` tokens of the prefix that is attached (0: without a prefix)."""
        assert self.attached is not None
        if tokens == 0:
            self.detach()
            return
        request, before = self.attached.request, self.stats
        self.attach(request.prefix.truncated(tokens), request.plan.config)
        self._count_tokens(before.tokens_from_store)

    def restart(self) -> None:
        """Begin the request on the attached prefix again, if there is one."""
        before = self.stats
        if self.attached is None:
            self.detach()
        else:
            self.attach(self.attached.request.prefix)
            self._count_tokens(before.tokens_from_store)

    def _attached(self, plan: ReadPlan) -> AttachedRequest:
        request = PrefixRequest(plan, self.store, self.stats, self._recovery(), self._method)
        return AttachedRequest(request, self.installation)

    def _recovery(self) -> Recovery | None:
        if self.ids is None or self._method is not None:
            return None
        # Weakly: the request must not keep the cache alive that it serves.
        report = weakref.WeakMethod(self._recovered)

        def tell(whole: AttachedPrefix, from_store: int) -> None:
            told = report()
            if told is not None:
                told(whole, from_store)

        return Recovery(self._prefill, self.ids, tell)

    def _recovered(self, whole: AttachedPrefix, from_store: int) -> None:
        """Damage showed in the middle of a request, and `whole`, the prefix of all `ids`, has replaced it."""
        if self.whole is not None:
            self.whole = whole
        self._count_tokens(from_store)

    def _count_tokens(self, from_store: int) -> None:
        self.stats.tokens_from_store = min(from_store, self.stats.prefix_tokens)
        self.stats.tokens_prefilled = self.stats.prefix_tokens - self.stats.tokens_from_store

    def _end_request(self) -> None:
        if self.attached is not None:
            self.attached.request.close()
            self.attached = None

    def _show(self) -> None:
        for layer in self._layers:
            layer.attach(self.attached)

    def close(self) -> None:
        """End the request and forget the prefix. `stats` stay readable."""
        stats = self.stats
        self.detach()
        self.stats = stats
        self.whole = self.ids = None
        self.installation.release()

    def copy_for(self, layers: Sequence[PrefixLayer], memo: dict[int, Any]) -> PrefixSlot:
        """The same for a copy of the cache, whose `layers` are filled in by the caller: they are not told."""
        twin = copy.copy(self)
        twin._layers = layers
        twin.stats = copy.deepcopy(self.stats, memo)
        twin.installation = self.model.installation()
        if self.attached is not None:
            request = self.attached.request.twin(twin.stats, twin._recovery())
            twin.attached = AttachedRequest(request, twin.installation)
        return twin
