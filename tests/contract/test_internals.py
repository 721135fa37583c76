"""Canaries: what `transformers_internals` relies on, one test each, so that a new release fails here first."""

from __future__ import annotations

import inspect
import threading
import warnings

import pytest
import torch
import transformers as hf
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from hf_contiguouskv.errors import AttentionNotActiveError, UnsupportedModelError
from hf_contiguouskv.model import transformers_internals as internals

from .models import CACHE, FAMILIES, build, token_ids
from .references import assert_close, assert_same_generation, forward, generate, prefilled
from .subject import ContiguousKVCache, PrefixStore

pytestmark = pytest.mark.needs_library

PREFIX, SUFFIX = token_ids(83, seed=601), token_ids(6, seed=602)
QUESTION = torch.cat([PREFIX, SUFFIX], dim=1)


# ---- names ----


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_argument_of_a_model_is_found(tiny_model, family):
    model = tiny_model(family)
    assert internals.cache_argument(model) == internals.cache_argument() == CACHE
    assert internals.cache_argument(model.forward) == CACHE


def test_a_forward_with_the_old_name_is_called_by_it():
    def forward(input_ids, past_key_values=None):
        """As models from outside of transformers have it."""

    assert internals.cache_argument(forward) == "past_key_values"
    bound = internals.bound_arguments(inspect.signature(forward), (1,), {"past_key_values": 2})
    assert bound == {"input_ids": 1, "past_key_values": 2}


@pytest.mark.parametrize("name", internals.CACHE_NAMES)
def test_arguments_are_bound_by_name_and_a_deprecated_name_stays(name):
    def forward(input_ids, attention_mask=None, cache=None, **kwargs):
        """As 5.24 has it."""

    bound = internals.bound_arguments(inspect.signature(forward), (1,), {name: 2, "pixel_values": 3})
    assert bound == {"input_ids": 1, name: 2, "pixel_values": 3}


