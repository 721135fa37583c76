"""The cache layers: those of `DynamicCache`, with a prefix in front.

Without a prefix, each layer behaves exactly like its base class. With one, `get_seq_length` is the *logical* length
(prefix included) and `get_mask_sizes` the *physical* one, which attention sees: `k` of `n` prefix tokens, the suffix,
the new tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..errors import InputError
from ..hardware.accelerator import send
from ..model.attention import NO_FULL_GRAPH, tagged
from ..session.attached_request import AttachedRequest

GROWTH = 64


L = TypeVar("L", bound="ContiguousLayer | ContiguousSlidingLayer")


def _twin(layer: L, attached: AttachedRequest | None, memo: dict[int, Any]) -> L:
    twin = copy.copy(layer)
    for name, value in vars(layer).items():
        if name != "attached":
            setattr(twin, name, copy.deepcopy(value, memo))
    twin.attached = attached
    return twin


class ContiguousLayer(DynamicLayer):
    """A full-attention layer: selected prefix chunks, then the suffix.

    Prefix K/V exist once per *distinct* row: beams share them, and at budget 1.0 all rows do. If there is one per batch
    row, prefix and suffix lie in one growing buffer, so that a decoding step copies nothing.

    It has many methods because transformers has: each one of `DynamicLayer` that touches K/V is overridden here.
    """

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.is_initialized: bool = False
        self.layer_idx = layer_idx
        self.attached: AttachedRequest | None = None
        self._forget()

    def _forget(self) -> None:
        self._suffix = 0
        self._loaded = False
        # (2 (K, V), batch, kv_heads, room, head_dim): [prefix ; suffix] if `_joined`, else the suffix alone.
        self._buffer: torch.Tensor | None = None
        self._joined = True
        # (2, distinct rows or 1, kv_heads, kept_tokens, head_dim), if not `_joined`.
        self._prefix: torch.Tensor | None = None
        # int64 (batch,): for each batch row, its distinct row of the request, and its row of `_prefix`.
        self.row_of: torch.Tensor | None = None
        self._prefix_row: torch.Tensor | None = None
        # Queries for later choices, (batch, heads, n, head_dim).
        self._queries: torch.Tensor | None = None
        # Whether a copy of this layer uses the prefix in `_buffer`.
        self._lent = False

    # -- attaching ----------------------------------------------------------------------------------------------------

    def attach(self, attached: AttachedRequest | None) -> None:
        """Put a prefix in front, or remove it; everything else is dropped."""
        super().reset()
        self.attached = attached
        self._forget()

    def copy_of(self, attached: AttachedRequest | None, memo: dict[int, Any]) -> ContiguousLayer:
        """A deep copy that uses the prefix of `attached`.

        The copy shares the loaded prefix K/V, which change for neither: where chunks are chosen again, each makes K/V
        of its own. So it keeps prefix and suffix separate, and joins them for each step.
        """
        if attached is None or self._buffer is None or not self._loaded:
            return _twin(self, attached, memo)
        twin = copy.copy(self)
        twin.attached, twin._joined = attached, False
        if self._joined:
            self._lent = True
            twin._prefix = self._buffer.narrow(3, 0, self._offset)
            twin._prefix_row = torch.arange(self._buffer.shape[1], device=self._buffer.device)
        own = self._buffer.narrow(3, self._offset, self._suffix)
        twin._buffer = own.new_empty(*own.shape[:3], self._suffix + GROWTH, own.shape[4])
        twin._buffer[:, :, :, : self._suffix] = own
        twin._show_suffix()
        return twin

    # -- the transformers contract ------------------------------------------------------------------------------------

    @torch.compiler.disable(reason=NO_FULL_GRAPH)
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append K/V `(batch, kv_heads, q, head_dim)`; with a prefix, the returned K is tagged with this layer."""
        if self.attached is None:
            return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[no-any-return]
        self.attached.require_running()
        self.attached.expect(self.layer_idx)
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.is_initialized = True
        if self._buffer is None:
            self._start(key_states)
        elif key_states.requires_grad:
            # The backward pass needs the earlier K/V unchanged.
            self._buffer = self._buffer.clone()
        start = self._offset + self._suffix
        end = start + key_states.shape[2]
        buffer = self._with_room(end)
        if buffer.shape[1] != key_states.shape[0]:
            raise InputError(f"the cache holds {buffer.shape[1]} rows, but {key_states.shape[0]} were passed")
        new = buffer.narrow(3, start, end - start)
        new[0].copy_(key_states)
        new[1].copy_(value_states)
        self._suffix = end - self._offset
        self._show_suffix()
        return tagged(self.keys, self), self.values

    @property
    def plain(self) -> bool:
        return self.attached is not None and self.attached.plain

    @torch.compiler.disable(reason=NO_FULL_GRAPH)
    def visible_kv(
        self, query: torch.Tensor, attention_mask: torch.Tensor | None, options: Mapping[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.attached is not None
        self.attached.expected = None
        request = self.attached.request
        self._queries = request.remember(self.layer_idx, self._queries, query)
        if not self._loaded:
            self._load(query, options)
        elif request.chooses_again:
            self._load_again(options)
        assert self._buffer is not None
        if self._joined:
            visible = self._buffer.narrow(3, 0, self._offset + self._suffix)
        else:
            visible = torch.cat([self._prefix_rows(), self._buffer[:, :, :, : self._suffix]], dim=3)
        if attention_mask is not None and attention_mask.shape[-1] != visible.shape[3]:
            raise InputError(
                f"the attention mask has {attention_mask.shape[-1]} columns, but attention sees {visible.shape[3]} "
                f"tokens of layer {self.layer_idx} (pruned prefix and suffix); pass a 2D mask over all tokens instead"
            )
        return visible[0], visible[1]

    def get_seq_length(self) -> int:
        """Tokens in the cache: the whole prefix, including chunks that are not kept, and the suffix."""
        if self.attached is None:
            return super().get_seq_length()  # type: ignore[no-any-return]
        return self.attached.request.prefix.tokens + self._suffix

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """`(mask columns, position of the first)`; kept prefix tokens count as the last tokens of the prefix."""
        if self.attached is None:
            return super().get_mask_sizes(query_length)  # type: ignore[no-any-return]
        request = self.attached.request
        return request.kept_tokens + self._suffix + query_length, request.prefix.tokens - request.kept_tokens

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` suffix tokens (the cache handles a crop that reaches the prefix)."""
        if self.attached is None:
            super().crop(tokens_to_remove)
            return
        self._suffix = max(0, self._suffix - abs(tokens_to_remove))
        self._show_suffix()

    def reset(self) -> None:
        """Drop the suffix; the prefix stays attached."""
        self.attach(self.attached)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Make row `i` continue the former row `beam_idx[i]`."""
        if self.attached is None:
            super().reorder_cache(beam_idx)
        else:
            self._take_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        if self.attached is None:
            super().batch_repeat_interleave(repeats)
        elif self._buffer is not None:
            self._take_rows(torch.arange(self._buffer.shape[1]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the rows `indices` (positions, or a bool mask)."""
        if self.attached is None:
            super().batch_select_indices(indices)
        elif self._buffer is not None:
            self._take_rows(torch.arange(self._buffer.shape[1], device=indices.device)[indices])

    def offload(self) -> None:
        """Do nothing: the store takes the place of offloading."""

    def prefetch(self) -> None:
        """Do nothing, as `offload`."""

    def record(self, recording: bool) -> None:
        """Do nothing: the cache already holds all K/V of a full-attention layer."""

    def row_states(self, row: int, pads: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """K and V `(kv_heads, n, head_dim)` of a row at budget 1.0, and the position of their first token.

        Args:
            row: index in the batch.
            pads: number of left-padding columns of the row.
            tokens: number of real tokens of the row, prefix included.
        """
        if self.attached is None:
            return self.keys[row, :, pads:], self.values[row, :, pads:], 0
        assert self._buffer is not None
        prefix = self.attached.request.prefix
        # Of the prefix, only its partial last chunk is needed, which the suffix completes.
        tail = prefix.tail_tokens
        end = self._offset + self._suffix
        before = self._buffer[:, row] if self._joined else self._prefix_rows()[:, row]
        states = torch.cat(
            [
                before[:, :, prefix.tokens - tail : prefix.tokens],
                self._buffer[:, row, :, self._offset + pads : end],
            ],
            dim=2,
        )
        return states[0], states[1], prefix.tokens - tail

    # -- inside -------------------------------------------------------------------------------------------------------

    @property
    def _offset(self) -> int:
        """Token index at which the suffix begins in `_buffer`."""
        return self.attached.request.kept_tokens if self.attached is not None and self._joined else 0

    def _prefix_rows(self) -> torch.Tensor:
        """The prefix once per batch row; if all rows share one, without a copy."""
        assert self._prefix is not None
        assert self._prefix_row is not None
        if self._prefix.shape[1] == 1:
            return self._prefix.expand(-1, len(self._prefix_row), -1, -1, -1)
        return self._prefix[:, self._prefix_row]

    def _show_suffix(self) -> None:
        if self._buffer is not None:
            self.keys, self.values = self._buffer.narrow(3, self._offset, self._suffix).unbind(0)

    def _start(self, key_states: torch.Tensor) -> None:
        assert self.attached is not None
        rows = self.attached.request.rows
        batch, _, length, _ = key_states.shape
        if rows is not None and rows.of_batch.shape[0] != batch:
            raise InputError(f"the batch has {rows.of_batch.shape[0]} rows, but layer {self.layer_idx} got {batch}")
        in_order = rows is None or rows.in_order
        self._joined = batch == 1 or (in_order and not self.attached.request.keeps_all)
        self._buffer = self._room(key_states, batch, self._offset + length + GROWTH)

    def _with_room(self, length: int) -> torch.Tensor:
        """The buffer, with room for `length` tokens."""
        assert self._buffer is not None
        room = self._buffer.shape[3]
        if length > room:
            larger = self._room(self._buffer, self._buffer.shape[1], length + max(GROWTH, length // 4))
            larger[:, :, :, :room] = self._buffer
            self._buffer = larger
        return self._buffer

    def _load(self, query: torch.Tensor, options: Mapping[str, Any]) -> None:
        assert self.attached is not None
        assert self._buffer is not None
        request = self.attached.request
        rows = request.rows
        self.row_of = self._prefix_row = request.row_of(query.shape[0], query.device)
        if self._joined:
            destination = self._buffer[:, :, :, : request.kept_tokens]
        else:
            distinct = 1 if request.keeps_all or rows is None else len(rows.representatives)
            destination = self._prefix = self._room(self._buffer, distinct, request.kept_tokens)
        request.load_full(self.layer_idx, query, self.keys, options, destination)
        self._loaded = True

    def _load_again(self, options: Mapping[str, Any]) -> None:
        """Replace the chunks of the prefix that are not chosen any more; the suffix stays as it is."""
        assert self.attached is not None
        assert self._buffer is not None
        request = self.attached.request
        asked = self.layer_idx, self._queries, self.keys, options
        if self._joined:
            if self._lent:
                self._buffer, self._lent = self._buffer.clone(), False
                self._show_suffix()
            request.load_again(*asked, self._buffer[:, :, :, : request.kept_tokens], by_batch=True)
            return
        assert self._prefix is not None
        assert self._prefix_row is not None
        # Into memory of its own, as copies of the cache may use what is there now.
        of_batch, some = (send(rows, self._buffer.device) for rows in request.rows_now())
        new = self._room(self._buffer, len(some), request.kept_tokens)
        new.copy_(self._prefix.index_select(1, self._prefix_row.index_select(0, some)))
        if request.load_again(*asked, new, by_batch=False):
            self._prefix, self._prefix_row = new, of_batch

    def _room(self, like: torch.Tensor, batch: int, tokens: int) -> torch.Tensor:
        assert self.attached is not None
        return self.attached.request.room(like, batch, tokens)

    def _take_rows(self, indices: torch.Tensor) -> None:
        if self._buffer is None:
            return
        self._buffer = self._buffer.index_select(1, indices.to(self._buffer.device))
        if self.row_of is not None:
            self.row_of = self.row_of.index_select(0, indices.to(self.row_of.device))
        if self._prefix_row is not None:
            self._prefix_row = self._prefix_row.index_select(0, indices.to(self._prefix_row.device))
        if self._queries is not None:
            self._queries = self._queries.index_select(0, indices.to(self._queries.device))
        self._show_suffix()


class ContiguousSlidingLayer(DynamicSlidingWindowLayer):
    """A sliding-window layer that begins with the exact tail of the prefix that its window can see."""

    def __init__(self, layer_idx: int, sliding_window: int) -> None:
        super().__init__(sliding_window=sliding_window)
        self.layer_idx = layer_idx
        self.attached: AttachedRequest | None = None
        # While set, `update` keeps the K/V of all tokens of the forward, for the store.
        self._recording = False
        self._recorded: tuple[torch.Tensor, torch.Tensor] | None = None

    def attach(self, attached: AttachedRequest | None) -> None:
        """Put a prefix in front, or remove it; everything else is dropped."""
        super().reset()
        self._recorded = None
        self.attached = attached
        self.cumulative_length = 0 if attached is None else attached.request.prefix.tokens

    def copy_of(self, attached: AttachedRequest | None, memo: dict[int, Any]) -> ContiguousSlidingLayer:
        """A deep copy that uses the prefix of `attached`."""
        return _twin(self, attached, memo)

    @torch.compiler.disable(reason=NO_FULL_GRAPH)
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append K/V `(batch, kv_heads, q, head_dim)`; the first suffix tokens load the prefix's tail."""
        if self.attached is not None:
            self.attached.require_running()
            if not self.is_initialized:
                self._load_tail(key_states, value_states)
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if self._recording:
            self._recorded = (keys, values)
        return keys, values

    def record(self, recording: bool) -> None:
        """Keep the K/V of all tokens of the next forward (more than the window holds), or drop them."""
        self._recording = recording
        self._recorded = None

    def row_states(self, row: int, pads: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Recorded K and V `(kv_heads, n, head_dim)` of a row, and the position of their first token.

        Args:
            row: index in the batch.
            pads: number of left-padding columns of the row.
            tokens: number of real tokens of the row, prefix included.
        """
        assert self._recorded is not None
        # The recorded tokens end with the prompt. (With padding, no prefix is attached to sliding-window layers.)
        keys, values = (states[row] for states in self._recorded)
        padded = self.attached is None and keys.shape[1] == tokens + pads
        known = min(keys.shape[1] - (pads if padded else 0), tokens)
        return keys[:, -known:], values[:, -known:], tokens - known

    def _load_tail(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        assert self.attached is not None
        self.lazy_initialization(key_states, value_states)
        batch = key_states.shape[0]
        keys, values = self.attached.request.load_tail(self.layer_idx, self.sliding_window, batch, key_states.shape[2])
        self.keys, self.values = keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1)

    def reset(self) -> None:
        """Drop the suffix; the prefix stays attached."""
        self.attach(self.attached)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Make row `i` continue the former row `beam_idx[i]`."""
        if self.is_initialized:
            super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        if self.is_initialized:
            super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the rows `indices`."""
        if self.is_initialized:
            super().batch_select_indices(indices)

    def offload(self) -> None:
        """Do nothing: the store takes the place of offloading."""

    def prefetch(self) -> None:
        """Do nothing, as `offload`."""
