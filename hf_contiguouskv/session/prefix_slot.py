"""The prefix in front of a cache: attached to the cache's layers, and served by a request."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..config import ContiguousKVConfig
from ..planning.auto_budget import BudgetChoice
from ..planning.choosing import choosing_cost
from ..planning.read_plan import ReadPlan
from ..request.prefix_request import PrefixRequest
from ..request.strategy import ServingMethod
from ..stats import RequestStats
from ..store.attached_prefix import AttachedPrefix
from .attached_request import AttachedRequest, PrefixLayer
from .prefix_source import PrefixSource


class PrefixSlot:
    """Attaches a prefix to the layers, and begins and ends the requests on it.

    Args:
        source: finds and computes prefixes.
        layers: the cache's layers.
        method: serves prefixes in place of the library's own method.

    Attributes:
        source: as passed.
        installation: installs the library's attention function in the model.
        ids: the tokens of the prefix, int64 `(n,)`, of which the first `tokens` are attached; `None` without a prefix.
        whole: the prefix of all `ids` if the user has named it; `None` in automatic mode.
        attached: the state that the layers share; `None` if no prefix is attached.
        stats: statistics of the running request.
        budget_choice: the choice of `budget="auto"` for the prefix, or `None`.
    """

    def __init__(
        self, source: PrefixSource, layers: Sequence[PrefixLayer], method: ServingMethod | None = None
    ) -> None:
        self.source = source
        self.installation = source.model.installation()
        self.ids: torch.Tensor | None = None
        self.whole: AttachedPrefix | None = None
        self.attached: AttachedRequest | None = None
        self.stats = RequestStats()
        self.budget_choice: BudgetChoice | None = None
        self._layers = layers
        self._method = method

    @property
    def tokens(self) -> int:
        """Tokens of the attached prefix; 0 without one."""
        return 0 if self.attached is None else self.attached.request.prefix.tokens

    @property
    def is_damaged(self) -> bool:
        """Whether stored bytes of the prefix are damaged and could not be computed again."""
        return self.attached is not None and self.attached.request.damaged

    def attach_ids(self, ids: torch.Tensor) -> None:
        """Attach the prefix that the user has named, int64 `(n,)`, and start to read it.

        Raises:
            InputError: it is not completely stored, and must not be.
        """
        source = self.source
        if self._method is not None:
            self.ids, self.whole = ids, self._method.attach(ids, source.geometry)
            self.attach(self.whole)
        else:
            found = source.complete(ids)
            self.ids, self.whole = ids, found.prefix
            self.attach(self.whole)
            self.budget_choice = found.recomputed or self.budget_choice
            self._count_tokens(found.from_store)
        # Start reading now, because `generate` takes a while to prepare its inputs.
        if self.attached is not None:
            self.attached.request.start()

    def attach(self, prefix: AttachedPrefix, config: ContiguousKVConfig | None = None) -> None:
        """Begin a new request on `prefix`; every layer drops its suffix.

        `config` applies to this request only; with it, the earlier choice of the budget is kept.
        """
        source, kept = self.source, None if config is None else self.budget_choice
        config = config or source.config
        choice = source.choose_budget(prefix, config)
        if choice is not None:
            config = replace(config, budget=choice.budget)
        plan = ReadPlan.of(prefix, config, source.layers, choosing_cost(source.store.inner, prefix, source.layers))
        # (From here on nothing of the earlier request is left.)
        self._end_request()
        self.budget_choice = choice or kept
        self.stats = RequestStats(
            prefix_tokens=prefix.tokens, tokens_from_store=prefix.tokens, chunks_total=prefix.chunks
        )
        recovery = None if self.ids is None else source.recovery(self.ids, self._recovered)
        request = PrefixRequest(plan, source.store.inner, self.stats, recovery, self._method)
        self.attached = AttachedRequest(request, self.installation)
        source.model.forget_shift()
        self._show()

    def detach(self) -> None:
        """Remove the prefix and leave every layer empty."""
        self._end_request()
        self.budget_choice = None
        self.stats = RequestStats()
        self._show()

    def shorten(self, tokens: int) -> None:
        """Begin a new request on the first `tokens` tokens of the attached prefix (0: without a prefix)."""
        assert self.attached is not None
        if tokens == 0:
            self.detach()
            return
        request, before = self.attached.request, self.stats
        self.attach(request.prefix.truncated(tokens), request.plan.config)
        self._count_tokens(before.tokens_from_store)

    def restart(self) -> None:
        """Begin the request on the attached prefix again; without a prefix, leave every layer empty."""
        if self.attached is None:
            self.detach()
        else:
            before = self.stats
            self.attach(self.attached.request.prefix)
            self._count_tokens(before.tokens_from_store)

    def _recovered(self, whole: AttachedPrefix, from_store: int) -> None:
        """Called when a request met damage, and `whole`, the prefix of all `ids`, has replaced its prefix."""
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
        """A copy for a copy of the cache. Nothing is attached to its `layers`; the caller must fill them."""
        twin = copy.copy(self)
        twin._layers = layers
        twin.source = copy.copy(self.source)
        twin.stats = copy.deepcopy(self.stats, memo)
        twin.installation = self.source.model.installation()
        if self.attached is not None:
            recovery = None if self.ids is None else twin.source.recovery(self.ids, twin._recovered)
            twin.attached = AttachedRequest(self.attached.request.twin(twin.stats, recovery), twin.installation)
        return twin