@pytest.mark.parametrize("mode", ["explicit", "automatic"])
@pytest.mark.parametrize("name", internals.CACHE_NAMES)
def test_both_names_work_in_generate(tiny_model, store_path, name, mode):
    if CACHE != "cache" and name != CACHE:
        pytest.skip(f"transformers {hf.__version__} does not know {name!r}")
    model = tiny_model("llama")
    expected = generate(model, QUESTION, DynamicCache(config=model.config))
    options = {"do_sample": False, "max_new_tokens": 8, "return_dict_in_generate": True, "output_logits": True}
    with PrefixStore(store_path) as store:
        for turn in range(2):
            cache = ContiguousKVCache(model, PREFIX if mode == "explicit" else None, store=store, budget=1.0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                assert_same_generation(model.generate(QUESTION, **options, **{name: cache}), expected)
            store.flush()
            assert (cache.stats.tokens_from_store > 0) is (turn == 1)
            assert cache.stats.passed_over == {}


CALLS = {
    "by name": lambda model, ids, cache, name: model(ids, **{name: cache}).logits,
    "by position": lambda model, ids, cache, name: model(ids, None, None, cache).logits,
    "the base model": lambda model, ids, cache, name: model.lm_head(model.model(ids, **{name: cache})[0]),
    "the base model by position": lambda model, ids, cache, name: model.lm_head(model.model(ids, None, None, cache)[0]),
}


@pytest.mark.parametrize("name", internals.CACHE_NAMES)
@pytest.mark.parametrize("call", CALLS)
def test_both_names_and_positions_work_in_forwards(tiny_model, store_path, name, call):
    if CACHE != "cache" and name != CACHE:
        pytest.skip(f"transformers {hf.__version__} does not know {name!r}")
    model = tiny_model("llama")
    expected = forward(model, SUFFIX, prefilled(model, PREFIX))
    with torch.no_grad(), warnings.catch_warnings(), ContiguousKVCache(model, PREFIX, budget=1.0) as cache:
        warnings.simplefilter("ignore", FutureWarning)
        assert_close(CALLS[call](model, SUFFIX, cache, name), expected)


def test_a_pipeline_passes_the_cache_on(tiny_model, store_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(128)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0")
    model = tiny_model("llama")
    ask = hf.pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    text = " ".join(f"w{i}" for i in QUESTION[0].tolist())
    expected = ask(text, max_new_tokens=8, do_sample=False)
    with PrefixStore(store_path) as store:
        for turn in range(2):
            cache = ContiguousKVCache(model, store=store, budget=1.0)
            assert ask(text, max_new_tokens=8, do_sample=False, **{CACHE: cache}) == expected
            store.flush()
            assert (cache.stats.tokens_from_store > 0) is (turn == 1)


def test_the_library_itself_never_uses_a_deprecated_name(tiny_model, store_path):
    model = tiny_model("gemma3")
    with warnings.catch_warnings(), PrefixStore(store_path) as store:
        warnings.simplefilter("error", FutureWarning)
        for prefix in (PREFIX, None, None):
            generate(model, QUESTION, ContiguousKVCache(model, prefix, store=store, budget=0.5))
            store.flush()
        ContiguousKVCache(build("llama"), PREFIX, budget="auto").close()


# ---- generate ----


class Told(internals.NotifiedByGenerate, DynamicCache):
    """A cache that is its own session."""

    def __init__(self, **options):
        super().__init__(**options)
        self.session = self
        self.calls = []

    def generate_begins(self, call):
        self.calls.append(call)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_generate_marks_a_cache_that_it_is_given_and_shows_its_prompt(tiny_model, options):
    model = tiny_model("llama")
    cache = Told(config=model.config)
    generate(model, QUESTION, cache, tokens=2, **options)
    (call,) = cache.calls
    rows = options.get("num_beams", 1)
    assert call.prompt.tolist() == QUESTION.tolist() * rows
    assert call.whole_prompt is call.prompt
    assert call.block is None
    assert call.embeddings is None
    assert cache._is_user_defined


def test_generate_shows_masks_blocks_and_embeddings(tiny_model):
    model = tiny_model("llama")
    ids, mask = token_ids(20, seed=603, rows=2), torch.ones(2, 20, dtype=torch.long)
    mask[1, :5] = 0
    cache = Told(config=model.config)
    generate(model, ids, cache, tokens=2, attention_mask=mask, prefill_chunk_size=8)
    assert cache.calls[0].attention_mask.tolist() == mask.tolist()
    assert cache.calls[0].block == 8
    cache = Told(config=model.config)
    embeddings = model.get_input_embeddings()(ids)
    model.generate(inputs_embeds=embeddings, max_new_tokens=2, **{CACHE: cache})
    assert torch.equal(cache.calls[0].embeddings, embeddings)
    assert cache.calls[0].whole_prompt is None


def test_new_tokens_alone_are_no_whole_prompt(tiny_model):
    model = tiny_model("llama")
    cache = Told(config=model.config)
    forward(model, PREFIX, cache)
    generate(model, SUFFIX, cache, tokens=2, attention_mask=torch.ones_like(QUESTION))
    assert cache.calls[0].whole_prompt is None


@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 3}], ids=["plain", "assisted"])
def test_assisted_decoding_shows_in_layers_with_a_window(tiny_model, options):
    model = tiny_model("gemma3")
    cache, seen = Told(config=model.config), []
    hook = model.register_forward_pre_hook(lambda *_: seen.append(internals.is_assisted(cache.layers)))
    try:
        generate(model, QUESTION, cache, tokens=4, **options)
    finally:
        hook.remove()
    assert set(seen) == {bool(options)}


def test_outside_of_generate_there_is_no_call():
    assert internals.running_generate() is None


@pytest.mark.parametrize("how", ["generate", "forward", "forward by position"])
def test_a_cache_in_use_on_another_thread_is_seen(how):
    model = build("llama")
    cache = DynamicCache(config=model.config)
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        assert go_on.wait(30)

    handle = model.model.layers[1].register_forward_hook(wait)
    calls = {
        "generate": lambda: model.generate(PREFIX, max_new_tokens=1, **{CACHE: cache}),
        "forward": lambda: model(PREFIX, **{CACHE: cache}),
        "forward by position": lambda: model(PREFIX, None, None, cache),
    }
    thread = threading.Thread(target=calls[how])
    thread.start()
    try:
        assert inside.wait(30)
        assert internals.in_use_on_thread(cache, thread.ident)
        assert not internals.in_use_on_thread(DynamicCache(), thread.ident)
        assert not internals.in_use_on_thread(cache, threading.get_ident())
    finally:
        go_on.set()
        thread.join()
        handle.remove()
    assert not internals.in_use_on_thread(cache, thread.ident)


