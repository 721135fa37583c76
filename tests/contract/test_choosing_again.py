"""`reselect_every`: in mid-answer, layers get the chunks that a later choice names, and attend to nothing else.

Two references: a model that masks all but the chunks that `selected_chunks` names at that step (`PrunedReference`), and
a slow reading of the rule that chooses them. K and V themselves are compared, bit for bit, with those of a new cache
that is made to choose the same chunks.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from hf_contiguouskv import AttentionMass, ContiguousKVConfig, IndexedKeys
from hf_contiguouskv.cache.layers import ContiguousLayer
from hf_contiguouskv.errors import ConfigError
from hf_contiguouskv.request import chunk_strategy

from .models import PAD, PRUNABLE, full_attention_layers, token_ids
from .references import assert_close, forward, generate, prefilled, visible_tokens
from .subject import ContiguousKVCache, PrefixStore, write_prefix, written_for
from .test_pruned import SUFFIX, assert_as_masked, masked_reference, prefix_of, visible_by_layer
from .test_recovery import damage, files

pytestmark = pytest.mark.needs_library

PREFIX = prefix_of(165)
CHUNK = 4096  # Bytes of an exact chunk of one layer.
RULES: dict[str, dict[str, Any]] = {
    "default": {},
    "exact payload": {"payload": "exact"},
    "compact": {"index_bits": 2},
    "one voter": {"selection": IndexedKeys(queries=1)},
    "paper": {"payload": "exact", "selection": AttentionMass()},
    "paper, period 2": {"payload": "exact", "selection": AttentionMass(period=2, subperiod=1)},
    # Neither an index nor leader keys: whole leader layers are read.
    "whole layers": {"payload": "exact", "selection": AttentionMass(queries=16, period=3, subperiod=1)},
}


def config(every: int | None, rule: str = "default", budget: float = 0.5, **more: Any) -> ContiguousKVConfig:
    return ContiguousKVConfig(**{"budget": budget, "reselect_every": every} | RULES[rule] | more)


@pytest.fixture
def opened(store_path):
    """Opens a cache on `PREFIX`, which another store has written."""
    made: list[Any] = []

    def open_cache(model: Any, settings: ContiguousKVConfig, prefix: torch.Tensor = PREFIX, **store: Any) -> Any:
        if not made:
            write_prefix(model, prefix, store_path, config=written_for(settings))
        found = PrefixStore(store_path, **store)
        made.extend([found, ContiguousKVCache(model, prefix, store=found, config=settings)])
        return made[-1]

    yield open_cache
    for one in reversed(made):
        one.close()


def chosen(model: Any, cache: Any) -> list[list[list[int]]]:
    """The chunks of every full-attention layer and row."""
    return [cache.selected_chunks(layer).tolist() for layer in full_attention_layers(model)]


def step(model: Any, cache: Any, reference: Any, ids: torch.Tensor) -> None:
    """One forward answers as a model that sees only what the cache says it has chosen by then."""
    found = forward(model, ids, cache)
    reference.visible = visible_by_layer(model, cache, reference.prefix_tokens)
    assert_as_masked(cache, found, reference.forward(ids))


def prefix_states(model: Any, cache: Any) -> list[torch.Tensor]:
    """K and V of the prefix in every full-attention layer, `(2, rows, kv_heads, kept_tokens, head_dim)`."""
    found = []
    for number in full_attention_layers(model):
        layer = cache.layers[number]
        found.append(layer._buffer[:, :, :, : layer._offset] if layer._joined else layer._prefix_rows())
    return found


def states_of_new_cache(monkeypatch: Any, model: Any, cache: Any, suffixes: torch.Tensor) -> list[torch.Tensor]:
    """K and V of a new cache on the same store that is made to choose what `cache` has chosen."""
    period = cache.config.selection.period
    wanted = [cache.selected_chunks(layer) for layer in full_attention_layers(model)[::period]]
    with monkeypatch.context() as patch:
        patch.setattr(chunk_strategy, "choose_chunks", lambda *_: wanted.pop(0))
        prefix = cache.prefix_ids[: cache.stats.prefix_tokens]
        with ContiguousKVCache(model, prefix, store=cache.store, config=cache.config) as other:
            forward(model, suffixes, other)
            return prefix_states(model, other)


# ---- what layers attend to ----


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_every_step_attends_to_what_is_chosen_by_then(tiny_model, opened, monkeypatch, family, rule, every):
    model = tiny_model(family, layers=7)
    cache = opened(model, config(every, rule))
    forward(model, SUFFIX, cache)
    reference, seen = masked_reference(model, cache, PREFIX), [chosen(model, cache)]
    reference.forward(SUFFIX)
    for number in range(7):
        step(model, cache, reference, token_ids(1, seed=500 + number))
        seen.append(chosen(model, cache))
        if number in (2, 5):
            for ours, new in zip(
                prefix_states(model, cache), states_of_new_cache(monkeypatch, model, cache, SUFFIX), strict=True
            ):
                assert torch.equal(ours, new)
    assert cache.stats.reselections == 7 // every
    steps = {number for number in range(1, 8) if seen[number] != seen[number - 1]}
    if family == "llama":
        assert steps, "nothing was chosen that was not there: this test shows nothing"
    assert all(number % every == 0 for number in steps)


@pytest.mark.parametrize("family", PRUNABLE)
@pytest.mark.parametrize("prefix_tokens", [160, 165])
def test_every_family_attends_to_what_is_chosen_by_then(tiny_model, opened, family, prefix_tokens):
    model, prefix = tiny_model(family), prefix_of(prefix_tokens)
    cache = opened(model, config(2), prefix)
    forward(model, SUFFIX, cache)
    reference = masked_reference(model, cache, prefix)
    reference.forward(SUFFIX)
    for number, tokens in enumerate([1, 1, 3, 1]):
        step(model, cache, reference, token_ids(tokens, seed=520 + number))
    assert cache.stats.reselections == 2


@pytest.mark.parametrize("rule", ["default", "paper"])
def test_a_generated_answer_follows_the_masked_reference(tiny_model, opened, rule):
    model = tiny_model("llama")
    cache = opened(model, config(3, rule))
    tokens = generate(model, torch.cat([PREFIX, SUFFIX], dim=1), cache, tokens=10).sequences[0, -10:].tolist()
    assert cache.stats.reselections == 3
    cache.reset()
    logits = forward(model, SUFFIX, cache)
    reference = masked_reference(model, cache, PREFIX)
    reference.forward(SUFFIX)
    for token in tokens:
        assert int(logits[0, -1].argmax()) == token
        logits = forward(model, torch.tensor([[token]]), cache)
        reference.visible = visible_by_layer(model, cache, 165)
        assert_as_masked(cache, logits, reference.forward(torch.tensor([[token]])))


# ---- which chunks ----


class Queries:
    """Records the queries and suffix keys of every layer, forward by forward."""

    def __init__(self, monkeypatch: Any) -> None:
        self.queries: dict[int, list[torch.Tensor]] = {}
        self.keys: dict[int, torch.Tensor] = {}
        inner = ContiguousLayer.visible_kv

        def visible_kv(layer: Any, query: torch.Tensor, *others: Any) -> Any:
            self.queries.setdefault(layer.layer_idx, []).append(query.clone())
            self.keys[layer.layer_idx] = layer.keys.clone()
            return inner(layer, query, *others)

        monkeypatch.setattr(ContiguousLayer, "visible_kv", visible_kv)

    def expected(self, model: Any, layer: int, voters: list[list[int]], groups: list[list[int]], keep: int) -> Any:
        """The published rule with loops, in float64: `voters` of each row, and the rows that choose together."""
        prefix_keys = prefilled(model, PREFIX).layers[layer].keys[0].double()
        queries = torch.cat(self.queries[layer], dim=2).double()
        heads, group = queries.shape[1], queries.shape[1] // prefix_keys.shape[0]
        found = []
        for rows in groups:
            importance = torch.zeros(10, dtype=torch.float64)
            for row in rows:
                for head in range(heads):
                    for position in voters[row]:
                        own = self.keys[layer][row, head // group, : position + 1].double()
                        both = torch.cat([prefix_keys[head // group], own])
                        weights = (both @ queries[row, head, position] * queries.shape[3] ** -0.5).softmax(0)
                        importance += weights[:160].view(10, 16).sum(1) / heads
            best = sorted(range(10), key=lambda chunk: -importance[chunk].item())[:keep]
            found += [sorted(best)] * len(rows)
        return found


@pytest.mark.parametrize("rows", [1, 3])
def test_the_question_and_the_latest_tokens_choose_by_the_published_rule(tiny_model, opened, monkeypatch, rows):
    model, seen = tiny_model("llama", layers=10), Queries(monkeypatch)
    cache = opened(model, config(3, "paper"))
    forward(model, token_ids(9, seed=530, rows=rows), cache)
    for number in range(6):
        forward(model, token_ids(1, seed=531 + number, rows=rows), cache)
    voters = [[*range(9), 12, 13, 14]] * rows
    for layer in (0, 8):
        expected = seen.expected(model, layer, voters, [[row] for row in range(rows)], 5)
        assert cache.selected_chunks(layer).tolist() == expected
        assert cache.selected_chunks(min(layer + 7, 9)).tolist() == expected


def test_beams_choose_together(tiny_model, opened, monkeypatch):
    model, seen = tiny_model("llama", layers=3), Queries(monkeypatch)
    cache = opened(model, config(2, "paper"))
    first = token_ids(9, seed=540, rows=2)[[0, 1, 0, 1]]
    forward(model, first, cache)
    for number in range(4):
        forward(model, token_ids(1, seed=541 + number, rows=4), cache)
    expected = seen.expected(model, 0, [[*range(9), 11, 12]] * 4, [[0, 2], [1, 3]], 5)
    assert cache.selected_chunks(0)[[0, 2, 1, 3]].tolist() == expected


def test_padding_never_votes(tiny_model, opened):
    """A padded row of a batch chooses, step by step, what it chooses alone."""
    model = tiny_model("llama")
    long, short = token_ids(9, seed=550), token_ids(4, seed=551)
    ids = torch.cat([torch.cat([PREFIX, long], 1), torch.cat([PREFIX, torch.full((1, 5), PAD), short], 1)])
    cache = opened(model, config(2))
    output = generate(model, ids, cache, tokens=7, attention_mask=(ids != PAD).long())
    together = [cache.selected_chunks(layer) for layer in range(4)]
    assert cache.stats.reselections == 3
    for row, suffix in enumerate((long, short)):
        cache.reset()
        alone = generate(model, torch.cat([PREFIX, suffix], 1), cache, tokens=7)
        assert output.sequences[row, -7:].tolist() == alone.sequences[0, -7:].tolist()
        for layer in range(4):
            assert cache.selected_chunks(layer)[0].tolist() == together[layer][row].tolist()


# ---- what is read ----


@pytest.mark.parametrize("rule", ["exact payload", "paper"])
def test_only_missing_chunks_are_read_and_each_once(tiny_model, opened, rule):
    model = tiny_model("llama", layers=8)
    cache = opened(model, config(2, rule), host_bytes=0)
    forward(model, SUFFIX, cache)
    for number in range(6):
        before, had = cache.stats.bytes_read - cache.stats.bytes_identified, chosen(model, cache)
        wasted = cache.stats.prefetch_wasted_bytes
        forward(model, token_ids(1, seed=560 + number), cache)
        new = sum(len(set(now[0]) - set(old[0])) for old, now in zip(had, chosen(model, cache), strict=True))
        read = cache.stats.bytes_read - cache.stats.bytes_identified - before
        assert read - (cache.stats.prefetch_wasted_bytes - wasted) == new * CHUNK
    assert len(cache.stats.chunks_used) == 8


@pytest.mark.parametrize("rule", RULES)
def test_what_is_in_memory_is_not_read(tiny_model, opened, rule):
    model = tiny_model("llama")
    cache = opened(model, config(1, rule))
    for turn in range(2):
        forward(model, SUFFIX, cache)
        before = cache.stats.bytes_read
        for number in range(5):
            forward(model, token_ids(1, seed=570 + number), cache)
        assert cache.stats.reselections == 5
        if turn == 0:
            cache.reset()
    assert cache.stats.bytes_read == before == 0


def test_a_long_answer_is_one_request_to_memory(tiny_model, opened):
    model = tiny_model("llama")
    cache = opened(model, config(1))
    forward(model, SUFFIX, cache)
    for number in range(9):
        forward(model, token_ids(1, seed=580 + number), cache)
    cache.session.request.close()
    assert {table.uses for table in cache.store.inner.memory._tables.values()} == {1}


# ---- nothing changes where nothing is asked for ----


@pytest.mark.parametrize("rule", ["default", "paper"])
def test_an_answer_that_is_shorter_is_the_same_bit_for_bit(tiny_model, opened, rule):
    model, ids = tiny_model("llama"), torch.cat([PREFIX, SUFFIX], dim=1)
    without, late = (opened(model, config(every, rule)) for every in (None, 12))
    first, second = (generate(model, ids, cache, tokens=12) for cache in (without, late))
    assert first.sequences.tolist() == second.sequences.tolist()
    assert all(torch.equal(*both) for both in zip(first.logits, second.logits, strict=True))
    for name in ("bytes_read", "bytes_used", "hits", "chunks_used", "reselections"):
        assert getattr(without.stats, name) == getattr(late.stats, name)


def test_the_whole_prefix_is_never_chosen_again(tiny_model, opened):
    model, ids = tiny_model("llama"), torch.cat([PREFIX, SUFFIX], dim=1)
    cache = opened(model, config(1, budget=1.0))
    found, plain = (generate(model, ids, one) for one in (cache, DynamicCache(config=model.config)))
    assert found.sequences.tolist() == plain.sequences.tolist()
    assert cache.stats.reselections == 0
    assert cache.layers[0]._queries is None


def test_windows_alone_are_never_chosen_again(tiny_model, opened):
    model, ids = tiny_model("mistral-window"), torch.cat([PREFIX, SUFFIX], dim=1)
    cache = opened(model, config(1))
    found, plain = (generate(model, ids, one) for one in (cache, DynamicCache(config=model.config)))
    assert found.sequences.tolist() == plain.sequences.tolist()
    assert cache.stats.reselections == 0


def test_a_method_that_chooses_once_is_refused(tiny_model, store_path):
    with PrefixStore(store_path) as store, pytest.raises(ConfigError, match="reselect_every"):
        ContiguousKVCache(tiny_model("llama"), PREFIX, store=store, method=object(), reselect_every=8)


# ---- the methods of a cache ----


@pytest.mark.parametrize("rule", ["default", "paper"])
@pytest.mark.parametrize("first", [[0, 1, 2], [0, 1, 0], [0, 0, 0]], ids=str)
def test_rows_go_on_in_another_order(tiny_model, opened, rule, first):
    model, suffixes = tiny_model("llama"), token_ids(9, seed=123, rows=3)[first]
    cache = opened(model, config(2, rule))
    forward(model, suffixes, cache)
    reference = masked_reference(model, cache, PREFIX, rows=3)
    reference.forward(suffixes)
    for number, order in enumerate([[0, 1, 2], [2, 0, 0], [1, 1, 2], [0, 1, 2]]):
        step(model, cache, reference, token_ids(1, seed=590 + number, rows=3))
        for one in (cache, reference.cache):
            one.reorder_cache(torch.tensor(order))
    assert cache.stats.reselections == 2


@pytest.mark.parametrize("first", [[0, 1, 2], [0, 1, 0]], ids=str)
@pytest.mark.parametrize("change", ["select", "mask", "repeat"])
def test_rows_that_end_or_split_leave_the_others_right(tiny_model, opened, first, change):
    model, suffixes = tiny_model("llama"), token_ids(9, seed=123, rows=3)[first]
    cache = opened(model, config(2, "paper"))
    forward(model, suffixes, cache)
    reference = masked_reference(model, cache, PREFIX, rows=3)
    reference.forward(suffixes)
    step(model, cache, reference, token_ids(1, seed=600, rows=3))
    calls = {
        "select": lambda one: one.batch_select_indices(torch.tensor([2, 1])),
        "mask": lambda one: one.batch_select_indices(torch.tensor([True, False, True])),
        "repeat": lambda one: one.batch_repeat_interleave(2),
    }
    for one in (cache, reference.cache):
        calls[change](one)
    rows = 6 if change == "repeat" else 2
    reference.rows = rows
    for number in range(4):
        step(model, cache, reference, token_ids(1, seed=601 + number, rows=rows))
    assert cache.stats.reselections == 2


@pytest.mark.parametrize("rule", ["default", "paper"])
def test_beams_of_several_prompts_answer_as_each_prompt_alone(tiny_model, opened, rule):
    model = tiny_model("llama")
    ids = torch.cat([PREFIX.expand(3, -1), token_ids(9, seed=123, rows=3)], dim=1)
    cache = opened(model, config(3, rule))
    together = generate(model, ids, cache, num_beams=2, tokens=9).sequences
    assert cache.stats.reselections == 2
    for row in range(3):
        cache.reset()
        alone = generate(model, ids[row : row + 1], cache, num_beams=2, tokens=9).sequences
        assert together[row].tolist() == alone[0].tolist()


def test_reset_forgets_what_the_answer_has_chosen(tiny_model, opened):
    model, ids = tiny_model("llama"), torch.cat([PREFIX, SUFFIX], dim=1)
    cache = opened(model, config(2))
    first = generate(model, ids, cache, tokens=9)
    cache.reset()
    forward(model, SUFFIX, cache)
    assert cache.stats.reselections == 0
    cache.reset()
    second = generate(model, ids, cache, tokens=9)
    assert first.sequences.tolist() == second.sequences.tolist()
    assert all(torch.equal(*both) for both in zip(first.logits, second.logits, strict=True))


def test_a_crop_behind_the_last_choice_lets_the_question_choose_again(tiny_model, opened):
    model = tiny_model("llama")
    cache = opened(model, config(3, "exact payload"))
    forward(model, SUFFIX, cache)
    reference = masked_reference(model, cache, PREFIX)
    reference.forward(SUFFIX)
    at_first = chosen(model, cache)
    for number in range(4):
        step(model, cache, reference, token_ids(1, seed=610 + number))
    assert chosen(model, cache) != at_first
    for one in (cache, reference.cache):
        one.crop(-5)  # All of the answer, and the last token of the question.
    step(model, cache, reference, SUFFIX[:, -1:])
    assert cache.stats.reselections == 2
    # The same queries vote as at first. (One of them was computed with what they chose.)
    assert chosen(model, cache)[0] == at_first[0]
    for one in (cache, reference.cache):
        one.crop(-1)
    for number in range(3):
        step(model, cache, reference, token_ids(1, seed=620 + number))


def test_the_same_prompt_again_gives_the_same_answer(tiny_model, opened):
    model, ids = tiny_model("llama"), torch.cat([PREFIX, SUFFIX], dim=1)
    cache = opened(model, config(2))
    answers = [generate(model, ids, cache, tokens=9).sequences.tolist() for _ in range(3)]
    assert answers[0] == answers[1] == answers[2]


def test_a_prompt_that_goes_on_chooses_by_itself(tiny_model, opened, monkeypatch):
    model, seen = tiny_model("llama", layers=3), Queries(monkeypatch)
    cache = opened(model, config(4, "paper"))
    forward(model, SUFFIX, cache)
    forward(model, token_ids(5, seed=630), cache)
    assert cache.selected_chunks(0).tolist() == seen.expected(model, 0, [[*range(14)]], [[0]], 5)
    for number in range(4):
        forward(model, token_ids(1, seed=631 + number), cache)
    # The new prompt is what is asked now; the old one is done with.
    assert cache.selected_chunks(0).tolist() == seen.expected(model, 0, [[*range(9, 18)]], [[0]], 5)


def test_drafts_that_are_all_wrong_change_nothing(tiny_model, opened):
    model, assistant = tiny_model("llama"), tiny_model("qwen2", layers=1)
    ids = torch.cat([PREFIX, SUFFIX], dim=1)
    for every in (1, 3):
        cache = opened(model, config(every, "paper"))
        greedy = generate(model, ids, cache, tokens=10)
        cache.reset()
        drafted = generate(model, ids, cache, tokens=10, assistant_model=assistant)
        assert drafted.sequences.tolist() == greedy.sequences.tolist()
        assert cache.stats.reselections > 1


@pytest.mark.parametrize("first", ["copy", "original"])
@pytest.mark.parametrize("rows", [[0], [0, 1], [0, 0]], ids=str)
@pytest.mark.parametrize("rule", ["default", "paper"])
def test_copies_choose_each_for_itself(tiny_model, opened, rule, rows, first):
    model, suffixes = tiny_model("llama"), token_ids(9, seed=123, rows=3)[rows]
    cache = opened(model, config(2, rule))
    forward(model, suffixes, cache)
    reference = masked_reference(model, cache, PREFIX, rows=len(rows))
    reference.forward(suffixes)
    step(model, cache, reference, token_ids(1, seed=640, rows=len(rows)))
    pairs = [(cache, reference)]
    twin, other = copy.deepcopy(cache), copy.copy(reference)
    other.cache, other.visible = copy.deepcopy(reference.cache), dict(reference.visible)
    pairs.insert(0 if first == "copy" else 1, (twin, other))
    for number in range(4):
        for which, (one, its_reference) in enumerate(pairs):
            step(model, one, its_reference, token_ids(1, seed=650 + 10 * which + number, rows=len(rows)))
    if rule == "default":
        assert chosen(model, cache) != chosen(model, twin)
    twin.close()


def test_a_cache_may_leave_inference_mode_in_mid_answer(tiny_model, opened):
    model = tiny_model("llama")
    for rows in (1, 2):
        cache = opened(model, config(2))
        ids = [SUFFIX.repeat(rows, 1), *(token_ids(1, seed=660 + number, rows=rows) for number in range(6))]
        expected = [forward(model, one, cache) for one in ids]
        cache.reset()
        for number, one in enumerate(ids):
            with torch.inference_mode(number % 3 == 1):
                assert_close(model(one, **{_cache_name(): cache}).logits.detach(), expected[number])


def _cache_name() -> str:
    from .models import CACHE

    return CACHE


# ---- stores ----


def test_a_prefix_in_several_segments_is_chosen_from_as_one(tiny_model, store_path, tmp_path, monkeypatch):
    model, found = tiny_model("llama"), []
    for place, lengths in (("one", [165]), ("three", [70, 131, 165])):
        with PrefixStore(tmp_path / place) as store:
            for length in lengths:
                ContiguousKVCache(model, PREFIX[:, :length], store=store).close()
        assert len(files(tmp_path / place)) == len(lengths)
        with (
            PrefixStore(tmp_path / place) as store,
            ContiguousKVCache(model, PREFIX, store=store, config=config(2, "exact payload")) as cache,
        ):
            forward(model, SUFFIX, cache)
            for number in range(4):
                forward(model, token_ids(1, seed=670 + number), cache)
            found.append((chosen(model, cache), prefix_states(model, cache)))
            new = states_of_new_cache(monkeypatch, model, cache, SUFFIX)
            assert all(torch.equal(*both) for both in zip(found[-1][1], new, strict=True))
    assert found[0][0] == found[1][0]


@pytest.mark.parametrize("rule", ["default", "paper", "whole layers"])
@pytest.mark.parametrize("rows", [1, 2])
def test_damage_that_only_a_later_choice_meets_is_repaired(tiny_model, opened, store_path, monkeypatch, rule, rows):
    model, suffixes = tiny_model("llama"), token_ids(9, seed=680, rows=rows)
    cache = opened(model, config(3, rule), host_bytes=0)
    forward(model, suffixes, cache)
    reference = masked_reference(model, cache, PREFIX, rows=rows)
    reference.forward(suffixes)
    packed = 2 * 16 * (16 // 2 + 4)
    tensor, extent = ("values4", packed) if rule == "default" else ("payload", CHUNK)
    for layer in range(4):
        for chunk in range(11):
            damage(files(store_path)[0], f"{tensor}.{layer}", at=chunk * extent + 3)
    for number in range(6):
        step(model, cache, reference, token_ids(1, seed=681 + number, rows=rows))
    assert cache.store.stats.recovered >= 1
    assert cache.stats.reselections == 2
    new = states_of_new_cache(monkeypatch, model, cache, suffixes)
    assert all(torch.equal(*both) for both in zip(prefix_states(model, cache), new, strict=True))
    assert not cache.store.verify()


@pytest.mark.parametrize("rule", ["default", "paper"])
@pytest.mark.parametrize("memory", [0, 2**26])
def test_a_store_that_was_closed_leaves_the_former_choice(tiny_model, opened, caplog, rule, memory):
    model = tiny_model("llama")
    cache = opened(model, config(2, rule), host_bytes=memory)
    forward(model, SUFFIX, cache)
    reference = masked_reference(model, cache, PREFIX)
    reference.forward(SUFFIX)
    before = chosen(model, cache)
    cache.store.close()
    with caplog.at_level(logging.WARNING, logger="hf_contiguouskv"):
        for number in range(5):
            step(model, cache, reference, token_ids(1, seed=690 + number))
    assert chosen(model, cache) == before
    assert [record.message for record in caplog.records].count(
        "the store was closed: this answer goes on with the chunks that were chosen before"
    ) == 1


def test_automatic_mode_chooses_again_as_well(tiny_model, store_path):
    model = tiny_model("llama")
    question = token_ids(20, seed=700)
    write_prefix(model, PREFIX, store_path)
    with PrefixStore(store_path) as store:
        with ContiguousKVCache(model, store=store, config=config(3)) as cache:
            found = generate(model, torch.cat([PREFIX, question], dim=1), cache, tokens=10)
            assert cache.stats.prefix_tokens == 165
            assert cache.stats.reselections == 3
        with ContiguousKVCache(model, PREFIX, store=store, config=config(3)) as named:
            expected = generate(model, torch.cat([PREFIX, question], dim=1), named, tokens=10)
    assert found.sequences.tolist() == expected.sequences.tolist()


def test_equal_rows_of_automatic_mode_go_their_own_ways(tiny_model, store_path):
    model, ids = tiny_model("llama"), torch.cat([PREFIX, token_ids(20, seed=700)], dim=1)
    write_prefix(model, PREFIX, store_path)
    with PrefixStore(store_path) as store, ContiguousKVCache(model, store=store, config=config(3)) as cache:
        generate(model, ids, cache, tokens=10, do_sample=True, num_return_sequences=3, temperature=3.0)
        assert cache.stats.reselections == 3
        visible = visible_tokens(cache.selected_chunks(0), 165)
        assert visible.shape[0] == 3
        assert torch.equal(visible[0], visible[2])  # They share their chunks, as beams do.
