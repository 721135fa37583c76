"""The attention function and mask that a model uses while a forward with a `ContiguousKVCache` runs.

`Cache.update` runs before attention and sees no queries, but choosing chunks needs the queries after RoPE. So a cache
layer returns its suffix K/V *tagged* with a reference to itself. The function registered here asks that layer for the
K/V that these queries attend to, then calls the model's previous implementation. K/V without a tag (any other cache, or
none) go straight to that implementation, bit for bit as before.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import nn
from torch.backends.cuda import SDPAParams, can_use_efficient_attention, can_use_flash_attention

from ..errors import AttentionNotActiveError, UnsupportedModelError
from .transformers_internals import (
    attention_function,
    attention_implementation,
    register_attention,
    set_attention_implementation,
)

NO_FULL_GRAPH = "a ContiguousKVCache works outside of compiled code: fullgraph=True is not possible with it"
"""The reason for the graph break: dynamo shows it to users who ask for a full graph."""
PREFIX = "contiguouskv_"
BASES = ("sdpa", "eager")
_TAG = "_contiguouskv_source"
_PREPARED = "_contiguouskv_prepared"
# A mask is repeated for each query head of a group only if the result has at most this many elements (CPU, device).
_FOLDED_MASK, _FOLDED_MASK_ON_DEVICE = 2**22, 2**27
# The flash kernel needs a multiple of this many channels.
_FLASH_CHANNELS = 8
# GPU kernels need the rows of a mask to begin at multiples of this many elements.
_ROW_NUMBERS = 16


class KVSource(Protocol):
    """The cache layer that a tagged key tensor refers to: the layer that produced it.

    Attributes:
        plain: whether the forward's arguments let every token see all tokens before it: there is no padding, and no
            argument from which some models build another mask.
    """

    @property
    def plain(self) -> bool: ...

    def visible_kv(
        self, query: torch.Tensor, attention_mask: torch.Tensor | None, options: Mapping[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V `(batch, kv_heads, visible_length, head_dim)` for `query` `(batch, heads, q_length, head_dim)`.

        `attention_mask` is the model's mask, `None` or `(batch, 1, q_length, visible_length)`. `options` are the other
        keyword arguments of the attention function; `scaling` is always present.
        """
        ...


def tagged(states: torch.Tensor, source: KVSource) -> torch.Tensor:
    """A new view of `states` that refers to `source` (tagging a stored tensor itself would make a reference cycle)."""
    view = states[:]
    setattr(view, _TAG, source)
    return view


def _make_attention(base: str) -> Callable[..., Any]:
    @torch.compiler.disable(reason=NO_FULL_GRAPH)
    def attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        forward = attention_function(base, module)
        source: KVSource | None = getattr(key, _TAG, None)
        if source is not None:
            options = dict(kwargs)
            if options.get("scaling") is None:
                options["scaling"] = getattr(module, "scaling", None) or query.shape[-1] ** -0.5
            key, value = source.visible_kv(query, attention_mask, options)
            if base == "sdpa" and _is_ours(query, key, attention_mask, kwargs):
                accelerated = uses_our_attention(query.device)
                plain = accelerated and source.plain and _is_lower_right(module, query, key, attention_mask)
                return attend(query, key, value, attention_mask, options, plain=plain), None
        return forward(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]

    return attention  # type: ignore[no-any-return]


def uses_our_attention(device: torch.device) -> bool:
    """Whether `attend` beats the model's own implementation for every masked call, with grouped heads or without."""
    return device.type != "cpu"


