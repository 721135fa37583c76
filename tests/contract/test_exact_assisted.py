"""Assisted decoding over a stored prefix gives the tokens of greedy decoding (float32)."""

from __future__ import annotations

import pytest
import torch

from .models import FAMILIES, token_ids
from .references import generate, prefilled
from .subject import prefix_from_disk

pytestmark = pytest.mark.needs_library

PREFIX = token_ids(83, seed=61)
# Repeats a piece of the prefix, so that prompt look-up has something to draft.
IDS = torch.cat([PREFIX, token_ids(3, seed=62), PREFIX[:, 20:28]], dim=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_lookup_equals_greedy(tiny_model, store_path, family):
    model = tiny_model(family)
    expected = generate(model, IDS, prefilled(model, PREFIX), tokens=16)
    with prefix_from_disk(model, PREFIX, store_path, budget=1.0) as cache:
        actual = generate(model, IDS, cache, tokens=16, prompt_lookup_num_tokens=4)
        assert actual.sequences.tolist() == expected.sequences.tolist()


@pytest.mark.parametrize("assistant_agrees", [True, False], ids=["a twin drafts", "a stranger drafts"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral-window", "gpt-neox"])
def test_an_assistant_model_equals_greedy(tiny_model, store_path, family, assistant_agrees):
    model = tiny_model(family)
    assistant = tiny_model(family, layers=4, seed=0) if assistant_agrees else tiny_model("llama", layers=2, seed=9)
    expected = generate(model, IDS, prefilled(model, PREFIX), tokens=16)
    with prefix_from_disk(model, PREFIX, store_path, budget=1.0) as cache:
        actual = generate(model, IDS, cache, tokens=16, assistant_model=assistant)
        assert actual.sequences.tolist() == expected.sequences.tolist()


def test_greedy_may_follow_assisted_decoding_on_the_same_prefix(tiny_model, store_path):
    model = tiny_model("llama")
    expected = generate(model, IDS, prefilled(model, PREFIX), tokens=10)
    with prefix_from_disk(model, PREFIX, store_path, budget=1.0) as cache:
        generate(model, IDS, cache, tokens=10, prompt_lookup_num_tokens=3)
        cache.reset()
        actual = generate(model, IDS, cache, tokens=10)
        assert actual.sequences.tolist() == expected.sequences.tolist()


def test_a_fully_cached_prompt_may_be_decoded_with_prompt_lookup(tiny_model, store_path):
    model = tiny_model("llama")
    prefix = IDS
    expected = generate(model, prefix, None, tokens=10)
    with prefix_from_disk(model, prefix, store_path, budget=1.0) as cache:
        actual = generate(model, prefix, cache, tokens=10, prompt_lookup_num_tokens=3)
        assert actual.sequences.tolist() == expected.sequences.tolist()
