"""A pruned prefix leaves enough of the question uncached: the queries of its tokens choose the chunks.

A prompt that is asked twice is stored whole, question included. Were all of it attached, one token would choose.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_contiguouskv import ContiguousKVConfig, IndexedKeys

from .models import CACHE, token_ids
from .references import forward, generate
from .subject import ContiguousKVCache, PrefixStore, write_prefix

pytestmark = pytest.mark.needs_library

DOCUMENT = token_ids(480, seed=731)
VOTERS = 16
CONFIGS = {
    "a tenth": ContiguousKVConfig(budget=0.1),
    "a quarter": ContiguousKVConfig(budget=0.25),
    "the default": ContiguousKVConfig(),
    "as published": ContiguousKVConfig.paper(0.1),
    "automatic budget": ContiguousKVConfig(budget="auto"),
    "few queries": ContiguousKVConfig(budget=0.1, selection=IndexedKeys(queries=VOTERS)),
}


def ask(question: int, document: torch.Tensor = DOCUMENT) -> torch.Tensor:
    return torch.cat([document, token_ids(question, seed=732 + question)], dim=1)


class Uncached:
    """Counts the tokens of the first forward that reaches the first decoder layer."""

    def __init__(self, model: Any) -> None:
        self.tokens = 0
        self.handle = model.get_input_embeddings().register_forward_hook(self._note)

    def _note(self, module: Any, args: Any, output: torch.Tensor) -> None:
        self.tokens = self.tokens or output.shape[-2]

    def __enter__(self) -> Uncached:
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


def uses_all(cache: Any) -> bool:
    used = cache.stats.chunks_used
    return bool(used) and min(used) == cache.stats.chunks_total


def assert_enough_voters(model: Any, cache: Any, prompt: torch.Tensor, question: int, **options: Any) -> None:
    with Uncached(model) as seen:
        generate(model, prompt, cache, tokens=3, **options)
    assert cache.stats.prefix_tokens >= 400, "the document is still served"
    assert seen.tokens >= min(VOTERS, question) or uses_all(cache), f"{seen.tokens} tokens choose"


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("question", [17, 24, 60])
def test_the_same_prompt_twice_in_automatic_mode_keeps_its_voters(tiny_model, store_path, question, config):
    model, prompt = tiny_model("llama"), ask(question)
    with PrefixStore(store_path) as store:
        for request in range(3):
            cache = ContiguousKVCache(model, store=store, config=CONFIGS[config])
            if request == 0:
                generate(model, prompt, cache, tokens=3)
            else:
                assert_enough_voters(model, cache, prompt, question)
                assert cache.stats.tokens_from_store > 0
            cache.close()
            store.flush()


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("question", [1, 8, 24])
def test_a_prefix_that_reaches_to_the_end_of_the_prompt_keeps_voters(tiny_model, store_path, question, config):
    model, prompt = tiny_model("llama"), ask(question)
    write_prefix(model, prompt, store_path)
    with PrefixStore(store_path) as store:
        cache = ContiguousKVCache(model, prompt, store=store, config=CONFIGS[config])
        for _ in range(2):
            assert_enough_voters(model, cache, prompt, VOTERS)


@pytest.mark.parametrize("family", ["gemma3", "opt", "gpt-neox"])
@pytest.mark.parametrize("mode", ["explicit", "automatic"])
def test_every_family_keeps_its_voters_on_one_cache_and_on_new_ones(tiny_model, store_path, family, mode):
    model, prompt = tiny_model(family), ask(24)
    with PrefixStore(store_path) as store:
        ContiguousKVCache(model, prompt, store=store).close()
        for _ in range(2):
            cache = ContiguousKVCache(model, prompt if mode == "explicit" else None, store=store, budget=0.1)
            for _ in range(2):
                assert_enough_voters(model, cache, prompt, 24)
            cache.close()


@pytest.mark.parametrize(
    "options", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 3}, {"do_sample": True}], ids=str
)  # fmt: skip
@pytest.mark.parametrize("mode", ["explicit", "automatic"])
def test_every_strategy_keeps_its_voters(tiny_model, store_path, mode, options):
    model, prompt = tiny_model("llama"), ask(24)
    write_prefix(model, prompt, store_path)
    with PrefixStore(store_path) as store:
        cache = ContiguousKVCache(model, prompt if mode == "explicit" else None, store=store, budget=0.1)
        assert_enough_voters(model, cache, prompt, 24, **options)


@pytest.mark.parametrize("longer", [0, 40], ids=["equal rows", "one row longer"])
def test_the_same_batch_twice_keeps_its_voters(tiny_model, store_path, longer):
    model = tiny_model("llama")
    rows = [ask(24 + longer), ask(24)]
    ids = torch.cat([torch.cat([row.new_zeros(1, 504 + longer - row.shape[1]), row], dim=1) for row in rows])
    with PrefixStore(store_path) as store:
        for _ in range(2):
            cache = ContiguousKVCache(model, store=store, budget=0.1)
            with Uncached(model) as seen:
                generate(model, ids, cache, tokens=3, attention_mask=(ids != 0).long())
            store.flush()
        assert cache.stats.tokens_from_store > 0
        assert seen.tokens >= VOTERS


@pytest.mark.parametrize("known", [1, 4])
def test_a_question_is_never_cut_where_its_document_ends(tiny_model, store_path, known):
    model = tiny_model("llama")
    with PrefixStore(store_path) as store:
        for seed in range(known):
            cache = ContiguousKVCache(model, store=store, budget=0.1)
            generate(model, torch.cat([DOCUMENT, token_ids(30, seed=740 + seed)], dim=1), cache, tokens=3)
            cache.close()
            store.flush()
        for question in (24, 40, 100):
            cache = ContiguousKVCache(model, store=store, budget=0.1)
            for _ in range(2):
                with Uncached(model) as seen:
                    generate(model, ask(question), cache, tokens=3)
                assert seen.tokens >= question, "all of the question chooses"
                cache.close()
                store.flush()
                cache = ContiguousKVCache(model, store=store, budget=0.1)


def test_a_raw_forward_that_repeats_a_stored_prompt_keeps_its_voters(tiny_model, store_path):
    model, prompt = tiny_model("llama"), ask(24)
    whole = {"attention_mask": torch.ones_like(prompt), "logits_to_keep": 1}
    with PrefixStore(store_path) as store:
        for request in range(2):
            cache = ContiguousKVCache(model, store=store, budget=0.1)
            with Uncached(model) as seen:
                forward(model, prompt, cache, **whole)
            assert (cache.stats.tokens_from_store > 0) == (request == 1)
            store.flush()
        assert seen.tokens >= VOTERS


def test_the_answer_at_a_budget_of_one_needs_no_voters(tiny_model, store_path):
    model, prompt = tiny_model("llama"), ask(24)
    expected = generate(model, prompt, None)
    write_prefix(model, prompt, store_path)
    with PrefixStore(store_path) as store, torch.no_grad():
        cache = ContiguousKVCache(model, store=store, budget=1.0)
        with Uncached(model) as seen:
            actual = model.generate(prompt, **{CACHE: cache}, do_sample=False, max_new_tokens=8)
        assert actual.tolist() == expected.sequences.tolist()
        assert seen.tokens <= 16
