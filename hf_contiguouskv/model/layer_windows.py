"""The sliding windows of a model's layers, by its configuration; kinds of layers that cannot be served."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..errors import UnsupportedModelError
from .causal_lm import decoder_config
from .refusals import reason_for_refusal

# These change their frequencies when a sequence exceeds a length, so stored keys would not fit later queries.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


def layer_windows(model: nn.Module) -> tuple[int | None, ...]:
    """The sliding window of each layer in tokens; `None` for full attention.

    Raises:
        UnsupportedModelError: the configuration rules the model out; the message names the reason.
    """
    name = type(model).__name__
    reason = reason_for_refusal(model)
    if reason is not None:
        raise UnsupportedModelError(f"{name} {reason}")
    text = decoder_config(model)
    kinds = _rope_kinds(getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None))
    for kind in LENGTH_DEPENDENT_ROPE:
        if kind in kinds:
            raise UnsupportedModelError(
                f"{name} uses {kind!r} RoPE, which changes with the length of the sequence: stored keys would be wrong"
            )
    try:
        layers = DynamicCache(config=model.config).layers
    except Exception as error:
        raise UnsupportedModelError(f"transformers cannot make a DynamicCache for {name}: {error}") from error
    types = getattr(text, "layer_types", None) or [None] * len(layers)
    windows: list[int | None] = []
    for position, (layer, kind) in enumerate(zip(layers, types, strict=False)):
        if type(layer) is DynamicLayer:
            windows.append(None)
        elif type(layer) is DynamicSlidingWindowLayer and kind in (None, "sliding_attention"):
            if layer.sliding_window < 2:
                raise UnsupportedModelError(f"{name}: layer {position} has a sliding window below 2 tokens")
            windows.append(layer.sliding_window)
        else:
            raise UnsupportedModelError(
                f"{name}: layer {position} is {kind or type(layer).__name__!r}; only full and sliding-window attention "
                "with their own KV cache are supported (no linear attention, hybrid state, chunked or shared KV)"
            )
    if not windows:
        raise UnsupportedModelError(f"{name} has no attention layers with a KV cache")
    return tuple(windows)


def _rope_kinds(parameters: Any) -> set[str]:
    if not isinstance(parameters, Mapping):
        return set()
    kinds = {str(parameters.get("rope_type", parameters.get("type", "default")))}
    for value in parameters.values():
        kinds |= _rope_kinds(value)
    return kinds
