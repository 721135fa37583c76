"""A model that changes, trains, is copied or is called unusually while a cache lives: right answers or errors."""

from __future__ import annotations

import copy
import gc
import io
import tempfile
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as hf
from transformers import DynamicCache

from hf_contiguouskv import ContiguousKVConfig
from hf_contiguouskv.errors import AttentionNotActiveError, InputError

from .models import CACHE, build, quiet, token_ids
from .references import assert_close, assert_same_generation, forward, generate, prefilled
from .subject import ContiguousKVCache, PrefixStore, write_prefix

pytestmark = [
    pytest.mark.needs_library,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # Of peft.
]

DOCUMENT = token_ids(96, seed=701)
FIRST = torch.cat([DOCUMENT, token_ids(5, seed=702)], dim=1)
SECOND = torch.cat([DOCUMENT, token_ids(11, seed=703)], dim=1)


def answer(model, ids, cache):
    return generate(model, ids, cache, tokens=4)


def fresh_answer(model, ids):
    return answer(model, ids, DynamicCache(config=model.config))


def is_untouched(model, implementation: str = "sdpa") -> bool:
    hooks = [*model._forward_pre_hooks.values(), *model._forward_hooks.values()]
    return model.config._attn_implementation == implementation and not hooks


# ---- the weights change ----


def with_two_adapters(model):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules=["k_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, lora, adapter_name="one")
    model.add_adapter("two", lora)
    return model.eval()


def edit_a_weight(model):
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight.mul_(1.5)


CHANGES: dict[str, tuple[Any, Any]] = {
    "a weight is edited": (lambda model: model, edit_a_weight),
    "bfloat16": (lambda model: model, lambda model: model.to(torch.bfloat16)),
    "another adapter": (with_two_adapters, lambda model: model.set_adapter("two")),
    "no adapter": (with_two_adapters, lambda model: model.base_model.disable_adapter_layers()),
}


@pytest.fixture(params=CHANGES)
def changing(request) -> tuple[Any, Any, Any]:
    """A model, what changes it, and a copy that stays as it was."""
    prepare, change = CHANGES[request.param]
    model = prepare(build("llama"))
    return model, change, copy.deepcopy(model)


@pytest.mark.parametrize("when", ["before the first prompt", "without a reset"])
def test_an_automatic_cache_misses_after_a_change(changing, store_path, when):
    model, change, unchanged = changing
    before = fresh_answer(model, SECOND)
    write_prefix(model, DOCUMENT, store_path)
    with PrefixStore(store_path) as store:
        cache = ContiguousKVCache(model, store=store, budget=1.0)
        if when != "before the first prompt":
            answer(model, FIRST, cache)
            assert cache.stats.tokens_from_store > 0
        change(model)
        expected = fresh_answer(model, SECOND)
        assert not torch.equal(expected.logits[0], before.logits[0]), "a change that changes nothing"
        assert_same_generation(answer(model, SECOND, cache), expected)
        assert cache.stats.tokens_from_store == 0
        cache.close()
        store.flush()
        assert store.inner.background_failures == 0
    with PrefixStore(store_path) as store:
        restored = ContiguousKVCache(unchanged, store=store, budget=1.0)
        assert_same_generation(answer(unchanged, SECOND, restored), before)
        assert restored.stats.tokens_from_store >= 96
        again = ContiguousKVCache(model, store=store, budget=1.0)
        noise = 0.05 if model.dtype == torch.bfloat16 else 1e-4
        assert_close(answer(model, SECOND, again).logits[0], expected.logits[0], relative=noise, absolute=noise)


@pytest.mark.filterwarnings("ignore:.*deprecated:")
def test_a_model_with_packed_weights_is_not_served_another_ones_keys_and_values(store_path):
    first = build("llama")
    second = copy.deepcopy(first)
    with torch.no_grad():
        second.model.layers[1].self_attn.v_proj.weight.mul_(1.5)
    with PrefixStore(store_path) as store:
        for model in (first, second):
            torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, inplace=True)
            for request in range(2):
                cache = ContiguousKVCache(model, store=store, budget=1.0)
                answer(model, FIRST, cache)  # (Its activations are quantised by what is in a batch: no exact answers.)
                assert (cache.stats.tokens_from_store > 0) == (request == 1)
                cache.close()
                store.flush()


@pytest.mark.parametrize("when", ["before the first question", "after a reset"])
def test_a_prefix_is_refused_after_a_change(changing, store_path, when):
    model, change, _ = changing
    with PrefixStore(store_path) as store:
        cache = ContiguousKVCache(model, DOCUMENT, store=store, budget=1.0)
        if when == "after a reset":
            answer(model, FIRST, cache)
            cache.reset()
        change(model)
        with pytest.raises(InputError):
            answer(model, SECOND, cache)
        again = ContiguousKVCache(model, DOCUMENT, store=store, budget=1.0)
        assert again.stats.tokens_from_store == 0


