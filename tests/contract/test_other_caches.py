"""While a cache with a prefix lives, every other cache on the model works as before, to the last bit.

When the last one is gone, the model is as it was.
"""

from __future__ import annotations

import copy
import gc

import pytest
import torch
import transformers as hf
from transformers import DynamicCache, StaticCache

from hf_contiguouskv.errors import AttentionNotActiveError

from .models import FAMILIES, IMPLEMENTATIONS, build, quiet, token_ids
from .references import assert_same_generation, forward, generate, prefilled
from .subject import ContiguousKVCache

pytestmark = pytest.mark.needs_library

PREFIX, SUFFIX, IDS = token_ids(83, seed=401), token_ids(6, seed=402), token_ids(40, seed=403, rows=2)
QUESTION = torch.cat([PREFIX, SUFFIX], dim=1)


def answers_of_other_caches(model) -> dict[str, list[torch.Tensor]]:
    """What the model says without us, in every way of caching that we should not touch."""
    mask = torch.ones_like(IDS)
    mask[1, :9] = 0
    answers = {}
    with torch.no_grad():
        answers["no cache"] = [model(IDS, use_cache=False).logits, model(IDS, attention_mask=mask).logits]
        for name, cache in (
            ("dynamic cache", DynamicCache(config=model.config)),
            ("static cache", StaticCache(config=model.config, max_cache_len=64)),
        ):
            answers[name] = [forward(model, IDS, cache), forward(model, IDS[:, :1], cache)]
        output = generate(model, IDS, None, attention_mask=mask, tokens=4)
        answers["generate"] = [output.sequences, *output.logits]
        answers["beams"] = [generate(model, IDS, None, num_beams=2, tokens=4).sequences]
        if model.config._attn_implementation.endswith("eager"):
            answers["attentions"] = [*model(IDS, output_attentions=True).attentions]
    return answers


def assert_identical(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        for ours, theirs in zip(actual[name], expected[name], strict=True):
            assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("budget", [0.3, 1.0])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_other_caches_never_notice(family, implementation, budget):
    model = build(family, implementation)
    before = answers_of_other_caches(model)
    cache = ContiguousKVCache(model, PREFIX, budget=budget)
    assert_identical(answers_of_other_caches(model), before)
    generate(model, QUESTION, cache, tokens=3)
    assert_identical(answers_of_other_caches(model), before)
    cache.close()
    del cache
    gc.collect()
    assert_identical(answers_of_other_caches(model), before)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_restored_when_the_last_cache_is_gone(family, implementation):
    model = build(family, implementation)
    first = ContiguousKVCache(model, PREFIX, budget=0.3)
    second = ContiguousKVCache(model, PREFIX, budget=0.5)
    twin = copy.deepcopy(second)
    generate(model, QUESTION, first, tokens=2)
    for cache in ("first", "second", "twin"):
        generate(model, QUESTION, twin, tokens=2)
        twin.reset()
        if cache == "first":
            del first
        elif cache == "second":
            del second
        gc.collect()
    del twin
    gc.collect()
    assert model.config._attn_implementation == implementation
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_cache_keeps_no_model_alive_and_is_kept_alive_by_none():
    model = build("llama")
    cache = ContiguousKVCache(model, PREFIX, budget=0.3)
    generate(model, QUESTION, cache, tokens=2)
    hooks = [module for module in model.modules() if module._forward_pre_hooks]
    del cache
    gc.collect()
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_pre_hooks for module in hooks)


def test_two_models_that_share_a_config_take_turns():
    model = build("llama")
    sibling = build("llama", seed=3)
    sibling = hf.LlamaForCausalLM(model.config).eval()
    quiet(sibling)
    if sibling.config is not model.config:
        pytest.skip("this transformers copies the config")
    expected = [generate(each, QUESTION, prefilled(each, PREFIX)) for each in (model, sibling)]
    caches = [ContiguousKVCache(each, PREFIX, budget=1.0) for each in (model, sibling)]
    for each, cache, answer in zip((model, sibling), caches, expected, strict=True):
        assert_same_generation(generate(each, QUESTION, cache), answer)
        cache.reset()
    del cache
    caches.pop(0)
    gc.collect()
    assert_same_generation(generate(sibling, QUESTION, caches[0]), expected[1])
    assert_same_generation(generate(model, QUESTION, prefilled(model, PREFIX)), expected[0])
    caches.clear()
    gc.collect()
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("shared", [False, True], ids=["own configs", "one config"])
def test_two_live_caches_may_alternate(shared):
    model = build("llama")
    other = model if shared else build("qwen3")
    expected = [forward(each, SUFFIX, prefilled(each, PREFIX)) for each in (model, other)]
    caches = [ContiguousKVCache(each, PREFIX, budget=1.0) for each in (model, other)]
    actual = [forward(each, SUFFIX, cache) for each, cache in zip((model, other), caches, strict=True)]
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["set_attn_implementation", "config"])
@pytest.mark.parametrize("begun", [False, True], ids=["before the suffix", "in mid-answer"])
def test_a_changed_attention_implementation_is_noticed(how, begun):
    model = build("llama")
    cache = ContiguousKVCache(model, PREFIX, budget=0.3)
    if begun:
        forward(model, SUFFIX, cache)
    if how == "config":
        model.config._attn_implementation = "eager"
    else:
        model.set_attn_implementation("eager")
    with pytest.raises(AttentionNotActiveError):
        forward(model, SUFFIX, cache)


def test_a_users_own_change_of_implementation_survives_the_cache():
    model = build("llama")
    cache = ContiguousKVCache(model, PREFIX, budget=0.3)
    model.set_attn_implementation("eager")
    del cache
    gc.collect()
    assert model.config._attn_implementation == "eager"


def test_saving_a_model_with_a_live_cache_leaves_no_trace(tmp_path):
    model = build("llama")
    cache = ContiguousKVCache(model, PREFIX, budget=0.3)
    model.save_pretrained(tmp_path / "saved")
    text = (tmp_path / "saved" / "config.json").read_text()
    assert "contiguous" not in text.lower()
    cache.close()
