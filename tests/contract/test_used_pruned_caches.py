"""After any sequence of prompts a pruned cache answers as a fresh one does: nothing of earlier questions has a say."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from hf_contiguouskv import ContiguousKVConfig

from .models import token_ids
from .references import assert_same_generation, generate
from .subject import ContiguousKVCache, PrefixStore, write_prefix

pytestmark = pytest.mark.needs_library

DOCUMENT = token_ids(240, seed=4301)
CONFIGS = {
    "default": ContiguousKVConfig(budget=0.3),
    "published": ContiguousKVConfig.paper(0.3),
}
# What a prompt is: a question on the document, or one that follows the latest answer; with so many tokens.
QUESTIONS = st.tuples(st.sampled_from(["new", "new", "follows", "again"]), st.integers(4, 30), st.integers(0, 99))
BETWEEN = st.sampled_from(["", "", "reset", "copy", "crop"])


@pytest.mark.parametrize("method", ["default", "published"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3"])
@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(uses=st.lists(st.tuples(QUESTIONS, BETWEEN), min_size=2, max_size=5))
def test_every_answer_is_that_of_a_fresh_cache(tiny_model, tmp_path_factory, family, method, uses):
    model, config = tiny_model(family), CONFIGS[method]
    path = tmp_path_factory.mktemp("store")
    write_prefix(model, DOCUMENT, path)
    prompt = latest = DOCUMENT
    with PrefixStore(path) as store:
        cache = ContiguousKVCache(model, DOCUMENT, store=store, config=config)
        for (kind, length, seed), between in uses:
            if kind != "again" or prompt is DOCUMENT:
                before = latest if kind == "follows" else DOCUMENT
                prompt = torch.cat([before, token_ids(length, seed=4400 + seed)], dim=1)
            actual = generate(model, prompt, cache, tokens=5)
            with ContiguousKVCache(model, DOCUMENT, store=store, config=config) as fresh:
                assert_same_generation(actual, generate(model, prompt, fresh, tokens=5))
            latest = actual.sequences
            if between == "copy":
                twin = copy.deepcopy(cache)
                cache.close()
                cache = twin
            elif between == "reset" or (between == "crop" and family == "gemma3"):
                cache.reset()
            elif between == "crop":
                cache.crop(-3)
        cache.close()
