"""Whatever a cache was used for before, it answers a whole prompt as the model does without it.

At `budget=1.0` there is no other right answer. An explicit prefix may refuse a prompt that does not begin with it.
"""

from __future__ import annotations

import copy
import functools
import gc
import re
from typing import Any

import pytest
import torch

from hf_contiguouskv.errors import InputError

from .models import CACHE, PAD, build
from .references import assert_close, assert_same_generation, forward, generate, prefilled
from .subject import ContiguousKVCache, PrefixStore
from .test_placed_text import text as token_ids
from .test_placed_text import vision_model

pytestmark = pytest.mark.needs_library

PREFIX = token_ids(70, seed=601)
MODES = {"explicit": PREFIX, "automatic": None}
FAMILIES = ("llama", "gemma3", "opt", "gpt-neox", "mistral-window", "qwen2.5-vl")


def ask(length: int, seed: int, document: torch.Tensor = PREFIX) -> torch.Tensor:
    """The document and a question."""
    return torch.cat([document, token_ids(length, seed)], dim=1)


def answer(model: Any, prompt: torch.Tensor, cache: Any, **options: Any) -> Any:
    # (Without `suppress_tokens`, an answer may hold padding, which `generate` would hide in the next turn.)
    return generate(model, prompt, cache, **{"tokens": 4, "suppress_tokens": [PAD]} | options)


def alone(model: Any, prompt: torch.Tensor, **options: Any) -> Any:
    """The answer without any cache of ours."""
    return answer(model, prompt, None, **options)


@functools.cache
def model_and_twin(family: str) -> tuple[Any, Any]:
    """A model, and its twin that no cache of ours ever touches."""
    make = vision_model if family.endswith("vl") else build
    return make(family), make(family)


@pytest.fixture
def new_cache(store_path):
    """Makes caches on one store, which is closed with them."""
    store = PrefixStore(store_path)
    made: list[Any] = []

    def make(model: Any, prefix: torch.Tensor | None, **options: Any) -> Any:
        made.append(ContiguousKVCache(model, prefix, store=store, **{"budget": 1.0} | options))
        return made[-1]

    yield make
    for cache in made:
        cache.close()
    store.close()


# ---- another prompt after any use ----


def assisted(model: Any) -> dict[str, Any]:
    return {"assistant_model": build("llama", layers=2, seed=9)}


USES = {
    "an answer": {},
    "beams": {"num_beams": 3},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "an assistant": assisted,
    "blocks": {"prefill_chunk_size": 16},
    "use_cache=False": {"use_cache": False},
}


def use(model: Any, cache: Any, how: str) -> None:
    if how == "a batch":
        answer(model, torch.cat([ask(9, 2), ask(9, 3)]), cache)
    elif how == "a padded batch":
        ids = torch.cat([ask(9, 2), torch.cat([torch.full((1, 4), PAD), ask(5, 3)], dim=1)])
        answer(model, ids, cache, attention_mask=(ids != PAD).long())
    elif how == "embeddings":
        embeddings = model.get_input_embeddings()(ask(9, 2)).detach()
        model.generate(inputs_embeds=embeddings, **{CACHE: cache}, do_sample=False, max_new_tokens=4)
    elif how == "forwards":
        forward(model, ask(9, 2), cache, logits_to_keep=1, attention_mask=torch.ones(1, 79))
        forward(model, token_ids(3, seed=4), cache)
    elif how == "repeated rows":
        answer(model, ask(9, 2), cache)
        cache.batch_repeat_interleave(3)
    elif how == "a crop to nothing":
        answer(model, ask(9, 2), cache)
        cache.crop(-cache.get_seq_length())
    elif how == "a copy":
        answer(model, ask(9, 2), cache)
        answer(model, ask(30, 5), copy.deepcopy(cache))
    else:
        options: Any = USES[how]
        answer(model, ask(9, 2), cache, **(options(model) if callable(options) else options))


HOW = [*USES, "a batch", "a padded batch", "embeddings", "forwards", "repeated rows", "a crop to nothing", "a copy"]
FOLLOWING = [ask(40, 6), torch.cat([ask(31, 7), ask(31, 8)])]
STRANGERS = [token_ids(150, seed=9), token_ids(120, seed=10, rows=2)]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2.5-vl"])
def test_after_any_use_longer_prompts_are_answered_from_their_first_token_on(new_cache, family, mode, how):
    model, twin = model_and_twin(family)
    if family.endswith("vl") and how == "an assistant":
        pytest.skip("transformers itself fails: the assistant gets positions of four kinds")
    for following in FOLLOWING + (STRANGERS if mode == "automatic" else []):
        cache = new_cache(model, MODES[mode])
        use(model, cache, how)
        assert_same_generation(answer(model, following, cache), alone(twin, following))


