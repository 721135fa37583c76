"""The module inside a user's model that computes K/V: finding it below wrappers, and running tokens through it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from ..errors import UnsupportedModelError
from .transformers_internals import cache_argument


def innermost_causal_lm(model: nn.Module) -> nn.Module:
    """The module whose forward takes `input_ids` and the cache, below wrappers (PEFT, `torch.compile`, DDP)."""
    inner: Any = model
    while True:
        if hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif type(inner).__name__ in ("DataParallel", "DistributedDataParallel"):
            inner = inner.module
        elif hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        else:
            return inner  # type: ignore[no-any-return]


def decoder_config(model: nn.Module) -> Any:
    """The config that the model's attention layers share."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise UnsupportedModelError(f"{type(model).__name__} is not a transformers model: it has no config")
    return config.get_text_config(decoder=True)


def input_device(model: nn.Module) -> torch.device:
    """Where the model's inputs go; with all weights offloaded, where its hooks bring them to be used."""
    device: torch.device = getattr(model, "device", torch.device("cpu"))
    if device.type != "meta":
        return device
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):
            used = getattr(one, "execution_device", None)
            if used is not None:
                return torch.device(used)
    return torch.device("cpu")


def run_forward(model: nn.Module, ids: torch.Tensor, cache: Cache, start: int) -> Any:
    """Run tokens through a model for the sake of their K/V.

    The model runs eagerly, compiled or not (dynamo would trace what a cache does with its K/V), computes no more logits
    than it must, and is told the positions: some would shift them by what they remember of an earlier image.

    Args:
        model: the causal LM.
        ids: int64 `(rows, q)`, on the model's device.
        cache: receives the K/V.
        start: position of the first token.

    Returns:
        what the model returns.
    """
    accepted = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {cache_argument(model): cache, "use_cache": True}
    if "logits_to_keep" in accepted:
        options["logits_to_keep"] = 1
    if "position_ids" in accepted:
        options["position_ids"] = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
    with torch.compiler.set_stance("force_eager"):
        return model(input_ids=ids, **options)
