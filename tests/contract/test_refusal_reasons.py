"""The words in which a model is refused name what is special about it, not what the trial forward counted."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import DynamicCache

from hf_contiguouskv.errors import UnsupportedModelError
from hf_contiguouskv.model.refusals import NOT_CAUSAL, TRIAL_IDS, looks_ahead, reason_after_trial, reason_for_refusal

from .model_zoo import KINDS, build
from .models import token_ids
from .references import forward
from .subject import ContiguousKVCache, PrefixStore

pytestmark = pytest.mark.needs_library

KIND = {kind.name: kind for kind in KINDS}

BEFORE_ANYTHING_IS_COMPUTED = {
    "T5ForConditionalGeneration": "is an encoder-decoder model",
    "FalconForCausalLM (with ALiBi)": "adds an ALiBi bias",
    "MptForCausalLM": "adds an ALiBi bias",
    "DeepseekV3ForCausalLM": r"keeps latent \(compressed\) K/V .* \(kv_lora_rank=16\)",
    "Qwen3NextForCausalLM": r"keeps a recurrent state instead .* in 1 of its 2 layers \(linear_attention\)",
    "RwkvForCausalLM": "keeps a recurrent state instead .*, in a cache format of its own",
    "FalconH1ForCausalLM": "keeps a recurrent state beside its K/V",
    "Lfm2ForCausalLM": "keeps the state of a convolution",
    "Llama4ForCausalLM": "attends within chunks of tokens, in 2 of its 2 layers",
    "Gemma3nForCausalLM": "lets 2 of its 4 layers use the K/V of other layers",
    "GemmaForCausalLM (bidirectional)": r"not causal.*\(use_bidirectional_attention=True\)",
    "MllamaForConditionalGeneration": "layers that attend to images",
    "RobertaForCausalLM (is_decoder=True)": "counts positions from its padding token",
}

AFTER_THE_TRIAL = {
    ("BloomForCausalLM", 1, 0): "adds an ALiBi bias inside its own attention",
    ("FalconForCausalLM (with RoPE)", 1, 0): r"computes attention itself .* \(FalconAttention\)",
    ("GPTNeoForCausalLM", 1, 0): r"computes attention itself .* \(GPTNeoSelfAttention\)",
    ("JetMoeForCausalLM", 1, 0): r"changes its K/V after storing them \(JetMoeAttention\)",
    ("DiffLlamaForCausalLM", 1, 2): "computes attention 2 times in layer 1 with the K/V that it stores once",
    ("LlamaForCausalLM", 2, 1): "stores K/V 2 times in layer 1 in one forward",
    ("LlamaForCausalLM", 0, 0): "stores no K/V in layer 1 in the cache",
    ("OpenAIGPTLMHeadModel", 0, 0): "takes no KV cache in its forward",
}


@pytest.mark.parametrize("name", BEFORE_ANYTHING_IS_COMPUTED)
def test_what_the_configuration_rules_out_is_named(name):
    assert_matches(reason_for_refusal(build(KIND[name])), BEFORE_ANYTHING_IS_COMPUTED[name])


@pytest.mark.parametrize(("name", "updates", "reached"), AFTER_THE_TRIAL)
def test_what_the_trial_found_is_explained(name, updates, reached):
    model = build(KIND[name])
    assert reason_for_refusal(model) is None, "only a trial can tell"
    reason = reason_after_trial(model, 1, updates, reached)
    assert_matches(reason, AFTER_THE_TRIAL[name, updates, reached])


def test_a_layer_that_stores_and_is_reached_once_gives_no_reason():
    assert reason_after_trial(build(KIND["LlamaForCausalLM"]), 1, 1, 1) is None


@pytest.mark.parametrize(
    "name", ["LlamaForCausalLM", "Gemma3ForCausalLM", "MistralForCausalLM", "LlavaNextForConditionalGeneration"]
)
def test_an_ordinary_model_is_left_to_the_trial(name):
    assert reason_for_refusal(build(KIND[name])) is None


def test_a_module_without_a_configuration_is_left_to_the_trial():
    assert reason_for_refusal(torch.nn.Linear(2, 2)) is None


def trial_states(name: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """K and V of every layer after a forward with `TRIAL_IDS`."""
    model = build(KIND[name]).to(dtype)
    cache = DynamicCache(config=model.config)
    forward(model, torch.tensor(TRIAL_IDS), cache)
    return [states for layer in cache.layers for states in (layer.keys, layer.values)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["BertLMHeadModel (not made a decoder)", "GemmaForCausalLM (bidirectional)"])
def test_attention_that_sees_later_tokens_shows_in_the_trial(name, dtype):
    assert any(map(looks_ahead, trial_states(name, dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name", ["BertLMHeadModel (is_decoder=True)", "LlamaForCausalLM", "MixtralForCausalLM", "GptOssForCausalLM"]
)
def test_causal_attention_is_not_taken_for_it(name, dtype):
    assert not any(map(looks_ahead, trial_states(name, dtype)))


@pytest.mark.parametrize("name", [kind.name for kind in KINDS if kind.refused and "not causal" in kind.refused])
def test_a_model_that_looks_ahead_is_refused_by_the_cache(store_path, name):
    with PrefixStore(store_path) as store, pytest.raises(UnsupportedModelError, match="not causal"):
        ContiguousKVCache(build(KIND[name]), token_ids(20, seed=611), store=store)


def test_the_reason_for_looking_ahead_says_what_helps():
    assert_matches(NOT_CAUSAL, "is_decoder=True")


def assert_matches(reason: str | None, pattern: str) -> None:
    assert reason is not None
    assert re.search(pattern, reason), reason