def test_an_edit_that_is_undone_is_forgotten(store_path):
    model = build("llama")
    expected = fresh_answer(model, SECOND)
    weight = model.model.layers[1].self_attn.k_proj.weight
    with PrefixStore(store_path) as store, torch.no_grad():
        cache = ContiguousKVCache(model, DOCUMENT, store=store, budget=1.0)
        before = weight.clone()
        weight.mul_(1.5)
        with pytest.raises(InputError):
            answer(model, SECOND, cache)
        weight.copy_(before)
        again = ContiguousKVCache(model, DOCUMENT, store=store, budget=1.0)
        assert again.stats.tokens_from_store == 96
        assert_same_generation(answer(model, SECOND, again), expected)


# ---- calls whose K/V are not those of the prompt's tokens ----


class Seeing(hf.LlamaForCausalLM):
    """A model that sees pictures: they are added to the embeddings of the tokens."""

    def forward(self, input_ids=None, attention_mask=None, pixel_values=None, **options):
        if pixel_values is None:
            return super().forward(input_ids, attention_mask, **options)
        states = self.get_input_embeddings()(input_ids) + pixel_values
        return super().forward(inputs_embeds=states, attention_mask=attention_mask, **options)


def seeing_model():
    config = copy.deepcopy(build("llama").config)
    config.attention_dropout = 0.2
    torch.manual_seed(31)
    model = Seeing(config).eval()
    quiet(model)
    return model


def ask(model, cache, **options):
    return forward(model, FIRST, cache, logits_to_keep=1, **options)


def ask_in_training(model, cache):
    model.train()
    torch.manual_seed(5)
    return ask(model, cache)


def ask_in_bfloat16(model, cache):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return ask(model, cache)


def zeros_at(columns) -> torch.Tensor:
    mask = torch.ones_like(FIRST)
    mask[:, columns] = 0
    return mask


UNUSUAL: dict[str, Any] = {
    "training": ask_in_training,
    "autocast": ask_in_bfloat16,
    "a picture": lambda model, cache: ask(model, cache, pixel_values=torch.full((1, FIRST.shape[1], 64), 0.3)),
    "shifted positions": lambda model, cache: ask(model, cache, position_ids=torch.arange(FIRST.shape[1])[None] + 7),
    "a hole": lambda model, cache: ask(model, cache, attention_mask=zeros_at(40)),
    "right padding": lambda model, cache: ask(model, cache, attention_mask=zeros_at(slice(-5, None))),
}


@pytest.mark.parametrize("stored", [False, True], ids=["nothing stored", "stored"])
@pytest.mark.parametrize("call", UNUSUAL)
def test_an_unusual_call_is_neither_served_nor_stored(store_path, call, stored):
    model = seeing_model()
    if stored:
        write_prefix(model, DOCUMENT, store_path)
    with PrefixStore(store_path) as store:
        cache = ContiguousKVCache(model, store=store, budget=1.0)
        actual = UNUSUAL[call](model, cache)
        assert torch.equal(actual, UNUSUAL[call](model, DynamicCache(config=model.config)))
        assert cache.stats.tokens_from_store == 0
        cache.close()
        store.flush()
        assert store.match(model, FIRST[0]) == (96 if stored else 0)
        assert store.inner.background_failures == 0


def test_the_same_call_in_its_usual_form_is_served_and_stored(store_path):
    model = seeing_model()
    with PrefixStore(store_path) as store:
        for request in range(2):
            cache = ContiguousKVCache(model, store=store, budget=1.0)
            assert_close(ask(model, cache), ask(model, DynamicCache(config=model.config)))
            assert (cache.stats.tokens_from_store > 0) == (request == 1)
            store.flush()
        assert store.match(model, FIRST[0]) >= 96


def test_gradients_are_those_without_a_cache(store_path):
    model = build("llama")
    write_prefix(model, DOCUMENT, store_path)

    def gradients(**options):
        model.zero_grad()
        model(FIRST, logits_to_keep=1, **options).logits.square().sum().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected = gradients(use_cache=False)
    with PrefixStore(store_path) as store:
        cache = ContiguousKVCache(model, store=store, budget=1.0)
        actual = gradients(**{CACHE: cache})
        assert cache.stats.tokens_from_store == 0
        cache.close()
        store.flush()
        assert store.inner.background_failures == 0
    for name in expected:
        assert_close(actual[name], expected[name])


@pytest.mark.parametrize(
    "config", [ContiguousKVConfig.paper(0.3), ContiguousKVConfig(budget=0.3)], ids=["paper", "ours"]
)
def test_a_pruned_prefix_answers_with_gradients_enabled(store_path, config):
    model = build("llama")
    suffix = SECOND[:, 96:]
    with PrefixStore(store_path) as store:
        answers = []
        for enabled in (False, True):
            cache = ContiguousKVCache(model, DOCUMENT, store=store, config=config)
            with torch.set_grad_enabled(enabled):
                answers.append(
                    [model(ids, **{CACHE: cache}).logits.detach() for ids in (suffix, suffix[:, :1], suffix[:, :3])]
                )
        for ours, theirs in zip(*answers, strict=True):
            assert_close(ours, theirs)