CROPS = {
    "nothing": lambda cache: 0,
    "the last token": lambda cache: -1,
    "the question": lambda cache: -min(12, cache.get_seq_length()),
    "more than half": lambda cache: -50,
    "all": lambda cache: -cache.get_seq_length(),
}


@pytest.mark.parametrize("stored", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("family", ["llama", "gpt-neox", "qwen2.5-vl"])
def test_after_any_crop_automatic_mode_takes_any_prompt(new_cache, family, crop, stored):
    model, twin = model_and_twin(family)
    for following in (token_ids(150, seed=9), token_ids(40, seed=11), token_ids(80, seed=10, rows=2), ask(9, 6)):
        if stored:
            new_cache(model, PREFIX)
        cache = new_cache(model, None)
        answer(model, ask(9, 2), cache)
        cache.crop(CROPS[crop](cache))
        assert_same_generation(answer(model, following, cache), alone(twin, following))


# ---- tokens that are passed again ----


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_use_cache_false_changes_nothing_cold_warm_and_again(new_cache, family, mode):
    model, twin = model_and_twin(family)
    for _ in range(2):
        cache = new_cache(model, MODES[mode])
        for prompt in (ask(9, 2), ask(20, 3)):
            assert_same_generation(answer(model, prompt, cache, use_cache=False), alone(twin, prompt))
        assert_same_generation(answer(model, ask(9, 2), cache), alone(twin, ask(9, 2)))
        cache.store.flush()


@pytest.mark.parametrize("assistant", [False, True], ids=["prompt lookup", "an assistant"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt-neox"])
def test_three_turns_of_assisted_decoding_cache_no_token_twice(new_cache, family, mode, assistant):
    model, twin = model_and_twin(family)
    options = assisted(model) if assistant else {"prompt_lookup_num_tokens": 3}
    for _ in range(2):
        cache, prompt = new_cache(model, MODES[mode]), ask(9, 2)
        for turn in range(3):
            expected = alone(twin, prompt, tokens=12)
            actual = answer(model, prompt, cache, tokens=12, **options)
            assert actual.sequences.tolist() == expected.sequences.tolist()
            assert cache.get_seq_length() <= expected.sequences.shape[1]
            prompt = torch.cat([expected.sequences, token_ids(7, seed=20 + turn)], dim=1)
        cache.store.flush()


WHOLE = {
    "ids alone": {},
    "ids alone, one logit": {"logits_to_keep": 1},
    "a mask": {"attention_mask": torch.ones(1, 79, dtype=torch.long)},
    "a mask, one logit": {"attention_mask": torch.ones(1, 79, dtype=torch.long), "logits_to_keep": 1},
    "positions": {"position_ids": torch.arange(79)[None]},
    "positions, nine logits": {"position_ids": torch.arange(79)[None], "logits_to_keep": 9},
}


@pytest.mark.parametrize("arguments", WHOLE)
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_a_whole_prompt_that_is_scored_on_an_explicit_prefix_is_served_or_refused(new_cache, family, rows, arguments):
    model, twin = model_and_twin(family)
    ids = ask(9, 2).repeat(rows, 1)
    options = {name: v.repeat(rows, 1) if torch.is_tensor(v) else v for name, v in WHOLE[arguments].items()}
    expected = forward(twin, ids, None, **options)
    cache, wanted = new_cache(model, PREFIX), options.get("logits_to_keep")
    if wanted is None:  # (Of every token; what is cached has none.)
        with pytest.raises(InputError) as refusal:
            forward(model, ids, cache, **options)
        numbers = set(re.findall(r"\d+", str(refusal.value)))
        assert numbers >= {"70", "79"}, "the error says what is cached and what was passed"
    else:
        assert_close(forward(model, ids, cache, **options), expected[:, -wanted:])
        assert cache.get_seq_length() == 79
    assert_same_generation(answer(model, ids, cache), alone(twin, ids))


@pytest.mark.parametrize("tokens", [70, 40])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_ids_alone_that_are_the_prefix_or_its_beginning_are_not_appended_to_it(new_cache, family, tokens):
    model, twin = model_and_twin(family)
    ids, cache = PREFIX[:, :tokens], new_cache(model, PREFIX)
    if tokens < PREFIX.shape[1]:
        with pytest.raises(InputError, match=f"{tokens} tokens were passed.*holds 70"):
            forward(model, ids, cache, logits_to_keep=1)
    else:
        assert_close(forward(model, ids, cache, logits_to_keep=1), forward(twin, ids, None)[:, -1:])
    assert_same_generation(answer(model, ask(9, 2), cache), alone(twin, ask(9, 2)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2.5-vl"])
def test_a_prompt_may_be_scored_again_and_then_answered(new_cache, family, mode):
    model, twin = model_and_twin(family)
    ids = ask(9, 2)
    cache, mask = new_cache(model, MODES[mode]), torch.ones_like(ids)
    expected = forward(twin, ids, None, logits_to_keep=1)
    for _ in range(3):
        assert_close(forward(model, ids, cache, attention_mask=mask, logits_to_keep=1), expected)
    assert_same_generation(answer(model, ids, cache), alone(twin, ids))


@pytest.mark.parametrize("strategy", [{}, {"prefill_chunk_size": 16}, {"num_beams": 2}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "mistral-window", "gpt-neox"])
def test_a_prompt_of_which_every_token_is_cached_may_be_answered(new_cache, family, mode, strategy):
    model, twin = model_and_twin(family)
    cache = new_cache(model, MODES[mode])
    forward(model, ask(9, 2), cache, attention_mask=torch.ones(1, 79), logits_to_keep=1)
    expected = alone(twin, ask(9, 2), **{name: v for name, v in strategy.items() if name == "num_beams"})
    assert answer(model, ask(9, 2), cache, **strategy).sequences.tolist() == expected.sequences.tolist()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_a_prompt_whose_mask_hides_a_token_that_the_cache_has_seen_does_not_continue_it(new_cache, family, mode):
    model, twin = model_and_twin(family)
    cache = new_cache(model, MODES[mode])
    turn = torch.cat([answer(model, ask(9, 2), cache).sequences, token_ids(5, seed=3)], dim=1)
    mask = torch.ones_like(turn)
    mask[0, 74] = 0
    expected = alone(twin, turn, attention_mask=mask)
    assert_same_generation(answer(model, turn, cache, attention_mask=mask), expected)


# ---- prompts that are shorter than the prefix ----

SHORT = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "several samples": {"do_sample": True, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "blocks": {"prefill_chunk_size": 16},
    "use_cache=False": {"use_cache": False},
}


@pytest.mark.parametrize("strategy", SHORT)
@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_a_prompt_that_is_only_the_beginning_of_the_prefix_is_answered_exactly(new_cache, family, strategy):
    model, twin = model_and_twin(family)
    cache = new_cache(model, PREFIX)
    for tokens in (70, 69, 33, 1, 54):
        torch.manual_seed(3)
        expected = alone(twin, PREFIX[:, :tokens], **SHORT[strategy])
        torch.manual_seed(3)
        actual = answer(model, PREFIX[:, :tokens], cache, **SHORT[strategy])
        assert actual.sequences.tolist() == expected.sequences.tolist()
    assert_same_generation(answer(model, ask(9, 2), cache), alone(twin, ask(9, 2)))


@pytest.mark.parametrize("blocks", [{}, {"prefill_chunk_size": 16}], ids=["at once", "in blocks"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_row_of_a_padded_batch_may_be_shorter_than_the_prefix(new_cache, family, blocks):
    model, twin = model_and_twin(family)
    rows = [ask(9, 2), PREFIX[:, :41], PREFIX]
    ids = torch.cat([torch.cat([torch.full((1, 79 - row.shape[1]), PAD), row], dim=1) for row in rows])
    mask = (ids != PAD).long()
    expected = alone(twin, ids, attention_mask=mask)
    assert_same_generation(answer(model, ids, new_cache(model, PREFIX), attention_mask=mask, **blocks), expected)


@pytest.mark.parametrize("block", [5, 16, 33])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral-window"])
def test_a_left_padded_batch_may_come_in_blocks(new_cache, family, mode, block):
    model, twin = model_and_twin(family)
    rows = [ask(23, 2), ask(7, 3)]
    ids = torch.cat([torch.cat([torch.full((1, 93 - row.shape[1]), PAD), row], dim=1) for row in rows])
    mask = (ids != PAD).long()
    expected = alone(twin, ids, attention_mask=mask)
    for _ in range(2):
        cache = new_cache(model, MODES[mode])
        assert_same_generation(answer(model, ids, cache, attention_mask=mask, prefill_chunk_size=block), expected)
        cache.store.flush()


@pytest.mark.parametrize("tokens", [70, 60, 20])
def test_embeddings_of_no_more_tokens_than_the_prefix_are_answered_exactly_or_refused(new_cache, tokens):
    model, twin = model_and_twin("llama")
    embeddings = twin.get_input_embeddings()(PREFIX[:, :tokens]).detach()
    options = {"inputs_embeds": embeddings, "do_sample": False, "max_new_tokens": 6}
    expected = twin.generate(**options)
    try:
        actual = model.generate(**options, **{CACHE: new_cache(model, PREFIX)})
    except InputError:
        return
    assert actual.tolist() == expected.tolist()


# ---- a seam between prefix and question ----


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt", "qwen2.5-vl"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_prefix_may_be_cropped_at_the_seam_for_all_questions_that_follow(new_cache, family, tokens):
    model, twin = model_and_twin(family)
    cache = new_cache(model, PREFIX)
    seam = torch.cat([PREFIX[:, :-tokens], 118 - PREFIX[:, -tokens:]], dim=1)
    for seed in (2, 3, 4):
        prompt = ask(9, seed, seam)
        if seed == 2:
            with pytest.raises(InputError, match=re.escape(f"crop({-tokens})")):
                answer(model, prompt, cache)
            cache.crop(-tokens)
        assert_same_generation(answer(model, prompt, cache), alone(twin, prompt))
    assert cache.stats.prefix_tokens == 70 - tokens
    cache.reset()
    assert_same_generation(answer(model, ask(9, 2), cache), alone(twin, ask(9, 2)))
    assert cache.stats.prefix_tokens == 70


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_prefix_that_is_cropped_away_stays_away_until_reset(new_cache, family):
    model, twin = model_and_twin(family)
    cache = new_cache(model, PREFIX)
    cache.crop(-70)
    for prompt in (token_ids(90, seed=2), token_ids(30, seed=3, rows=2), token_ids(60, seed=4), ask(9, 5)):
        assert_same_generation(answer(model, prompt, cache), alone(twin, prompt))
    cache.reset()
    with pytest.raises(InputError):
        answer(model, token_ids(90, seed=2), cache)
    assert_same_generation(answer(model, ask(9, 5), cache), alone(twin, ask(9, 5)))


# ---- copies, gradients ----


def bytes_of_tensors() -> int:
    gc.collect()
    # (Plain ones: what dynamo leaves behind of other tests has no memory.)
    tensors = [each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("budget", [0.5, 1.0])
@pytest.mark.parametrize("mode", MODES)
def test_copies_of_a_used_cache_share_its_prefix(new_cache, mode, budget, rows):
    model, _ = model_and_twin("llama")
    document = token_ids(800, seed=602)
    one = int(800 * budget) * 4 * 2 * 2 * 16 * 4
    new_cache(model, document)
    cache = new_cache(model, document if mode == "explicit" else None, budget=budget)
    answer(model, torch.cat([document.repeat(rows, 1), token_ids(8, seed=2, rows=rows)], dim=1), cache)
    before = bytes_of_tensors()
    copies = [copy.deepcopy(cache) for _ in range(20)]
    assert bytes_of_tensors() - before < 10 * rows * one
    step = token_ids(2, seed=3, rows=rows)
    expected = forward(model, step, cache)
    for each in copies[::7]:
        assert_close(forward(model, step, each), expected)
        each.close()


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt-neox"])
def test_the_loss_of_two_forwards_has_the_gradients_of_a_prefilled_cache(new_cache, family):
    model, _ = model_and_twin(family)
    gradients = []
    for cache in (prefilled(model, PREFIX), new_cache(model, PREFIX)):
        losses = [model(token_ids(n, seed=n), **{CACHE: cache}).logits.logsumexp(-1).sum() for n in (5, 3)]
        sum(losses).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert gradients[1].keys() == gradients[0].keys()
    for name, gradient in gradients[1].items():
        assert_close(gradient, gradients[0][name], relative=1e-3, absolute=1e-4)
