"""What a cache does after `close`, when it is copied or pickled, and with a text that repeats itself."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from transformers import DynamicCache

from hf_contiguouskv.errors import InputError, StoreClosedError

from .models import token_ids
from .references import assert_close, assert_same_generation, forward, generate
from .subject import ContiguousKVCache, PrefixStore, prefix_from_disk, write_prefix

pytestmark = pytest.mark.needs_library

PREFIX = token_ids(64, seed=4201)
SUFFIX = token_ids(9, seed=4202)
PROMPT = torch.cat([PREFIX, SUFFIX], dim=1)


@pytest.mark.parametrize("budget", [0.5, 1.0])
def test_a_closed_cache_does_not_answer_without_its_prefix(tiny_model, store_path, budget):
    model = tiny_model("llama")
    with prefix_from_disk(model, PREFIX, store_path, budget=budget) as cache:
        generate(model, PROMPT, cache)
    with pytest.raises(InputError, match="closed: the 64 tokens of its prefix"):
        forward(model, SUFFIX, cache)
    with pytest.raises(InputError, match="closed"):
        generate(model, PROMPT, cache)
    assert cache.stats.tokens_from_store == 64


def test_a_closed_automatic_cache_is_an_ordinary_one(tiny_model, store_path):
    model = tiny_model("llama")
    write_prefix(model, PREFIX, store_path)
    expected = generate(model, PROMPT, DynamicCache(config=model.config))
    cache = ContiguousKVCache(model, store=store_path, budget=1.0)
    generate(model, PROMPT, cache)
    cache.close()
    assert_same_generation(generate(model, PROMPT, cache), expected)


def test_a_store_that_is_closed_too_early_is_named(tiny_model, store_path):
    model = tiny_model("llama")
    write_prefix(model, PREFIX, store_path)
    store = PrefixStore(store_path, host_bytes=0)
    cache = ContiguousKVCache(model, PREFIX, store=store, budget=0.5)
    cache.reset()
    store.close()
    with pytest.raises(StoreClosedError, match="the store"):
        generate(model, PROMPT, cache)
    cache.close()


@pytest.mark.parametrize("budget", [0.5, 1.0])
def test_copy_is_a_cache_of_its_own(tiny_model, store_path, budget):
    model = tiny_model("llama")
    with prefix_from_disk(model, PREFIX, store_path, budget=budget) as cache:
        twin = copy.copy(cache)
        expected = generate(model, PROMPT, cache)
        assert twin.get_seq_length() == 64
        assert_same_generation(generate(model, PROMPT, twin), expected)
        twin.close()


def test_pickle_says_why_not(tiny_model, store_path):
    model = tiny_model("llama")
    with prefix_from_disk(model, PREFIX, store_path) as cache, pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(cache)


@pytest.mark.parametrize("ids", [torch.tensor([3, 128, 5]), torch.tensor([3, -1, 5])], ids=["too large", "negative"])
def test_ids_of_another_tokenizer_are_named(tiny_model, store_path, ids):
    with PrefixStore(store_path) as store, pytest.raises(InputError, match="has 128 embeddings"):
        ContiguousKVCache(tiny_model("llama"), ids, store=store)


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("mode", ["explicit", "automatic"])
def test_a_text_that_repeats_itself_is_appended(tiny_model, store_path, mode, stored):
    """Forwards without mask and positions append what they are given, as with a `DynamicCache`."""
    model = tiny_model("llama")
    parts = [PROMPT, PREFIX[:, :40], SUFFIX]
    reference = DynamicCache(config=model.config)
    expected = [forward(model, part, reference, logits_to_keep=1) for part in parts]
    with PrefixStore(store_path) as store:
        if stored or mode == "explicit":
            ContiguousKVCache(model, PREFIX, store=store).close()
        ids = PREFIX if mode == "explicit" else None
        with ContiguousKVCache(model, ids, store=store, budget=1.0) as cache:
            for part, logits in zip(parts, expected, strict=True):
                assert_close(forward(model, part, cache, logits_to_keep=1), logits)
            assert cache.get_seq_length() == reference.get_seq_length()


@pytest.mark.parametrize("form", ["mask", "positions"])
def test_a_mask_over_new_tokens_alone_is_explained(tiny_model, store_path, form):
    model = tiny_model("llama")
    told = {"mask": {"attention_mask": torch.ones(1, 9)}, "positions": {"position_ids": torch.arange(9)[None]}}[form]
    with (
        prefix_from_disk(model, PREFIX, store_path, budget=1.0) as cache,
        pytest.raises(InputError, match=r"9 tokens were passed.*the cache holds 64"),
    ):
        forward(model, SUFFIX, cache, **told)


def test_a_cache_that_is_dropped_goes_at_once_with_its_store_and_is_counted(tiny_model, store_path):
    model = tiny_model("llama")
    write_prefix(model, PREFIX, store_path)
    gc.collect()
    gc.disable()
    try:
        cache = ContiguousKVCache(model, store=str(store_path))
        generate(model, PROMPT, cache)
        cache.store.flush()
        gone = weakref.ref(cache), weakref.ref(cache.store), weakref.ref(cache.store.inner)
        del cache
        assert [one() for one in gone] == [None, None, None]
    finally:
        gc.enable()
    with PrefixStore(store_path) as store:
        assert max(entry.uses for entry in store.entries()) >= 1
