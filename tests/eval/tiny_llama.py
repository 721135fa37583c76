"""Tiny random models and token ids for tests of systems."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 97


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    """Two layers, two query heads, one KV head of 16 channels, float32, 512 tokens of context; always the same weights.

    Args:
        changes: fields of `LlamaConfig` that differ.
    """
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
    }
    return LlamaForCausalLM(LlamaConfig(**shape | changes)).eval()


def some_ids(count: int, seed: int) -> torch.Tensor:
    """Token ids, int64 `(count,)`, always the same for a seed."""
    return torch.randint(3, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))
