"""The module inside a user's model that computes K/V: how to find it inside wrappers, and how to run tokens through
it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from ..errors import UnsupportedModelError
from .transformers_internals import cache_argument


def innermost_causal_lm(model: nn.Module) -> nn.Module:
    """The module whose forward takes `input_ids` and the cache, inside wrappers (PEFT, `torch.compile`, DDP)."""
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
    """The config that the model's attention layers share.

    Raises:
        UnsupportedModelError: the model has no transformers config.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise UnsupportedModelError(f"{type(model).__name__} is not a transformers model: it has no config")
    return config.get_text_config(decoder=True)


def input_device(model: nn.Module) -> torch.device:
    """The device of the model's inputs; with all weights offloaded, the device on which its hooks execute."""
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
    """Run tokens through a model to get their K/V.

    The model runs eagerly even if it is compiled, because dynamo would trace the cache. It computes as few logits as
    possible. Positions are passed, because some models would shift them by the offset of an earlier image.

    Args:
        model: the causal LM.
        ids: int64 `(rows, q)`, on the model's device.
        cache: receives the K/V.
        start: position of the first token.

    Returns:
        the model's output.
    """
    accepted = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {cache_argument(model): cache, "use_cache": True}
    if "logits_to_keep" in accepted:
        options["logits_to_keep"] = 1
    if "position_ids" in accepted:
        options["position_ids"] = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
    with torch.compiler.set_stance("force_eager"):
        return model(input_ids=ids, **options)
