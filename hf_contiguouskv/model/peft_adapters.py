"""What PEFT changes in a single forward: adapters chosen per row, and adapters that start at their invocation
tokens."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from .modules import modules_of


def adapters_of_rows(model: nn.Module) -> str | None:
    """Why the running forward does not use the active adapter alone, or `None` if it does.

    PEFT chooses an adapter per row (`adapter_names`), and the position from which an activated LoRA acts, with hooks on
    its layers that live as long as the call.
    """
    if not hasattr(model, "peft_config"):
        return None
    for module in modules_of(model):
        if not hasattr(module, "_active_adapter") or not module._forward_pre_hooks:
            continue
        named: Any = module._active_adapter
        active = {named} if isinstance(named, str) else set(named)
        for hook in module._forward_pre_hooks.values():
            given: dict[str, Any] = hook.keywords if isinstance(hook, partial) else {}
            if "adapter_names" in given:
                others = set(given["adapter_names"]) - active
                if others or len(active) != 1:
                    return f"adapter_names of adapters that are not the active one ({', '.join(sorted(others))})"
            elif "alora_offsets" in given:
                if any(offset is not None for offset in given["alora_offsets"] or ()):
                    return "an activated LoRA in the prompt"
            else:
                return "hooks on adapter layers"
        return None  # All layers of one call have the same hooks.
    return None


def require_one_adapter(model: nn.Module) -> None:
    """Raise `InputError` if a row of the running forward uses another adapter than the one that computed the prefix."""
    reason = adapters_of_rows(model)
    if reason is not None and "adapter_names" in reason:
        raise InputError(
            f"the forward was called with {reason}: the prefix of this cache was computed by the active adapter. "
            "Make a cache for each adapter after model.set_adapter(...), or use automatic mode"
        )


def remove_row_hooks(model: nn.Module) -> None:
    """Remove the hooks of a refused call, because PEFT leaves them on its layers when a call fails."""
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, partial) and "adapter_names" in hook.keywords:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


def require_no_virtual_tokens(model: Any, automatic: bool) -> None:
    """Raise `InputError` if a PEFT wrapper puts virtual tokens before each prompt, which an explicit prefix would lack.

    If the virtual tokens are embeddings, `automatic` mode computes such prompts without the store. Prefix tuning passes
    its virtual tokens as PEFT's own cache, which leaves no room for another cache.
    """
    config = getattr(model, "active_peft_config", None)
    if not getattr(config, "is_prompt_learning", False):
        return
    name, own_cache = type(config).__name__, getattr(config, "peft_type", None) == "PREFIX_TUNING"
    if own_cache:
        raise InputError(f"{name} passes its own K/V to the model, in place of this cache")
    if not automatic:
        raise InputError(
            f"{name} puts virtual tokens before a prompt, which an explicit prefix would not have; use automatic mode, "
            "which computes such prompts as they are"
        )


def require_no_invocation(model: nn.Module, ids: torch.Tensor) -> None:
    """Raise `InputError` if a prefix, int64 `(n,)`, holds the tokens that invoke an activated LoRA (aLoRA).

    After these tokens the K/V differ from the base model's, but the library computes prefixes without PEFT's wrapper.
    """
    for name, tokens in _invocations(model):
        wanted = torch.tensor(tokens)
        if len(ids) >= len(wanted) and bool((ids.unfold(0, len(wanted), 1) == wanted).all(1).any()):
            raise InputError(
                f"the prefix holds the invocation tokens {tokens} of the activated LoRA {name!r}, which changes the "
                "K/V behind them; end the prefix before them, and pass them with the question"
            )


def _invocations(model: nn.Module) -> Iterator[tuple[str, list[int]]]:
    configs = getattr(model, "peft_config", None)
    for name, config in configs.items() if isinstance(configs, dict) else ():
        tokens = getattr(config, "alora_invocation_tokens", None)
        if tokens:
            yield name, list(tokens)
