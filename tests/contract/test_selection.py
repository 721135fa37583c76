"""`ContiguousKVConfig.paper(budget)` keeps exactly the chunks that a slow, independent reading of the algorithm keeps.

The reference runs on the same pruned context: the hidden states that reach a later leader layer were computed with the
chunks that the earlier leaders chose.
"""

from __future__ import annotations

import pytest
import torch

from hf_contiguouskv import AttentionMass, ContiguousKVConfig
from hf_contiguouskv.planning.read_plan import chunks_kept

from .models import IMPLEMENTATIONS, PAD, PRUNABLE, full_attention_layers, token_ids
from .references import PrunedReference, forward, generate
from .subject import prefix_from_disk

pytestmark = pytest.mark.needs_library

CLEAR = 1e-5
"""Relative gap between the last kept and the first dropped chunk above which float32 cannot change the choice."""


def published_choice(model, prefix, suffix, *, budget: float, period: int = 8) -> PrunedReference:
    """The reference after its first forward over `suffix`, with a choice that rounding cannot change."""
    reference = PrunedReference(model, prefix, rows=suffix.shape[0], budget=budget, period=period)
    reference.forward(suffix)
    assert reference.margin() > CLEAR, "an ambiguous seed: choose another"
    return reference


def assert_same_choice(model, cache, reference: PrunedReference) -> None:
    for layer in full_attention_layers(model):
        assert cache.selected_chunks(layer).tolist() == reference.chunks(layer), f"layer {layer}"


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("budget", [0.05, 0.3, 0.6])
@pytest.mark.parametrize("prefix_tokens", [80, 83, 331])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_leaders_choose_as_published(tiny_model, store_path, implementation, prefix_tokens, budget, seed):
    model = tiny_model("llama", implementation, layers=10)
    prefix, suffix = token_ids(prefix_tokens, seed=200 + seed), token_ids(7, seed=300 + seed)
    reference = published_choice(model, prefix, suffix, budget=budget)
    assert sorted(reference.importance) == [0, 8]
    with prefix_from_disk(model, prefix, store_path, config=ContiguousKVConfig.paper(budget)) as cache:
        forward(model, suffix, cache)
        assert_same_choice(model, cache, reference)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", PRUNABLE)
def test_every_family_chooses_as_published(tiny_model, store_path, family, implementation):
    model = tiny_model(family, implementation, layers=6)
    prefix, suffix = token_ids(165, seed=210), token_ids(7, seed=310)
    reference = published_choice(model, prefix, suffix, budget=0.3, period=2)
    config = ContiguousKVConfig.paper(0.3, selection=AttentionMass(period=2, subperiod=1))
    with prefix_from_disk(model, prefix, store_path, config=config) as cache:
        forward(model, suffix, cache)
        assert_same_choice(model, cache, reference)


@pytest.mark.parametrize("period", [1, 3, 8])
def test_a_period_shares_its_leaders_choice(tiny_model, store_path, period):
    model = tiny_model("llama", layers=5)
    prefix, suffix = token_ids(165, seed=211), token_ids(7, seed=311)
    reference = published_choice(model, prefix, suffix, budget=0.3, period=period)
    config = ContiguousKVConfig.paper(0.3, selection=AttentionMass(period=period, subperiod=1))
    with prefix_from_disk(model, prefix, store_path, config=config) as cache:
        forward(model, suffix, cache)
        assert_same_choice(model, cache, reference)
        for layer in range(5):
            leader = layer // period * period
            assert torch.equal(cache.selected_chunks(layer), cache.selected_chunks(leader))


@pytest.mark.parametrize("suffix_tokens", [1, 40])
def test_one_query_or_many_choose_as_published(tiny_model, store_path, suffix_tokens):
    model = tiny_model("llama")
    prefix, suffix = token_ids(165, seed=212), token_ids(suffix_tokens, seed=312)
    reference = published_choice(model, prefix, suffix, budget=0.3)
    with prefix_from_disk(model, prefix, store_path, config=ContiguousKVConfig.paper(0.3)) as cache:
        forward(model, suffix, cache)
        assert_same_choice(model, cache, reference)


