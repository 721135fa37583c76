"""Tokens of a text stand at positions 0, 1, 2, ..., whatever image the model saw before.

Vision-language models of the Qwen kind place the tokens behind an image earlier than their number says, and remember
by how much (`rope_deltas`) until the next call. That must not reach a text, its prefix, or what is stored of it. And a
prefix that is longer than the model has positions for is not accepted as if nothing were wrong.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import pytest
import torch
import transformers as hf

from hf_contiguouskv.errors import InputError

from .models import CACHE, PAD, VOCABULARY, quiet
from .references import assert_close, assert_same_generation, assert_same_rows, generate, prefilled
from .subject import ContiguousKVCache, PrefixStore

pytestmark = pytest.mark.needs_library

IMAGE, VIDEO, VISION_START, VISION_END = 120, 121, 118, 119
_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
    "pad_token_id": PAD,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
}
_VISION: dict[str, Any] = {
    "depth": 2,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}


def _qwen2_vl() -> Any:
    vision = _VISION | {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    return hf.Qwen2VLForConditionalGeneration(hf.Qwen2VLConfig(text_config=_TEXT, vision_config=vision, **_TOKENS))


def _qwen2_5_vl() -> Any:
    vision = _VISION | {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64}
    vision |= {"window_size": 16, "fullatt_block_indexes": [1]}
    return hf.Qwen2_5_VLForConditionalGeneration(
        hf.Qwen2_5_VLConfig(text_config=_TEXT, vision_config=vision, **_TOKENS)
    )


KINDS = {"qwen2-vl": _qwen2_vl, "qwen2.5-vl": _qwen2_5_vl}


def vision_model(kind: str) -> Any:
    """A fresh tiny model that has seen no image yet; two of a kind have the same weights."""
    torch.manual_seed(0)
    model = KINDS[kind]().eval()
    quiet(model)
    return model


def text(length: int, seed: int, rows: int = 1) -> torch.Tensor:
    """`[rows, length]` ids without placeholders."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 115, (rows, length), generator=generator)


