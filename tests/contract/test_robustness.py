"""After a failure, a damaged file, another question or an unusual call, a cache answers rightly or says what to do."""

from __future__ import annotations

import copy
import gc
import itertools
from contextlib import closing, contextmanager

import pytest
import torch
from transformers import DynamicCache

from hf_contiguouskv import AttentionMass, ContiguousKVConfig, ReadOptions
from hf_contiguouskv.errors import InputError
from hf_contiguouskv.store.local_disk import FileBlob
from hf_contiguouskv.store.segment import Segment

from .models import CACHE, full_attention_layers, token_ids
from .references import PrunedReference, assert_close, assert_same_generation, forward, generate, prefilled
from .subject import ContiguousKVCache, PrefixStore, prefix_from_disk, write_prefix

pytestmark = pytest.mark.needs_library

PREFIX = token_ids(83, seed=801)
SUFFIX = token_ids(6, seed=802)
QUESTION = torch.cat([PREFIX, SUFFIX], dim=1)
STEP = token_ids(1, seed=803)


def answer(model, ids, cache, **options):
    return generate(model, ids, cache, tokens=4, **options)


def exact(model, ids):
    return answer(model, ids, DynamicCache(config=model.config))


MODES = {
    "explicit": lambda model, **options: ContiguousKVCache(model, PREFIX, **options),
    "automatic": ContiguousKVCache,
}


# ---- failures inside a forward ----


class MishapError(RuntimeError):
    pass


@contextmanager
def one_failure(model, forwards: int = 0):
    """The forward after the next `forwards` fails in the middle of the model; its caller sees `MishapError`."""
    left = [forwards]

    def fail(module, args, output):
        left[0] -= 1
        if left[0] == -1:
            raise MishapError

    handle = model.model.layers[2].mlp.register_forward_hook(fail)
    try:
        with pytest.raises(MishapError):
            yield
    finally:
        handle.remove()


@pytest.mark.parametrize("budget", [0.3, 1.0])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_request_whose_first_forward_failed_starts_over(tiny_model, store_path, family, mode, budget):
    model = tiny_model(family)
    write_prefix(model, PREFIX, store_path)
    with PrefixStore(store_path) as store:
        expected = answer(model, QUESTION, MODES[mode](model, store=store, budget=budget))
        cache = MODES[mode](model, store=store, budget=budget)
        with one_failure(model):
            answer(model, QUESTION, cache)
        assert_same_generation(answer(model, QUESTION, cache), expected)
        store.flush()
        assert store.inner.background_failures == 0


@pytest.mark.parametrize("budget", [0.3, 1.0])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_raw_forward_that_failed_may_be_repeated(tiny_model, store_path, family, budget):
    model = tiny_model(family)
    with prefix_from_disk(model, PREFIX, store_path, budget=budget) as cache:
        expected = [forward(model, ids, cache) for ids in (SUFFIX, STEP)]
        cache.reset()
        with one_failure(model):
            forward(model, SUFFIX, cache)
        for ids, logits in zip((SUFFIX, STEP), expected, strict=True):
            assert_close(forward(model, ids, cache), logits)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_prompt_that_failed_before_anything_was_stored_starts_over(tiny_model, store_path, family):
    model = tiny_model(family)
    with PrefixStore(store_path) as store:
        cache = ContiguousKVCache(model, store=store, budget=0.3)
        with one_failure(model):
            answer(model, QUESTION, cache)
        assert_same_generation(answer(model, QUESTION, cache), exact(model, QUESTION))
        store.flush()
        assert store.match(model, PREFIX[0]) >= 80
        assert store.inner.background_failures == 0
        again = ContiguousKVCache(model, store=store, budget=1.0)
        assert_same_generation(answer(model, QUESTION, again), exact(model, QUESTION))


@pytest.mark.parametrize("budget", [0.3, 1.0])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_failure_in_mid_answer_asks_for_a_reset(tiny_model, store_path, family, mode, budget):
    model = tiny_model(family)
    write_prefix(model, PREFIX, store_path)
    with PrefixStore(store_path) as store:
        cache = MODES[mode](model, store=store, budget=budget)
        with one_failure(model, forwards=2):
            answer(model, QUESTION, cache)
        with pytest.raises(InputError, match="reset"):
            forward(model, STEP, cache)
        cache.reset()
        expected = answer(model, QUESTION, MODES[mode](model, store=store, budget=budget))
        assert_same_generation(answer(model, QUESTION, cache), expected)