def test_nothing_is_selected_before_the_first_suffix_and_after_reset(tiny_model, store_path):
    model = tiny_model("llama")
    prefix = token_ids(165, seed=213)
    with prefix_from_disk(model, prefix, store_path, config=ContiguousKVConfig.paper(0.3)) as cache:
        assert cache.selected_chunks(0) is None
        forward(model, token_ids(7, seed=313), cache)
        assert cache.selected_chunks(0).dtype == torch.int64
        cache.reset()
        assert cache.selected_chunks(0) is None


@pytest.mark.parametrize("back", ["reset", "crop"])
def test_the_next_question_chooses_anew(tiny_model, store_path, back):
    model = tiny_model("llama", layers=10)
    prefix = token_ids(165, seed=214)
    with prefix_from_disk(model, prefix, store_path, config=ContiguousKVConfig.paper(0.3)) as cache:
        for seed in (314, 315):
            question = token_ids(7, seed=seed)
            forward(model, question, cache)
            assert_same_choice(model, cache, published_choice(model, prefix, question, budget=0.3))
            if back == "reset":
                cache.reset()
            else:
                cache.crop(prefix.shape[1] - cache.get_seq_length())


def test_later_tokens_do_not_change_the_choice(tiny_model, store_path):
    model = tiny_model("llama", layers=10)
    prefix, suffix = token_ids(165, seed=215), token_ids(7, seed=316)
    reference = published_choice(model, prefix, suffix, budget=0.3)
    with prefix_from_disk(model, prefix, store_path, config=ContiguousKVConfig.paper(0.3)) as cache:
        generate(model, torch.cat([prefix, suffix], dim=1), cache, tokens=10)
        assert_same_choice(model, cache, reference)


def test_each_row_chooses_for_itself(tiny_model, store_path):
    model = tiny_model("llama", layers=10)
    prefix, suffixes = token_ids(165, seed=216), token_ids(7, seed=317, rows=3)
    reference = published_choice(model, prefix, suffixes, budget=0.3)
    with prefix_from_disk(model, prefix, store_path, config=ContiguousKVConfig.paper(0.3)) as cache:
        forward(model, suffixes, cache)
        assert_same_choice(model, cache, reference)


