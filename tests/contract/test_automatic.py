"""Automatic mode: knowing only the store, a cache learns the prompt, reuses what is stored and stores what is exact."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

from .models import CACHE, FAMILIES, IMPLEMENTATIONS, PAD, token_ids
from .references import assert_close, assert_same_generation, assert_same_rows, forward, generate, prefilled
from .subject import ContiguousKVCache, PrefixStore

pytestmark = pytest.mark.needs_library

DOCUMENT = token_ids(96, seed=91)
FIRST = torch.cat([DOCUMENT, token_ids(5, seed=92)], dim=1)
SECOND = torch.cat([DOCUMENT, token_ids(11, seed=93)], dim=1)


def ask(model, ids, path, *, budget: float = 1.0, **options):
    """One request of one process: open the store, generate with a fresh automatic cache, close. Output and stats."""
    with PrefixStore(path) as store:
        cache = ContiguousKVCache(model, store=store, budget=budget)
        output = generate(model, ids, cache, **options)
        stats = cache.stats
        cache.close()
    return output, stats


def stored_tokens(model, ids, path) -> int:
    with PrefixStore(path) as store:
        return store.match(model, ids[0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_second_question_reuses_the_document_of_the_first(tiny_model, store_path, family, implementation):
    model = tiny_model(family, implementation)
    expected = generate(model, FIRST, DynamicCache(config=model.config))
    first, stats = ask(model, FIRST, store_path)
    assert_same_generation(first, expected)
    assert stats.tokens_from_store == 0
    again, stats = ask(model, FIRST, store_path)
    assert_same_generation(again, expected)
    assert stats.tokens_from_store > 0
    other, stats = ask(model, SECOND, store_path)
    assert_same_generation(other, generate(model, SECOND, DynamicCache(config=model.config)))
    assert stats.tokens_from_store >= 80


def test_a_path_will_do_for_a_store(tiny_model, store_path):
    model = tiny_model("llama")
    expected = generate(model, FIRST, DynamicCache(config=model.config))
    for request in range(2):
        cache = ContiguousKVCache(model, store=store_path, budget=1.0)
        assert_same_generation(generate(model, FIRST, cache), expected)
        assert (cache.stats.tokens_from_store > 0) == (request == 1)
        cache.close()


def test_what_is_stored_is_the_prompt_in_whole_chunks_and_nothing_of_the_answer(tiny_model, store_path):
    model = tiny_model("llama")
    output, _ = ask(model, FIRST, store_path, tokens=40)
    assert stored_tokens(model, FIRST, store_path) in (96, FIRST.shape[1])
    assert stored_tokens(model, output.sequences, store_path) <= FIRST.shape[1]


@pytest.mark.parametrize("strategy", [{"num_beams": 3}, {"do_sample": True}, {"prompt_lookup_num_tokens": 3}], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_every_strategy_stores_and_reuses(tiny_model, store_path, family, strategy):
    model = tiny_model(family)
    torch.manual_seed(4)
    expected = generate(model, FIRST, DynamicCache(config=model.config), **strategy)
    for request in range(2):
        torch.manual_seed(4)
        output, stats = ask(model, FIRST, store_path, **strategy)
        assert output.sequences.tolist() == expected.sequences.tolist()
        assert (stats.tokens_from_store > 0) == (request == 1)


def test_a_batch_attaches_what_all_its_rows_share(tiny_model, store_path):
    model = tiny_model("llama")
    ask(model, FIRST, store_path)
    ids = torch.cat([DOCUMENT.expand(2, -1), token_ids(11, seed=94, rows=2)], dim=1)
    ids[1, 70:] = token_ids(37, seed=95)[0]
    output, stats = ask(model, ids, store_path)
    assert_same_generation(output, generate(model, ids, DynamicCache(config=model.config)))
    assert 0 < stats.tokens_from_store <= 70


def test_a_batch_that_shares_nothing_attaches_nothing(tiny_model, store_path):
    model = tiny_model("llama")
    ask(model, FIRST, store_path)
    ids = torch.cat([FIRST, token_ids(FIRST.shape[1], seed=96)])
    output, stats = ask(model, ids, store_path)
    assert_same_generation(output, generate(model, ids, DynamicCache(config=model.config)))
    assert stats.tokens_from_store == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_left_padded_batch_is_exact_before_and_after_it_is_stored(tiny_model, store_path, family):
    model = tiny_model(family)
    suffixes = [token_ids(12, seed=97), token_ids(3, seed=98)]
    ids = torch.cat(
        [
            torch.cat([DOCUMENT, suffixes[0]], dim=1),
            torch.cat([torch.full((1, 9), PAD), DOCUMENT, suffixes[1]], dim=1),
        ]
    )
    mask = (ids != PAD).long()
    singles = [
        generate(model, torch.cat([DOCUMENT, suffix], dim=1), DynamicCache(config=model.config)) for suffix in suffixes
    ]
    for _ in range(2):
        output, stats = ask(model, ids, store_path, attention_mask=mask)
        assert_same_rows(output, singles)
    ask(model, FIRST, store_path)
    output, stats = ask(model, ids, store_path, attention_mask=mask)
    assert_same_rows(output, singles)
    if family == "llama":
        assert stats.tokens_from_store > 0


NOTICEABLE = {
    "labels": {"labels": FIRST},
    "hidden states": {"output_hidden_states": True, "logits_to_keep": 1},
    "attentions": {"output_attentions": True, "logits_to_keep": 1},
    "all logits": {"logits_to_keep": 0},
    "all logits by default": {},
    "logits by index": {"logits_to_keep": torch.tensor([3, 50])},
    "more logits than are uncached": {"logits_to_keep": 90},
}


@pytest.mark.parametrize("reason", NOTICEABLE)
def test_it_computes_everything_where_the_caller_would_notice(tiny_model, store_path, reason):
    model = tiny_model("llama", "eager")
    ask(model, FIRST, store_path)
    with torch.no_grad(), PrefixStore(store_path) as store:
        expected = model(FIRST, **{CACHE: DynamicCache(config=model.config)}, **NOTICEABLE[reason])
        cache = ContiguousKVCache(model, store=store, budget=1.0)
        actual = model(FIRST, **{CACHE: cache}, **NOTICEABLE[reason])
        assert actual.logits.shape == expected.logits.shape
        assert_close(actual.logits, expected.logits)
        if expected.loss is not None:
            assert_close(actual.loss, expected.loss)
        for field in ("hidden_states", "attentions"):
            if expected.get(field) is not None:
                for ours, theirs in zip(actual[field], expected[field], strict=True):
                    assert_close(ours, theirs)
        assert cache.get_seq_length() == FIRST.shape[1]
        step = token_ids(1, seed=3)
        reference = prefilled(model, FIRST)
        assert_close(forward(model, step, cache), forward(model, step, reference))


@pytest.mark.parametrize("logits_to_keep", [1, 4])
def test_a_raw_forward_that_wants_only_the_last_logits_attaches(tiny_model, store_path, logits_to_keep):
    model = tiny_model("llama")
    ask(model, FIRST, store_path)
    expected = forward(model, FIRST, DynamicCache(config=model.config), logits_to_keep=logits_to_keep)
    with PrefixStore(store_path) as store:
        cache = ContiguousKVCache(model, store=store, budget=1.0)
        assert_close(forward(model, FIRST, cache, logits_to_keep=logits_to_keep), expected)
        assert cache.stats.tokens_from_store > 0
        assert cache.get_seq_length() == FIRST.shape[1]


@pytest.mark.parametrize("output", ["output_hidden_states", "output_attentions"])
def test_generate_still_returns_the_whole_prompts_states(tiny_model, store_path, output):
    model = tiny_model("llama", "eager")
    ask(model, FIRST, store_path)
    expected = generate(model, FIRST, DynamicCache(config=model.config), **{output: True})
    actual, _ = ask(model, FIRST, store_path, **{output: True})
    assert_same_generation(actual, expected)
    field = output.removeprefix("output_")
    for ours, theirs in zip(actual[field][0], expected[field][0], strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("block", [8, 32, 200])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_generate_with_prefill_blocks_stays_exact(tiny_model, store_path, family, block):
    model = tiny_model(family)
    expected = generate(model, FIRST, DynamicCache(config=model.config))
    found = []
    for _ in range(3):
        output, stats = ask(model, FIRST, store_path, prefill_chunk_size=block)
        assert_same_generation(output, expected)
        found.append(stats.tokens_from_store)
    # Not just what the first block has.
    assert found == [0, FIRST.shape[1] - 1, FIRST.shape[1] - 1]


def test_a_pruned_answer_is_never_stored(tiny_model, store_path):
    model = tiny_model("llama")
    ask(model, DOCUMENT, store_path)
    before = stored_tokens(model, SECOND, store_path)
    assert before >= 80
    long_question = torch.cat([DOCUMENT, token_ids(60, seed=99)], dim=1)
    _, stats = ask(model, long_question, store_path, budget=0.1)
    assert stats.tokens_from_store > 0
    assert stored_tokens(model, long_question, store_path) == stored_tokens(model, DOCUMENT, store_path)
    exact, _ = ask(model, long_question, store_path, budget=1.0)
    assert_same_generation(exact, generate(model, long_question, DynamicCache(config=model.config)))


def test_a_pruned_budget_stores_what_it_computed_without_a_prefix(tiny_model, store_path):
    model = tiny_model("llama")
    expected = generate(model, FIRST, DynamicCache(config=model.config))
    first, _ = ask(model, FIRST, store_path, budget=0.1)
    assert_same_generation(first, expected)
    again, stats = ask(model, FIRST, store_path, budget=1.0)
    assert stats.tokens_from_store > 0
    assert_same_generation(again, expected)


def test_a_conversation_grows_the_store_turn_by_turn(tiny_model, store_path):
    model = tiny_model("llama")
    ids = FIRST
    for turn in range(3):
        expected = generate(model, ids, DynamicCache(config=model.config))
        output, stats = ask(model, ids, store_path)
        assert_same_generation(output, expected)
        if turn:
            assert stats.tokens_from_store >= 96
        ids = torch.cat([output.sequences, token_ids(20, seed=100 + turn)], dim=1)
    assert stored_tokens(model, ids, store_path) > FIRST.shape[1]


def test_two_turns_on_one_cache_are_exact(tiny_model, store_path):
    model = tiny_model("llama")
    ask(model, FIRST, store_path)
    reference = DynamicCache(config=model.config)
    with PrefixStore(store_path) as store:
        cache = ContiguousKVCache(model, store=store, budget=1.0)
        ids = FIRST
        for turn in range(2):
            expected = generate(model, ids, reference)
            assert_same_generation(generate(model, ids, cache), expected)
            ids = torch.cat([expected.sequences, token_ids(5, seed=110 + turn)], dim=1)


def test_another_model_never_sees_the_prefix(tiny_model, store_path):
    model, stranger = tiny_model("llama"), tiny_model("llama", seed=7)
    ask(model, FIRST, store_path)
    assert stored_tokens(stranger, FIRST, store_path) == 0
    output, stats = ask(stranger, FIRST, store_path)
    assert stats.tokens_from_store == 0
    assert_same_generation(output, generate(stranger, FIRST, DynamicCache(config=stranger.config)))


def test_a_forward_with_another_cache_does_not_teach_this_one(tiny_model, store_path):
    model = tiny_model("llama")
    with PrefixStore(store_path) as store:
        cache = ContiguousKVCache(model, store=store, budget=1.0)
        other = generate(model, SECOND, DynamicCache(config=model.config))
        expected = generate(model, FIRST, DynamicCache(config=model.config))
        assert_same_generation(generate(model, FIRST, cache), expected)
        cache.close()
        assert store.match(model, FIRST[0]) >= 96
        assert store.match(model, other.sequences[0]) <= 96


def test_input_embeddings_are_served_without_a_store(tiny_model, store_path):
    model = tiny_model("llama")
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(FIRST)
        expected = model(inputs_embeds=embeddings, **{CACHE: DynamicCache(config=model.config)}).logits
        with PrefixStore(store_path) as store:
            cache = ContiguousKVCache(model, store=store, budget=1.0)
            assert_close(model(inputs_embeds=embeddings, **{CACHE: cache}).logits, expected)
            cache.close()
    assert stored_tokens(model, FIRST, store_path) == 0


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_deep_copy_of_an_automatic_cache_goes_its_own_way(tiny_model, store_path, family):
    model = tiny_model(family)
    ask(model, FIRST, store_path)
    with PrefixStore(store_path) as store:
        cache = ContiguousKVCache(model, store=store, budget=1.0)
        fresh_twin = copy.deepcopy(cache)
        for each in (cache, fresh_twin):
            expected = generate(model, SECOND, DynamicCache(config=model.config))
            assert_same_generation(generate(model, SECOND, each), expected)
        later_twin = copy.deepcopy(cache)
        step = token_ids(3, seed=3)
        reference = prefilled(model, expected.sequences[:, :-1])
        expected_logits = forward(model, step, reference)
        for each in (cache, fresh_twin, later_twin):
            assert_close(forward(model, step, each), expected_logits)


def test_reset_makes_an_automatic_cache_learn_the_next_prompt(tiny_model, store_path):
    model = tiny_model("llama")
    other_document = token_ids(70, seed=120)
    with PrefixStore(store_path) as store:
        cache = ContiguousKVCache(model, store=store, budget=1.0)
        for request, ids in enumerate([FIRST, other_document, SECOND, other_document]):
            expected = generate(model, ids, DynamicCache(config=model.config))
            assert_same_generation(generate(model, ids, cache), expected)
            assert (cache.stats.tokens_from_store > 0) == (request >= 2)
            cache.reset()
            assert cache.get_seq_length() == 0
        cache.close()


def test_a_pruned_padded_batch_attaches_and_stores_nothing_new(tiny_model, store_path):
    model = tiny_model("llama")
    ask(model, DOCUMENT, store_path)
    before = stored_tokens(model, FIRST, store_path)
    ids = torch.cat(
        [
            torch.cat([DOCUMENT, token_ids(40, seed=121)], dim=1),
            torch.cat([torch.full((1, 20), PAD), DOCUMENT, token_ids(20, seed=122)], dim=1),
        ]
    )
    _, stats = ask(model, ids, store_path, budget=0.2, attention_mask=(ids != PAD).long())
    assert stats.tokens_from_store > 0
    for row in (ids[:1], ids[1:, 20:]):
        assert stored_tokens(model, row, store_path) == max(before, stored_tokens(model, DOCUMENT, store_path))
