"""Models with random weights, for measuring time, which does not depend on the weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

_SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
    "max_position_embeddings": 131_072,
}
CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config}


def random_model(architecture: str, dtype: torch.dtype = torch.bfloat16, **shape: int) -> Any:
    """A small model of this architecture in evaluation mode, with the same weights in every call.

    Args:
        architecture: one of `CONFIGS`.
        dtype: dtype of weights and KV cache.
        shape: configuration fields that replace those of `_SHAPE`.

    Raises:
        ValueError: the architecture is not one of `CONFIGS`.
    """
    if architecture not in CONFIGS:
        raise ValueError(f"architecture must be one of {list(CONFIGS)}, got {architecture!r}")
    config = CONFIGS[architecture](**(_SHAPE | shape), bos_token_id=None, eos_token_id=None)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval()