# ---- another model object ----

STRANGERS = {
    "other weights": lambda model: build("llama", model.config._attn_implementation, seed=3),
    "a copy": copy.deepcopy,
    "one config": lambda model: type(model)(model.config).eval(),
}


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize(("implementation", "budget"), [("sdpa", 0.3), ("sdpa", 1.0), ("eager", 0.3)])
@pytest.mark.parametrize("stranger", STRANGERS)
def test_another_model_gets_an_error_and_never_an_answer(store_path, stranger, implementation, budget, tokens):
    model = build("llama", implementation)
    other = STRANGERS[stranger](model)
    quiet(other)
    suffix = token_ids(tokens, seed=704)
    with PrefixStore(store_path) as store:
        cache = ContiguousKVCache(model, DOCUMENT, store=store, budget=budget)
        with pytest.raises((AttentionNotActiveError, InputError)):
            forward(other, suffix, cache)
        with pytest.raises((AttentionNotActiveError, InputError)):
            answer(other, torch.cat([DOCUMENT, suffix], dim=1), cache)
        cache.reset()
        same = ContiguousKVCache(model, DOCUMENT, store=store, budget=budget)
        assert_close(forward(model, suffix, cache), forward(model, suffix, same))


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("family", ["gemma3", "mistral-window"])
def test_another_model_with_windows_gets_an_error(tiny_model, store_path, family, tokens):
    model, other = tiny_model(family), tiny_model(family, seed=3)
    with PrefixStore(store_path) as store:
        cache = ContiguousKVCache(model, DOCUMENT, store=store, budget=1.0)
        with pytest.raises((AttentionNotActiveError, InputError)):
            forward(other, token_ids(tokens, seed=704), cache)
        cache.close()


# ---- copies of a model that a cache has touched ----


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "torch.save": saved_and_loaded,
    "from its config": lambda model: type(model)(model.config).eval(),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize(
    ("implementation", "outlives"), [("sdpa", False), ("eager", True)], ids=["cache alive", "cache gone"]
)
def test_a_copy_of_a_model_in_use_is_a_model_of_its_own(store_path, implementation, how, outlives):
    model = build("llama", implementation)
    expected_of_model = fresh_answer(model, FIRST)
    with PrefixStore(store_path) as store:
        cache = ContiguousKVCache(model, DOCUMENT, store=store, budget=1.0)
        twin = COPIES[how](model)
        quiet(twin)
        if outlives:
            cache.close()
            del cache
            gc.collect()
        expected = fresh_answer(twin, FIRST)
        if how != "from its config":
            assert_same_generation(expected, expected_of_model)
        new = ContiguousKVCache(twin, DOCUMENT, store=store, budget=1.0)
        assert_same_generation(answer(twin, FIRST, new), expected)
        automatic = ContiguousKVCache(twin, store=store, budget=1.0)
        assert_same_generation(answer(twin, FIRST, automatic), expected)
        assert automatic.stats.tokens_from_store > 0
        if not outlives:
            assert_same_generation(answer(model, FIRST, cache), expected_of_model)
            cache.close()
        new.close()
        automatic.close()
    assert twin.config._attn_implementation == implementation
    assert is_untouched(model, implementation)


# ---- the attention implementation ----


@pytest.mark.parametrize("first_to_go", [0, 1])
def test_an_implementation_chosen_between_two_caches_stays(first_to_go):
    model = build("llama")
    caches = [ContiguousKVCache(model, DOCUMENT, budget=1.0)]
    model.set_attn_implementation("eager")
    caches.append(ContiguousKVCache(model, DOCUMENT, budget=1.0))
    expected = answer(model, FIRST, prefilled(model, DOCUMENT))
    assert_same_generation(answer(model, FIRST, caches[1]), expected)
    for cache in (caches[first_to_go], caches[1 - first_to_go]):
        cache.close()
    caches.clear()
    del cache
    gc.collect()
    assert is_untouched(model, "eager")


# ---- constructions that fail ----


@contextmanager
def failing_prefill(model):
    def fail(module, args, output):
        if output.shape[1] > 3:  # Not at the three tokens of the trial.
            raise RuntimeError("out of luck")

    handle = model.model.layers[1].mlp.register_forward_hook(fail)
    yield
    handle.remove()


@contextmanager
def in_training(model):
    model.train()
    yield
    model.eval()


@pytest.mark.parametrize("reason", [failing_prefill, in_training])
def test_a_construction_that_fails_leaves_nothing_behind(tmp_path, monkeypatch, reason):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = build("llama")
    with reason(model), pytest.raises((InputError, RuntimeError)) as failure:
        ContiguousKVCache(model, DOCUMENT, budget=1.0)
    assert failure.value.__traceback__ is not None, "the exception still holds the frames of the constructor"
    assert is_untouched(model)
    assert list(tmp_path.iterdir()) == []
    cache = ContiguousKVCache(model, DOCUMENT, budget=1.0)
    assert_same_generation(answer(model, FIRST, cache), fresh_answer(model, FIRST))