def test_a_generate_that_failed_before_its_first_forward_leaves_no_trace(tiny_model, store_path, monkeypatch):
    model = tiny_model("llama")
    write_prefix(model, PREFIX, store_path)
    expected = forward(model, QUESTION, DynamicCache(config=model.config))

    def fail(*args, **options):
        raise MishapError

    with PrefixStore(store_path) as store:
        cache = ContiguousKVCache(model, store=store, budget=1.0)
        with monkeypatch.context() as patch:
            patch.setattr(model, "_prefill", fail)
            with pytest.raises(MishapError):
                answer(model, QUESTION, cache)
        actual = forward(model, QUESTION, cache)
        assert actual.shape == expected.shape
        assert_close(actual, expected)


# ---- masks ----


def hole_at(column: int) -> torch.Tensor:
    mask = torch.ones_like(QUESTION)
    mask[0, column] = 0
    return mask


@pytest.mark.parametrize("column", [16, 40])
@pytest.mark.parametrize(("call", "ids"), [(forward, SUFFIX), (answer, QUESTION)], ids=["forward", "generate"])
def test_a_hole_in_a_pruned_prefix_is_refused(tiny_model, store_path, call, ids, column):
    model = tiny_model("llama")
    with prefix_from_disk(model, PREFIX, store_path, budget=0.3) as cache, pytest.raises(InputError):
        call(model, ids, cache, attention_mask=hole_at(column))


@pytest.mark.parametrize("column", [16, 70])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_hole_in_a_whole_prefix_is_respected(tiny_model, store_path, family, column):
    model, mask = tiny_model(family), hole_at(column)
    expected = forward(model, SUFFIX, prefilled(model, PREFIX), attention_mask=mask)
    assert not torch.equal(expected, forward(model, SUFFIX, prefilled(model, PREFIX)))
    with prefix_from_disk(model, PREFIX, store_path, budget=1.0) as cache:
        assert_close(forward(model, SUFFIX, cache, attention_mask=mask), expected)


# ---- another question on the same cache ----

AFTER_ONE_ANSWER = QUESTION.shape[1] + 3
"""Tokens in a cache that has answered QUESTION: the last of the four is not cached."""
NEXT = {
    "shorter": torch.cat([PREFIX, token_ids(2, seed=804)], dim=1),
    "as long": torch.cat([PREFIX, token_ids(AFTER_ONE_ANSWER - 83, seed=805)], dim=1),
    "longer": torch.cat([PREFIX, token_ids(30, seed=806)], dim=1),
    "the same": QUESTION,
    "the same beginning": torch.cat([QUESTION[:, :86], token_ids(25, seed=807)], dim=1),
}


@pytest.mark.parametrize("question", NEXT)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("family", "budget"), [("llama", 0.3), ("llama", 1.0), ("gemma3", 0.3)])
def test_another_question_needs_no_reset(tiny_model, store_path, family, mode, question, budget):
    model, ids = tiny_model(family), NEXT[question]
    write_prefix(model, PREFIX, store_path)
    with PrefixStore(store_path) as store:
        cache = MODES[mode](model, store=store, budget=budget)
        expected = answer(model, ids, MODES[mode](model, store=store, budget=budget))
        answer(model, QUESTION, cache)
        assert cache.get_seq_length() == AFTER_ONE_ANSWER
        assert_same_generation(answer(model, ids, cache), expected)
        if budget == 1.0:
            assert_same_generation(expected, exact(model, ids))


def test_an_automatic_cache_takes_a_prompt_with_another_beginning(tiny_model, store_path):
    model = tiny_model("llama")
    write_prefix(model, PREFIX, store_path)
    with PrefixStore(store_path) as store:
        cache = ContiguousKVCache(model, store=store, budget=0.3)
        for tokens in (60, 96, 150):
            answer(model, QUESTION, cache)
            stranger = token_ids(tokens, seed=810 + tokens)
            assert_same_generation(answer(model, stranger, cache), exact(model, stranger))
            assert cache.stats.tokens_from_store == 0


def test_a_failed_question_is_not_remembered(tiny_model, store_path):
    model = tiny_model("llama")
    with prefix_from_disk(model, PREFIX, store_path, budget=0.3) as cache:
        expected = answer(model, NEXT["longer"], cache)
        cache.reset()
        with one_failure(model):
            answer(model, QUESTION, cache)
        assert_same_generation(answer(model, NEXT["longer"], cache), expected)


