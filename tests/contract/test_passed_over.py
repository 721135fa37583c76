"""What automatic mode serves, and that it says why it passes a prompt over: in `stats`, by reason, and in the log."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from hf_contiguouskv.session import unserved

from .models import CACHE, PAD, VOCABULARY, build, quiet, token_ids
from .references import assert_close, assert_same_generation, forward, generate
from .subject import ContiguousKVCache, PrefixStore
from .test_placed_text import IMAGE, VISION_END, VISION_START, see_an_image, vision_model
from .test_placed_text import text as text_ids

pytestmark = pytest.mark.needs_library

DOCUMENT = text_ids(96, seed=751)
PROMPT = torch.cat([DOCUMENT, text_ids(9, seed=752)], dim=1)


def assert_served_the_second_time(model: Any, path: Any, prompt: torch.Tensor = PROMPT, **options: Any) -> None:
    """Both times the answer is exact, nothing is passed over, and the second one comes from the store."""
    expected = generate(model, prompt, None, **options)
    with PrefixStore(path) as store:
        for _ in range(2):
            cache = ContiguousKVCache(model, store=store, budget=1.0)
            assert_same_generation(generate(model, prompt, cache, **options), expected)
            assert cache.stats.passed_over == {}
            store.flush()
        assert cache.stats.tokens_from_store >= 80


# ---- what is served ----


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    letters = {letter: at for at, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet())[:VOCABULARY])}
    tokenizer = Tokenizer(models.BPE(letters, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("more", [{}, {"num_beams": 2}, {"use_cache": True}, {"prefill_chunk_size": 200}], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_stop_strings_do_not_keep_a_prompt_from_being_served(tiny_model, store_path, tokenizer, family, more):
    assert_served_the_second_time(tiny_model(family), store_path, stop_strings=["zz"], tokenizer=tokenizer, **more)


HARMLESS = {
    "return_dict": {"return_dict": True},
    "a custom criterion": {"stopping_criteria": hf.StoppingCriteriaList([lambda ids, scores, **_: False])},
    "a processor": {"logits_processor": hf.LogitsProcessorList([lambda ids, scores: scores])},
    "a mask of ones": {"attention_mask": torch.ones_like(PROMPT)},
    "position ids": {"position_ids": torch.arange(PROMPT.shape[1])[None]},
    "synced_gpus": {"synced_gpus": False},
}


@pytest.mark.parametrize("arguments", HARMLESS)
def test_arguments_that_leave_keys_and_values_alone_do_not_keep_a_prompt_from_being_served(
    tiny_model, store_path, arguments
):
    try:
        generate(tiny_model("llama"), PROMPT, None, **HARMLESS[arguments])
    except (ValueError, TypeError) as error:
        pytest.skip(f"this transformers does not take it: {error}")
    assert_served_the_second_time(tiny_model("llama"), store_path, **HARMLESS[arguments])


_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "initializer_range": 0.2,
    "pad_token_id": PAD,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def gemma3_vl() -> Any:
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    text = _TEXT | {"head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 16, "layer_types": types}
    return hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(
            text_config=text,
            vision_config=_VISION,
            image_token_index=IMAGE,
            boi_token_index=VISION_START,
            eoi_token_index=VISION_END,
            mm_tokens_per_image=4,
        )
    )


def llava() -> Any:
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            text_config=hf.LlamaConfig(**_TEXT), vision_config=hf.CLIPVisionConfig(**_VISION), image_token_index=IMAGE
        )
    )


SEEING: dict[str, Callable[[], Any]] = {
    "gemma3": gemma3_vl,
    "llava": llava,
    "qwen2-vl": lambda: vision_model("qwen2-vl"),
    "qwen2.5-vl": lambda: vision_model("qwen2.5-vl"),
}


def seeing(name: str) -> Any:
    torch.manual_seed(0)
    model = SEEING[name]().eval()
    quiet(model)
    return model


@pytest.mark.parametrize("arguments", ["ids alone", "a mask", "token types"])
@pytest.mark.parametrize("name", SEEING)
def test_text_prompts_of_models_that_see_are_served(store_path, name, arguments):
    model, options = seeing(name), {}
    if arguments == "a mask":
        options = {"attention_mask": torch.ones_like(PROMPT)}
    elif arguments == "token types":
        # What the processors of these models return with every prompt.
        types = {"gemma3": "token_type_ids", "qwen2-vl": "mm_token_type_ids", "qwen2.5-vl": "mm_token_type_ids"}
        if name not in types:
            pytest.skip("its processor returns none")
        options = {"attention_mask": torch.ones_like(PROMPT), types[name]: torch.zeros_like(PROMPT)}
    assert_served_the_second_time(model, store_path, **options)


@pytest.mark.parametrize("name", ["qwen2-vl", "qwen2.5-vl"])
def test_a_text_prompt_is_served_after_an_image(store_path, name):
    model = vision_model(name)
    see_an_image(model)
    assert_served_the_second_time(model, store_path)


@pytest.mark.parametrize("name", ["qwen2.5-vl"])
def test_a_text_prompt_on_a_used_cache_is_served_after_an_image(store_path, name):
    model = vision_model(name)
    with PrefixStore(store_path) as store:
        cache = ContiguousKVCache(model, store=store, budget=1.0)
        generate(model, PROMPT, cache)
        store.flush()
        see_an_image(model)
        another = torch.cat([DOCUMENT, text_ids(20, seed=753)], dim=1)
        assert_same_generation(generate(model, another, cache), generate(vision_model(name), another, None))
        assert cache.stats.passed_over == {}
        assert cache.stats.tokens_from_store >= 80


# ---- equal rows ----


class Widths:
    """The `(rows, tokens)` of every forward that reaches the embeddings."""

    def __init__(self, model: Any) -> None:
        self.shapes: list[tuple[int, int]] = []
        self.handle = model.get_input_embeddings().register_forward_hook(
            lambda module, args, output: self.shapes.append(tuple(output.shape[:2]))
        )

    def __enter__(self) -> Widths:
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()

    @property
    def of_the_prompt(self) -> tuple[int, int]:
        return max(self.shapes, key=lambda shape: shape[1])


MANY = {
    "beams": {"num_beams": 4},
    "samples": {"do_sample": True, "num_return_sequences": 3},
    "sampled beams": {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
    "beams of equal rows": {"num_beams": 2},
}


@pytest.mark.parametrize("strategy", MANY)
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt-neox", "opt"])
def test_equal_rows_of_a_cold_prompt_are_computed_once(tiny_model, store_path, family, strategy):
    model = tiny_model(family)
    prompt = PROMPT.repeat(2, 1) if strategy == "beams of equal rows" else PROMPT
    torch.manual_seed(4)
    expected = generate(model, prompt, None, **MANY[strategy])
    with PrefixStore(store_path) as store:
        torch.manual_seed(4)
        cache = ContiguousKVCache(model, store=store, budget=1.0)
        with Widths(model) as seen:
            actual = generate(model, prompt, cache, **MANY[strategy])
        assert seen.of_the_prompt == (1, PROMPT.shape[1])
        assert actual.sequences.tolist() == expected.sequences.tolist()
        for ours, theirs in zip(actual.logits, expected.logits, strict=True):
            assert_close(ours, theirs)
        store.flush()
        assert store.match(model, PROMPT[0]) >= 96


@pytest.mark.parametrize("output", ["output_hidden_states", "output_attentions"])
def test_equal_rows_are_all_computed_where_the_caller_looks_inside(store_path, output):
    model = build("llama", "eager")
    expected = generate(model, PROMPT, None, num_beams=3, **{output: True})
    with PrefixStore(store_path) as store:
        cache = ContiguousKVCache(model, store=store, budget=1.0)
        actual = generate(model, PROMPT, cache, num_beams=3, **{output: True})
        field = output.removeprefix("output_")
        for ours, theirs in zip(actual[field][0], expected[field][0], strict=True):
            assert_close(ours, theirs)


# ---- what is passed over ----


def hole(prompt: torch.Tensor) -> torch.Tensor:
    mask = torch.ones_like(prompt)
    mask[0, 40] = 0
    return mask


PASSED_OVER: dict[str, tuple[str, Callable[[Any, Any], Any]]] = {
    "embeddings": (
        "embeddings",
        lambda model, cache: model.generate(
            inputs_embeds=model.get_input_embeddings()(PROMPT).detach(), **{CACHE: cache}, max_new_tokens=3
        ),
    ),
    "a hole in the mask": (
        "mask",
        lambda model, cache: generate(model, PROMPT, cache, attention_mask=hole(PROMPT)),
    ),
    "positions that do not count": (
        "position",
        lambda model, cache: forward(model, PROMPT, cache, position_ids=torch.arange(5, 110)[None], logits_to_keep=1),
    ),
    "training": ("training", lambda model, cache: forward(model.train(), PROMPT, cache)),
    "all logits": ("logits", lambda model, cache: forward(model, PROMPT, cache)),
    "hidden states": (
        "hidden states",
        lambda model, cache: generate(model, PROMPT, cache, output_hidden_states=True),
    ),
}


@pytest.mark.parametrize("reason", PASSED_OVER)
def test_every_prompt_that_is_passed_over_is_counted_by_reason_and_logged_once(store_path, reason, caplog, monkeypatch):
    model = build("llama")
    word, call = PASSED_OVER[reason]
    monkeypatch.setattr(unserved, "_logged", set())
    with PrefixStore(store_path) as store, caplog.at_level(logging.WARNING, "hf_contiguouskv"):
        for _ in range(2):
            cache = ContiguousKVCache(model, store=store, budget=1.0)
            call(model, cache)
            ((text, times),) = cache.stats.passed_over.items()
            assert word in text
            assert times == 1
            assert cache.stats.as_dict()["passed_over"] == {text: 1}
            model.eval()
        logged = [message for message in caplog.messages if text in message]
        assert len(logged) == 1
        counted = store.stats.as_dict().get("passed_over")
        assert counted is None or counted[text] == 2


def test_a_new_request_counts_anew(store_path):
    model = build("llama")
    with PrefixStore(store_path) as store:
        cache = ContiguousKVCache(model, store=store, budget=1.0)
        generate(model, PROMPT, cache, attention_mask=hole(PROMPT))
        assert sum(cache.stats.passed_over.values()) == 1
        cache.reset()
        assert cache.stats.passed_over == {}
        generate(model, PROMPT, cache)
        assert cache.stats.passed_over == {}


def test_an_explicit_prefix_and_a_plain_cache_pass_nothing_over(store_path):
    model = build("llama")
    with PrefixStore(store_path) as store:
        for cache in (ContiguousKVCache(model, DOCUMENT, store=store, budget=1.0), ContiguousKVCache(model)):
            generate(model, PROMPT, cache)
            assert cache.stats.passed_over == {}


def test_one_row_that_differs_from_the_others_is_not_taken_for_equal(tiny_model, store_path):
    model = tiny_model("llama")
    ids = PROMPT.repeat(3, 1)
    ids[2, -1] = 129 - ids[2, -1].clamp(3, 126)
    expected = generate(model, ids, None)
    with PrefixStore(store_path) as store:
        for _ in range(2):
            cache = ContiguousKVCache(model, store=store, budget=1.0)
            assert_same_generation(generate(model, ids, cache), expected)
            assert cache.stats.passed_over == {}
            store.flush()
        assert cache.stats.tokens_from_store >= 80
        step = token_ids(2, seed=3, rows=3)
        whole = torch.cat([expected.sequences[:, :-1], step], dim=1)
        assert_close(forward(model, step, cache), forward(model, whole, None)[:, -2:])