def _is_ours(
    query: torch.Tensor, key: torch.Tensor, attention_mask: torch.Tensor | None, options: Mapping[str, Any]
) -> bool:
    """Whether `attend` gives the same result as `sdpa`, and faster.

    With a mask, transformers repeats K/V for each query head, which on a CPU costs more than the attention itself. On a
    GPU a mask also rules out flash attention; cuDNN then takes its place and may build a plan for every new number of
    tokens.
    """
    if options.get("position_bias") is not None or options.get("softcap") is not None:
        return False
    if uses_our_attention(query.device):
        return attention_mask is not None
    return query.shape[1] != key.shape[1] and (attention_mask is not None or query.shape[2] == 1)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    options: Mapping[str, Any],
    *,
    plain: bool = False,
) -> torch.Tensor:
    """Attention with grouped queries, without a copy of K and V for each query head.

    Args:
        query: `(batch, heads, q, head_dim)`.
        key, value: `(batch, kv_heads, n, head_dim)`.
        mask: `(batch, 1, q, n)`, bool (true for visible) or additive; `None` if everything is visible.
        options: keyword arguments of the attention function: `scaling`, and optionally `dropout`.
        plain: `mask` lets query `i` see exactly the first `n - q + i + 1` keys.

    Returns:
        `(batch, q, heads, head_dim)`, contiguous.
    """
    dropout, scale = options.get("dropout", 0.0), options["scaling"]
    groups = query.shape[1] // key.shape[1]
    if plain and _flash(query, key, value, dropout, groups > 1):
        return _flash_sdpa(query, key, value, dropout, scale).transpose(1, 2).contiguous()
    batch, heads, length, head_dim = query.shape
    added, folds = _prepared(mask, query, groups)
    if folds:
        # Treat the heads of a group as extra queries of one head, so that its K and V go through the kernel once.
        query = query.reshape(batch, key.shape[1], -1, head_dim)
    if added is not None and key.shape[1] == query.shape[1] and _efficient(query, key, value, added, dropout):
        output = _efficient_sdpa(query, key, value, added, dropout, scale)
    else:
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=added, dropout_p=dropout, scale=scale, enable_gqa=groups > 1 and not folds
        )
    return output.reshape(batch, heads, length, head_dim).transpose(1, 2).contiguous()


def _flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float, grouped: bool) -> bool:
    """Whether a flash kernel supports this call (never on a CPU). It needs no preparation for a new token count."""
    if query.shape[-1] % _FLASH_CHANNELS:
        return False
    return bool(can_use_flash_attention(SDPAParams(query, key, value, None, dropout, False, grouped)))


def _flash_sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float, scale: float
) -> torch.Tensor:
    """Call the flash kernel by name: its causal mask is aligned with the last key, and heads may be grouped.

    (`causal_lower_right` reaches the same kernel, but its tensor subclass costs as much as a launch.)
    """
    found: torch.Tensor = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, dropout, True, scale=scale
    )[0]
    return found


def _efficient(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, added: torch.Tensor, dropout: float
) -> bool:
    """Whether the memory-efficient kernel supports this masked call (never on a CPU), without preparation."""
    return bool(can_use_efficient_attention(SDPAParams(query, key, value, added, dropout, False, False)))


def _efficient_sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, added: torch.Tensor, dropout: float, scale: float
) -> torch.Tensor:
    """Call the memory-efficient kernel by name, because `sdpa_kernel` would select it for all threads of the
    process."""
    gradient = any(one.requires_grad for one in (query, key, value, added)) and torch.is_grad_enabled()
    bias = added.expand(query.shape[0], query.shape[1], -1, -1)
    found: torch.Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, gradient, dropout, False, scale=scale
    )[0]
    return found


def _prepared(mask: torch.Tensor | None, query: torch.Tensor, groups: int) -> tuple[torch.Tensor | None, bool]:
    """The mask in the kernel's form, and whether the query heads of a group can be folded into one.

    All layers pass the same mask, so it is converted once: to an additive mask (the kernel would convert a bool mask in
    each layer), repeated for each head of a group if the result is small.
    """
    if mask is None:
        return None, False
    known: tuple[int, torch.Tensor, bool] | None = getattr(mask, _PREPARED, None)
    if known is not None and known[0] == groups and known[1].dtype == query.dtype:
        return known[1], known[2]
    added = mask
    if mask.dtype == torch.bool:
        added = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill_(~mask, float("-inf"))
    most = _FOLDED_MASK if mask.device.type == "cpu" else _FOLDED_MASK_ON_DEVICE
    folds = mask.shape[1] == 1 and mask.numel() * groups <= most
    if folds and groups > 1:
        added = added.repeat(1, 1, groups, 1)
    if mask.device.type != "cpu" and added.shape[-1] % _ROW_NUMBERS:
        columns = added.shape[-1]
        added = torch.nn.functional.pad(added, (0, -columns % _ROW_NUMBERS))[..., :columns]
    setattr(mask, _PREPARED, (groups, added, folds))
    return added, folds