@pytest.mark.parametrize("budget", [0.3, 1.0])
@pytest.mark.parametrize("mode", MODES)
def test_a_prompt_that_continues_the_conversation_continues_the_cache(tiny_model, store_path, mode, budget):
    model = tiny_model("llama")
    write_prefix(model, PREFIX, store_path)
    computed: list[int] = []
    reference = DynamicCache(config=model.config)
    with PrefixStore(store_path) as store:
        cache = MODES[mode](model, store=store, budget=budget)
        output = answer(model, QUESTION, cache)
        ids = torch.cat([output.sequences, token_ids(5, seed=808)], dim=1)
        watch = model.get_input_embeddings().register_forward_hook(lambda _, args, out: computed.append(out.shape[1]))
        reply = answer(model, ids, cache)
        watch.remove()
        if budget == 1.0:
            assert computed[0] == 1 + 5, "the last token of the answer and the new ones"
            answer(model, QUESTION, reference)
            assert_same_generation(reply, answer(model, ids, reference))
        else:
            assert computed[0] == ids.shape[1] - PREFIX.shape[1], "all behind the prefix"
            with MODES[mode](model, store=store, budget=budget) as fresh:
                assert_same_generation(reply, answer(model, ids, fresh))


@pytest.mark.parametrize("mode", ["explicit", "automatic"])
def test_a_further_question_gets_its_own_chunks(tiny_model, store_path, mode):
    """Those of the first question need not be what it needs: it is answered as by a fresh cache."""
    model, document = tiny_model("llama"), token_ids(320, seed=821)
    write_prefix(model, document, store_path)
    question = torch.cat([document, token_ids(20, seed=822)], dim=1)
    prefix = document if mode == "explicit" else None
    with PrefixStore(store_path) as store, ContiguousKVCache(model, prefix, store=store, budget=0.3) as cache:
        ids, chosen = question, []
        for turn in range(3):
            reply = answer(model, ids, cache)
            chosen.append([cache.selected_chunks(layer) for layer in range(model.config.num_hidden_layers)])
            with ContiguousKVCache(model, prefix, store=store, budget=0.3) as fresh:
                assert_same_generation(reply, answer(model, ids, fresh))
            ids = torch.cat([reply.sequences, token_ids(20, seed=823 + turn)], dim=1)
        for earlier, later in itertools.pairwise(chosen):
            assert not all(torch.equal(*both) for both in zip(earlier, later, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_an_answer_that_goes_on_keeps_its_chunks(tiny_model, store_path, mode):
    model = tiny_model("llama")
    write_prefix(model, PREFIX, store_path)
    with PrefixStore(store_path) as store, MODES[mode](model, store=store, budget=0.3) as cache:
        expected = generate(model, QUESTION, cache, tokens=12).sequences
        cache.reset()
        begun = generate(model, QUESTION, cache, tokens=6).sequences
        chosen = cache.selected_chunks(0)
        rest = generate(model, begun, cache, tokens=6).sequences
        assert torch.equal(cache.selected_chunks(0), chosen)
        assert torch.equal(rest, expected)


WRONG_BEGINNINGS = {
    "one other token": torch.cat([PREFIX[:, :3], 129 - PREFIX[:, 3:4].clamp(3, 126), QUESTION[:, 4:]], dim=1),
    "another document": token_ids(120, seed=809),
    "as long as what is cached": token_ids(AFTER_ONE_ANSWER, seed=811),
    "a short prompt": token_ids(20, seed=812),
}


@pytest.mark.parametrize(("begun", "budget"), [(False, 1.0), (True, 0.3)], ids=["fresh", "after an answer"])
@pytest.mark.parametrize("prompt", WRONG_BEGINNINGS)
def test_generate_refuses_a_prompt_that_does_not_begin_with_the_prefix(tiny_model, store_path, prompt, budget, begun):
    model = tiny_model("llama")
    with prefix_from_disk(model, PREFIX, store_path, budget=budget) as cache:
        if begun:
            answer(model, QUESTION, cache)
        with pytest.raises(InputError):
            answer(model, WRONG_BEGINNINGS[prompt], cache)
        cache.reset()
        expected = answer(model, QUESTION, ContiguousKVCache(model, PREFIX, store=cache.store, budget=budget))
        assert_same_generation(answer(model, QUESTION, cache), expected)


# ---- copies and stores ----


@pytest.mark.parametrize("closed", ["the copy", "the original"])
@pytest.mark.parametrize("begun", [False, True], ids=["fresh", "in mid-answer"])
def test_a_closed_copy_takes_nothing_from_the_other(tiny_model, closed, begun):
    model = tiny_model("llama")
    cache, reference = ContiguousKVCache(model, PREFIX, budget=1.0), prefilled(model, PREFIX)
    folder = cache.store.path
    if begun:
        for each in (cache, reference):
            forward(model, SUFFIX, each)
    pair = [cache, copy.deepcopy(cache)]
    left = pair.pop(0 if closed == "the copy" else 1)
    pair.pop().close()
    del cache
    gc.collect()
    assert_close(forward(model, STEP, left), forward(model, STEP, reference))
    left.reset()
    assert_same_generation(answer(model, QUESTION, left), exact(model, QUESTION))
    assert folder.exists()
    left.close()
    del left
    gc.collect()
    assert not folder.exists()


def test_a_path_means_the_store_that_is_open_there(tiny_model, store_path):
    model = tiny_model("llama")
    with PrefixStore(store_path, max_disk_bytes=10 * 2**20) as store:
        for path in (str(store_path), store_path):
            cache = ContiguousKVCache(model, PREFIX, store=path, budget=1.0)
            assert cache.store is store
            cache.close()
    cache = ContiguousKVCache(model, PREFIX, store=str(store_path), budget=1.0)
    assert cache.store is not store
    assert_same_generation(answer(model, QUESTION, cache), exact(model, QUESTION))
    cache.close()


# ---- damage ----

DAMAGED = {
    "payload.2": ContiguousKVConfig(budget=1.0),
    "key_index.0": ContiguousKVConfig(budget=0.3),
    "key_scale.0": ContiguousKVConfig(budget=0.3),
    "values4.2": ContiguousKVConfig(budget=0.3),
    "leader_keys.0": ContiguousKVConfig.paper(0.3),
}


def flip_a_byte(path, tensor: str) -> None:
    (file,) = path.rglob("*.safetensors")
    with closing(Segment(FileBlob(file))) as segment:
        offset, _ = segment.tensor_extent(tensor)
    with file.open("r+b") as stream:
        stream.seek(offset + 3)  # The exponent of a float32.
        byte = stream.read(1)[0]
        stream.seek(offset + 3)
        stream.write(bytes([byte ^ 0x40]))


def right_answers(model, mode, config, path) -> list:
    """What may be answered where the prefix is stored; automatic: also where nothing is, or the whole question."""
    write_prefix(model, PREFIX, path)
    with PrefixStore(path) as store:
        answers = [answer(model, QUESTION, MODES[mode](model, store=store, config=config))]
        if mode == "automatic":
            answers.append(answer(model, QUESTION, ContiguousKVCache(model, store=store, budget=1.0)))
            answers.append(answer(model, QUESTION, ContiguousKVCache(model, store=store, config=config)))
    return [answer.sequences.tolist() for answer in answers]


@pytest.mark.parametrize("caches", ["one cache", "new caches"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tensor", DAMAGED)
def test_damage_is_repaired_inside_the_request_that_meets_it(tiny_model, tmp_path, tensor, mode, caches):
    model, config = tiny_model("llama"), DAMAGED[tensor]
    right = right_answers(model, mode, config, tmp_path / "sound")
    write_prefix(model, PREFIX, tmp_path / "damaged")
    flip_a_byte(tmp_path / "damaged", tensor)
    with PrefixStore(tmp_path / "damaged") as store:
        cache = MODES[mode](model, store=store, config=config)
        for _ in range(3):
            assert answer(model, QUESTION, cache).sequences.tolist() in right
            if caches == "new caches":
                cache.close()
                cache = MODES[mode](model, store=store, config=config)
            else:
                cache.reset()
        store.flush()
        assert store.verify() == []
        assert (store.stats.recovered, store.stats.quarantined) == (1, 1)
        assert store.match(model, PREFIX[0]) >= 80


# ---- automatic mode, block by block ----


@pytest.mark.parametrize("block", [13, 50])
@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral-window"])
def test_a_prompt_that_comes_in_blocks_is_stored_in_full(tiny_model, store_path, family, block):
    model = tiny_model(family)
    ids = token_ids(101, seed=820)
    with PrefixStore(store_path) as store:
        for _ in range(2):
            cache = ContiguousKVCache(model, store=store, budget=1.0)
            output = answer(model, ids, cache, prefill_chunk_size=block)
            assert_same_generation(output, exact(model, ids))
            cache.close()
            store.flush()
            assert store.inner.background_failures == 0
            assert store.match(model, ids[0]) in (101, 101 // block * block)
        cache = ContiguousKVCache(model, store=store, budget=1.0)
        assert_same_generation(answer(model, ids, cache), exact(model, ids))
        assert cache.stats.tokens_from_store >= 80


# ---- the model below the head ----


@pytest.mark.parametrize("budget", [0.3, 1.0])
@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral-window"])
def test_the_base_model_may_be_called_alone(tiny_model, store_path, family, budget):
    model = tiny_model(family)
    with prefix_from_disk(model, PREFIX, store_path, budget=budget) as cache, torch.no_grad():
        same = ContiguousKVCache(model, PREFIX, store=cache.store, budget=budget)
        for ids in (SUFFIX, STEP, SUFFIX[:, :3]):
            states = model.model(ids, **{CACHE: cache}).last_hidden_state
            assert_close(model.lm_head(states), forward(model, ids, same))
        same.close()


# ---- what a cache says of itself ----


def test_counters_tell_how_the_prefix_came_even_when_the_prompt_is_the_prefix(tiny_model, store_path):
    model = tiny_model("llama")
    with PrefixStore(store_path) as store:
        for stored in (False, True):
            cache = ContiguousKVCache(model, PREFIX, store=store, budget=1.0)
            answer(model, PREFIX, cache)
            counters = (cache.stats.tokens_from_store, cache.stats.tokens_prefilled)
            # The last token is computed once more, to have logits.
            assert counters in ([(83, 0), (82, 0)] if stored else [(0, 83), (0, 82)])
            cache.close()


@pytest.mark.parametrize("mode", MODES)
def test_counters_can_be_read_after_close(tiny_model, store_path, mode):
    model = tiny_model("llama")
    write_prefix(model, PREFIX, store_path)
    with PrefixStore(store_path) as store:
        cache = MODES[mode](model, store=store, budget=0.3)
        answer(model, QUESTION, cache)
        before = cache.stats.as_dict()
        cache.close()
        assert before["bytes_used"] > 0
        assert cache.stats.as_dict() == before


def test_check_asks_only_for_what_a_crop_has_left(tiny_model, store_path):
    with prefix_from_disk(tiny_model("llama"), PREFIX, store_path, budget=1.0) as cache:
        cache.crop(-10)
        cache.check(torch.cat([PREFIX[:, :73], token_ids(20, seed=821)], dim=1))
        cache.check(PREFIX[:, :73])
        with pytest.raises(InputError):
            cache.check(torch.cat([PREFIX[:, :60], token_ids(40, seed=822)], dim=1))
        cache.reset()
        with pytest.raises(InputError):
            cache.check(PREFIX[:, :73])


# ---- periods that the stored keys do not fit ----


@pytest.mark.parametrize("lookahead", [1, 64 * 2**20])
@pytest.mark.parametrize(("period", "subperiod"), [(2, 1), (3, 2), (16, 4)])
@pytest.mark.parametrize(("family", "layers"), [("llama", 10), ("gemma3", 12)])
def test_leaders_without_stored_keys_choose_as_published(
    tiny_model, store_path, family, layers, period, subperiod, lookahead
):
    model = tiny_model(family, layers=layers)
    prefix, suffix = token_ids(101, seed=823), token_ids(7, seed=824)
    reference = PrunedReference(model, prefix, budget=0.3, period=period)
    expected = reference.forward(suffix)
    assert reference.margin() > 1e-5, "an ambiguous seed: choose another"
    config = ContiguousKVConfig.paper(
        0.3,
        selection=AttentionMass(period=period, subperiod=subperiod),
        reading=ReadOptions(lookahead_bytes=lookahead),
    )
    with prefix_from_disk(model, prefix, store_path, config=config) as cache:
        assert_close(forward(model, suffix, cache), expected)
        for layer in full_attention_layers(model):
            assert cache.selected_chunks(layer).tolist() == reference.chunks(layer), f"layer {layer}"
        assert_close(forward(model, STEP, cache), reference.forward(STEP))
