"""With neither a prefix nor a store the cache is a `DynamicCache`, to the last bit."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from .models import FAMILIES, IMPLEMENTATIONS, token_ids
from .references import forward, generate
from .subject import ContiguousKVCache

STRATEGIES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "prefill in blocks": {"prefill_chunk_size": 16},
}


def assert_identical(actual, expected) -> None:
    assert torch.equal(actual.sequences, expected.sequences)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(actual.logits, expected.logits, strict=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_bit_for_bit_that_of_dynamic_cache(tiny_model, family, implementation):
    model = tiny_model(family, implementation)
    ids = token_ids(40, seed=1)
    expected = generate(model, ids, DynamicCache(config=model.config))
    assert_identical(generate(model, ids, ContiguousKVCache(model)), expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_every_strategy_is_bit_for_bit_that_of_dynamic_cache(tiny_model, family, strategy):
    model = tiny_model(family)
    ids = token_ids(40, seed=1)
    options = STRATEGIES[strategy]
    torch.manual_seed(3)
    expected = generate(model, ids, DynamicCache(config=model.config), **options)
    torch.manual_seed(3)
    assert_identical(generate(model, ids, ContiguousKVCache(model), **options), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_left_padded_batch_is_bit_for_bit_that_of_dynamic_cache(tiny_model, family):
    model = tiny_model(family)
    ids = token_ids(40, seed=1, rows=2)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    expected = generate(model, ids, DynamicCache(config=model.config), attention_mask=mask)
    assert_identical(generate(model, ids, ContiguousKVCache(model), attention_mask=mask), expected)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_its_methods_are_those_of_dynamic_cache(tiny_model, family):
    model = tiny_model(family)
    ours, theirs = ContiguousKVCache(model), DynamicCache(config=model.config)
    assert ours.get_seq_length() == 0
    for each in (ours, theirs):
        forward(model, token_ids(12, seed=1, rows=2), each)
        each.crop(-3)
        each.reorder_cache(torch.tensor([1, 0]))
        each.batch_repeat_interleave(2)
        each.batch_select_indices(torch.tensor([0, 3]))
    step = token_ids(1, seed=2, rows=2)
    assert torch.equal(forward(model, step, ours), forward(model, step, theirs))
    assert ours.get_seq_length() == theirs.get_seq_length()
    for each in (ours, theirs):
        each.reset()
    assert ours.get_seq_length() == 0
    ids = token_ids(9, seed=3)
    assert torch.equal(forward(model, ids, ours), forward(model, ids, theirs))


@pytest.mark.needs_library
def test_nothing_is_attached_or_counted(tiny_model):
    model = tiny_model("llama")
    cache = ContiguousKVCache(model)
    generate(model, token_ids(40, seed=1), cache)
    assert cache.prefix_ids is None
    assert cache.stats.tokens_from_store == 0
    assert cache.stats.bytes_read == 0
    assert cache.selected_chunks(0) is None
