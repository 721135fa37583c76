"""What cannot be served correctly is refused, with an error that names the reason."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf

from hf_contiguouskv import ContiguousKVConfig
from hf_contiguouskv.errors import ConfigError, ContiguousKVError, InputError, UnsupportedModelError

from .models import CACHE, PAD, quiet, token_ids
from .references import assert_same_generation, generate, prefilled
from .subject import ContiguousKVCache, PrefixStore, prefix_from_disk, write_prefix

pytestmark = pytest.mark.needs_library

PREFIX = token_ids(83, seed=501)
_SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": PAD,
}
_PHI3_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}

UNSUPPORTED: dict[str, Callable[[], Any]] = {
    "an encoder-decoder": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    ),
    "a state-space model": lambda: hf.MambaForCausalLM(
        hf.MambaConfig(vocab_size=128, hidden_size=32, state_size=8, num_hidden_layers=2)
    ),
    "a model with convolutional layers": lambda: hf.Lfm2ForCausalLM(
        hf.Lfm2Config(**_SMALL, layer_types=["conv", "full_attention", "conv"])
    ),
    "linear attention between full attention": lambda: hf.Qwen3NextForCausalLM(
        hf.Qwen3NextConfig(
            **_SMALL,
            head_dim=16,
            layer_types=["linear_attention", "linear_attention", "full_attention"],
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
        )
    ),
    "dynamic RoPE": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(**_SMALL, rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})
    ),
    "long RoPE": lambda: hf.Phi3ForCausalLM(
        hf.Phi3Config(**_SMALL, rope_parameters=_PHI3_LONGROPE, original_max_position_embeddings=64)
    ),
}


@pytest.mark.parametrize("mode", ["with a prefix", "automatic"])
@pytest.mark.parametrize("reason", UNSUPPORTED)
def test_unsupported_models_are_refused_at_construction(store_path, reason, mode):
    model = UNSUPPORTED[reason]().eval()
    with PrefixStore(store_path) as store, pytest.raises(UnsupportedModelError) as refusal:
        ContiguousKVCache(model, PREFIX if mode == "with a prefix" else None, store=store)
    assert len(str(refusal.value)) > 20, "the message names the reason"


UNUSUAL: dict[str, Callable[[], Any]] = {
    "gpt2 (learned positions)": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=128, n_embd=64, n_layer=3, n_head=4, n_positions=256)
    ),
    "gptj (attention of its own)": lambda: hf.GPTJForCausalLM(
        hf.GPTJConfig(vocab_size=128, n_embd=64, n_layer=3, n_head=4, n_positions=256, rotary_dim=8)
    ),
    "codegen (attention of its own)": lambda: hf.CodeGenForCausalLM(
        hf.CodeGenConfig(vocab_size=128, n_embd=64, n_layer=3, n_head=4, n_positions=256, rotary_dim=8)
    ),
    "bloom (alibi)": lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=128, hidden_size=64, n_layer=3, n_head=4)),
    "falcon (one KV head)": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(vocab_size=128, hidden_size=64, num_hidden_layers=3, num_attention_heads=4)
    ),
    "falcon (alibi)": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(vocab_size=128, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, alibi=True)
    ),
    "gemma2 (soft caps)": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**_SMALL, head_dim=16, query_pre_attn_scalar=16, sliding_window=24)
    ),
    "gpt-oss (sinks)": lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(
            **{**_SMALL, "num_hidden_layers": 4},
            head_dim=16,
            sliding_window=24,
            num_local_experts=2,
            num_experts_per_tok=1,
        )
    ),
    "deepseek v3 (latent attention)": lambda: hf.DeepseekV3ForCausalLM(
        hf.DeepseekV3Config(
            **{**_SMALL, "num_key_value_heads": 4},
            kv_lora_rank=16,
            q_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
            n_routed_experts=4,
            n_group=1,
            topk_group=1,
            num_experts_per_tok=1,
            moe_intermediate_size=32,
            first_k_dense_replace=3,
        )
    ),
    "llama4 (chunked attention)": lambda: hf.Llama4ForCausalLM(
        hf.Llama4TextConfig(
            **_SMALL,
            head_dim=16,
            intermediate_size_mlp=96,
            num_local_experts=2,
            attention_chunk_size=32,
        )
    ),
    "gemma3n (shared KV)": lambda: hf.Gemma3nForCausalLM(
        hf.Gemma3nTextConfig(
            **{**_SMALL, "num_hidden_layers": 4, "intermediate_size": [96] * 4},
            head_dim=16,
            vocab_size_per_layer_input=128,
            hidden_size_per_layer_input=16,
            laurel_rank=8,
            num_kv_shared_layers=2,
            sliding_window=24,
            layer_types=["sliding_attention", "full_attention"] * 2,
            activation_sparsity_pattern=[0.0] * 4,
        )
    ),
    "cohere (no positions in some layers)": lambda: hf.Cohere2ForCausalLM(
        hf.Cohere2Config(**_SMALL, sliding_window=24)
    ),
    "smollm3 (no positions in some layers)": lambda: hf.SmolLM3ForCausalLM(
        hf.SmolLM3Config(**_SMALL, no_rope_layer_interval=2)
    ),
    "yarn RoPE": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(
            **_SMALL,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        )
    ),
    "starcoder2": lambda: hf.Starcoder2ForCausalLM(hf.Starcoder2Config(**_SMALL)),
    "olmo2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**_SMALL)),
    "glm4": lambda: hf.Glm4ForCausalLM(hf.Glm4Config(**_SMALL, head_dim=16)),
    "stablelm": lambda: hf.StableLmForCausalLM(hf.StableLmConfig(**_SMALL)),
}


@pytest.mark.parametrize("architecture", UNUSUAL)
def test_an_unusual_model_is_exact_or_refused(store_path, architecture):
    torch.manual_seed(21)
    model = UNUSUAL[architecture]().eval()
    quiet(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)  # peaked attention: a wrong key must show
    ids = torch.cat([PREFIX, token_ids(7, seed=502)], dim=1)
    expected = generate(model, ids, prefilled(model, PREFIX))
    try:
        write_prefix(model, PREFIX, store_path)
    except UnsupportedModelError:
        return
    with prefix_from_disk(model, PREFIX, store_path, budget=1.0) as cache:
        assert_same_generation(generate(model, ids, cache), expected)


BAD_IDS = {
    "int32": PREFIX.int(),
    "float": PREFIX.float(),
    "bool": PREFIX.bool(),
    "three dimensions": PREFIX[None],
    "two rows": PREFIX.expand(2, -1),
    "no tokens": PREFIX[:, :0],
    "no tokens, one dimension": PREFIX[0, :0],
    "a single number": PREFIX[0, 0],
    "not a tensor": "a prompt",
}


@pytest.mark.parametrize("fault", BAD_IDS)
def test_prefix_ids_that_make_no_sense_are_refused(tiny_model, store_path, fault):
    with PrefixStore(store_path) as store, pytest.raises(InputError):
        ContiguousKVCache(tiny_model("llama"), BAD_IDS[fault], store=store)


@pytest.mark.parametrize("budget", [0, 0.0, -1, 1.5, math.nan, math.inf, "0.5", None, True], ids=repr)
def test_budgets_that_make_no_sense_are_refused(tiny_model, store_path, budget):
    with PrefixStore(store_path) as store, pytest.raises(ConfigError, match="budget"):
        ContiguousKVCache(tiny_model("llama"), PREFIX, store=store, budget=budget)


def test_a_field_that_does_not_exist_is_refused(tiny_model):
    with pytest.raises((ConfigError, TypeError), match="budgett"):
        ContiguousKVCache(tiny_model("llama"), PREFIX, budgett=0.5)


def test_overrides_refine_a_given_config(tiny_model):
    cache = ContiguousKVCache(tiny_model("llama"), PREFIX, config=ContiguousKVConfig.paper(0.2), budget=0.7)
    assert cache.config.budget == 0.7
    assert cache.config.selection.period == 8


def test_a_refused_construction_leaves_the_model_as_it_was(tiny_model):
    model = tiny_model("llama")
    with pytest.raises(ContiguousKVError):
        ContiguousKVCache(model, PREFIX.int(), budget=0.3)
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.fixture
def pruned_cache(tiny_model, store_path):
    with prefix_from_disk(tiny_model("llama"), PREFIX, store_path, config=ContiguousKVConfig.paper(0.3)) as cache:
        yield cache


@pytest.mark.parametrize("dimensions", [1, 2])
def test_check_accepts_ids_that_begin_with_the_prefix(pruned_cache, dimensions):
    ids = torch.cat([PREFIX, token_ids(3, seed=503)], dim=1)
    pruned_cache.check(ids if dimensions == 2 else ids[0])
    pruned_cache.check(ids.expand(3, -1))


WRONG = {
    "another document": token_ids(90, seed=504),
    "a shorter prompt": PREFIX[:, :50],
    "one row of two": torch.cat([torch.cat([PREFIX, PREFIX[:, :4]], dim=1), token_ids(87, seed=505)]),
}


@pytest.mark.parametrize("ids", WRONG)
def test_check_raises_on_ids_that_do_not(pruned_cache, ids):
    with pytest.raises(InputError):
        pruned_cache.check(WRONG[ids])


@pytest.mark.parametrize("budget", [0.3, 1.0])
def test_a_row_that_is_shorter_than_the_prefix_is_refused(tiny_model, store_path, budget):
    model = tiny_model("llama")
    ids = torch.cat([PREFIX, token_ids(5, seed=506)], dim=1).repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    with prefix_from_disk(model, PREFIX, store_path, budget=budget) as cache, pytest.raises(InputError):
        generate(model, ids, cache, attention_mask=mask)


def test_a_4d_mask_over_a_pruned_prefix_is_refused(tiny_model, pruned_cache):
    model = tiny_model("llama")
    suffix = token_ids(4, seed=507)
    mask = torch.ones(1, 1, 4, PREFIX.shape[1] + 4, dtype=torch.bool).tril(PREFIX.shape[1])
    with pytest.raises(InputError), torch.no_grad():
        model(suffix, attention_mask=mask, **{CACHE: pruned_cache})


def test_a_cache_of_another_model_is_refused_or_at_least_not_served(tiny_model, pruned_cache):
    stranger = tiny_model("llama", layers=2)
    with pytest.raises((ContiguousKVError, RuntimeError, IndexError)), torch.no_grad():
        stranger(token_ids(4, seed=508), **{CACHE: pruned_cache})
