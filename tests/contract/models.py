"""Tiny random models, one per way in which transformers builds an attention layer.

Every model has vocabulary 128, hidden size 64 and heads of 16, so that one chunk of 16 tokens of one layer with two
KV heads is exactly one 4 KiB page in float32. Weights are large on purpose: attention must be peaked enough that a
wrong key changes a logit visibly.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

CACHE = "cache" if "cache" in inspect.signature(hf.LlamaForCausalLM.forward).parameters else "past_key_values"
"""What this transformers calls the cache, in `generate` and in every forward (5.24 renamed it)."""
VOCABULARY = 128
WINDOW = 24
PAD = 0
"""Token id 0 pads; `token_ids` never draws it, so that generate infers no mask from the ids themselves."""

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": PAD,
}
_GROUPED = _SIZES | {"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96}


def _gemma3_layer_types(layers: int) -> list[str]:
    return ["full_attention" if layer % 3 == 1 else "sliding_attention" for layer in range(layers)]


FAMILIES: dict[str, Callable[[int], Any]] = {
    "llama": lambda layers: hf.LlamaForCausalLM(hf.LlamaConfig(**_GROUPED, num_hidden_layers=layers)),
    "qwen2": lambda layers: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_GROUPED, num_hidden_layers=layers)),
    "qwen3": lambda layers: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_GROUPED, num_hidden_layers=layers)),
    "mistral": lambda layers: hf.MistralForCausalLM(
        hf.MistralConfig(**_GROUPED, num_hidden_layers=layers, sliding_window=None)
    ),
    "mistral-window": lambda layers: hf.MistralForCausalLM(
        hf.MistralConfig(**_GROUPED, num_hidden_layers=layers, sliding_window=WINDOW)
    ),
    "phi3": lambda layers: hf.Phi3ForCausalLM(
        hf.Phi3Config(
            **{key: value for key, value in _GROUPED.items() if key != "head_dim"},
            num_hidden_layers=layers,
            original_max_position_embeddings=1024,
        )
    ),
    "gemma3": lambda layers: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(
            **_GROUPED,
            num_hidden_layers=layers,
            sliding_window=WINDOW,
            query_pre_attn_scalar=16,
            tie_word_embeddings=False,
            layer_types=_gemma3_layer_types(layers),
        )
    ),
    "gpt-neox": lambda layers: hf.GPTNeoXForCausalLM(
        hf.GPTNeoXConfig(**_SIZES, intermediate_size=96, num_hidden_layers=layers)
    ),
    "opt": lambda layers: hf.OPTForCausalLM(
        hf.OPTConfig(
            **{key: value for key, value in _SIZES.items() if key != "initializer_range"},
            init_std=0.15,
            ffn_dim=96,
            word_embed_proj_dim=64,
            num_hidden_layers=layers,
            dropout=0.0,
        )
    ),
}

WINDOWED = ("mistral-window", "gemma3")
"""Families with sliding-window layers; Mistral's are all windowed, Gemma's mixed with full attention."""
WINDOWLESS = tuple(name for name in FAMILIES if name not in WINDOWED)
PRUNABLE = tuple(name for name in FAMILIES if name != "mistral-window")
"""Families with at least one full-attention layer, to which a budget applies."""
IMPLEMENTATIONS = ("sdpa", "eager")


def build(family: str, implementation: str = "sdpa", *, layers: int = 4, seed: int = 0) -> Any:
    """A fresh float32 model in eval mode that never stops by itself (no end-of-sequence id)."""
    torch.manual_seed(1000 + 17 * list(FAMILIES).index(family) + seed)
    model = FAMILIES[family](layers).eval()
    model.set_attn_implementation(implementation)
    _break_symmetry(model)
    quiet(model)
    return model


def quiet(model: Any) -> None:
    """Generation settings under which every test asks for exactly the tokens it wants."""
    model.generation_config.eos_token_id = None
    model.generation_config.bos_token_id = 1
    model.generation_config.pad_token_id = PAD


def _break_symmetry(model: Any) -> None:
    # Norm weights start at one and biases at zero: an implementation that drops them would pass unnoticed.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.05 * torch.randn_like(parameter))


def full_attention_layers(model: Any) -> list[int]:
    """Indices of the layers that look at the whole context, ascending."""
    config = model.config.get_text_config()
    types = getattr(config, "layer_types", None)
    if types is not None:
        return [layer for layer, kind in enumerate(types) if kind == "full_attention"]
    if getattr(config, "sliding_window", None) is not None:
        return []
    return list(range(config.num_hidden_layers))


def token_ids(length: int, *, seed: int, rows: int = 1) -> torch.Tensor:
    """`[rows, length]` int64 ids, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)
