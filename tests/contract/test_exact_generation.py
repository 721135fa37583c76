"""With `budget=1.0`, a prefix read back from disk answers exactly as a `DynamicCache` prefilled with the same split."""

from __future__ import annotations

import pytest
import torch

from .models import FAMILIES, IMPLEMENTATIONS, WINDOWLESS, token_ids
from .references import assert_close, assert_same_generation, forward, generate, prefilled
from .subject import ContiguousKVCache, PrefixStore, prefix_from_disk, write_prefix

SUFFIX = token_ids(7, seed=12)


def prompt(prefix_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    prefix = token_ids(prefix_tokens, seed=11)
    return prefix, torch.cat([prefix, SUFFIX], dim=1)


@pytest.mark.parametrize("prefix_tokens", [80, 83])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_decoding_is_exact(tiny_model, store_path, family, implementation, prefix_tokens):
    model = tiny_model(family, implementation)
    prefix, ids = prompt(prefix_tokens)
    expected = generate(model, ids, prefilled(model, prefix))
    with prefix_from_disk(model, prefix, store_path, budget=1.0) as cache:
        assert cache.get_seq_length() == prefix_tokens
        assert_same_generation(generate(model, ids, cache), expected)
        assert cache.get_seq_length() == ids.shape[1] + 7


STRATEGIES = {
    "beams": {"num_beams": 3},
    "beams returned": {"num_beams": 3, "num_return_sequences": 3},
    "sampling": {"do_sample": True, "temperature": 1.3},
    "several samples": {"do_sample": True, "num_return_sequences": 3, "top_k": 20},
    "sampled beams": {"do_sample": True, "num_beams": 2},
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_decoding_strategy_is_exact(tiny_model, store_path, family, strategy):
    model = tiny_model(family)
    prefix, ids = prompt(83)
    options = STRATEGIES[strategy]
    rows = max(options.get("num_beams", 1), options.get("num_return_sequences", 1))
    torch.manual_seed(5)
    expected = generate(model, ids, prefilled(model, prefix, rows), **options)
    with prefix_from_disk(model, prefix, store_path, budget=1.0) as cache:
        torch.manual_seed(5)
        assert_same_generation(generate(model, ids, cache, **options), expected)


@pytest.mark.parametrize("strategy", ["beams", "several samples"])
def test_every_decoding_strategy_is_exact_with_eager_attention(tiny_model, store_path, strategy):
    test_every_decoding_strategy_is_exact(
        lambda family: tiny_model(family, "eager"), store_path, family="llama", strategy=strategy
    )


def test_bfloat16_is_close(tiny_model, store_path):
    model = tiny_model("llama", seed=1).to(torch.bfloat16)
    prefix, _ = prompt(83)
    expected = forward(model, SUFFIX, prefilled(model, prefix))
    with prefix_from_disk(model, prefix, store_path, budget=1.0) as cache:
        assert_close(forward(model, SUFFIX, cache), expected, relative=0.05, absolute=0.02)


@pytest.mark.parametrize("prefix_tokens", [1, 5, 15, 16, 17, 31])
@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_short_prefixes_are_exact_even_below_one_chunk(tiny_model, store_path, family, prefix_tokens):
    model = tiny_model(family)
    prefix, ids = prompt(prefix_tokens)
    expected = generate(model, ids, prefilled(model, prefix))
    with prefix_from_disk(model, prefix, store_path, budget=1.0) as cache:
        assert_same_generation(generate(model, ids, cache), expected)


@pytest.mark.parametrize("prefix_tokens", [1, 15])
@pytest.mark.needs_library
def test_a_prefix_below_one_chunk_is_exact_at_any_budget(tiny_model, store_path, prefix_tokens):
    model = tiny_model("llama")
    prefix, ids = prompt(prefix_tokens)
    expected = generate(model, ids, prefilled(model, prefix))
    with prefix_from_disk(model, prefix, store_path, budget=0.05) as cache:
        assert_same_generation(generate(model, ids, cache), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_raw_forwards_are_exact_token_block_by_token_block(tiny_model, store_path, family):
    model = tiny_model(family)
    prefix, _ = prompt(83)
    reference = prefilled(model, prefix)
    with prefix_from_disk(model, prefix, store_path, budget=1.0) as cache:
        for block, tokens in enumerate([5, 1, 30, 1, 3]):
            ids = token_ids(tokens, seed=20 + block)
            assert_close(forward(model, ids, cache), forward(model, ids, reference))
            assert cache.get_seq_length() == reference.get_seq_length()


@pytest.mark.needs_library
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_that_is_the_prefix_itself_still_generates(tiny_model, store_path, family):
    model = tiny_model(family)
    prefix, _ = prompt(83)
    expected = generate(model, prefix, None)
    with prefix_from_disk(model, prefix, store_path, budget=1.0) as cache:
        assert_same_generation(generate(model, prefix, cache), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversation_goes_on_over_the_same_cache(tiny_model, store_path, family):
    model = tiny_model(family)
    prefix, ids = prompt(83)
    reference = prefilled(model, prefix)
    with prefix_from_disk(model, prefix, store_path, budget=1.0) as cache:
        for turn in range(3):
            # (Without a mask, generate hides tokens that look like padding: those that the model has said before, too.)
            mask = torch.ones_like(ids)
            expected = generate(model, ids, reference, tokens=5, attention_mask=mask)
            assert_same_generation(generate(model, ids, cache, tokens=5, attention_mask=mask), expected)
            ids = torch.cat([expected.sequences, token_ids(4, seed=30 + turn)], dim=1)


@pytest.mark.parametrize("prefill_chunk_size", [3, 64])
def test_prefilling_the_suffix_in_blocks_is_exact(tiny_model, store_path, prefill_chunk_size):
    model = tiny_model("llama")
    prefix, ids = prompt(83)
    expected = generate(model, ids, prefilled(model, prefix))
    with prefix_from_disk(model, prefix, store_path, budget=1.0) as cache:
        actual = generate(model, ids, cache, prefill_chunk_size=prefill_chunk_size)
        assert_same_generation(actual, expected)


def test_a_prefix_prefilled_in_blocks_is_exact(tiny_model, store_path):
    model = tiny_model("llama")
    prefix, ids = prompt(83)
    write_prefix(model, prefix, store_path, prefill_block=16)
    expected = generate(model, ids, prefilled(model, prefix))
    with PrefixStore(store_path) as store:
        cache = ContiguousKVCache(model, prefix, store=store, budget=1.0)
        assert_same_generation(generate(model, ids, cache), expected)


@pytest.mark.parametrize("family", WINDOWLESS)
def test_a_prefix_without_a_store_is_exact(tiny_model, family):
    model = tiny_model(family)
    prefix, ids = prompt(83)
    expected = generate(model, ids, prefilled(model, prefix))
    cache = ContiguousKVCache(model, prefix, budget=1.0)
    assert_same_generation(generate(model, ids, cache), expected)


def test_the_cache_that_computed_the_prefix_answers_like_the_one_that_read_it(tiny_model, store_path):
    model = tiny_model("gemma3")
    prefix, ids = prompt(83)
    expected = generate(model, ids, prefilled(model, prefix))
    with PrefixStore(store_path) as store:
        writer = ContiguousKVCache(model, prefix, store=store, budget=1.0)
        assert_same_generation(generate(model, ids, writer), expected)
        reader = ContiguousKVCache(model, prefix, store=store, budget=1.0)
        assert_same_generation(generate(model, ids, reader), expected)


@pytest.mark.needs_library
@pytest.mark.parametrize("family", FAMILIES)
def test_a_longer_prefix_continues_a_stored_one(tiny_model, store_path, family):
    model = tiny_model(family)
    prefix, ids = prompt(83)
    write_prefix(model, prefix[:, :50], store_path)
    expected = generate(model, ids, prefilled(model, prefix))
    with PrefixStore(store_path) as store:
        cache = ContiguousKVCache(model, prefix, store=store, budget=1.0)
        stats = cache.stats
        assert stats.tokens_from_store + stats.tokens_prefilled == 83
        assert_same_generation(generate(model, ids, cache), expected)
        cache.close()
        assert store.match(model, ids[0]) >= 80


@pytest.mark.needs_library
def test_a_prefix_that_ends_inside_a_stored_one_is_exact(tiny_model, store_path):
    model = tiny_model("llama")
    longer, _ = prompt(112)
    write_prefix(model, longer, store_path)
    prefix = longer[:, :70]
    ids = torch.cat([prefix, SUFFIX], dim=1)
    expected = generate(model, ids, prefilled(model, prefix))
    with PrefixStore(store_path) as store:
        cache = ContiguousKVCache(model, prefix, store=store, budget=1.0)
        assert cache.stats.tokens_from_store >= 64
        assert_same_generation(generate(model, ids, cache), expected)


@pytest.mark.parametrize("shape", ["[n]", "[1, n]"])
def test_prefix_ids_may_have_one_or_two_dimensions(tiny_model, store_path, shape):
    model = tiny_model("llama")
    prefix, ids = prompt(80)
    given = prefix[0] if shape == "[n]" else prefix
    expected = generate(model, ids, prefilled(model, prefix))
    with prefix_from_disk(model, given, store_path, budget=1.0) as cache:
        assert cache.prefix_ids.reshape(-1).tolist() == prefix[0].tolist()
        assert_same_generation(generate(model, ids, cache), expected)