def see_an_image(model: Any) -> None:
    """Answer a prompt with an image, after which the model remembers that text stands earlier than it is."""
    height, width = 8, 12
    image = torch.tensor([[VISION_START] + [IMAGE] * (height * width // 4) + [VISION_END]])
    prompt = torch.cat([text(5, 2), image, text(6, 3)], dim=1)
    pixels = torch.randn(height * width, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(3))
    generate(
        model,
        prompt,
        None,
        tokens=3,
        pixel_values=pixels,
        image_grid_thw=torch.tensor([[1, height, width]]),
        mm_token_type_ids=(prompt == IMAGE).int(),
    )


DOCUMENT = text(70, 8)
PROMPT = torch.cat([DOCUMENT, text(9, 4)], dim=1)
ANOTHER = torch.cat([DOCUMENT, text(30, 5)], dim=1)


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def model(kind) -> Any:
    return vision_model(kind)


untouched = functools.cache(vision_model)


def right(kind: str, prompt: torch.Tensor) -> Any:
    """The answer of a model that never sees an image."""
    return generate(untouched(kind), prompt, None)


# ---- what is stored ----


@pytest.mark.parametrize("block", [16, 4096])
@pytest.mark.parametrize("stored", [0, 40], ids=["nothing stored", "a beginning stored"])
def test_a_prefix_that_is_computed_after_an_image_is_stored_as_the_text_that_it_is(
    model, kind, store_path, block, stored
):
    with PrefixStore(store_path) as store:
        if stored:
            ContiguousKVCache(vision_model(kind), DOCUMENT[:, :stored], store=store).close()
        see_an_image(model)
        cache = ContiguousKVCache(model, DOCUMENT, store=store, budget=1.0, prefill_block=block)
        assert cache.stats.tokens_prefilled == 70 - stored
        assert_same_generation(generate(model, PROMPT, cache), right(kind, PROMPT))
        fresh = vision_model(kind)
        served = ContiguousKVCache(fresh, DOCUMENT, store=store, budget=1.0)
        assert served.stats.tokens_from_store == 70
        assert_same_generation(generate(fresh, PROMPT, served), right(kind, PROMPT))


def test_automatic_mode_stores_a_prompt_after_an_image_as_the_text_that_it_is(model, kind, store_path):
    with PrefixStore(store_path) as store:
        for each in (model, vision_model(kind)):
            see_an_image(model)
            cache = ContiguousKVCache(each, store=store, budget=1.0)
            assert_same_generation(generate(each, PROMPT, cache), right(kind, PROMPT))
            store.flush()
        assert cache.stats.tokens_from_store >= 64


# ---- what is answered ----

MODES = {"explicit": DOCUMENT, "automatic": None}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stored", [False, True], ids=["cold", "warm"])
def test_an_image_between_two_questions_does_not_move_the_second(model, kind, store_path, mode, stored):
    with PrefixStore(store_path) as store:
        if stored:
            ContiguousKVCache(model, DOCUMENT, store=store).close()
        cache = ContiguousKVCache(model, MODES[mode], store=store, budget=1.0)
        for prompt in (PROMPT, ANOTHER, PROMPT):
            assert_same_generation(generate(model, prompt, cache), right(kind, prompt))
            see_an_image(model)


@pytest.mark.parametrize("mode", MODES)
def test_an_image_between_two_turns_does_not_move_the_second(model, kind, store_path, mode):
    with PrefixStore(store_path) as store:
        cache = ContiguousKVCache(model, MODES[mode], store=store, budget=1.0)
        first = generate(model, PROMPT, cache)
        see_an_image(model)
        turn = torch.cat([first.sequences, text(7, 6)], dim=1)
        assert_same_generation(generate(model, turn, cache), right(kind, turn))


FORWARDS = {
    "ids alone": lambda new, whole: {},
    "a mask over all": lambda new, whole: {"attention_mask": torch.ones_like(whole)},
    "positions": lambda new, whole: {"position_ids": torch.arange(whole.shape[1])[None, -new.shape[1] :]},
}


@pytest.mark.parametrize("arguments", FORWARDS)
def test_an_image_does_not_move_the_tokens_of_later_forwards(model, kind, store_path, arguments):
    with PrefixStore(store_path) as store:
        cache = ContiguousKVCache(model, DOCUMENT, store=store, budget=1.0)
        with torch.no_grad():
            expected = untouched(kind)(PROMPT).logits[:, 70:]
        actual = []
        for begin, end in ((70, 75), (75, 76), (76, 79)):
            see_an_image(model)
            new, whole = PROMPT[:, begin:end], PROMPT[:, :end]
            with torch.no_grad():
                actual.append(model(new, **{CACHE: cache}, **FORWARDS[arguments](new, whole)).logits)
        assert_close(torch.cat(actual, dim=1), expected)


def test_an_image_before_a_prompt_does_not_move_later_steps_cold_or_warm(model, kind, store_path):
    with torch.no_grad(), PrefixStore(store_path) as store:
        expected = untouched(kind)(ANOTHER).logits[:, 79:]
        for _ in range(2):
            see_an_image(model)
            cache = ContiguousKVCache(model, store=store, budget=1.0)
            model(ANOTHER[:, :80], **{CACHE: cache}, logits_to_keep=1)
            steps = [model(ANOTHER[:, at : at + 1], **{CACHE: cache}).logits for at in range(80, 85)]
            assert_close(torch.cat(steps, dim=1), expected[:, 1:6])
            store.flush()


@pytest.mark.parametrize("mode", MODES)
def test_a_left_padded_batch_after_an_image_is_placed_row_by_row(model, kind, store_path, mode):
    rows = [PROMPT, ANOTHER]
    width = ANOTHER.shape[1]
    ids = torch.cat([torch.cat([torch.full((1, width - row.shape[1]), PAD), row], dim=1) for row in rows])
    with PrefixStore(store_path) as store:
        for _ in range(2):
            cache = ContiguousKVCache(model, MODES[mode], store=store, budget=1.0)
            see_an_image(model)
            output = generate(model, ids, cache, attention_mask=(ids != PAD).long())
            assert_same_rows(output, [right(kind, row) for row in rows])
            cache.close()
            store.flush()


# ---- a used cache ----

ROWS = {1: PROMPT, 2: text(60, 9, rows=2), 3: text(85, 10, rows=3)}


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 3), (3, 2)])
def test_an_automatic_cache_takes_a_prompt_with_another_number_of_rows(model, kind, store_path, before, after):
    with PrefixStore(store_path) as store:
        cache = ContiguousKVCache(model, store=store, budget=1.0)
        for rows in (before, after):
            assert_same_generation(generate(model, ROWS[rows], cache), right(kind, ROWS[rows]))


