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
from .hook import ForwardHook, caller_generation_config
from .layers import AttachedState, ContiguousLayer, ContiguousSlidingLayer
from .prefill import prefill_into_store
from .prefix import AttachedPrefix
from .request import PrefixRequest
from .stats import RequestStats
from .store import PrefixStore
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
        windows = layer_windows(innermost_causal_lm(model))
        super().__init__(
            layers=[
                ContiguousLayer(position) if window is None else ContiguousSlidingLayer(position, window)
                for position, window in enumerate(windows)
            ]
        )
        ids = None if prefix_ids is None else checked_ids(prefix_ids)
        self.prefix_ids: torch.Tensor | None = None
        self._model = weakref.ref(model)
        self._attached: AttachedState | None = None
        self._whole_prefix: AttachedPrefix | None = None
        self._stats = RequestStats()
        self._automatic: AutomaticPrefix | None = None
        self._installation: Installation | None = None
        self._hook: ForwardHook | None = None
        self._generation_config: Any = None
        self._from_generate = False
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self.store = self._opened(store, ids is not None)
        if self.store is None:
            return
        self._support = require_support(innermost_causal_lm(model))
        self._fingerprint = model_fingerprint(innermost_causal_lm(model))
        self._install(model)
        if ids is None:
            self._automatic = AutomaticPrefix(self.store, self._fingerprint, self._support, self.config)
        else:
            self._attach_ids(model, ids)

    def _opened(self, store: PrefixStore | str | Path | None, needed: bool) -> PrefixStore | None:
        if isinstance(store, PrefixStore):
            return store
        if isinstance(store, str | Path):
            return PrefixStore.shared(store)
        if store is not None:
            raise InputError(f"store must be a PrefixStore or a path, got {type(store).__name__}")
        if not needed:
            return None
        self._temporary = tempfile.TemporaryDirectory(prefix="contiguouskv-")
        return PrefixStore(Path(self._temporary.name) / "store")

    def _install(self, model: nn.Module) -> None:
        lm = innermost_causal_lm(model)
        self._installation = Installation(decoder_config(lm))
        self._hook = ForwardHook(self, lm)

    # -- attaching ----------------------------------------------------------------------------------------------------

    def _attach_ids(self, model: nn.Module, ids: torch.Tensor) -> None:
        assert self.store is not None
        self.store.flush()
        numbers = ids.numpy().astype(np.int64)
        stored = self.store.lookup(self._fingerprint, numbers, self.config.chunk_size)
        found = 0 if stored is None else stored.tokens
        if stored is None or found < len(numbers):
            lm = innermost_causal_lm(model)
            if lm.training:
                raise InputError("the model is in training mode; call model.eval() before its KV is stored")
            stored = prefill_into_store(lm, ids, stored, self.store, self._fingerprint, self._support, self.config)
        self.prefix_ids = ids
        self._whole_prefix = AttachedPrefix.of(stored, len(numbers))
        self._attach(self._whole_prefix)
        self._stats.tokens_from_store = found
        self._stats.tokens_prefilled = len(numbers) - found

    def _attach(self, prefix: AttachedPrefix | None, config: ContiguousKVConfig | None = None) -> None:
        """Begin a new request on `prefix` (or none): every layer forgets its suffix."""
        self._close_request()
        self._stats = RequestStats()
        if prefix is not None:
            assert self.store is not None
            assert self._installation is not None
            self._stats.prefix_tokens = self._stats.tokens_from_store = prefix.tokens
            self._stats.chunks_total = prefix.chunks
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
        from_generate, self._from_generate = self._from_generate, False
        if self._automatic is not None:
            blocks = getattr(self._generation_config, "prefill_chunk_size", None) if from_generate else None
            self._automatic.before_forward(self, inputs, from_generate, blocks)
        if self._attached is None:
            return
        self._attached.require_active()
        cached = self.get_seq_length()
        if is_refed(inputs, cached, from_generate, self.prefix_ids):
            self._check_refed(inputs)
            needed = inputs.get("logits_to_keep", 1)
            needed = max(1, needed) if isinstance(needed, int) else 1
            length = inputs["input_ids"].shape[1]
            if length < cached:
                raise InputError(f"the prompt has {length} tokens, fewer than the {cached} that the cache holds")
            if length - cached < needed:
                self.crop(length - cached - needed)
            cached = self.get_seq_length()
            cut_cached(inputs, cached)
        if self._attached is None:  # The crop took everything.
            return
        mask = inputs.get("attention_mask")
        request = self._attached.request
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            block = getattr(self._generation_config, "prefill_chunk_size", None)
            moved = mask_behind_prefix(mask, request.prefix.tokens, more_follows=bool(block) and not decoding(inputs))
            if moved is not mask and any(request.plan.windows):
                self._compute_everything(inputs, request.prefix.tokens)
                return
            inputs["attention_mask"] = moved
        elif isinstance(mask, torch.Tensor) and not request.keeps_all:
            raise InputError("a 4D attention mask cannot say what to do with a pruned prefix; pass a 2D mask")
        if request.rows is None:
            drafts = inputs.get("logits_to_keep", 1) if from_generate else 1
            drafts = drafts - 1 if isinstance(drafts, int) and drafts > 1 else 0
            request.begin(rows_of(inputs, cached, drafts))

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

    def _check_refed(self, inputs: dict[str, Any]) -> None:
        """The whole prompt is at hand: make sure that it begins with the prefix."""
        if self.prefix_ids is None:
            return
        mask, ids = inputs.get("attention_mask"), inputs["input_ids"]
        pads = [0] * len(ids)
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            pads = pads_before_prefix(mask).tolist()
        for row, skip in zip(ids, pads, strict=True):
            self.check(row[skip:], partial=True)

    def after_forward(self) -> None:
        """The model is through with a forward on this cache."""
        if self._automatic is not None:
            self._automatic.after_forward(self)

    @property
    def _is_user_defined(self) -> bool:
        """`generate` sets this on a cache that it is given: the sign that a new call begins."""
        return self._generation_config is not None

    @_is_user_defined.setter
    def _is_user_defined(self, value: bool) -> None:
        self._from_generate = True
        self._generation_config = caller_generation_config() or False

    # -- the public interface -----------------------------------------------------------------------------------------

    @property
    def stats(self) -> RequestStats:
        """What the current request read, used and waited for."""
        return self._stats

    def check(self, input_ids: torch.Tensor, *, partial: bool = False) -> None:
        """Raise `InputError` if `input_ids` (`[n]`, or `[batch, n]`: each row) do not begin with the prefix.

        With `partial`, ids shorter than the prefix need only agree as far as they go.
        """
        if self.prefix_ids is None:
            return
        rows = input_ids[None] if input_ids.ndim == 1 else input_ids
        wanted = self.prefix_ids
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
            return
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes a negative number of tokens to remove (or 0), got {tokens_to_remove}; to keep "
                f"{tokens_to_remove} of {self.get_seq_length()} tokens, pass {tokens_to_remove - self.get_seq_length()}"
            )
        prefix = self._attached.request.prefix
        left = self.get_seq_length() + tokens_to_remove
        if left > prefix.tokens or tokens_to_remove == 0:
            for layer in self.layers:
                layer.crop(tokens_to_remove)
        elif left > 0:
            self._attach(prefix.truncated(left))
        else:
            self._attach(None)

    def close(self) -> None:
        """Detach the prefix and let go of model and store. The cache is empty afterwards, and ordinary."""
        self._automatic = None
        self._attach(None)
        self._whole_prefix = self.prefix_ids = None
        if self._hook is not None:
            self._hook.remove()
        if self._installation is not None:
            self._installation.release()
        if self._temporary is not None and self.store is not None:
            self.store.close()
            self._temporary.cleanup()
        self.store = None

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
        shared = ("_model", "store", "_support", "_temporary", "_whole_prefix", "_generation_config")
        apart = ("layers", "_attached", "_installation", "_hook")
        for name, value in vars(self).items():
            if name not in apart:
                setattr(twin, name, value if name in shared else copy.deepcopy(value, memo))
        twin._attached = twin._installation = twin._hook = None
        model = self._model()
        if self._installation is not None and model is not None:
            twin._install(model)
        if self._attached is not None and twin._installation is not None:
            request = self._attached.request.twin(twin._stats)
            twin._attached = AttachedState(request, twin._installation)
        twin.layers = [layer.copy_of(twin._attached, memo) for layer in self.layers]
        return twin


def _configured(config: ContiguousKVConfig | None, overrides: dict[str, Any]) -> ContiguousKVConfig:
    if config is not None and not isinstance(config, ContiguousKVConfig):
        raise ConfigError(f"config must be a ContiguousKVConfig, got {type(config).__name__}")
    try:
        return replace(config or ContiguousKVConfig(), **overrides)
    except TypeError as error:
        known = ", ".join(ContiguousKVConfig.__dataclass_fields__)
        raise ConfigError(f"unknown option in {sorted(overrides)}; the options are {known}") from error
