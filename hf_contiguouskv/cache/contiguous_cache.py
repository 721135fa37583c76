"""`ContiguousKVCache`: a transformers `Cache` whose beginning lives on disk."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..config import ContiguousKVConfig
from ..errors import ContiguousKVError, InputError
from ..model.attention import NO_FULL_GRAPH, Installation
from ..model.fingerprint import model_fingerprint
from ..model.forward_hooks import ForwardHook, HookedCache
from ..model.media_placeholders import placeholder_ids
from ..model.peft_adapters import remove_row_hooks, require_no_virtual_tokens
from ..model.support import decoder_config, innermost_causal_lm, layer_windows, require_support
from ..model.transformers_internals import (
    GenerateCall,
    NotifiedByGenerate,
    forget_shift,
    running_generate,
    shifted_positions,
)
from ..planning.auto_budget import AutoBudget, BudgetChoice
from ..planning.read_plan import ReadPlan
from ..prefill.exact_prefill import Prefill, geometry_of
from ..prefill.recovery import Recovery
from ..request.prefix_request import PrefixRequest
from ..request.strategy import ServingMethod
from ..session.arguments import checked_ids, configured, opened_store, require_storable
from ..session.automatic import AutomaticPrefix
from ..session.cached_tokens import CachedTokens
from ..session.fitting import begin_prompt, check_ids, drop_cached, fit_to_prefix, place_tokens
from ..session.forward_inputs import decoding, is_refed
from ..session.one_thread import OneThread
from ..session.unserved import Unserved
from ..stats import RequestStats
from ..store import PrefixStore
from ..store.attached_prefix import AttachedPrefix
from ..store.entries import StoredPrefix
from ..timeline import Timeline
from .copying import copy_of_cache
from .layers import AttachedState, ContiguousLayer, ContiguousSlidingLayer


class ContiguousKVCache(NotifiedByGenerate, HookedCache):
    """A KV cache that begins with a stored prefix, of which attention reads only the chunks that it needs.

    Use it as any other cache: `model.generate(ids, cache=ContiguousKVCache(model, prefix_ids, store="kv"))`
    (`past_key_values=` before transformers 5.24).

    Args:
        model: a decoder-only transformers model, on any device or several.
        prefix_ids: int64 `[n]` or `[1, n]`. What is stored of it is attached; the rest is prefilled exactly, written
            to the store and attached. `None` with a store: **automatic**, the prompt of the first forward is looked
            up and stored. `None` without a store: an ordinary `DynamicCache`.
        store: a `PrefixStore` or the path of one. `None` with `prefix_ids`: a temporary one that goes with the cache.
        config: how chunks are chosen and read; the default is the best we know.
        method: serves `prefix_ids` in place of the library's own method.
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
        method: ServingMethod | None = None,
        **overrides: Any,
    ) -> None:
        self._method = method
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
        # A `generate` was given this cache, and its first forward has not been seen yet.
        self._generate_begins = False
        # The forward that is running, or ran last, is one of `generate`.
        self._in_generate = False
        # A forward of the cache's own model is running.
        self._announced = False
        # Tokens after the prefix.
        self._suffix_ids = CachedTokens()
        self._one_thread = OneThread()
        self._unserved = Unserved(self._stats)
        # Whether the model takes images and the like; modules whose memory of an earlier image would shift the
        # positions of a text; and whether the suffix is text.
        self._multimodal = False
        self._shifted: list[nn.Module] = []
        self._text_so_far = True
        # The `generate` that is running has found another prompt in the cache than its own.
        self._started_over = False
        # What `crop` has left of an explicit prefix, in tokens, for the prompts that follow.
        self._cropped_to: int | None = None
        # Suffix length before the forward that is running (or was interrupted); `None` between forwards.
        self._before: int | None = None
        self.store, self._temporary = opened_store(store, ids is not None, self.config.reading.verify)
        if self.store is None:
            return
        require_no_virtual_tokens(model, automatic=ids is None)
        self._unserved.counters = self.store.counters
        self._support = require_support(lm)
        self._fingerprint = model_fingerprint(lm)
        self._measure(lm)
        self._shifted = shifted_positions(lm)
        self._multimodal = bool(placeholder_ids(lm.config))
        try:
            self._install(lm)
            if ids is None:
                self._automatic = AutomaticPrefix(self.store, self._support, self.config)
            else:
                self._attach_ids(lm, ids)
        except BaseException:
            self.close()
            raise

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
        if self._method is not None:
            self.prefix_ids = ids
            self._whole_prefix = self._method.attach(ids, geometry_of(self._support, self.config.chunk_size))
            self._attach(self._whole_prefix)
            assert self._attached is not None
            self._attached.request.start()
            return
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
        self._suffix_ids.clear()
        self._stats = RequestStats()
        self._unserved.stats = self._stats
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
            forget_shift(self._shifted)
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
        """What serves `prefix`."""
        assert self.store is not None
        plan = ReadPlan.of(prefix, config, self._support.plan)
        return PrefixRequest(plan, self.store, self._stats, Recovery(self), self._method)

    def _close_request(self) -> None:
        if self._attached is not None:
            self._attached.request.close()
            self._attached = None

    # -- before and after every forward (called by the hook) ----------------------------------------------------------

    def generate_begins(self, call: GenerateCall | None) -> None:
        """See `NotifiedByGenerate`. Another prompt than the one in the cache needs no `reset`: it starts over."""
        if self.store is None:
            return
        self._one_thread.claim(self)
        if self._generate_begins:
            self._unserved.note("a generate call whose forward was not seen")
            self._generate_begins = False
        self._started_over = False
        if call is not None:
            self._recover()
            try:
                begin_prompt(self, call)
            except ContiguousKVError:
                forget_shift(self._shifted)  # What `generate` has noted for a prompt that is refused.
                raise
        self._generate_begins = True

    def before_forward(self, inputs: dict[str, Any]) -> None:
        """Make the arguments of the model's forward fit what is cached. `inputs` are changed in place."""
        self._one_thread.claim(self)
        try:
            self._fit(inputs)
        except ContiguousKVError:
            remove_row_hooks(self._living_model())
            raise
        self._suffix_ids.append_new(inputs)
        self._before = self._suffix_length()
        self.announce(True)

    def _fit(self, inputs: dict[str, Any]) -> None:
        self._recover()
        if self._attached is not None:
            self._attached.request.settle()  # The forward before this one has had its token by now.
        call = running_generate()
        self._in_generate = call is not None
        begins, self._generate_begins = self._generate_begins and call is not None, False
        cached = self.get_seq_length()
        if is_refed(inputs, cached, begins, self.prefix_ids if self._attached is not None else None):
            drop_cached(self, inputs, begins)
        place_tokens(self, inputs, self._in_generate)
        if self._automatic is not None:
            self._automatic.before_forward(self, inputs, begins, call.block if begins and call else None)
        if self._attached is not None:
            more_follows = call is not None and bool(call.block) and not decoding(inputs)
            fit_to_prefix(self, inputs, begins, more_follows)

    def announce(self, running: bool) -> None:
        """See `HookedCache`. Our attention function is in the model's config for as long as the forward runs."""
        if running:
            self._one_thread.claim(self)
        elif not self._one_thread.is_mine():
            return  # A forward that was refused, because one is running on another thread.
        self._announced = running
        if self._installation is None:
            return
        if running and self._attached is not None:
            self._installation.activate()
        elif not running:
            self._installation.release()
        if self._attached is not None:
            self._attached.announced = running
            self._attached.plain = self._attached.plain and running

    def after_forward(self, output: Any) -> Any:
        """See `HookedCache`."""
        self._before = None
        if self._text_so_far or self._in_generate:
            forget_shift(self._shifted)  # `generate` would add it to another prompt, before it asks what is cached.
        if self._attached is not None:
            self._attached.request.count()
            if self._attached.request.timeline is not None:
                self._attached.request.timeline.model_done()
        return None if self._automatic is None else self._automatic.after_forward(self, output)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Cache.update`. (A prefix refuses K/V of a forward that was not announced.)"""
        if layer_idx == 0 and self._hook is not None and not self._announced:
            self._not_announced()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)  # type: ignore[no-any-return]

    @torch.compiler.disable(reason=NO_FULL_GRAPH)
    def _not_announced(self) -> None:
        self._suffix_ids.forget()
        self._unserved.note("a forward of another model, or one that this library's hook does not see")

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

    def _tokens(self) -> int:
        """Tokens of the prefix that is attached now."""
        return 0 if self._attached is None else self._attached.request.prefix.tokens

    # -- the public interface -----------------------------------------------------------------------------------------

    @property
    def stats(self) -> RequestStats:
        """What the current request read, used and waited for."""
        if self._attached is not None:
            self._attached.request.count()
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
        found = self._attached.request.selected_chunks(layer_idx)
        if found is None:
            return None
        return found.expand(len(layer.row_of), -1) if self._attached.request.keeps_all else found[layer.row_of.cpu()]

    def reset(self) -> None:
        """Drop the suffix and keep the prefix attached, ready for the next question (automatic: the next prompt)."""
        self._one_thread.claim(self)
        self._cropped_to = None
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
            self._suffix_ids.clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens. Back to the prefix, its chunks are selected again.

        A crop into the prefix shortens it for the next questions, too, until `reset`.
        """
        self._one_thread.claim(self)
        if self._attached is not None and tokens_to_remove > 0:
            raise ValueError(
                f"crop takes a negative number of tokens to remove (or 0), got {tokens_to_remove}; to keep "
                f"{tokens_to_remove} of {self.get_seq_length()} tokens, pass {tokens_to_remove - self.get_seq_length()}"
            )
        if self._automatic is not None and 0 < self.get_seq_length() <= -tokens_to_remove:
            self.reset()  # (Layers with a window could not be cropped.)
            return
        before = self._tokens()
        self.give_back(-tokens_to_remove)
        if self._whole_prefix is not None and self._tokens() < before:
            self._cropped_to = self._tokens()

    def give_back(self, tokens: int) -> None:
        """Remove the last tokens. Where that reaches the prefix, a new request on what is left of it begins."""
        prefix = self._tokens()
        left = self.get_seq_length() - tokens
        if self._attached is None:
            super().crop(-tokens)
            self._suffix_ids.crop(self.get_seq_length())
        elif left > prefix or tokens == 0:
            for layer in self.layers:
                layer.crop(-tokens)
            self._suffix_ids.crop(left - prefix)
        else:
            self.shorten_prefix(left)

    def next_prompt(self) -> None:
        """Another prompt begins: as `reset`, but a prefix that was cropped stays cropped."""
        cropped = self._cropped_to
        self.reset()
        if cropped is not None and self._attached is not None and cropped < self._tokens():
            self.shorten_prefix(cropped)
            self._cropped_to = cropped

    def shorten_prefix(self, tokens: int) -> None:
        """Begin a new request on the first `tokens` tokens of the prefix that is attached (none: without a prefix)."""
        assert self._attached is not None
        request = self._attached.request
        if tokens > 0:
            self._attach(request.prefix.truncated(tokens), request.plan.config, stats=self._stats)
        else:
            self._attach(None)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row `i` continues what row `beam_idx[i]` was."""
        self._one_thread.claim(self)
        super().reorder_cache(beam_idx)
        self._suffix_ids.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        self._one_thread.claim(self)
        super().batch_repeat_interleave(repeats)
        self._suffix_ids.repeat(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Only the rows `indices` (positions, or a bool mask)."""
        self._one_thread.claim(self)
        super().batch_select_indices(indices)
        self._suffix_ids.select(indices)

    def close(self) -> None:
        """Detach the prefix, let go of model and store: an empty, ordinary cache is left. `stats` stay readable."""
        self._one_thread.claim(self)
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
        """An independent cache in the same state; model, store and what is loaded of the prefix are shared."""
        return copy_of_cache(self, memo)
