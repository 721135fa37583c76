"""Compiled models: a cache of ours is exact there, and does not disturb what is compiled beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import DynamicCache

from .models import build, token_ids
from .references import assert_close, assert_same_generation, forward, generate
from .subject import ContiguousKVCache, PrefixStore

pytestmark = [pytest.mark.needs_library, pytest.mark.filterwarnings("ignore")]

PREFIX = token_ids(70, seed=711)
MODES = {"explicit": PREFIX, "automatic": None}
FIRST = torch.cat([PREFIX, token_ids(13, seed=712)], dim=1)
SECOND = torch.cat([PREFIX, token_ids(6, seed=713)], dim=1)


@pytest.fixture(autouse=True)
def _forget_compiled_code():
    yield
    torch._dynamo.reset()


def compile_forward(model: Any, **options: Any) -> Any:
    model.forward = torch.compile(model.forward, **options)
    return model


def compile_in_place(model: Any, **options: Any) -> Any:
    model.compile(**options)
    return model


def compile_layers(model: Any, **options: Any) -> Any:
    for layer in model.model.layers:
        layer.compile(**options)
    return model


COMPILED = {
    "model.forward = torch.compile(model.forward)": compile_forward,
    "model.compile()": compile_in_place,
    "each layer": compile_layers,
}


@pytest.mark.parametrize(
    ("how", "mode"),
    [
        ("model.forward = torch.compile(model.forward)", "explicit"),
        ("model.forward = torch.compile(model.forward)", "automatic"),
        ("model.compile()", "explicit"),
        ("each layer", "explicit"),
        ("each layer", "automatic"),
    ],
)
def test_questions_and_forwards_are_exact_with_a_compiled_model_cold_and_warm(store_path, how, mode):
    model, twin = build("llama", layers=1), build("llama", layers=1)
    model = COMPILED[how](model, backend="eager")
    step = token_ids(1, seed=714)
    with PrefixStore(store_path) as store:
        for _ in range(2):
            cache = ContiguousKVCache(model, MODES[mode], store=store, budget=1.0)
            for prompt in (FIRST, SECOND):
                assert_same_generation(generate(model, prompt, cache, tokens=3), generate(twin, prompt, None, tokens=3))
            cache.reset()
            store.flush()
            whole = {"attention_mask": torch.ones_like(SECOND), "logits_to_keep": 1}
            assert_close(forward(model, SECOND, cache, **whole), forward(twin, SECOND, None)[:, -1:])
            expected = forward(twin, torch.cat([SECOND, step], dim=1), None)[:, -1:]
            assert_close(forward(model, step, cache), expected)
            assert cache.stats.tokens_from_store >= 64


def test_chunks_are_chosen_again_beneath_a_compiled_model(store_path):
    model, twin = build("llama", layers=2), build("llama", layers=2)
    model, found = compile_in_place(model, backend="eager"), []
    with PrefixStore(store_path) as store:
        for one in (twin, model):
            with ContiguousKVCache(one, PREFIX, store=store, budget=0.5, reselect_every=2) as cache:
                found.append(generate(one, FIRST, cache, tokens=7))
                assert cache.stats.reselections == 3
    assert_same_generation(found[1], found[0])


def test_a_cold_prefix_with_windows_is_stored_exactly_by_a_compiled_model(store_path):
    twin = build("gemma3", layers=2)
    model = compile_forward(build("gemma3", layers=2), backend="eager")
    with PrefixStore(store_path) as store:
        cache = ContiguousKVCache(model, PREFIX, store=store, budget=1.0, prefill_block=32)
        assert_same_generation(generate(model, FIRST, cache), generate(twin, FIRST, None))
        served = ContiguousKVCache(twin, PREFIX, store=store, budget=1.0)
        assert served.stats.tokens_from_store == 70
        assert_same_generation(generate(twin, SECOND, served), generate(twin, SECOND, None))


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["model.forward = torch.compile(model.forward)", "each layer"])
def test_fullgraph_works_with_another_cache_while_one_of_ours_lives(store_path, how, mode, used):
    model, twin = build("llama", layers=1), build("llama", layers=1)
    with PrefixStore(store_path) as store:
        living = ContiguousKVCache(model, MODES[mode], store=store, budget=1.0)
        if used:
            generate(model, FIRST, living)
        model = COMPILED[how](model, backend="eager", fullgraph=True)
        for prompt in (FIRST, SECOND):
            plain = DynamicCache(config=model.config)
            assert_same_generation(generate(model, prompt, plain), generate(twin, prompt, None))
        assert living.get_seq_length() >= (70 if used or mode == "explicit" else 0)


@pytest.mark.parametrize("mode", MODES)
def test_another_cache_is_compiled_into_as_many_graphs_as_without_ours(store_path, mode):
    counted = []
    for beside in (False, True):
        model, counter = build("llama", layers=1), CompileCounter()
        with PrefixStore(store_path) as store:
            living = ContiguousKVCache(model, MODES[mode], store=store, budget=1.0) if beside else None
            compile_forward(model, backend=counter)
            for prompt in (FIRST, SECOND):
                generate(model, prompt, DynamicCache(config=model.config))
            counted.append((counter.frame_count, counter.op_count))
            if living is not None:
                living.close()
        torch._dynamo.reset()
    assert counted[1] == counted[0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["model.forward = torch.compile(model.forward)", "each layer"])
def test_fullgraph_with_a_cache_of_ours_fails_with_words_that_name_both(store_path, how, mode):
    model = build("llama", layers=1)
    with PrefixStore(store_path) as store:
        cache = ContiguousKVCache(model, MODES[mode], store=store, budget=1.0)
        model = COMPILED[how](model, backend="eager", fullgraph=True)
        with pytest.raises(Exception, match=r"(?s)Contiguous.*fullgraph|fullgraph.*Contiguous"):
            generate(model, FIRST, cache)