@pytest.mark.parametrize("padding", ["before", "between"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_pad_queries_never_count(tiny_model, store_path, implementation, padding):
    model = tiny_model("llama", implementation, layers=10)
    prefix = token_ids(165, seed=217)
    suffixes = [token_ids(12, seed=318), token_ids(5, seed=319)]
    pads = torch.full((1, 7), PAD)
    second = [pads, prefix, suffixes[1]] if padding == "before" else [prefix, pads, suffixes[1]]
    ids = torch.cat([torch.cat([prefix, suffixes[0]], dim=1), torch.cat(second, dim=1)])
    alone = [published_choice(model, prefix, suffix, budget=0.3) for suffix in suffixes]
    with prefix_from_disk(model, prefix, store_path, config=ContiguousKVConfig.paper(0.3)) as cache:
        generate(model, ids, cache, attention_mask=(ids != PAD).long(), tokens=2)
        for layer in full_attention_layers(model):
            expected = [reference.chunks(layer)[0] for reference in alone]
            assert cache.selected_chunks(layer).tolist() == expected, f"layer {layer}"


VOTERS = {40: [6, 19, 31, 38, 39], 25: [3, 11, 19, 23, 24], 5: [0, 1, 2, 3, 4]}
"""Of 5 voters two are the last; the other three are in the middles of three equal stretches of what is before them."""


def choice_of_voters(model, prefix, suffix, budget: float = 0.3) -> PrunedReference:
    voters = torch.zeros_like(suffix, dtype=torch.bool)
    voters[:, VOTERS[suffix.shape[1]]] = True
    reference = PrunedReference(model, prefix, rows=1, budget=budget, period=8)
    reference.forward(suffix, voters=voters)
    assert reference.margin() > CLEAR, "an ambiguous seed: choose another"
    return reference


def test_few_voters_are_the_last_ones_and_others_spread_in_every_row(tiny_model, store_path):
    model = tiny_model("llama", layers=10)
    prefix, suffixes = token_ids(165, seed=223), [token_ids(n, seed=324 + n) for n in VOTERS]
    alone = [choice_of_voters(model, prefix, suffix) for suffix in suffixes]
    everyone = [published_choice(model, prefix, suffix, budget=0.3) for suffix in suffixes]
    assert any(one.chunks(0) != other.chunks(0) for one, other in zip(alone, everyone, strict=True))
    ids = torch.cat(
        [torch.cat([torch.full((1, 40 - suffix.shape[1]), PAD), prefix, suffix], dim=1) for suffix in suffixes]
    )
    config = ContiguousKVConfig.paper(0.3, selection=AttentionMass(queries=5, recent=2))
    with prefix_from_disk(model, prefix, store_path, config=config) as cache:
        generate(model, ids, cache, attention_mask=(ids != PAD).long(), tokens=2)
        for layer in full_attention_layers(model):
            expected = [reference.chunks(layer)[0] for reference in alone]
            assert cache.selected_chunks(layer).tolist() == expected, f"layer {layer}"


def test_drafts_do_not_move_voters(tiny_model, store_path):
    model, prefix = tiny_model("llama", layers=10), token_ids(165, seed=224)
    suffix = torch.cat([token_ids(19, seed=326), prefix[:, 40:46]], dim=1)
    config = ContiguousKVConfig.paper(0.3, selection=AttentionMass(queries=5, recent=2))
    with prefix_from_disk(model, prefix, store_path, config=config) as cache:
        generate(model, torch.cat([prefix, suffix], dim=1), cache, tokens=6, prompt_lookup_num_tokens=5)
        assert_same_choice(model, cache, choice_of_voters(model, prefix, suffix))


def test_as_many_recent_voters_as_voters_are_the_last_ones(tiny_model, store_path):
    model, prefix, suffix = tiny_model("llama", layers=10), token_ids(165, seed=225), token_ids(40, seed=327)
    reference = PrunedReference(model, prefix, rows=1, budget=0.3, period=8)
    reference.forward(suffix, voters=torch.arange(40)[None] >= 35)
    assert reference.margin() > CLEAR
    config = ContiguousKVConfig.paper(0.3, selection=AttentionMass(queries=5, recent=5))
    with prefix_from_disk(model, prefix, store_path, config=config) as cache:
        forward(model, suffix, cache)
        assert_same_choice(model, cache, reference)


def test_draft_tokens_never_count(tiny_model, store_path):
    model = tiny_model("llama", layers=10)
    prefix = token_ids(165, seed=218)
    suffix = torch.cat([token_ids(4, seed=320), prefix[:, 40:46]], dim=1)
    reference = published_choice(model, prefix, suffix, budget=0.3)
    with prefix_from_disk(model, prefix, store_path, config=ContiguousKVConfig.paper(0.3)) as cache:
        ids = torch.cat([prefix, suffix], dim=1)
        generate(model, ids, cache, tokens=6, prompt_lookup_num_tokens=5)
        assert_same_choice(model, cache, reference)


def test_beams_share_the_choice_of_their_prompt(tiny_model, store_path):
    model = tiny_model("llama", layers=10)
    prefix, suffixes = token_ids(165, seed=219), token_ids(7, seed=321, rows=2)
    reference = published_choice(model, prefix, suffixes, budget=0.3)
    with prefix_from_disk(model, prefix, store_path, config=ContiguousKVConfig.paper(0.3)) as cache:
        ids = torch.cat([prefix.expand(2, -1), suffixes], dim=1)
        generate(model, ids, cache, num_beams=3)
        for layer in full_attention_layers(model):
            expected = [row for row in reference.chunks(layer) for _ in range(3)]
            assert cache.selected_chunks(layer).tolist() == expected


@pytest.mark.parametrize("budget", [0.05, 0.2, 0.5, 0.99])
@pytest.mark.parametrize("prefix_tokens", [20, 160, 175])
def test_the_default_configuration_keeps_its_budget_and_both_ends(tiny_model, store_path, prefix_tokens, budget):
    model = tiny_model("llama")
    prefix, config = token_ids(prefix_tokens, seed=220), ContiguousKVConfig(budget=budget)
    whole = prefix_tokens // 16
    with prefix_from_disk(model, prefix, store_path, config=config) as cache:
        forward(model, token_ids(7, seed=322), cache)
        for layer in full_attention_layers(model):
            chunks = cache.selected_chunks(layer)[0].tolist()
            assert chunks == sorted(set(chunks))
            assert len(chunks) == chunks_kept(config.budget, whole)
            if len(chunks) >= config.selection.keep_first + config.selection.keep_last:
                assert {0, whole - 1} <= set(chunks)
