"""`ContiguousKVCache`: a transformers `Cache` whose beginning lives on disk."""

from __future__ import annotations

import copy
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.cache_utils import Cache

from .arguments import TemporaryStore, checked_ids, configured, require_storable
from .attention import Installation
from .auto_budget import AutoBudget, BudgetChoice
from .automatic import AutomaticPrefix
from .config import ContiguousKVConfig
from .errors import InputError
from .fitting import check_ids, check_rows, fit_to_prefix
from .forward import decoding
from .hook import ForwardHook, GenerateCall, running_generate
from .layers import AttachedState, ContiguousLayer, ContiguousSlidingLayer
from .prefill import Prefill, geometry_of
from .prefix import AttachedPrefix
from .recovery import Recovery
from .request import PrefixRequest
from .stats import RequestStats
from .store import PrefixStore
from .store.entries import StoredPrefix
from .store.fingerprint import model_fingerprint
from .support import decoder_config, innermost_causal_lm, layer_windows, require_support
from .timeline import Timeline


class ContiguousKVCache(Cache):
    """A KV cache that begins with a stored prefix, of which attention reads only the chunks that it needs.

    Use it as any other cache: `model.generate(ids, past_key_values=ContiguousKVCache(model, prefix_ids, store="kv"))`.

    Args:
        model: a decoder-only transformers model, on any device or several.
        prefix_ids: int64 `[n]` or `[1, n]`. What is stored of it is attached; the rest is prefilled exactly, written
            to the store and attached. `None` with a store: **automatic**, the prompt of the first forward is looked
            up and stored. `None` without a store: an ordinary `DynamicCache`.
        store: a `PrefixStore` or the path of one. `None` with `prefix_ids`: a temporary one that goes with the cache.
        config: how chunks are chosen and read; the default is the best we know.
        overrides: fields of `ContiguousKVConfig`, e.g. `budget=0.1`.

    Attributes:
        prefix_ids: int64 `(n,)`, the attached prefix, or `None`.
        config: the `ContiguousKVConfig` in force.
        store: the `PrefixStore` in use, or `None`.
        budget_choice: what `budget="auto"` has chosen for the attached prefix and why, or `None`.

    Raises:
        UnsupportedModelError: the model cannot be served correctly; the message names the reason.
        InputError: ids of the wrong dtype or shape, or none.
        ConfigError: a field out of range.
        StoreError: the folder is not a store, is of a newer format, or its files are damaged.
    """

    def __init__(
        self,
        model: nn.Module,
        prefix_ids: torch.Tensor | None = None,
        *,
        store: PrefixStore | str | Path | None = None,
        config: ContiguousKVConfig | None = None,
        **overrides: Any,
    ) -> None:
        self.config = configured(config, overrides)
        lm = innermost_causal_lm(model)
        windows = layer_windows(lm)
        super().__init__(
            layers=[
                ContiguousLayer(position) if window is None else ContiguousSlidingLayer(position, window)
                for position, window in enumerate(windows)
            ]
        )
        ids = None if prefix_ids is None else checked_ids(prefix_ids)
        self.prefix_ids: torch.Tensor | None = None
        self._model = weakref.ref(lm)
        self._attached: AttachedState | None = None
        self._whole_prefix: AttachedPrefix | None = None
        self._stats = RequestStats()
        self._automatic: AutomaticPrefix | None = None
        self._installation: Installation | None = None
        self._hook: ForwardHook | None = None
        self._auto_budget: AutoBudget | None = None
        self.budget_choice: BudgetChoice | None = None
        self._generate_begins = False
        # Tokens after the prefix, int64 (n,), for as long as there is one row and all of them were seen.
        self._suffix_ids: torch.Tensor | None = torch.zeros(0, dtype=torch.long)
        # Suffix length before the forward that is running (or was interrupted); `None` between forwards.
        self._before: int | None = None
        self._temporary: TemporaryStore | None = None
        self.store = self._opened(store, ids is not None)
        if self.store is None:
            return
        self._support = require_support(lm)
        self._fingerprint = model_fingerprint(lm)
        self._measure(lm)
        try:
            self._install(lm)
            if ids is None:
                self._automatic = AutomaticPrefix(self.store, self._support, self.config)
            else:
                self._attach_ids(lm, ids)
        except BaseException:
            self.close()
            raise

    def _opened(self, store: PrefixStore | str | Path | None, needed: bool) -> PrefixStore | None:
        if isinstance(store, PrefixStore):
            return store
        if isinstance(store, str | Path):
            return PrefixStore.shared(store)
        if store is not None:
            raise InputError(f"store must be a PrefixStore or a path, got {type(store).__name__}")
        if not needed:
            return None
        self._temporary = TemporaryStore()
        return self._temporary.store

    def _install(self, lm: nn.Module) -> None:
        self._installation = Installation(decoder_config(lm))
        self._hook = ForwardHook(self, lm)

    def refresh_model(self) -> None:
        """Find out anew what the model is: its weights, adapters, dtype or devices may have changed."""
        lm = self._living_model()
        self._fingerprint = model_fingerprint(lm)
        self._support = require_support(lm)
        self._measure(lm)

    def _measure(self, lm: nn.Module) -> None:
        if self.config.budget == "auto" and self.store is not None:
            self._auto_budget = AutoBudget(lm, self.store, self._support, self.config)

    def _living_model(self) -> nn.Module:
        lm = self._model()
        if lm is None:
            raise InputError("the model of this cache is gone")
        return lm

    # -- attaching ----------------------------------------------------------------------------------------------------

    def _attach_ids(self, lm: nn.Module, ids: torch.Tensor) -> None:
        assert self.store is not None
        numbers = ids.numpy().astype(np.int64)
        stored = self._look_up(numbers)
        found = 0 if stored is None else stored.tokens
        again: BudgetChoice | None = None
        if stored is None or found < len(numbers):
            require_storable(lm, ids)
            prefill = Prefill(lm, self.store, self._fingerprint, self._support, self.config)
            stored = prefill.complete(ids, stored)
        elif not lm.training:
            again = self._computes_again(AttachedPrefix.of(stored, found), self.config)
            if again is not None:
                prefill = Prefill(lm, self.store, self._fingerprint, self._support, self.config)
                stored, found = prefill.complete(ids, None, in_memory=True), 0
        self.prefix_ids = ids
        self._whole_prefix = AttachedPrefix.of(stored, len(numbers))
        self._attach(self._whole_prefix)
        self.budget_choice = again or self.budget_choice
        self._stats.tokens_from_store = found
        self._stats.tokens_prefilled = len(numbers) - found
        if self._attached is not None:
            # A cache is made to be used: its first reads go on while `generate` prepares its inputs.
            self._attached.request.start()

    def _look_up(self, ids: np.ndarray[Any, np.dtype[np.int64]]) -> StoredPrefix | None:
        """The longest stored beginning of `ids`."""
        assert self.store is not None
        c = self.config.chunk_size
        return self.store.lookup(self._fingerprint, ids, c, geometry=geometry_of(self._support, c), wait=True)

    def prefix_recovered(self, whole: AttachedPrefix, tokens_from_store: int) -> None:
        """Damage showed in the middle of a request: `whole` is the prefix of all `prefix_ids` that has replaced it."""
        if self._whole_prefix is not None:
            self._whole_prefix = whole
        self._stats.tokens_from_store = min(tokens_from_store, self._stats.prefix_tokens)
        self._stats.tokens_prefilled = self._stats.prefix_tokens - self._stats.tokens_from_store

    def _attach(
        self, prefix: AttachedPrefix | None, config: ContiguousKVConfig | None = None, stats: RequestStats | None = None
    ) -> None:
        """Begin a new request on `prefix` (or none): every layer forgets its suffix."""
        self._close_request()
        self._before = None
        if prefix is None or config is None:
            self.budget_choice = None
        self._suffix_ids = torch.zeros(0, dtype=torch.long)
        self._stats = RequestStats()
        if prefix is not None:
            assert self.store is not None
            assert self._installation is not None
            self._stats.prefix_tokens = self._stats.tokens_from_store = prefix.tokens
            self._stats.chunks_total = prefix.chunks
            if stats is not None:
                self._stats.tokens_from_store = min(stats.tokens_from_store, prefix.tokens)
                self._stats.tokens_prefilled = prefix.tokens - self._stats.tokens_from_store
            config = self._decided(prefix, config or self.config)
            self._attached = AttachedState(self._new_request(prefix, config), self._installation)
        for layer in self.layers:
            layer.attach(self._attached)

    def _decided(self, prefix: AttachedPrefix, config: ContiguousKVConfig) -> ContiguousKVConfig:
        """`config` with a budget that is a number."""
        if config.budget != "auto" or self._auto_budget is None:
            return config
        self.budget_choice = self._auto_budget.choose(prefix)
        return replace(config, budget=self.budget_choice.budget)

    def _computes_again(self, prefix: AttachedPrefix, config: ContiguousKVConfig) -> BudgetChoice | None:
        """Why a stored prefix is computed again, where `budget="auto"` finds that faster than loading it."""
        if config.budget != "auto" or self._auto_budget is None:
            return None
        choice = self._auto_budget.choose(prefix)
        return replace(choice, budget=1.0) if choice.recompute else None

    def _new_request(self, prefix: AttachedPrefix, config: ContiguousKVConfig) -> PrefixRequest:
        """What serves `prefix`. (The evaluation package puts other methods here.)"""
        assert self.store is not None
        return PrefixRequest(prefix, config, self._support.plan, self.store, self._stats, Recovery(self))

    def _close_request(self) -> None:
        if self._attached is not None:
            self._attached.request.close()
            self._attached = None

    # -- before and after every forward (called by the hook) ----------------------------------------------------------

    def before_forward(self, inputs: dict[str, Any]) -> None:
        """Make the arguments of the model's forward fit what is cached. `inputs` are changed in place."""
        self._recover()
        if self._attached is not None:
            self._attached.request.settle()  # The forward before this one has had its token by now.
        call = running_generate()
        begins, self._generate_begins = self._generate_begins and call is not None, False
        if self._automatic is not None:
            self._automatic.before_forward(self, inputs, begins, call.block if begins and call else None)
        if self._attached is not None:
            fit_to_prefix(self, inputs, begins, call is not None and bool(call.block) and not decoding(inputs))
        self._remember(inputs)
        self._before = self._suffix_length()
        self.announce(True)

    def announce(self, running: bool) -> None:
        """A forward of this cache's own model begins, or is over."""
        if self._attached is not None:
            self._attached.announced = running

    def after_forward(self) -> None:
        """The model is through with a forward on this cache."""
        self._before = None
        self.announce(False)
        if self._attached is not None and self._attached.request.timeline is not None:
            self._attached.request.timeline.model_done()
        if self._automatic is not None:
            self._automatic.after_forward(self)

    def _suffix_length(self) -> int:
        return int(self.get_seq_length()) - self._tokens()

    def _recover(self) -> None:
        """After a forward that was interrupted: start over if it was the first, else the cache cannot be repaired."""
        if self._before == 0:
            self._start_over()
        elif self._before is not None:
            raise InputError(
                "an earlier forward with this cache was interrupted, its layers hold different tokens; call reset()"
            )

    def _start_over(self) -> None:
        if self._automatic is not None or self._damaged():
            self.reset()
        else:
            self._attach(None if self._attached is None else self._attached.request.prefix, stats=self._stats)

    def _damaged(self) -> bool:
        return self._attached is not None and self._attached.request.damaged

    def _remember(self, inputs: dict[str, Any]) -> None:
        ids = inputs.get("input_ids")
        known = isinstance(ids, torch.Tensor) and ids.ndim == 2 and ids.shape[0] == 1
        if known and self._suffix_ids is not None:
            self._suffix_ids = torch.cat([self._suffix_ids, ids[0].cpu()])  # type: ignore[index]
        else:
            self._suffix_ids = None

    @property
    def _is_user_defined(self) -> bool:
        """`generate` sets this on a cache that it is given: the sign that a new call begins."""
        return self._generate_begins

    @_is_user_defined.setter
    def _is_user_defined(self, value: bool) -> None:
        self._generate_begins = True
        call = running_generate()
        if self.store is not None and call is not None:
            self._recover()
            self._begin_generate(call)

    def _begin_generate(self, call: GenerateCall) -> None:
        """Another prompt than the one in the cache needs no `reset`: the next question on the same prefix begins."""
        prompt = call.whole_prompt
        if prompt is None or self.get_seq_length() == 0:
            return
        if self._suffix_length() > 0:
            continues = prompt.shape[1] >= self.get_seq_length()
            if continues and self._suffix_ids is not None and len(prompt) == 1:
                prefix = self.prefix_ids if self._attached is not None else None
                cached = self._suffix_ids if prefix is None else torch.cat([prefix[: self._tokens()], self._suffix_ids])
                continues = torch.equal(prompt[0, : len(cached)].cpu(), cached)
            if not continues:
                self.reset()
        if self._attached is not None:
            check_rows(self, prompt, call.attention_mask)

    def _tokens(self) -> int:
        """Tokens of the prefix that is attached now."""
        return 0 if self._attached is None else self._attached.request.prefix.tokens

    # -- the public interface -----------------------------------------------------------------------------------------

    @property
    def stats(self) -> RequestStats:
        """What the current request read, used and waited for."""
        return self._stats

    @property
    def timeline(self) -> Timeline | None:
        """When the current request did what, where the config asks for it."""
        return None if self._attached is None else self._attached.request.timeline

    def check(self, input_ids: torch.Tensor, *, partial: bool = False) -> None:
        """Raise `InputError` if `input_ids` (`[n]`, or `[batch, n]`: each row) do not begin with the prefix.

        With `partial`, ids shorter than the prefix need only agree as far as they go.
        """
        if self.prefix_ids is not None and self._attached is not None:
            check_ids(self.prefix_ids[: self._tokens()], input_ids, partial)

    def selected_chunks(self, layer_idx: int) -> torch.Tensor | None:
        """Whole chunks that a full-attention layer uses now, int64 `(batch, kept)`, ascending.

        `None` before the first suffix token, and for sliding-window layers. A partial last chunk is kept besides.
        """
        layer = self.layers[layer_idx]
        if self._attached is None or not isinstance(layer, ContiguousLayer) or layer.row_of is None:
            return None
        request, rows = self._attached.request, layer.row_of.cpu()
        if request.keeps_all:
            return torch.arange(request.keep).expand(len(rows), -1)
        return request.selected[layer_idx].cpu()[rows]

    def reset(self) -> None:
        """Drop the suffix and keep the prefix attached, ready for the next question (automatic: the next prompt)."""
        if self._automatic is not None:
            self._automatic.reset()
            self.prefix_ids = None
            self._attach(None)
        elif self._damaged() and self.prefix_ids is not None:
            # What is stored proved wrong and is out of service: compute it anew.
            self._attach_ids(self._living_model(), self.prefix_ids)
        elif self._whole_prefix is not None:
            self._attach(self._whole_prefix)
        else:
            super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens. Back to the prefix, its chunks are selected anew."""
        if self._attached is None:
            super().crop(tokens_to_remove)
            self._suffix_ids = None
            return
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes a negative number of tokens to remove (or 0), got {tokens_to_remove}; to keep "
                f"{tokens_to_remove} of {self.get_seq_length()} tokens, pass {tokens_to_remove - self.get_seq_length()}"
            )
        request = self._attached.request
        left = self.get_seq_length() + tokens_to_remove
        if left > request.prefix.tokens or tokens_to_remove == 0:
            for layer in self.layers:
                layer.crop(tokens_to_remove)
            if self._suffix_ids is not None:
                self._suffix_ids = self._suffix_ids[: left - request.prefix.tokens]
        elif left > 0:
            self._attach(request.prefix.truncated(left), request.config, stats=self._stats)
        else:
            self._attach(None)

    def close(self) -> None:
        """Detach the prefix, let go of model and store: an empty, ordinary cache is left. `stats` stay readable."""
        stats = self._stats
        self._automatic = self._auto_budget = None
        self._attach(None)
        self._stats = stats
        self._whole_prefix = self.prefix_ids = None
        if self._hook is not None:
            self._hook.remove()
        if self._installation is not None:
            self._installation.release()
        self._hook = self._installation = self._temporary = self.store = None

    def __enter__(self) -> ContiguousKVCache:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> ContiguousKVCache:
        """An independent cache in the same state; model and store are shared, not copied."""
        twin: ContiguousKVCache = object.__new__(type(self))
        memo[id(self)] = twin
        shared = ("_model", "store", "_support", "_temporary", "_whole_prefix")
        apart = ("layers", "_attached", "_installation", "_hook")
        for name, value in vars(self).items():
            if name not in apart:
                setattr(twin, name, value if name in shared else copy.deepcopy(value, memo))
        twin._attached = twin._installation = twin._hook = None
        if self._installation is not None:
            twin._install(self._living_model())
        if self._attached is not None and twin._installation is not None:
            request = self._attached.request.twin(twin._stats, Recovery(twin))
            twin._attached = AttachedState(request, twin._installation)
        twin.layers = [layer.copy_of(twin._attached, memo) for layer in self.layers]
        return twin
