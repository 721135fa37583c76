"""Models with random weights, and random K and V, for measuring time, which does not depend on what they say."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config
from transformers.cache_utils import DynamicLayer

from hf_contiguouskv import ContiguousKVConfig
from hf_contiguouskv.model.served_model import ServedModel

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


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer for such models: one token for each byte of UTF-8."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def random_states(model: Any, tokens: int) -> DynamicCache:
    """Random K and V of `tokens` tokens for `System.store`, on the host: equal in every layer and every call."""
    geometry = ServedModel(model).geometry(ContiguousKVConfig().chunk_size)
    shape = (2, 1, geometry.kv_heads, tokens, geometry.head_dim)
    keys, values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(geometry.dtype)
    layer = DynamicLayer()
    layer.update(keys, values)
    states = DynamicCache()
    states.layers = [layer] * geometry.num_layers
    return states
