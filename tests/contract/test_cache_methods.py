"""At `budget=1.0`, `crop`, `reset`, `deepcopy` and batch methods mean what they mean on a prefilled `DynamicCache`."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .models import CACHE, FAMILIES, WINDOWLESS, token_ids
from .references import assert_close, assert_same_generation, forward, generate, prefilled
from .subject import ContiguousKVCache, PrefixStore, prefix_from_disk, write_prefix

PREFIX = token_ids(83, seed=71)
QUESTION = torch.cat([PREFIX, token_ids(6, seed=72)], dim=1)
OTHER_QUESTION = torch.cat([PREFIX, token_ids(9, seed=73)], dim=1)


@pytest.fixture
def exact_cache(store_path):
    """`exact_cache(model)` is a cache at budget 1.0 over PREFIX, read from disk."""
    opened = []

    def open_cache(model):
        opened.append(prefix_from_disk(model, PREFIX, store_path, budget=1.0))
        return opened[-1].__enter__()

    yield open_cache
    for context in opened:
        context.__exit__(None, None, None)


@pytest.mark.parametrize("family", FAMILIES)
def test_reset_keeps_the_prefix_for_the_next_question(tiny_model, exact_cache, family):
    model = tiny_model(family)
    cache = exact_cache(model)
    for ids in (QUESTION, OTHER_QUESTION, QUESTION):
        assert_same_generation(generate(model, ids, cache), generate(model, ids, prefilled(model, PREFIX)))
        cache.reset()
        assert cache.get_seq_length() == PREFIX.shape[1]


def test_reset_lets_the_batch_size_change(tiny_model, exact_cache):
    model = tiny_model("llama")
    cache = exact_cache(model)
    for rows in (1, 3, 2, 1):
        ids = torch.cat([PREFIX.expand(rows, -1), token_ids(5, seed=80 + rows, rows=rows)], dim=1)
        assert_same_generation(generate(model, ids, cache), generate(model, ids, prefilled(model, PREFIX, rows)))
        cache.reset()


@pytest.mark.needs_library
@pytest.mark.parametrize("family", FAMILIES)
def test_crop_back_to_the_prefix_starts_a_new_question(tiny_model, exact_cache, family):
    model = tiny_model(family)
    cache = exact_cache(model)
    for ids in (QUESTION, OTHER_QUESTION):
        assert_same_generation(generate(model, ids, cache), generate(model, ids, prefilled(model, PREFIX)))
        cache.crop(PREFIX.shape[1] - cache.get_seq_length())
        assert cache.get_seq_length() == PREFIX.shape[1]


@pytest.mark.parametrize("family", WINDOWLESS)
@pytest.mark.parametrize("removed", [0, 1, 5])
def test_crop_within_the_suffix_equals_dynamic_cache(tiny_model, exact_cache, family, removed):
    model = tiny_model(family)
    cache, reference = exact_cache(model), prefilled(model, PREFIX)
    for each in (cache, reference):
        forward(model, token_ids(8, seed=74), each)
        each.crop(-removed)
    assert cache.get_seq_length() == reference.get_seq_length() == 83 + 8 - removed
    step = token_ids(3, seed=75)
    assert_close(forward(model, step, cache), forward(model, step, reference))


@pytest.mark.parametrize("family", WINDOWLESS)
@pytest.mark.parametrize("remaining", [80, 79, 70, 16, 3, 0])
def test_crop_into_the_prefix_equals_dynamic_cache(tiny_model, exact_cache, family, remaining):
    model = tiny_model(family)
    cache, reference = exact_cache(model), prefilled(model, PREFIX)
    for each in (cache, reference):
        forward(model, token_ids(5, seed=74), each)
        each.crop(remaining - each.get_seq_length())
        assert each.get_seq_length() == remaining
    for tokens in (6, 1):
        step = token_ids(tokens, seed=75)
        assert_close(forward(model, step, cache), forward(model, step, reference))
        assert cache.get_seq_length() == reference.get_seq_length()


def test_crop_into_an_untouched_prefix_equals_dynamic_cache(tiny_model, exact_cache):
    model = tiny_model("llama")
    cache, reference = exact_cache(model), prefilled(model, PREFIX)
    cache.crop(-10)
    reference.crop(-10)
    assert cache.get_seq_length() == 73
    step = token_ids(4, seed=75)
    assert_close(forward(model, step, cache), forward(model, step, reference))


def test_crop_refuses_a_positive_length_as_dynamic_cache_does(tiny_model, exact_cache):
    with pytest.raises(ValueError, match="crop"):
        exact_cache(tiny_model("llama")).crop(5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("begun", [False, True], ids=["before the suffix", "in mid-answer"])
def test_a_deep_copy_goes_its_own_way(tiny_model, exact_cache, family, begun):
    model = tiny_model(family)
    cache, reference = exact_cache(model), prefilled(model, PREFIX)
    if begun:
        for each in (cache, reference):
            forward(model, token_ids(6, seed=76), each)
    twin, reference_twin = copy.deepcopy(cache), copy.deepcopy(reference)
    ours, theirs = token_ids(4, seed=77), token_ids(7, seed=78)
    assert_close(forward(model, ours, cache), forward(model, ours, reference))
    assert_close(forward(model, theirs, twin), forward(model, theirs, reference_twin))
    step = token_ids(1, seed=79)
    assert_close(forward(model, step, cache), forward(model, step, reference))
    assert_close(forward(model, step, twin), forward(model, step, reference_twin))


def test_a_deep_copy_outlives_its_original(tiny_model, exact_cache):
    model = tiny_model("llama")
    cache = exact_cache(model)
    expected = generate(model, QUESTION, prefilled(model, PREFIX))
    twin = copy.deepcopy(cache)
    cache.close()
    del cache
    assert_same_generation(generate(model, QUESTION, twin), expected)


BATCH_METHODS = {
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([2, 0])),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0])),
    "repeat, reorder, select": lambda cache: (
        cache.batch_repeat_interleave(2),
        cache.reorder_cache(torch.tensor([5, 4, 3, 2, 1, 0])),
        cache.batch_select_indices(torch.tensor([0, 3])),
    ),
}


@pytest.mark.parametrize("method", BATCH_METHODS)
@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3", "mistral-window", "gpt-neox"])
def test_batch_methods_equal_dynamic_cache(tiny_model, exact_cache, family, method):
    model = tiny_model(family)
    cache, reference = exact_cache(model), prefilled(model, PREFIX, rows=3)
    suffixes = token_ids(5, seed=76, rows=3)
    for each in (cache, reference):
        forward(model, suffixes, each)
        BATCH_METHODS[method](each)
    rows = {"repeat": 6, "reorder": 3}.get(method, 2)
    for tokens in (2, 1):
        step = token_ids(tokens, seed=77, rows=rows)
        assert_close(forward(model, step, cache), forward(model, step, reference))


def test_a_prefix_may_be_repeated_before_the_first_suffix(tiny_model, exact_cache):
    model = tiny_model("llama")
    cache, reference = exact_cache(model), prefilled(model, PREFIX)
    for each in (cache, reference):
        each.batch_repeat_interleave(3)
    suffixes = token_ids(5, seed=76, rows=3)
    assert_close(forward(model, suffixes, cache), forward(model, suffixes, reference))


def test_the_cache_reports_its_shape_as_dynamic_cache_does(tiny_model, exact_cache):
    model = tiny_model("gemma3")
    cache, reference = exact_cache(model), prefilled(model, PREFIX)
    for each in (cache, reference):
        forward(model, token_ids(5, seed=76), each)
    assert len(cache) == len(reference)
    assert cache.is_sliding == reference.is_sliding
    assert not cache.is_compileable
    for layer in range(len(reference)):
        assert cache.get_seq_length(layer) == reference.get_seq_length(layer)


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("feed"), st.integers(1, 20)),
        st.tuples(st.just("crop"), st.integers(0, 40)),
        st.tuples(st.just("copy"), st.just(0)),
        st.tuples(st.just("reset"), st.just(0)),
    ),
    min_size=1,
    max_size=8,
)


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(operations=OPERATIONS)
def test_any_sequence_of_operations_equals_dynamic_cache(tiny_model, operations):
    model = tiny_model("llama", layers=2)
    prefix = PREFIX[:, :37]
    cache, reference = ContiguousKVCache(model, prefix, budget=1.0), prefilled(model, prefix)
    cropped_into_prefix = False
    for step, (operation, amount) in enumerate(operations):
        if operation == "feed":
            ids = token_ids(amount, seed=step)
            assert_close(forward(model, ids, cache), forward(model, ids, reference))
        elif operation == "crop":
            amount = min(amount, reference.get_seq_length() - 1)
            cropped_into_prefix |= reference.get_seq_length() - amount < prefix.shape[1]
            cache.crop(-amount)
            reference.crop(-amount)
        elif operation == "copy":
            cache, reference = copy.deepcopy(cache), copy.deepcopy(reference)
        elif not cropped_into_prefix:
            cache.reset()
            reference = prefilled(model, prefix)
        assert cache.get_seq_length() == reference.get_seq_length()
    ids = token_ids(2, seed=99)
    assert_close(forward(model, ids, cache), forward(model, ids, reference))


def test_a_cache_may_leave_inference_mode_in_mid_answer(tiny_model, exact_cache):
    model = tiny_model("llama")
    cache, reference = exact_cache(model), prefilled(model, PREFIX)
    with torch.inference_mode():
        for each in (cache, reference):
            forward(model, token_ids(5, seed=76), each)
    step = token_ids(2, seed=77)
    assert_close(forward(model, step, cache), forward(model, step, reference))
    cache.reset()
    assert_close(forward(model, step, cache), forward(model, step, prefilled(model, PREFIX)))


def test_a_forward_with_gradients_enabled_is_exact(tiny_model, exact_cache):
    model = tiny_model("llama")
    cache, reference = exact_cache(model), prefilled(model, PREFIX)
    for tokens in (5, 1, 1):
        ids = token_ids(tokens, seed=76)
        actual = model(ids, **{CACHE: cache}).logits.detach()
        assert_close(actual, model(ids, **{CACHE: reference}).logits.detach())


def test_generate_may_get_only_the_new_tokens_and_a_mask_over_all(tiny_model, exact_cache):
    model = tiny_model("llama")
    cache, reference = exact_cache(model), prefilled(model, PREFIX)
    new = token_ids(6, seed=72)
    mask = torch.ones(1, PREFIX.shape[1] + 6, dtype=torch.long)
    expected = generate(model, new, reference, attention_mask=mask)
    assert_same_generation(generate(model, new, cache, attention_mask=mask), expected)


def test_generate_may_get_embeddings_instead_of_ids(tiny_model, exact_cache):
    model = tiny_model("llama")
    embeddings = model.get_input_embeddings()(QUESTION).detach()
    options = {"do_sample": False, "max_new_tokens": 6}
    expected = model.generate(inputs_embeds=embeddings, **{CACHE: prefilled(model, PREFIX)}, **options)
    actual = model.generate(inputs_embeds=embeddings, **{CACHE: exact_cache(model)}, **options)
    assert actual.tolist() == expected.tolist()


@pytest.mark.needs_library
def test_threads_with_a_cache_each_share_model_and_store(tiny_model, store_path):
    model = tiny_model("llama")
    questions = [torch.cat([PREFIX, token_ids(6, seed=900 + index)], dim=1) for index in range(4)]
    expected = [generate(model, ids, prefilled(model, PREFIX)) for ids in questions]
    write_prefix(model, PREFIX, store_path)

    def ask(ids):
        cache = ContiguousKVCache(model, PREFIX, store=store, budget=1.0)
        try:
            return generate(model, ids, cache)
        finally:
            cache.close()

    with PrefixStore(store_path) as store, ThreadPoolExecutor(2) as threads:
        for actual, answer in zip(threads.map(ask, questions), expected, strict=True):
            assert_same_generation(actual, answer)
    assert model.config._attn_implementation == "sdpa"
