"""PEFT: K and V belong to the adapter that computed them, whatever chooses it, and for as long as it is chosen."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from hf_contiguouskv.errors import ContiguousKVError, InputError

from .models import build, token_ids
from .references import assert_close, assert_same_generation, forward, generate
from .subject import ContiguousKVCache, PrefixStore

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.needs_library

PREFIX = token_ids(70, seed=721).clamp_min(8)
MODES = {"explicit": PREFIX, "automatic": None}
PROMPT = torch.cat([PREFIX, token_ids(9, seed=722).clamp_min(8)], dim=1)
ANOTHER = torch.cat([PREFIX, token_ids(9, seed=723).clamp_min(8)], dim=1)
BATCH = torch.cat([PROMPT, ANOTHER])


def lora(**options: Any) -> Any:
    return peft.LoraConfig(
        r=8,
        lora_alpha=64,
        target_modules=["q_proj", "k_proj", "v_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
        **options,
    )


def two_adapters() -> Any:
    """A PEFT model with the adapters "one", which is active, and "two"."""
    torch.manual_seed(5)
    model = peft.get_peft_model(build("llama"), lora(), adapter_name="one")
    model.add_adapter("two", lora())
    model.set_adapter("one")
    return model.eval()


def assert_as_without_us(model: Any, prompt: torch.Tensor, cache: Any, **options: Any) -> None:
    assert_same_generation(generate(model, prompt, cache, **options), generate(model, prompt, None, **options))


# ---- adapters by row ----

FOREIGN = {
    "another adapter": (PROMPT, ["two"]),
    "no adapter": (PROMPT, ["__base__"]),
    "another adapter in the second row": (BATCH, ["one", "two"]),
    "no adapter in the first row": (BATCH, ["__base__", "one"]),
}


@pytest.mark.parametrize("stored", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("names", FOREIGN)
def test_a_prefix_refuses_rows_of_another_adapter_than_the_one_that_computed_it(store_path, names, stored):
    model = two_adapters()
    prompt, adapters = FOREIGN[names]
    with PrefixStore(store_path) as store:
        if stored:
            ContiguousKVCache(model, PREFIX, store=store).close()
        cache = ContiguousKVCache(model, PREFIX, store=store, budget=1.0)
        with pytest.raises(InputError, match="adapter"):
            generate(model, prompt, cache, adapter_names=adapters)


@pytest.mark.parametrize("names", FOREIGN)
def test_a_refusal_leaves_model_and_cache_as_they_were(store_path, names):
    model = two_adapters()
    prompt, adapters = FOREIGN[names]
    expected = generate(model, PROMPT, None)
    with PrefixStore(store_path) as store:
        cache = ContiguousKVCache(model, PREFIX, store=store, budget=1.0)
        with pytest.raises(InputError, match="adapter"):
            generate(model, prompt, cache, adapter_names=adapters)
        assert_same_generation(generate(model, PROMPT, None), expected)
        assert_same_generation(generate(model, PROMPT, cache), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("prompt", "names"), [(PROMPT, ["one"]), (BATCH, ["one", "one"])], ids=["a row", "two rows"])
def test_the_active_adapter_may_be_named_for_every_row(store_path, mode, prompt, names):
    model = two_adapters()
    with PrefixStore(store_path) as store:
        for _ in range(2):
            cache = ContiguousKVCache(model, MODES[mode], store=store, budget=1.0)
            assert_as_without_us(model, prompt, cache, adapter_names=names)
            store.flush()
        assert cache.stats.tokens_from_store >= 64


@pytest.mark.parametrize("names", FOREIGN)
def test_automatic_mode_answers_rows_of_other_adapters_and_stores_nothing_of_them(store_path, names):
    model = two_adapters()
    prompt, adapters = FOREIGN[names]
    with PrefixStore(store_path) as store:
        for _ in range(2):
            cache = ContiguousKVCache(model, store=store, budget=1.0)
            assert_as_without_us(model, prompt, cache, adapter_names=adapters)
            assert any("adapter" in reason for reason in cache.stats.passed_over)
            store.flush()
        for active in ("one", "two"):
            model.set_adapter(active)
            assert store.match(model, PROMPT[0]) == 0


def test_one_automatic_cache_answers_one_adapter_after_another(store_path):
    model = two_adapters()
    with PrefixStore(store_path) as store:
        cache = ContiguousKVCache(model, store=store, budget=1.0)
        for names in (None, ["two"], ["one"], ["__base__"], ["two"], None):
            assert_as_without_us(model, PROMPT, cache, adapter_names=names)
            store.flush()


# ---- adapters that are switched ----


def use_two(model: Any) -> Any:
    model.set_adapter("two")
    return nullcontext()


def use_none(model: Any) -> Any:
    return model.disable_adapter()


def use_both(model: Any) -> Any:
    model.base_model.set_adapter(["one", "two"])
    return nullcontext()


SWITCHES = {"another adapter": use_two, "no adapter": use_none, "both adapters": use_both}


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_prefix_refuses_questions_to_another_adapter_until_its_own_is_back(store_path, switch):
    model = two_adapters()
    with PrefixStore(store_path) as store:
        cache = ContiguousKVCache(model, PREFIX, store=store, budget=1.0)
        assert_as_without_us(model, PROMPT, cache)
        with SWITCHES[switch](model), pytest.raises(InputError, match="adapter"):
            generate(model, ANOTHER, cache)
        model.set_adapter("one")
        assert_as_without_us(model, ANOTHER, cache)


@pytest.mark.parametrize("switch", SWITCHES)
def test_automatic_mode_keeps_the_adapters_apart(store_path, switch):
    model = two_adapters()
    with PrefixStore(store_path) as store:
        cache = ContiguousKVCache(model, store=store, budget=1.0)
        for _ in range(2):
            assert_as_without_us(model, PROMPT, cache)
            with SWITCHES[switch](model):
                assert_as_without_us(model, ANOTHER, cache)
            model.set_adapter("one")
            store.flush()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("switch", SWITCHES)
def test_a_turn_under_another_adapter_does_not_continue_what_the_first_one_computed(store_path, mode, switch):
    model = two_adapters()
    with PrefixStore(store_path) as store:
        cache = ContiguousKVCache(model, MODES[mode], store=store, budget=1.0)
        first = generate(model, PROMPT, cache)
        turn = torch.cat([first.sequences, token_ids(6, seed=724)], dim=1)
        with SWITCHES[switch](model):
            expected = generate(model, turn, None)
            try:
                actual = generate(model, turn, cache)
            except InputError:
                assert mode == "explicit"
            else:
                assert_same_generation(actual, expected)


# ---- adapters that wait for their invocation tokens ----

INVOCATION = [5, 6, 7]
INVOKED = torch.cat([PREFIX, torch.tensor([INVOCATION]), token_ids(9, seed=725).clamp_min(8)], dim=1)


def activated() -> Any:
    torch.manual_seed(5)
    return peft.get_peft_model(build("llama"), lora(alora_invocation_tokens=INVOCATION)).eval()


@pytest.mark.parametrize("end", [73, 75, 82])
def test_a_prefix_that_ends_behind_an_invocation_is_exact_or_refused(store_path, end):
    model = activated()
    with PrefixStore(store_path) as store:
        try:
            cache = ContiguousKVCache(model, INVOKED[:, :end], store=store, budget=1.0)
        except ContiguousKVError as error:
            says = str(error)
        else:
            says = "invocation"
            assert_as_without_us(model, INVOKED, cache)
        assert "invocation" in says
        assert store.match(model, INVOKED[0]) <= 70


@pytest.mark.parametrize("mode", MODES)
def test_a_question_may_invoke_an_adapter_and_the_next_one_need_not(store_path, mode):
    model = activated()
    with PrefixStore(store_path) as store:
        for _ in range(2):
            cache = ContiguousKVCache(model, MODES[mode], store=store, budget=1.0)
            for prompt in (INVOKED, PROMPT, INVOKED, ANOTHER):
                assert_as_without_us(model, prompt, cache)
            store.flush()


@pytest.mark.parametrize("mode", MODES)
def test_an_invocation_in_the_second_turn_changes_only_what_comes_behind_it(store_path, mode):
    model = activated()
    with PrefixStore(store_path) as store:
        cache = ContiguousKVCache(model, MODES[mode], store=store, budget=1.0)
        first = generate(model, PROMPT, cache)
        turn = torch.cat([first.sequences, torch.tensor([INVOCATION]), token_ids(6, seed=726)], dim=1)
        assert_as_without_us(model, turn, cache)


# ---- adapters that are tokens ----

VIRTUAL = {
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "p-tuning": lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=16
    ),
    "prefix tuning": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
}  # fmt: skip


@pytest.mark.parametrize("kind", VIRTUAL)
@pytest.mark.parametrize("mode", MODES)
def test_virtual_tokens_before_the_prompt_are_respected_or_refused(store_path, mode, kind):
    torch.manual_seed(0)
    model = peft.get_peft_model(build("llama"), VIRTUAL[kind]()).eval()
    expected = generate(model, PROMPT, None)
    with PrefixStore(store_path) as store:
        for _ in range(2):
            try:
                cache = ContiguousKVCache(model, MODES[mode], store=store, budget=1.0)
                actual = generate(model, PROMPT, cache)
            except ContiguousKVError:
                return
            assert_same_generation(actual, expected)
            store.flush()


def test_a_forward_of_the_wrapper_and_one_of_the_wrapped_model_are_served_alike(store_path):
    model = two_adapters()
    with PrefixStore(store_path) as store:
        cache = ContiguousKVCache(model, PREFIX, store=store, budget=1.0)
        expected = forward(model, PROMPT, None)[:, 70:]
        for each in (model, model.get_base_model()):
            cache.reset()
            assert_close(forward(each, PROMPT[:, 70:], cache), expected)
