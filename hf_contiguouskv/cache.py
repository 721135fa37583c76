"""`ContiguousKVCache`: a transformers `Cache` whose beginning lives on disk."""

from __future__ import annotations

import copy
import tempfile
import weakref
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.cache_utils import Cache

from .attention import Installation
from .automatic import AutomaticPrefix
from .config import ContiguousKVConfig
from .device import SLABS
from .errors import ConfigError, InputError
from .forward import cut_cached, decoding, is_refed, mask_behind_prefix, pads_before_prefix, rows_of, uncut_prefix
from .hook import ForwardHook, GenerateCall, running_generate
from .layers import AttachedState, ContiguousLayer, ContiguousSlidingLayer
from .prefill import prefill_into_store
from .prefix import AttachedPrefix
from .request import PrefixRequest
from .stats import RequestStats
from .store import PrefixStore
from .store.entries import StoredPrefix
from .store.fingerprint import model_fingerprint
from .support import decoder_config, innermost_causal_lm, layer_windows, require_support


def checked_ids(ids: Any) -> torch.Tensor:
    """`ids` as int64 `(n,)` on the CPU; raises `InputError` for anything but `[n]` or `[1, n]` token ids, n >= 1."""
    if not isinstance(ids, torch.Tensor):
        try:
            ids = torch.as_tensor(ids)
        except Exception as error:
            raise InputError(f"token ids must be an int64 tensor [n] or [1, n], got {type(ids).__name__}") from error
    if ids.ndim == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.ndim != 1:
        raise InputError(f"token ids must have the shape [n] or [1, n], got {list(ids.shape)}")
    if ids.shape[0] == 0:
        raise InputError("the prefix is empty: at least one token is needed")
    if ids.dtype != torch.int64:
        raise InputError(f"token ids must be int64 (torch.long), got {ids.dtype}")
    return torch.Tensor.cpu(ids.detach())


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
        self.config = _configured(config, overrides)
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
        self._generate_begins = False
        # Tokens after the prefix, int64 (n,), for as long as there is one row and all of them were seen.
        self._suffix_ids: torch.Tensor | None = torch.zeros(0, dtype=torch.long)
        # Suffix length before the forward that is running (or was interrupted); `None` between forwards.
        self._before: int | None = None
        self._temporary: _TemporaryStore | None = None
        self.store = self._opened(store, ids is not None)
        if self.store is None:
            return
        self._support = require_support(lm)
        self._fingerprint = model_fingerprint(lm)
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
        self._temporary = _TemporaryStore()
        return self._temporary.store

    def _install(self, lm: nn.Module) -> None:
        self._installation = Installation(decoder_config(lm))
        self._hook = ForwardHook(self, lm)

    def refresh_model(self) -> None:
        """Find out anew what the model is: its weights, adapters, dtype or devices may have changed."""
        lm = self._living_model()
        self._fingerprint = model_fingerprint(lm)
        self._support = require_support(lm)

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
        if stored is None or found < len(numbers):
            if lm.training:
                raise InputError("the model is in training mode; call model.eval() before its KV is stored")
            images = getattr(lm.config, "image_token_id", getattr(lm.config, "image_token_index", None))
            if images is not None and bool((ids == images).any()):
                raise InputError(f"the prefix holds image placeholders (token {images}); only text can be stored")
            stored = prefill_into_store(lm, ids, stored, self.store, self._fingerprint, self._support, self.config)
        self.prefix_ids = ids
        self._whole_prefix = AttachedPrefix.of(stored, len(numbers))
        self._attach(self._whole_prefix)
        self._stats.tokens_from_store = found
        self._stats.tokens_prefilled = len(numbers) - found
        if self._attached is not None:
            # A cache is made to be used: its first reads go on while `generate` prepares its inputs.
            self._attached.request.start()

    def _look_up(self, ids: np.ndarray[Any, np.dtype[np.int64]]) -> StoredPrefix | None:
        """The longest stored beginning of `ids`; waits for prompts that are still being written only if that helps."""
        assert self.store is not None
        stored = self.store.lookup(self._fingerprint, ids, self.config.chunk_size)
        if (stored is None or stored.tokens < len(ids)) and self.store.flush():
            stored = self.store.lookup(self._fingerprint, ids, self.config.chunk_size)
        return stored

    def _attach(
        self, prefix: AttachedPrefix | None, config: ContiguousKVConfig | None = None, stats: RequestStats | None = None
    ) -> None:
        """Begin a new request on `prefix` (or none): every layer forgets its suffix."""
        self._close_request()
        self._before = None
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
            request = PrefixRequest(prefix, config or self.config, self._support.plan, self.store, SLABS, self._stats)
            self._attached = AttachedState(request, self._installation)
        for layer in self.layers:
            layer.attach(self._attached)

    def _close_request(self) -> None:
        if self._attached is not None:
            self._attached.request.close()
            self._attached = None

    # -- before and after every forward (called by the hook) ----------------------------------------------------------

    def before_forward(self, inputs: dict[str, Any]) -> None:
        """Make the arguments of the model's forward fit what is cached. `inputs` are changed in place."""
        self._recover()
        call = running_generate()
        begins, self._generate_begins = self._generate_begins and call is not None, False
        if self._automatic is not None:
            self._automatic.before_forward(self, inputs, begins, call.block if begins and call else None)
        if self._attached is not None:
            self._fit(inputs, begins, more_follows=call is not None and bool(call.block) and not decoding(inputs))
        self._remember(inputs)
        self._before = self._suffix_length()

    def _fit(self, inputs: dict[str, Any], generate_begins: bool, more_follows: bool) -> None:
        assert self._attached is not None
        self._attached.require_active()
        self._attached.expected = None
        cached = self.get_seq_length()
        if is_refed(inputs, cached, generate_begins, self.prefix_ids):
            self._cut_refed(inputs, cached, generate_begins)
            cached = self.get_seq_length()
        if self._attached is None:  # The whole prefix had to be given up.
            return
        request, mask = self._attached.request, inputs.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            moved = mask_behind_prefix(mask, request.prefix.tokens, more_follows)
            if moved is not mask and any(request.plan.windows):
                self._compute_everything(inputs, request.prefix.tokens)
                return
            inputs["attention_mask"] = moved
            if request.rows is None and not request.keeps_all and not bool(moved[:, : request.prefix.tokens].all()):
                raise InputError("the attention mask hides tokens of a prefix that is pruned; use budget=1.0")
        elif isinstance(mask, torch.Tensor) and not request.keeps_all:
            raise InputError("a 4D attention mask cannot say what to do with a pruned prefix; pass a 2D mask")
        if request.rows is None:
            if self._automatic is None and model_fingerprint(self._living_model()) != self._fingerprint:
                raise InputError(
                    "the model's weights, adapters or configuration have changed since this cache was made: its prefix "
                    "does not fit any more; make a new cache"
                )
            drafts = inputs.get("logits_to_keep", 1) if generate_begins else 1
            drafts = drafts - 1 if isinstance(drafts, int) and drafts > 1 else 0
            request.begin(rows_of(inputs, cached, drafts))

    def _cut_refed(self, inputs: dict[str, Any], cached: int, generate_begins: bool) -> None:
        """The whole prompt is at hand although most of it is cached: keep what is new, and at least one token."""
        needed, length = inputs.get("logits_to_keep", 0), inputs["input_ids"].shape[1]
        if not generate_begins and (not isinstance(needed, int) or needed < 1 or needed > length - cached):
            raise InputError(
                f"{cached} of these {length} tokens are in the cache already: pass the new ones only (the attention "
                "mask covers both), or logits_to_keep for no more than the new ones"
            )
        needed = max(1, needed) if isinstance(needed, int) else 1
        mask = inputs.get("attention_mask")
        self._check_rows(inputs["input_ids"], mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None)
        if length < cached:
            raise InputError(f"the prompt has {length} tokens, fewer than the {cached} that the cache holds")
        if length - cached < needed:
            self.crop(length - cached - needed)
        cut_cached(inputs, self.get_seq_length())

    def _check_rows(self, ids: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Make sure that whole prompts begin with the prefix, behind their left padding."""
        pads = [0] * len(ids) if mask is None else pads_before_prefix(mask).tolist()
        for row, skip in zip(ids, pads, strict=True):
            self.check(row[skip:], partial=True)

    def _compute_everything(self, inputs: dict[str, Any], tokens: int) -> None:
        """Left padding before the prefix on a model with sliding windows: they count columns, and the padding cannot
        be moved behind the prefix. This request computes the prefix with its rows, exactly; `reset` attaches it again.
        """
        ids = inputs.get("input_ids")
        if self.get_seq_length() > tokens or not isinstance(ids, torch.Tensor) or self.prefix_ids is None:
            raise InputError(
                "left padding before the prefix is not supported on a model with sliding-window attention once a "
                "suffix is cached, or with inputs_embeds; pad between prefix and suffix, or pass one row at a time"
            )
        uncut_prefix(inputs, self.prefix_ids[:tokens])
        self._attach(None)

    def after_forward(self) -> None:
        """The model is through with a forward on this cache."""
        self._before = None
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
        if self._automatic is not None:
            self.reset()
        else:
            self._attach(None if self._attached is None else self._attached.request.prefix, stats=self._stats)

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
            self._check_rows(prompt, call.attention_mask)

    def _tokens(self) -> int:
        """Tokens of the prefix that is attached now."""
        return 0 if self._attached is None else self._attached.request.prefix.tokens

    # -- the public interface -----------------------------------------------------------------------------------------

    @property
    def stats(self) -> RequestStats:
        """What the current request read, used and waited for."""
        return self._stats

    def check(self, input_ids: torch.Tensor, *, partial: bool = False) -> None:
        """Raise `InputError` if `input_ids` (`[n]`, or `[batch, n]`: each row) do not begin with the prefix.

        With `partial`, ids shorter than the prefix need only agree as far as they go.
        """
        if self.prefix_ids is None or self._attached is None:
            return
        rows = input_ids[None] if input_ids.ndim == 1 else input_ids
        wanted = self.prefix_ids[: self._tokens()]
        for position, row in enumerate(rows.cpu()):
            length = min(len(row), len(wanted))
            if length < len(wanted) and not partial:
                raise InputError(f"row {position} has {len(row)} tokens, fewer than the prefix of {len(wanted)}")
            differs = (row[:length] != wanted[:length]).nonzero()
            if len(differs):
                at = int(differs[0])
                raise InputError(
                    f"row {position} does not begin with the prefix of this cache: token {at} is {int(row[at])}, "
                    f"expected {int(wanted[at])}"
                )

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
        self._automatic = None
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
            request = self._attached.request.twin(twin._stats)
            twin._attached = AttachedState(request, twin._installation)
        twin.layers = [layer.copy_of(twin._attached, memo) for layer in self.layers]
        return twin


class _TemporaryStore:
    """A store in a folder that goes when nobody holds this object any more (a cache and its copies)."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="contiguouskv-")
        self.store = PrefixStore(Path(self._folder.name) / "store")
        weakref.finalize(self, _close_temporary, self.store, self._folder)


def _close_temporary(store: PrefixStore, folder: tempfile.TemporaryDirectory[str]) -> None:
    store.close()
    folder.cleanup()


def _configured(config: ContiguousKVConfig | None, overrides: dict[str, Any]) -> ContiguousKVConfig:
    if config is not None and not isinstance(config, ContiguousKVConfig):
        raise ConfigError(f"config must be a ContiguousKVConfig, got {type(config).__name__}")
    try:
        return replace(config or ContiguousKVConfig(), **overrides)
    except TypeError as error:
        known = ", ".join(ContiguousKVConfig.__dataclass_fields__)
        raise ConfigError(f"unknown option in {sorted(overrides)}; the options are {known}") from error