def _is_lower_right(module: nn.Module, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether this model builds the plain causal mask from plain arguments; checked on the first mask of each model."""
    config, length, keys = getattr(module, "config", None), query.shape[2], key.shape[2]
    if mask is None or config is None or tuple(mask.shape[1:]) != (1, length, keys) or length > keys:
        return False
    known = _lower_right.get(id(config))
    if known is None or known[0]() is not config:
        shown = mask if mask.dtype == torch.bool else mask == 0
        expected = torch.ones(length, keys, dtype=torch.bool, device=mask.device).tril(keys - length)
        key_of = id(config)
        living = weakref.ref(config, lambda _: _lower_right.pop(key_of, None))
        known = _lower_right[key_of] = living, bool((shown == expected).all())
    return known[1]


# By the id of a model's config: the config, and whether plain arguments give the plain causal mask.
_lower_right: dict[int, tuple[weakref.ref[Any], bool]] = {}


for _base in BASES:
    register_attention(PREFIX + _base, _make_attention(_base), like=_base)


class _Active:
    """A config whose layers now use our function, and the number of forwards that need it."""

    def __init__(self, config: Any, base: str) -> None:
        self.config = config
        self.base = base
        self.count = 0


_active: dict[int, _Active] = {}
_lock = threading.RLock()


class Installation:
    """Puts our function into a model's config only while a forward with one cache runs.

    So any other cache on the model runs exactly as it would without this library, compiled forwards included. (A
    forward in another thread may call our function meanwhile, which passes on K/V without a tag.)

    Args:
        config: the config that the model's attention layers share.

    Raises:
        UnsupportedModelError: the config names an implementation that does not work with a cached prefix.
    """

    def __init__(self, config: Any) -> None:
        self._config = config
        self._base = _base_of(config)
        if self._base not in BASES:
            raise UnsupportedModelError(
                f"attention implementation {self._base!r} is not supported: a cache with a prefix needs one of "
                f"{BASES}. Load the model with attn_implementation='sdpa'."
            )
        self._finalizer: weakref.finalize[Any, Any] | None = None

    @property
    def active(self) -> bool:
        """Whether the model's layers call our function now."""
        name = attention_implementation(self._config)
        return isinstance(name, str) and name.startswith(PREFIX)

    def activate(self) -> None:
        """Install our function when a forward begins. Idempotent.

        Raises:
            AttentionNotActiveError: the model's implementation was changed after the cache was made.
        """
        with _lock:
            current = _base_of(self._config)
            if current != self._base:
                raise AttentionNotActiveError(
                    f"the model's attention implementation was changed to {current!r} while a cache with a prefix is "
                    "in use. Set it before the cache is made, or make a new cache now."
                )
            if self._finalizer is None or not self._finalizer.alive:
                entry = _active.setdefault(id(self._config), _Active(self._config, self._base))
                entry.count += 1
                self._finalizer = weakref.finalize(self, _release, id(self._config))
                self._finalizer.atexit = False
            set_attention_implementation(self._config, PREFIX + self._base)

    def release(self) -> None:
        """Undo `activate` when the forward is over, or at the latest when the owning cache is collected. Idempotent."""
        if self._finalizer is not None:
            self._finalizer()


def _base_of(config: Any) -> Any:
    current = attention_implementation(config)
    # A copy of a config that was in use still names our function.
    return current.removeprefix(PREFIX) if isinstance(current, str) else current


def _release(key: int) -> None:
    with _lock:
        entry = _active.get(key)
        if entry is None:
            return
        entry.count -= 1
        if entry.count == 0:
            del _active[key]
            # Keep another implementation that was chosen in the meantime.
            if attention_implementation(entry.config) == PREFIX + entry.base:
                set_attention_implementation(entry.config, entry.base)
