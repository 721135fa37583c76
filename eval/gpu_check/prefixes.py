"""A model and prefixes of random numbers, made on the device that uses them. Time does not depend on the numbers."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, Qwen2Config

from ..tasks import Request
from .settings import Settings

# Keys this large make attention peaked (at 32K tokens, about a hundred tokens get most of it). With values this large,
# a wrong or missing chunk changes the answer visibly.
KEY_STD, VALUE_STD = 2.0, 3.0


def make_model(settings: Settings) -> Any:
    """A Qwen2 model of the shape in `settings`, with the same random weights each time, in evaluation mode."""
    device = torch.device(settings.device)
    config = Qwen2Config(
        **dict(settings.shape),
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, settings.dtype), attn_implementation="sdpa"
        )
    return model.to(device).eval()


def prefix_ids(settings: Settings, tokens: int) -> torch.Tensor:
    """Ids of a prefix, int64 `(tokens,)` on the host; prefixes of different lengths share no beginning."""
    chance = torch.Generator().manual_seed(tokens)
    return torch.randint(0, dict(settings.shape)["vocab_size"], (tokens,), generator=chance)


def request(settings: Settings, tokens: int, suffix_tokens: int | None = None) -> Request:
    """A request on a prefix, with the same suffix for the same suffix length."""
    suffix_tokens = settings.suffix_tokens if suffix_tokens is None else suffix_tokens
    chance = torch.Generator().manual_seed(suffix_tokens)
    suffix = torch.randint(0, dict(settings.shape)["vocab_size"], (suffix_tokens,), generator=chance)
    return Request("gpu_check", 0, prefix_ids(settings, tokens), tokens, suffix, ())


def random_states(model: Any, tokens: int) -> DynamicCache:
    """Random K and V in place of a prefix's, on the model's device, the same each time."""
    config = model.config
    head_dim = config.hidden_size // config.num_attention_heads
    shape = (1, config.num_key_value_heads, tokens, head_dim)
    chance = torch.Generator(model.device).manual_seed(tokens)
    states = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        keys, values = (
            torch.empty(shape, dtype=model.dtype, device=model.device).normal_(0.0, std, generator=chance)
            for std in (KEY_STD, VALUE_STD)
        )
        states.update(keys, values, layer)
    return states


def kv_bytes(settings: Settings, tokens: int) -> int:
    """Bytes of K and V of a prefix, in the model's dtype."""
    shape = dict(settings.shape)
    head_dim = shape["hidden_size"] // shape["num_attention_heads"]
    size: int = getattr(torch, settings.dtype).itemsize
    return 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * head_dim * size * tokens