# ---- attention ----


def test_an_attention_function_is_found_with_its_mask(tiny_model):
    model, seen = tiny_model("llama", "eager"), []

    def attention(module, query, key, value, attention_mask, **options):
        seen.append(attention_mask)
        return internals.attention_function("eager", module)(module, query, key, value, attention_mask, **options)

    internals.register_attention("canary_eager", attention, like="eager")
    expected = forward(model, QUESTION, None)
    internals.set_attention_implementation(model.config, "canary_eager")
    try:
        assert internals.attention_implementation(model.config) == model.config._attn_implementation == "canary_eager"
        assert torch.equal(forward(model, QUESTION, None), expected)
    finally:
        internals.set_attention_implementation(model.config, "eager")
    assert len(seen) == 4
    assert all(mask is not None for mask in seen)


def test_registering_needs_a_mask_that_exists():
    assert "sdpa" in AttentionInterface()
    assert "sdpa" in AttentionMaskInterface()


def test_a_module_without_eager_attention_is_named():
    with pytest.raises(UnsupportedModelError, match="Linear has no eager_attention_forward"):
        internals.attention_function("eager", torch.nn.Linear(1, 1))


# ---- layers and caches ----


def test_cache_layers_have_what_ours_override():
    for name in ("update", "get_mask_sizes", "get_seq_length", "reset", "reorder_cache", "offload", "prefetch"):
        assert callable(getattr(CacheLayerMixin, name)), name
    for name in ("crop", "batch_repeat_interleave", "batch_select_indices"):
        assert callable(getattr(DynamicLayer, name)), name
    assert issubclass(DynamicSlidingWindowLayer, DynamicLayer)
    known = {name for name in vars(Cache) if not name.startswith("_")}
    assert known >= {"update", "crop", "reset", "reorder_cache", "batch_repeat_interleave", "batch_select_indices"}


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_our_caches_say_that_they_can_be_cropped_and_not_compiled(tiny_model, store_path, family):
    model = tiny_model(family)
    for prefix in (None, PREFIX):
        with PrefixStore(store_path) as store, ContiguousKVCache(model, prefix, store=store) as cache:
            assert cache.is_croppable == DynamicCache(config=model.config).is_croppable
            assert not cache.is_compileable
            assert cache.get_max_length() == DynamicCache(config=model.config).get_max_length()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_models_may_pass_more_to_update_than_we_use(tiny_model, family):
    model = tiny_model(family)
    with ContiguousKVCache(model, PREFIX, budget=0.5) as cache:
        update = cache.update

        def with_more(*args, **options):
            return update(*args, **options | {"kwargs": {"anything": 1}})

        expected = forward(model, SUFFIX, cache)
        cache.reset()
        cache.update = with_more
        assert torch.equal(forward(model, SUFFIX, cache), expected)


# ---- never silent ----


def blind(monkeypatch):
    """A transformers release that passes the cache in a way that our hooks do not know."""
    monkeypatch.setattr("hf_contiguouskv.model.forward_hooks._hooked", lambda args, kwargs: False)


def test_a_model_whose_hooks_do_not_see_the_cache_is_refused_at_construction(monkeypatch):
    blind(monkeypatch)
    with pytest.raises(UnsupportedModelError, match=f"did not see the cache.*transformers.*{hf.__version__}"):
        ContiguousKVCache(build("llama"), PREFIX)


def test_a_prefix_is_never_served_to_a_forward_that_was_not_seen(tiny_model, monkeypatch):
    model = tiny_model("llama")
    with ContiguousKVCache(model, PREFIX, budget=1.0) as cache:
        blind(monkeypatch)
        with pytest.raises(AttentionNotActiveError, match="hook"):
            generate(model, QUESTION, cache)


def test_automatic_mode_says_that_it_saw_no_forward_and_answers_all_the_same(tiny_model, store_path, monkeypatch):
    model = tiny_model("llama")
    with PrefixStore(store_path) as store, ContiguousKVCache(model, store=store) as cache:
        blind(monkeypatch)
        expected = generate(model, QUESTION, DynamicCache(config=model.config))
        assert_same_generation(generate(model, QUESTION, cache), expected)
        assert any("hook" in reason for reason in cache.stats.passed_over)
        cache.reset()
        generate(model, QUESTION, cache)
        assert any("generate" in reason for reason in cache.stats.passed_over)
