"""`PrefixSession`: the state of a cache from call to call."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from ..config import ContiguousKVConfig
from ..errors import ContiguousKVError, InputError
from ..model.peft_adapters import remove_row_hooks, require_one_adapter
from ..model.served_model import ServedModel
from ..model.transformers_internals import GenerateCall, running_generate
from ..request.prefix_request import PrefixRequest
from ..request.strategy import ServingMethod
from ..stats import RequestStats
from ..store import PrefixStore
from .attached_request import PrefixLayer
from .automatic import AutomaticPrefix
from .cached_sequence import CachedSequence
from .fitting import Prefixed, fit_to_prefix
from .forward_inputs import decoding, uncut_prefix
from .one_thread import OneThread
from .prefix_slot import PrefixSlot
from .prefix_source import PrefixSource
from .prompt_checks import is_refed
from .prompt_start import begin_prompt, drop_cached
from .text_positions import TextPositions
from .unserved import note_unserved


class PrefixSession:
    """Serves a prefix to one cache. Hooks notify it of calls with the cache (`model.forward_hooks`), and it fits the
    arguments of each forward to the cached tokens. (Five of its methods are the listener protocol.)

    Args:
        owner: the cache; held weakly.
        model, store, config: the served model, the store that holds its prefixes, and the cache's configuration.
        layers: the cache's layers.
        automatic: whether each prompt determines the prefix; otherwise `held.slot.attach_ids` names it.
        method: serves the prefix in place of the library's own method.

    Attributes:
        held: the prefix and the suffix.
        announced: whether a forward of the cache's own model is running.
    """

    def __init__(
        self,
        owner: object,
        model: ServedModel,
        store: PrefixStore,
        config: ContiguousKVConfig,
        layers: Sequence[PrefixLayer],
        automatic: bool,
        method: ServingMethod | None = None,
    ) -> None:
        self.held = CachedSequence(PrefixSlot(PrefixSource(model, store, config), layers, method), layers, automatic)
        self.announced = False
        self._automatic = AutomaticPrefix(self.held) if automatic else None
        self._positions = TextPositions(model)
        self._thread = OneThread(owner)
        # Whether a `generate` was given the cache and its first forward has not been seen yet.
        self._generate_begins = False
        # Whether the running or last forward belongs to a `generate`.
        self._in_generate = False
        # Whether the running `generate` found another prompt than its own in the cache.
        self._started_over = False

    # -- for the cache ------------------------------------------------------------------------------------------------

    @property
    def request(self) -> PrefixRequest | None:
        """The running request on the attached prefix, or `None`."""
        attached = self.held.slot.attached
        return None if attached is None else attached.request

    @property
    def stats(self) -> RequestStats:
        """Statistics of the running request."""
        if self.request is not None:
            self.request.count()
        return self.held.slot.stats

    def claim(self) -> CachedSequence:
        """The cached tokens, for this thread to change.

        Raises:
            InputError: another thread is running a `generate` or a forward with the cache.
        """
        self._thread.claim()
        return self.held

    def close(self) -> None:
        """End the request, and release model and store."""
        self.claim()
        self.held.slot.close()
        self.held.suffix.clear()

    # -- calls: see `model.forward_hooks.ForwardListener` -------------------------------------------------------------

    def generate_begins(self, call: GenerateCall | None) -> None:
        """Called when `generate` receives the cache. A prompt other than the cached one needs no `reset`."""
        self._thread.claim()
        if self._generate_begins:
            self._note("a generate call whose forward was not seen")
            self._generate_begins = False
        self._started_over = False
        if call is not None:
            self.held.repair()
            try:
                self._started_over = begin_prompt(self.held, call)
                if self._automatic is not None and call.block and self.held.length == 0:
                    self._automatic.before_blocks(call)
            except ContiguousKVError:
                self._model.forget_shift()  # `generate` has already noted the shift of the refused prompt.
                raise
        self._generate_begins = True

    def before_forward(self, inputs: dict[str, Any]) -> None:
        """Fit the arguments of the model's forward to the cached tokens. `inputs` are changed in place."""
        self._thread.claim()
        try:
            self._fit(inputs)
        except ContiguousKVError:
            remove_row_hooks(self._model.lm)
            raise
        self.held.forward_begins(inputs)
        self.forward_runs(True)

    def forward_runs(self, running: bool) -> None:
        """Install this library's attention function in the model while a forward runs."""
        if running:
            self._thread.claim()
        elif not self._thread.is_mine():
            return  # This forward was refused, because another thread is running one.
        self.announced = running
        attached, installation = self.held.slot.attached, self.held.slot.installation
        if running and attached is not None:
            installation.activate()
        elif not running:
            installation.release()
        if attached is not None:
            attached.announced = running
            attached.plain = attached.plain and running

    def after_forward(self, output: Any) -> Any:
        """Called after the forward; a result other than `None` replaces its output."""
        self.held.forward_ended()
        self._positions.forward_ended(self._in_generate)
        request = self.request
        if request is not None:
            request.count()
            if request.timeline is not None:
                request.timeline.model_done()
        return None if self._automatic is None else self._automatic.after_forward(output)

    def unannounced_update(self) -> None:
        """Called when a layer receives K/V of an unannounced forward, whose tokens are unknown."""
        self.held.suffix.forget()
        self._note("a forward of another model, or one that this library's hook does not see")

    # -- inside -------------------------------------------------------------------------------------------------------

    @property
    def _model(self) -> ServedModel:
        return self.held.slot.source.model

    def _note(self, reason: str) -> None:
        note_unserved(self.held.slot, reason)

    def _fit(self, inputs: dict[str, Any]) -> None:
        held = self.held
        held.repair()
        if self.request is not None:
            self.request.settle()  # The token of the previous forward is out by now.
        call = running_generate()
        self._in_generate = call is not None
        begins, self._generate_begins = self._generate_begins and call is not None, False
        if is_refed(held, inputs, begins):
            drop_cached(held, inputs, begins)
        self._positions.place(held, inputs, self._in_generate, self._started_over)
        if self._automatic is not None:
            self._automatic.before_forward(inputs, begins, call.block if begins and call else None)
        if held.slot.attached is not None:
            more_follows = call is not None and bool(call.block) and not decoding(inputs)
            self._fit_to_prefix(inputs, begins, more_follows)

    def _fit_to_prefix(self, inputs: dict[str, Any], generate_begins: bool, more_follows: bool) -> None:
        """Fit `inputs` to the attached prefix, and begin its request with the first suffix tokens."""
        held, slot = self.held, self.held.slot
        assert slot.attached is not None
        slot.attached.expected = None
        request = slot.attached.request
        prefix = Prefixed(
            tokens=slot.tokens,
            cached=held.length,
            prunes=not request.keeps_all,
            windowed=any(self._model.windows),
            begun=request.rows is not None,
            multimodal=self._model.is_multimodal,
        )
        fitted = fit_to_prefix(prefix, inputs, generate_begins, more_follows, self._in_generate)
        if fitted.without_prefix:
            self._compute_everything(inputs)
            return
        if fitted.attention_mask is not None:
            inputs["attention_mask"] = fitted.attention_mask
        if not held.automatic:
            require_one_adapter(self._model.lm)
        if fitted.rows is not None:
            if not held.automatic and slot.source.is_changed:
                raise InputError(
                    "the model's weights, adapters or configuration have changed since this cache was made: its "
                    "prefix does not fit any more; make a new cache"
                )
            request.begin(fitted.rows)
        elif fitted.later is not None:
            request.go_on(fitted.later)
        slot.attached.plain = fitted.plain

    def _compute_everything(self, inputs: dict[str, Any]) -> None:
        """Detach the prefix and let this forward compute it exactly with its rows; `reset` attaches it again."""
        prefix, held = self.held.prefix, self.held
        if held.suffix_length > 0 or prefix is None or not isinstance(inputs.get("input_ids"), torch.Tensor):
            raise InputError(
                "left padding before the prefix is not supported on a model with sliding-window attention once a "
                "suffix is cached, or with inputs_embeds; pad between prefix and suffix, or pass one row at a time"
            )
        uncut_prefix(inputs, prefix)
        held.detach()

    def copy_for(self, owner: object, layers: Sequence[PrefixLayer], memo: dict[int, Any]) -> PrefixSession:
        """A copy of the session for a copy of the cache with these `layers`."""
        twin = copy.copy(self)
        twin.held = self.held.copy_for(layers, memo)
        twin._automatic = None if self._automatic is None else AutomaticPrefix(twin.held)
        twin._positions = copy.copy(self._positions)
        twin._thread = OneThread(owner)
        return twin
