"""Below `budget=1.0`, attention is that of a model which holds the whole prefix and masks the pruned chunks out.

Which chunks those are is read from `cache.selected_chunks(layer)`; that they are the right ones is the matter of
`test_selection.py`.
"""

from __future__ import annotations

import copy

import pytest
import torch

from hf_contiguouskv import AttentionMass, ContiguousKVConfig
from hf_contiguouskv.planning.read_plan import chunks_kept

from .models import IMPLEMENTATIONS, PAD, PRUNABLE, full_attention_layers, token_ids
from .references import PrunedReference, assert_close, forward, generate, visible_tokens
from .subject import ContiguousKVCache, prefix_from_disk

pytestmark = pytest.mark.needs_library

CONFIGS = {
    "paper": lambda budget: ContiguousKVConfig.paper(budget),
    "paper, period 2": lambda budget: ContiguousKVConfig.paper(budget, selection=AttentionMass(period=2, subperiod=1)),
    "default": lambda budget: ContiguousKVConfig(budget=budget),
    "default, exact payload": lambda budget: ContiguousKVConfig(budget=budget, payload="exact"),
}
SUFFIX = token_ids(9, seed=122)


def prefix_of(tokens: int) -> torch.Tensor:
    return token_ids(tokens, seed=121)


def visible_by_layer(model, cache, prefix_tokens: int) -> dict[int, torch.Tensor]:
    return {
        layer: visible_tokens(cache.selected_chunks(layer), prefix_tokens) for layer in full_attention_layers(model)
    }


def masked_reference(model, cache, prefix: torch.Tensor, rows: int = 1) -> PrunedReference:
    visible = visible_by_layer(model, cache, prefix.shape[1])
    # Which of the two a request saw is what was asked for, so a cache that does the other one fails.
    packed = cache.config.payload == "packed"
    scale_per_chunk = cache.config.index_bits == 2
    return PrunedReference(model, prefix, rows=rows, visible=visible, packed=packed, scale_per_chunk=scale_per_chunk)


