"""Why a model cannot be served, in words that name what is special about it.

`reason_for_refusal` runs before the trial forward; its findings are certain, from the configuration or the model's
class. `reason_after_trial` explains what the trial forward found. `looks_ahead` finds models whose K/V of a token
depend on later tokens: the K/V of a prefix cannot be stored before the rest of the prompt is known.

Every reason continues the name of the model's class: "FalconForCausalLM computes attention itself, ...".
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn

from .modules import modules_of
from .transformers_internals import CACHE_NAMES

TRIAL_IDS = ((0, 0, 0), (0, 0, 1))
"""Token ids of a trial forward, `(2, 3)`: the rows differ only in their last token (see `looks_ahead`)."""

NOT_CAUSAL = (
    "has attention that is not causal: the K/V of a token depend on tokens after it "
    "(BERT and its kin are decoders with is_decoder=True only)"
)
"""The reason for a model whose K/V `looks_ahead`."""

_INDEXED = "chooses the tokens to attend to by an index that it caches beside its K/V"
_COMPRESSED = "compresses the K/V of several tokens into one"
_KINDS_OF_LAYERS = {
    "linear_attention": "keeps a recurrent state instead of the K/V of each token",
    "mamba": "keeps a recurrent state instead of the K/V of each token",
    "recurrent": "keeps a recurrent state instead of the K/V of each token",
    "hybrid": "keeps a recurrent state beside its K/V",
    "hybrid_sliding": "keeps a recurrent state beside its K/V",
    "conv": "keeps the state of a convolution instead of the K/V of each token",
    "chunked_attention": "attends within chunks of tokens",
    "indexed_attention": _INDEXED,
    "deepseek_sparse_attention": _INDEXED,
    "qwen_sparse_attention": _INDEXED,
    "minimax_m3_sparse": _INDEXED,
    "compressed_sparse_attention": _COMPRESSED,
    "heavily_compressed_attention": _COMPRESSED,
    "reference_sliding_attention": "attends to the whole prompt but to a window of what it generates",
}
"""Why a store of per-token K/V cannot serve layers of these kinds (`config.layer_types`)."""


def reason_for_refusal(model: nn.Module) -> str | None:
    """What rules out a model before a forward runs.

    Args:
        model: a causal LM of transformers, without wrappers.

    Returns:
        the reason, or `None` if only a trial forward can tell.
    """
    config: Any = getattr(model, "config", None)
    if config is None:
        return None
    if getattr(config, "is_encoder_decoder", False):
        return "is an encoder-decoder model; only decoder-only models are supported"
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    if _declares_alibi(text):
        return "adds an ALiBi bias to its attention, which depends on columns that a pruned prefix lacks"
    if getattr(text, "use_bidirectional_attention", None) in (True, "all"):
        return (
            "has attention that is not causal: the K/V of a token depend on tokens after it "
            f"(use_bidirectional_attention={text.use_bidirectional_attention!r})"
        )
    reason = _reason_for_layers(text)
    if reason is not None:
        return reason
    if getattr(model, "_is_stateful", False):
        return f"{_KINDS_OF_LAYERS['linear_attention']}, in a cache format of its own"
    if getattr(text, "kv_lora_rank", None):
        return (
            f"keeps latent (compressed) K/V and expands them after they are stored (kv_lora_rank={text.kv_lora_rank})"
        )
    crossed = getattr(text, "cross_attention_layers", None)
    if crossed:
        return f"has layers that attend to images instead of text (cross_attention_layers={list(crossed)})"
    if _classes_with(model, "create_position_ids_from_input_ids"):
        # RoBERTa's positions begin after its padding token's id in a forward, and at 0 in `generate`.
        return "counts positions from its padding token, but in generate from 0: K/V of one do not fit the other"
    return None


def reason_after_trial(model: nn.Module, position: int, updates: int, reached: int) -> str | None:
    """What a trial forward showed about a layer.

    Args:
        model: the causal LM.
        position: index of the layer.
        updates: how often the layer stored K/V in the forward.
        reached: how often its attention received K/V exactly as stored.

    Returns:
        the reason, or `None` if both happened once, as they should.
    """
    if (updates, reached) == (1, 1):
        return None
    where = f"in layer {position}"
    if updates == 0:
        if not any(name in inspect.signature(model.forward).parameters for name in CACHE_NAMES):
            return "takes no KV cache in its forward"
        return f"stores no K/V {where} in the cache that it is given: it keeps a state of its own, or none"
    if updates > 1:
        return f"stores K/V {updates} times {where} in one forward"
    if reached > 1:
        return f"computes attention {reached} times {where} with the K/V that it stores once"
    if _classes_with(model, "alibi"):
        return "adds an ALiBi bias inside its own attention, which depends on columns that a pruned prefix lacks"
    module = _storing_module(model, position)
    kind = "" if module is None else f" ({type(module).__name__})"
    if module is None or "ALL_ATTENTION_FUNCTIONS" not in _names_in(type(module)):
        return f"computes attention itself instead of by the attention interface of transformers{kind}"
    return f"changes its K/V after storing them{kind}: what is stored is not what attention uses"


def looks_ahead(states: torch.Tensor) -> bool:
    """Whether the K (or V) of a layer depend on later tokens.

    Args:
        states: `(2, kv_heads, 3, head_dim)`, from a forward with `TRIAL_IDS`.

    Returns:
        whether the states of the first two tokens differ between the rows. The first layer's K/V depend on no other
        token, so only later layers can differ; a model with one layer may be served whatever its attention.
    """
    one, other = states[:, :, :2].float()
    noise = 1e-3 if states.dtype == torch.float32 else 2e-2
    return bool((one - other).abs().max() > noise * one.abs().max())


def _declares_alibi(text: Any) -> bool:
    attention = getattr(text, "attn_config", None)  # MPT's.
    return bool(
        getattr(text, "alibi", False)
        or getattr(attention, "alibi", False)
        or getattr(text, "position_embedding_type", "") == "alibi"
    )


def _reason_for_layers(text: Any) -> str | None:
    """The reason found in the kinds of layers, or `None`."""
    shared = getattr(text, "num_kv_shared_layers", None) or 0
    modes = getattr(text, "kv_sharing_modes", None) or ()
    shared = max(shared, sum(str(mode).startswith("reuse") for mode in modes))
    if shared:
        return f"lets {shared} of its {text.num_hidden_layers} layers use the K/V of other layers"
    types = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ()
    for kind in types:
        if kind in _KINDS_OF_LAYERS:
            return f"{_KINDS_OF_LAYERS[kind]}, in {types.count(kind)} of its {len(types)} layers ({kind})"
    if not types and getattr(text, "attention_chunk_size", None):
        return f"attends within chunks of {text.attention_chunk_size} tokens"
    return None


def _classes_with(model: nn.Module, part: str) -> bool:
    """Whether a class among the model's modules has a method or attribute whose name contains `part`."""
    return any(part in name for kind in {type(module) for module in modules_of(model)} for name in vars(kind))


def _storing_module(model: nn.Module, position: int) -> nn.Module | None:
    """The attention module that passes the K/V of a layer to the cache, else one of another layer, else `None`."""
    storing = [
        module
        for module in model.modules()
        if "Attention" in type(module).__name__ and "update" in _names_in(type(module))
    ]
    exact = (module for module in storing if getattr(module, "layer_idx", None) == position)
    return next(exact, storing[0] if storing else None)


def _names_in(kind: type) -> set[str]:
    """The global names and attributes that the methods of a module's class mention."""
    return {
        name
        for owner in kind.__mro__
        if owner is not nn.Module
        for member in vars(owner).values()
        if isinstance(member, FunctionType)
        for code in _codes(member)
        for name in code.co_names
    }


def _codes(function: FunctionType) -> Iterator[CodeType]:
    """The code of a function and of the functions that its decorators wrapped."""
    inner: Any = function
    while inner is not None:
        if isinstance(inner, FunctionType):
            yield inner.__code__
        inner = getattr(inner, "__wrapped__", None)