@pytest.mark.parametrize("stored", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("mode", MODES)
def test_one_cache_answers_batches_of_several_sizes(model, kind, store_path, mode, stored):
    with PrefixStore(store_path) as store:
        if stored:
            ContiguousKVCache(model, DOCUMENT, store=store).close()
        cache = ContiguousKVCache(model, MODES[mode], store=store, budget=1.0)
        for rows in (2, 3, 1, 2):
            prompt = torch.cat([DOCUMENT.repeat(rows, 1), text(12, seed=20 + rows, rows=rows)], dim=1)
            assert_same_generation(generate(model, prompt, cache), right(kind, prompt))


@pytest.mark.parametrize("mode", [*MODES, "a DynamicCache"])
def test_a_batch_after_another_caches_larger_one_fails_in_transformers_as_with_any_cache(model, kind, store_path, mode):
    """`generate` adds the other batch's `rope_deltas` to its positions before any cache is asked. `reset` helps."""
    prompt = torch.cat([DOCUMENT.repeat(2, 1), text(12, seed=22, rows=2)], dim=1)
    with PrefixStore(store_path) as store:
        if mode == "a DynamicCache":
            cache = prefilled(model, DOCUMENT, 2)
        else:
            cache = ContiguousKVCache(model, MODES[mode], store=store, budget=1.0)
            generate(model, PROMPT, cache)
        generate(model, ROWS[3], None)
        with pytest.raises(RuntimeError, match="size of tensor"):
            generate(model, prompt, cache)
        cache.reset()
        assert_same_generation(generate(model, prompt, cache), right(kind, prompt))


def test_a_batch_may_follow_a_larger_one_of_embeddings(model, kind, store_path):
    with PrefixStore(store_path) as store:
        cache = ContiguousKVCache(model, store=store, budget=1.0)
        embeddings = model.get_input_embeddings()(ROWS[3]).detach()
        model.generate(inputs_embeds=embeddings, **{CACHE: cache}, do_sample=False, max_new_tokens=3)
        assert_same_generation(generate(model, ROWS[2], cache), right(kind, ROWS[2]))


@pytest.mark.parametrize("strategy", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_one_greedy_answer_may_follow_several_rows_of_one_prompt(model, kind, store_path, mode, strategy):
    with PrefixStore(store_path) as store:
        cache = ContiguousKVCache(model, MODES[mode], store=store, budget=1.0)
        generate(model, PROMPT, cache, **strategy)
        assert_same_generation(generate(model, ANOTHER, cache), right(kind, ANOTHER))


def test_a_batch_may_follow_a_prefix_that_was_cropped_away(model, kind, store_path):
    with PrefixStore(store_path) as store:
        cache = ContiguousKVCache(model, DOCUMENT, store=store, budget=1.0)
        generate(model, PROMPT, cache)
        cache.crop(-cache.get_seq_length())
        for rows in (3, 1):
            assert_same_generation(generate(model, ROWS[rows], cache), right(kind, ROWS[rows]))


# ---- positions that a model does not have ----

LEARNED = {
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    ),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=96,
            word_embed_proj_dim=64,
            max_position_embeddings=64,
        )
    ),
}


@pytest.mark.parametrize("name", LEARNED)
def test_a_prefix_longer_than_a_model_has_positions_is_refused_with_both_numbers(name, store_path):
    model = LEARNED[name]().eval()
    with PrefixStore(store_path) as store:
        with pytest.raises(InputError, match=r"70 tokens.*64"):
            ContiguousKVCache(model, DOCUMENT, store=store)
        assert store.entries() == []
        ContiguousKVCache(model, DOCUMENT[:, :64], store=store).close()


def test_a_prefix_longer_than_a_model_was_trained_for_is_served_exactly_and_warned_of(store_path, caplog):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(
        hf.LlamaConfig(vocab_size=VOCABULARY, intermediate_size=96, max_position_embeddings=64, **sizes)
    ).eval()
    quiet(model)
    expected = generate(model, PROMPT, None)
    with PrefixStore(store_path) as store:
        with caplog.at_level(logging.WARNING, "hf_contiguouskv"):
            cache = ContiguousKVCache(model, DOCUMENT, store=store, budget=1.0)
        assert any("70" in message and "64" in message for message in caplog.messages)
        assert_same_generation(generate(model, PROMPT, cache), expected)
