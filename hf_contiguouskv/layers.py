"""The cache layers: `DynamicCache`'s own, plus a prefix in front of them.

Without a prefix each is exactly its base class. With one, `get_seq_length` is the *logical* length (prefix included)
and `get_mask_sizes` the *physical* one (what attention sees): `k` of `n` prefix tokens, the suffix, the new tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .attention import Installation, tagged
from .errors import AttentionNotActiveError, InputError
from .request import PrefixRequest

GROWTH = 64


class AttachedState:
    """What all layers of one cache share while a prefix is attached."""

    def __init__(self, request: PrefixRequest, installation: Installation) -> None:
        self.request = request
        self.installation = installation

    def require_active(self) -> None:
        """Raise if the model would not call our attention function: its answers would be silently wrong."""
        if not self.installation.active:
            raise AttentionNotActiveError(
                f"the model's attention implementation was changed to {self.installation.current!r} while a cache "
                "with a prefix is in use. Set it before the cache is made, or make a new cache now."
            )


class ContiguousLayer(DynamicLayer):
    """A full-attention layer: selected prefix chunks, then the suffix.

    Prefix K/V exist once per *distinct* row (beams share them, and at budget 1.0 all rows do); where that is one per
    batch row, prefix and suffix lie in one growing buffer, so that a decoding step copies nothing.
    """

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.is_initialized: bool = False
        self.layer_idx = layer_idx
        self.attached: AttachedState | None = None
        self._forget()

    def _forget(self) -> None:
        self._suffix = 0
        self._loaded = False
        # (batch, kv_heads, room, head_dim): [prefix ; suffix] if `_joined`, else the suffix alone.
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None
        self._joined = True
        # (distinct rows or 1, kv_heads, kept_tokens, head_dim), if not `_joined`.
        self._prefix: tuple[torch.Tensor, torch.Tensor] | None = None
        # int64 (batch,): which distinct row of the request each batch row is.
        self.row_of: torch.Tensor | None = None

    # -- attaching ----------------------------------------------------------------------------------------------------

    def attach(self, state: AttachedState | None) -> None:
        """Put a prefix in front (nothing else stays), or take it away."""
        super().reset()
        self.attached = state
        self._forget()

    def copy_of(self, state: AttachedState | None, memo: dict[int, Any]) -> ContiguousLayer:
        """A deep copy whose prefix belongs to `state`."""
        twin = copy.copy(self)
        for name, value in vars(self).items():
            if name != "attached":
                setattr(twin, name, copy.deepcopy(value, memo))
        twin.attached = state
        return twin

    # -- the transformers contract ------------------------------------------------------------------------------------

    @torch.compiler.disable
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append K/V `(batch, kv_heads, q, head_dim)`; with a prefix, the returned K leads attention back here."""
        if self.attached is None:
            return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[no-any-return]
        self.attached.require_active()
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.is_initialized = True
        if self._buffers is None:
            self._start(key_states)
        start = self._offset + self._suffix
        self._suffix += key_states.shape[2]
        self._reserve(self._offset + self._suffix)
        assert self._buffers is not None
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            if buffer.shape[0] != states.shape[0]:
                raise InputError(f"the cache holds {buffer.shape[0]} rows, but {states.shape[0]} were passed")
            buffer[:, :, start : self._offset + self._suffix] = states
        self.keys, self.values = (self._part(b, self._offset, self._suffix) for b in self._buffers)
        return tagged(self.keys, self), self.values

    @torch.compiler.disable
    def visible_kv(
        self, query: torch.Tensor, attention_mask: torch.Tensor | None, options: Mapping[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `attention.KVSource`."""
        assert self.attached is not None
        assert self._buffers is not None
        if not self._loaded:
            self._load(query, options)
        length = self._offset + self._suffix
        if self._joined:
            keys, values = (self._part(buffer, 0, length) for buffer in self._buffers)
        else:
            assert self._prefix is not None
            keys, values = (
                torch.cat([self._of_rows(prefix), self._part(buffer, 0, self._suffix)], dim=2)
                for prefix, buffer in zip(self._prefix, self._buffers, strict=True)
            )
        if attention_mask is not None and attention_mask.shape[-1] != keys.shape[2]:
            raise InputError(
                f"the attention mask has {attention_mask.shape[-1]} columns, but attention sees {keys.shape[2]} tokens "
                f"of layer {self.layer_idx} (pruned prefix and suffix); pass a 2D mask over all tokens instead"
            )
        return keys, values

    def get_seq_length(self) -> int:
        """Tokens in the cache: the whole prefix, kept or not, and the suffix."""
        if self.attached is None:
            return super().get_seq_length()  # type: ignore[no-any-return]
        return self.attached.request.prefix.tokens + self._suffix

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """`(columns of the mask, token position of the first)`: kept prefix tokens count as the last of the prefix."""
        if self.attached is None:
            return super().get_mask_sizes(query_length)  # type: ignore[no-any-return]
        self.attached.require_active()
        request = self.attached.request
        return request.kept_tokens + self._suffix + query_length, request.prefix.tokens - request.kept_tokens

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` suffix tokens (the cache handles a crop that reaches the prefix)."""
        if self.attached is None:
            super().crop(tokens_to_remove)
            return
        self._suffix -= abs(tokens_to_remove)
        if self._buffers is not None:
            self.keys, self.values = (self._part(b, self._offset, self._suffix) for b in self._buffers)

    def reset(self) -> None:
        """Drop the suffix; the prefix stays attached."""
        self.attach(self.attached)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row `i` continues what row `beam_idx[i]` was."""
        if self.attached is None:
            super().reorder_cache(beam_idx)
        else:
            self._take_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        if self.attached is None:
            super().batch_repeat_interleave(repeats)
        elif self._buffers is not None:
            self._take_rows(torch.arange(self._buffers[0].shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Only the rows `indices` (positions, or a bool mask)."""
        if self.attached is None:
            super().batch_select_indices(indices)
        elif self._buffers is not None:
            self._take_rows(torch.arange(self._buffers[0].shape[0], device=indices.device)[indices])

    def offload(self) -> None:
        """Offloading is what the store is for."""

    def prefetch(self) -> None:
        """See `offload`."""

    def row_states(self, row: int, pads: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """K and V `(kv_heads, n, head_dim)` of one batch row at budget 1.0, without its `pads` columns of padding.

        Returns also the first token: from the prefix, the chunk that it shares with the suffix is enough.
        """
        assert self.attached is not None
        assert self._buffers is not None
        prefix = self.attached.request.prefix
        tail = prefix.tail_tokens
        end = self._offset + self._suffix
        parts = []
        for half, buffer in enumerate(self._buffers):
            first = buffer if self._joined else self._prefix[half]  # type: ignore[index]
            source = first[row] if self._joined else self._of_rows(first)[row]
            shared = source[:, prefix.tokens - tail : prefix.tokens]
            parts.append(torch.cat([shared, buffer[row, :, self._offset + pads : end]], dim=1))
        return parts[0], parts[1], prefix.tokens - tail

    # -- inside -------------------------------------------------------------------------------------------------------

    @property
    def _offset(self) -> int:
        """Where the suffix begins in `_buffers`."""
        return self.attached.request.kept_tokens if self.attached is not None and self._joined else 0

    def _of_rows(self, prefix: torch.Tensor) -> torch.Tensor:
        """One prefix row for each batch row; a single one is shared by all."""
        assert self.row_of is not None
        return prefix.expand(len(self.row_of), -1, -1, -1) if prefix.shape[0] == 1 else prefix[self.row_of]

    @staticmethod
    def _part(buffer: torch.Tensor, start: int, length: int) -> torch.Tensor:
        return buffer[:, :, start : start + length]

    def _start(self, key_states: torch.Tensor) -> None:
        assert self.attached is not None
        rows = self.attached.request.rows
        batch, kv_heads, length, head_dim = key_states.shape
        if rows is not None and rows.of_batch.shape[0] != batch:
            raise InputError(f"the batch has {rows.of_batch.shape[0]} rows, but layer {self.layer_idx} got {batch}")
        distinct = batch if rows is None else rows.representatives.shape[0]
        self._joined = batch == 1 or (distinct == batch and not self.attached.request.keeps_all)
        room = self._offset + length + GROWTH
        self._buffers = (
            key_states.new_empty(batch, kv_heads, room, head_dim),
            key_states.new_empty(batch, kv_heads, room, head_dim),
        )

    def _reserve(self, length: int) -> None:
        assert self._buffers is not None
        room = self._buffers[0].shape[2]
        if length <= room:
            return
        grown = length + max(GROWTH, length // 4)
        batch, kv_heads, _, head_dim = self._buffers[0].shape
        larger = tuple(buffer.new_empty(batch, kv_heads, grown, head_dim) for buffer in self._buffers)
        for new, old in zip(larger, self._buffers, strict=True):
            new[:, :, :room] = old
        self._buffers = (larger[0], larger[1])

    def _load(self, query: torch.Tensor, options: Mapping[str, Any]) -> None:
        assert self.attached is not None
        assert self._buffers is not None
        request, kept = self.attached.request, self.attached.request.kept_tokens
        rows = request.rows
        self.row_of = (torch.arange(query.shape[0]) if rows is None else rows.of_batch).to(query.device)
        if self._joined:
            target = tuple(self._part(buffer, 0, kept) for buffer in self._buffers)
        else:
            distinct = 1 if request.keeps_all or rows is None else rows.representatives.shape[0]
            _, kv_heads, _, head_dim = self._buffers[0].shape
            target = tuple(buffer.new_empty(distinct, kv_heads, kept, head_dim) for buffer in self._buffers)
            self._prefix = (target[0], target[1])
        request.load_full(self.layer_idx, query, self.keys, options, target[0], target[1])
        self._loaded = True

    def _take_rows(self, indices: torch.Tensor) -> None:
        if self._buffers is None:
            return
        first, second = (buffer.index_select(0, indices.to(buffer.device)) for buffer in self._buffers)
        self._buffers = (first, second)
        if self.row_of is not None:
            self.row_of = self.row_of.index_select(0, indices.to(self.row_of.device))
        self.keys, self.values = (self._part(b, self._offset, self._suffix) for b in self._buffers)


class ContiguousSlidingLayer(DynamicSlidingWindowLayer):
    """A sliding-window layer: the exact tail of the prefix that its window can see, then the base class."""

    def __init__(self, layer_idx: int, sliding_window: int) -> None:
        super().__init__(sliding_window=sliding_window)
        self.layer_idx = layer_idx
        self.attached: AttachedState | None = None
        # While set, `update` keeps the K/V of all tokens it has seen, for the store.
        self.recording = False
        self.recorded: tuple[torch.Tensor, torch.Tensor] | None = None

    def attach(self, state: AttachedState | None) -> None:
        """Put a prefix in front (nothing else stays), or take it away."""
        super().reset()
        self.recorded = None
        self.attached = state
        self.cumulative_length = 0 if state is None else state.request.prefix.tokens

    def copy_of(self, state: AttachedState | None, memo: dict[int, Any]) -> ContiguousSlidingLayer:
        """A deep copy whose prefix belongs to `state`."""
        twin = copy.copy(self)
        for name, value in vars(self).items():
            if name != "attached":
                setattr(twin, name, copy.deepcopy(value, memo))
        twin.attached = state
        return twin

    @torch.compiler.disable
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `DynamicSlidingWindowLayer.update`; the prefix's tail is loaded when the first suffix tokens come."""
        if self.attached is not None:
            self.attached.require_active()
            if not self.is_initialized:
                self._load_tail(key_states, value_states)
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if self.recording:
            self.recorded = (keys, values)
        return keys, values

    def _load_tail(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        assert self.attached is not None
        self.lazy_initialization(key_states, value_states)
        batch = key_states.shape[0]
        keys, values = self.attached.request.load_tail(self.layer_idx, self.sliding_window)
        self.keys, self.values = keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """See `DynamicSlidingWindowLayer.get_mask_sizes`."""
        if self.attached is not None:
            self.attached.require_active()
        return super().get_mask_sizes(query_length)  # type: ignore[no-any-return]

    def reset(self) -> None:
        """Drop the suffix; the prefix stays attached."""
        self.attach(self.attached)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row `i` continues what row `beam_idx[i]` was."""
        if self.is_initialized:
            super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        if self.is_initialized:
            super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Only the rows `indices`."""
        if self.is_initialized:
            super().batch_select_indices(indices)

    def offload(self) -> None:
        """Offloading is what the store is for."""

    def prefetch(self) -> None:
        """See `offload`."""
