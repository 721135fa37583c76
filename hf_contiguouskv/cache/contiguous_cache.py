"""`ContiguousKVCache`: a transformers `Cache` whose beginning lives on disk."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import ContiguousKVConfig
from ..errors import ConfigError, InputError
from ..model.attention import NO_FULL_GRAPH
from ..model.forward_hooks import ForwardHook, ListeningCache
from ..model.peft_adapters import require_no_virtual_tokens
from ..model.served_model import ServedModel
from ..planning.auto_budget import BudgetChoice
from ..request.prefix_request import PrefixRequest
from ..request.strategy import ServingMethod
from ..session.arguments import checked_ids, configured, opened_store
from ..session.prefix_session import PrefixSession
from ..session.prompt_checks import check_ids
from ..stats import RequestStats
from ..store import PrefixStore
from ..timeline import Timeline
from .layers import ContiguousLayer, ContiguousSlidingLayer


class ContiguousKVCache(ListeningCache):
    """A KV cache that begins with a stored prefix, of which attention uses only the chunks that it needs.

    Use it like any other cache: `model.generate(ids, cache=ContiguousKVCache(model, prefix_ids, store="kv"))`
    (`past_key_values=` before transformers 5.24). It is a context manager. `copy.deepcopy` returns an independent cache
    in the same state, which shares the model, the store and the loaded part of the prefix. Its methods are those of
    `transformers.Cache` and a few properties; `session` does the work.

    Args:
        model: a decoder-only transformers model, on one or more devices.
        prefix_ids: int64 `[n]` or `[1, n]`. The stored part is attached; the rest is prefilled exactly, written to the
            store and attached. `None` with a store is **automatic** mode: the prompt of the first forward is looked up
            and stored. `None` without a store gives an ordinary `DynamicCache`.
        store: a `PrefixStore` or its path. `None` with `prefix_ids`: a temporary store, deleted with the cache.
        config: how chunks are chosen and read; the default is the best we know.
        method: serves `prefix_ids` in place of the library's own method (`request.strategy`).
        overrides: fields of `ContiguousKVConfig`, e.g. `budget=0.1`.

    Attributes:
        config: the `ContiguousKVConfig` in force.
        session: the cache's state, for this library's own use; `None` for an ordinary cache.

    Raises:
        UnsupportedModelError: the model cannot be served correctly; the message names the reason.
        InputError: `prefix_ids` has the wrong dtype or shape, or is empty.
        ConfigError: a field is out of range, or `method` cannot do what it asks for.
        StoreError: the folder is not a store, has a newer format, or its files are damaged.
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
        self.config = configured(config, overrides)
        if method is not None and self.config.reselect_every is not None:
            raise ConfigError(
                f"reselect_every={self.config.reselect_every} needs the library's own method, but "
                f"{type(method).__name__}, which chooses once, is to serve this cache; leave out one of the two"
            )
        self.session: PrefixSession | None = None
        self._hook: ForwardHook | None = None
        self._closed_stats = RequestStats()
        # The tokens that the prefix of a closed cache had.
        self._closed_with = 0
        served = ServedModel(model)
        super().__init__(
            layers=[
                ContiguousLayer(position) if window is None else ContiguousSlidingLayer(position, window)
                for position, window in enumerate(served.windows)
            ]
        )
        ids = None if prefix_ids is None else checked_ids(prefix_ids)
        opened, self._temporary = opened_store(store, ids is not None, self.config.reading.verify)
        if opened is None:
            return
        require_no_virtual_tokens(model, automatic=ids is None)
        self.session = PrefixSession(self, served, opened, self.config, self.layers, ids is None, method)
        try:
            self._hook = ForwardHook(self, served.lm)
            if ids is not None:
                self.session.held.slot.attach_ids(ids)
        except BaseException:
            self.close()
            raise

    # -- reading its state --------------------------------------------------------------------------------------------

    @property
    def prefix_ids(self) -> torch.Tensor | None:
        """The tokens of the prefix, int64 `(n,)`, or `None`."""
        return None if self.session is None else self.session.held.slot.ids

    @property
    def store(self) -> PrefixStore | None:
        """The store in use; `None` for an ordinary or closed cache."""
        return None if self.session is None else self.session.held.slot.source.store

    @property
    def budget_choice(self) -> BudgetChoice | None:
        """The choice of `budget="auto"` for the attached prefix with its reason, or `None`."""
        return None if self.session is None else self.session.held.slot.budget_choice

    @property
    def stats(self) -> RequestStats:
        """Statistics of the current request: what it read, used and waited for. Still readable after `close`."""
        return self._closed_stats if self.session is None else self.session.stats

    @property
    def timeline(self) -> Timeline | None:
        """The timeline of the current request, if the config asks for one; else `None`."""
        request = None if self.session is None else self.session.request
        return None if request is None else request.timeline

    def check(self, input_ids: torch.Tensor, *, partial: bool = False) -> None:
        """Raise `InputError` if `input_ids` (`[n]`, or `[batch, n]`: each row) do not begin with the prefix.

        With `partial`, ids shorter than the prefix need only match its beginning.
        """
        prefix = None if self.session is None else self.session.held.prefix
        if prefix is not None:
            check_ids(prefix, input_ids, partial)

    def selected_chunks(self, layer_idx: int) -> torch.Tensor | None:
        """Whole chunks that a full-attention layer uses now, int64 `(batch, kept)`, ascending.

        `None` before the first suffix token, and for sliding-window layers. A partial last chunk is always kept and not
        listed; `single_tokens` lists what is used of other chunks.
        """
        return self._chosen(layer_idx, PrefixRequest.selected_chunks)

    def single_tokens(self, layer_idx: int) -> torch.Tensor | None:
        """Prefix tokens that a full-attention layer uses beside whole chunks, int64 `(batch, n)`, ascending.

        `None` where single tokens are not chosen (`IndexedKeys.single_tokens`), and before the first suffix token.
        """
        return self._chosen(layer_idx, PrefixRequest.single_tokens)

    def _chosen(self, layer_idx: int, of: Callable[[PrefixRequest, int], torch.Tensor | None]) -> torch.Tensor | None:
        """What the request has chosen for a layer, for each batch row."""
        layer = self.layers[layer_idx]
        request = None if self.session is None else self.session.request
        if request is None or not isinstance(layer, ContiguousLayer) or layer.row_of is None:
            return None
        chosen = of(request, layer_idx)
        return None if chosen is None else chosen[layer.row_of.cpu()]

    # -- the transformers contract ------------------------------------------------------------------------------------

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append K/V `(batch, kv_heads, q, head_dim)` of a layer. With a prefix, K/V of a forward that this library's
        hook has not seen are refused.

        Raises:
            InputError: the cache was made for a prefix, and was closed.
        """
        if self._closed_with:
            raise InputError(
                f"this cache was closed: the {self._closed_with} tokens of its prefix are not in it any more. Make a "
                "new one, or close it later"
            )
        if layer_idx == 0 and self.session is not None and not self.session.announced:
            self._unannounced()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)  # type: ignore[no-any-return]

    @torch.compiler.disable(reason=NO_FULL_GRAPH)
    def _unannounced(self) -> None:
        if self.session is not None:
            self.session.unannounced_update()

    def reset(self) -> None:
        """Drop the suffix and keep the prefix attached, ready for the next question (automatic: the next prompt)."""
        if self.session is None:
            super().reset()
        else:
            self.session.claim().reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens. After a crop back to the prefix, chunks are selected again.

        A crop into the prefix also shortens it for later questions, until `reset`.
        """
        if self.session is None:
            super().crop(tokens_to_remove)
        else:
            self.session.claim().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Make row `i` continue the former row `beam_idx[i]`."""
        if self.session is None:
            super().reorder_cache(beam_idx)
        else:
            self.session.claim().select_rows(beam_idx, reorder=True)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        if self.session is None:
            super().batch_repeat_interleave(repeats)
        else:
            self.session.claim().repeat_rows(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the rows `indices` (positions, or a bool mask)."""
        if self.session is None:
            super().batch_select_indices(indices)
        else:
            self.session.claim().select_rows(indices)

    # -- closing and copying ------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Detach the prefix and release model and store; `stats` stay readable.

        A cache that was made with `prefix_ids` cannot be used any more, for it would answer without them. One in
        automatic mode remains as an empty, ordinary cache.
        """
        if self.session is None:
            return
        held = self.session.held
        tokens = 0 if held.automatic or held.slot.ids is None else len(held.slot.ids)
        self.session.close()  # (Refused, if another thread uses the cache.)
        self._closed_with = tokens
        self._closed_stats = self.session.stats
        if self._hook is not None:
            self._hook.remove()
        self.session = self._hook = self._temporary = None

    def __enter__(self) -> ContiguousKVCache:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __copy__(self) -> ContiguousKVCache:
        return copy.deepcopy(self)  # (Two caches that share layers would spoil each other.)

    def __reduce__(self) -> Any:
        raise TypeError(
            "a ContiguousKVCache cannot be pickled: it belongs to its model and to an open store. Make one where you "
            "need it; what it stored is found there"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> ContiguousKVCache:
        twin: ContiguousKVCache = object.__new__(type(self))
        memo[id(self)] = twin
        for name, value in vars(self).items():
            if name not in ("layers", "session", "_hook", "_temporary"):
                setattr(twin, name, copy.deepcopy(value, memo))
        twin.session, twin._hook, twin._temporary, twin.layers = None, None, self._temporary, []
        attached = None
        if self.session is not None:
            twin.session = self.session.copy_for(twin, twin.layers, memo)
            twin._hook = ForwardHook(twin, self.session.held.slot.source.model.lm)
            attached = twin.session.held.slot.attached
        twin.layers.extend(layer.copy_of(attached, memo) for layer in self.layers)
        return twin