def assert_as_masked(cache, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal within float32 noise. Of a packed prefix, that noise may move a number to the next step."""
    packed = cache.config.payload == "packed"
    assert_close(actual, expected, **({"relative": 0.01, "absolute": 3e-4} if packed else {}))


@pytest.mark.parametrize("prefix_tokens", [160, 165])
@pytest.mark.parametrize("budget", [0.1, 0.45])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", PRUNABLE)
def test_pruned_chunks_are_as_good_as_masked(
    tiny_model, store_path, family, implementation, config, budget, prefix_tokens
):
    model, prefix = tiny_model(family, implementation), prefix_of(prefix_tokens)
    settings = CONFIGS[config](budget)
    with prefix_from_disk(model, prefix, store_path, config=settings) as cache:
        logits = forward(model, SUFFIX, cache)
        for layer in full_attention_layers(model):
            assert cache.selected_chunks(layer).shape == (1, chunks_kept(settings.budget, prefix_tokens // 16))
        reference = masked_reference(model, cache, prefix)
        assert_as_masked(cache, logits, reference.forward(SUFFIX))
        for block, tokens in enumerate([1, 1, 3, 1]):
            ids = token_ids(tokens, seed=130 + block)
            assert_as_masked(cache, forward(model, ids, cache), reference.forward(ids))
        assert cache.get_seq_length() == prefix_tokens + SUFFIX.shape[1] + 6


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt-neox"])
def test_rows_with_different_selections_are_as_good_as_masked(tiny_model, store_path, family, config):
    model, prefix = tiny_model(family), prefix_of(165)
    suffixes = token_ids(9, seed=123, rows=3)
    with prefix_from_disk(model, prefix, store_path, config=CONFIGS[config](0.3)) as cache:
        logits = forward(model, suffixes, cache)
        reference = masked_reference(model, cache, prefix, rows=3)
        assert_as_masked(cache, logits, reference.forward(suffixes))
        for step in range(3):
            ids = token_ids(1, seed=140 + step, rows=3)
            assert_as_masked(cache, forward(model, ids, cache), reference.forward(ids))


def test_the_rows_of_that_batch_do_select_differently(tiny_model, store_path):
    model, prefix = tiny_model("llama"), prefix_of(165)
    with prefix_from_disk(model, prefix, store_path, config=ContiguousKVConfig.paper(0.3)) as cache:
        forward(model, token_ids(9, seed=123, rows=3), cache)
        assert len({tuple(row.tolist()) for row in cache.selected_chunks(0)}) > 1


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("family", PRUNABLE)
def test_generation_follows_the_masked_reference(tiny_model, store_path, family, config):
    model, prefix = tiny_model(family), prefix_of(165)
    with prefix_from_disk(model, prefix, store_path, config=CONFIGS[config](0.25)) as cache:
        output = generate(model, torch.cat([prefix, SUFFIX], dim=1), cache)
        tokens, scores = masked_reference(model, cache, prefix).greedy(SUFFIX, 8)
        for ours, theirs in zip(output.logits, scores, strict=True):
            assert_as_masked(cache, ours, theirs)
        assert output.sequences[0, -8:].tolist() == tokens


@pytest.mark.parametrize("padding", ["before", "between"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", ["llama", "opt", "gemma3"])
def test_each_row_of_a_padded_batch_follows_its_own_masked_reference(
    tiny_model, store_path, family, implementation, padding
):
    if family == "gemma3" and padding == "between":
        pytest.skip("windows count columns: padding inside the context is another question")
    model, prefix = tiny_model(family, implementation), prefix_of(165)
    suffixes = [token_ids(9, seed=124), token_ids(4, seed=125)]
    pads = torch.full((1, 5), PAD)
    second = [pads, prefix, suffixes[1]] if padding == "before" else [prefix, pads, suffixes[1]]
    ids = torch.cat([torch.cat([prefix, suffixes[0]], dim=1), torch.cat(second, dim=1)])
    with prefix_from_disk(model, prefix, store_path, config=ContiguousKVConfig.paper(0.3)) as cache:
        output = generate(model, ids, cache, attention_mask=(ids != PAD).long())
        if cache.selected_chunks(full_attention_layers(model)[0]) is None:
            assert family == "gemma3", "only on windows that count columns may everything be computed instead"
            visible = {}
        else:
            visible = visible_by_layer(model, cache, 165)
        for row, suffix in enumerate(suffixes):
            own = {layer: rows[row : row + 1] for layer, rows in visible.items()}
            tokens, scores = PrunedReference(model, prefix, visible=own).greedy(suffix, 8)
            for ours, theirs in zip(output.logits, scores, strict=True):
                assert_close(ours[row : row + 1], theirs)
            assert output.sequences[row, -8:].tolist() == tokens


@pytest.mark.parametrize("config", CONFIGS)
def test_a_pruned_answer_does_not_depend_on_drafts(tiny_model, store_path, config):
    model, prefix = tiny_model("llama"), prefix_of(165)
    ids = torch.cat([prefix, SUFFIX, prefix[:, 30:36]], dim=1)
    with prefix_from_disk(model, prefix, store_path, config=CONFIGS[config](0.25)) as cache:
        greedy = generate(model, ids, cache, tokens=12)
        cache.reset()
        drafted = generate(model, ids, cache, tokens=12, prompt_lookup_num_tokens=4)
        assert drafted.sequences.tolist() == greedy.sequences.tolist()


@pytest.mark.parametrize("rows", [1, 2])
def test_a_deep_copy_in_mid_answer_keeps_the_selection(tiny_model, store_path, rows):
    model, prefix = tiny_model("llama"), prefix_of(165)
    suffixes = token_ids(6, seed=126, rows=rows)
    with prefix_from_disk(model, prefix, store_path, config=ContiguousKVConfig.paper(0.25)) as cache:
        forward(model, suffixes, cache)
        twin = copy.deepcopy(cache)
        ids = token_ids(2, seed=127, rows=rows)
        assert_close(forward(model, ids, twin), forward(model, ids, cache))
        for layer in full_attention_layers(model):
            assert torch.equal(twin.selected_chunks(layer), cache.selected_chunks(layer))


def test_rows_take_their_selection_along(tiny_model, store_path):
    model, prefix = tiny_model("llama"), prefix_of(165)
    suffixes = token_ids(6, seed=128, rows=3)
    order = torch.tensor([2, 0, 0])
    with prefix_from_disk(model, prefix, store_path, config=ContiguousKVConfig.paper(0.25)) as cache:
        forward(model, suffixes, cache)
        reference = masked_reference(model, cache, prefix, rows=3)
        reference.forward(suffixes)
        before = cache.selected_chunks(0)
        cache.reorder_cache(order)
        reference.cache.reorder_cache(order)
        reference.visible = {layer: visible[order] for layer, visible in reference.visible.items()}
        assert torch.equal(cache.selected_chunks(0), before[order])
        ids = token_ids(1, seed=129, rows=3)
        assert_as_masked(cache, forward(model, ids, cache), reference.forward(ids))


def test_crop_within_the_suffix_keeps_the_selection(tiny_model, store_path):
    model, prefix = tiny_model("llama"), prefix_of(165)
    with prefix_from_disk(model, prefix, store_path, config=ContiguousKVConfig.paper(0.25)) as cache:
        forward(model, SUFFIX, cache)
        reference = masked_reference(model, cache, prefix)
        reference.forward(SUFFIX)
        cache.crop(-4)
        reference.cache.crop(-4)
        ids = token_ids(3, seed=129)
        assert_as_masked(cache, forward(model, ids, cache), reference.forward(ids))


@pytest.mark.parametrize("budget", [0.25, 1.0])
def test_crop_into_a_prefix_never_answers_wrongly(tiny_model, store_path, budget):
    """After a crop into a pruned prefix, the kept tokens of what remains are attended to; or the crop is refused."""
    model, prefix = tiny_model("llama"), prefix_of(165)
    with prefix_from_disk(model, prefix, store_path, config=ContiguousKVConfig.paper(budget)) as cache:
        try:
            cache.crop(-65)
        except ValueError:
            assert budget < 1.0
            return
        shorter = prefix[:, :100]
        assert cache.get_seq_length() == 100
        logits = forward(model, SUFFIX, cache)
        visible = {
            layer: torch.ones(1, 100, dtype=torch.bool)
            if cache.selected_chunks(layer) is None or budget == 1.0
            else visible_tokens(cache.selected_chunks(layer), 100)
            for layer in full_attention_layers(model)
        }
        assert_close(logits, PrunedReference(model, shorter, visible=visible).forward(SUFFIX))


def test_a_pruned_prefix_without_a_store_is_as_good_as_masked(tiny_model):
    model, prefix = tiny_model("llama"), prefix_of(165)
    cache = ContiguousKVCache(model, prefix, budget=0.25)
    logits = forward(model, SUFFIX, cache)
    assert_as_masked(cache, logits, masked_reference(model, cache, prefix).forward(SUFFIX))


@pytest.mark.parametrize("order", [[0, 1, 0], [1, 0, 1], [2, 1, 0], [1, 1, 1]], ids=str)
def test_equal_rows_and_rows_in_any_order_are_as_good_as_masked(tiny_model, store_path, order):
    model, prefix = tiny_model("llama"), prefix_of(165)
    suffixes = token_ids(9, seed=123, rows=3)[order]
    with prefix_from_disk(model, prefix, store_path, config=ContiguousKVConfig.paper(0.3)) as cache:
        logits = forward(model, suffixes, cache)
        reference = masked_reference(model, cache, prefix, rows=3)
        assert_as_masked(cache, logits, reference.forward(suffixes))
        ids = token_ids(1, seed=140, rows=3)
        assert_as_masked(cache, forward(model, ids, cache), reference.forward(ids))


@pytest.mark.parametrize("config", CONFIGS)
def test_beams_of_several_prompts_answer_as_each_prompt_alone(tiny_model, store_path, config):
    model, prefix = tiny_model("llama"), prefix_of(165)
    ids = torch.cat([prefix.expand(3, -1), token_ids(9, seed=123, rows=3)], dim=1)
    with prefix_from_disk(model, prefix, store_path, config=CONFIGS[config](0.3)) as cache:
        together = generate(model, ids, cache, num_beams=2).sequences
        for row in range(3):
            cache.reset()
            alone = generate(model, ids[row : row + 1], cache, num_beams=2).sequences
            assert together[row].tolist() == alone[0].tolist()


def test_a_prompt_that_is_a_pruned_prefix_itself_leaves_tokens_that_choose(tiny_model, store_path):
    model, prefix = tiny_model("llama"), prefix_of(165)
    with prefix_from_disk(model, prefix, store_path, config=ContiguousKVConfig.paper(0.3)) as cache:
        output = generate(model, prefix, cache)
        assert cache.stats.prefix_tokens == 165 - 16
        tokens, scores = masked_reference(model, cache, prefix[:, :-16]).greedy(prefix[:, -16:], 8)
        for ours, theirs in zip(output.logits, scores, strict=True):
            assert_as_masked(cache, ours, theirs)
        assert output.sequences[0, -8:].tolist() == tokens


@pytest.mark.parametrize("prefix_tokens", [160, 165])
@pytest.mark.parametrize("family", PRUNABLE)
def test_packed_and_exact_answers_are_told_apart_by_these_tests(tiny_model, store_path, family, prefix_tokens):
    model, prefix = tiny_model(family), prefix_of(prefix_tokens)
    with prefix_from_disk(model, prefix, store_path, config=ContiguousKVConfig(budget=0.45)) as cache:
        logits = forward(model, SUFFIX, cache)
        exact = PrunedReference(model, prefix, visible=visible_by_layer(model, cache, prefix_tokens))
        with pytest.raises(AssertionError, match="not close"):
            assert_as_masked(cache, logits, exact.forward(SUFFIX))
