"""The yardsticks measure correctly: each reference agrees with something simpler, without the library."""

from __future__ import annotations

import pytest
import torch

from .models import FAMILIES, PRUNABLE, full_attention_layers, token_ids
from .references import PrunedReference, assert_close, forward, prefilled, visible_tokens

PREFIX, SUFFIX = token_ids(83, seed=1), token_ids(9, seed=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reference_that_sees_everything_is_the_model(tiny_model, family):
    model = tiny_model(family)
    reference = PrunedReference(model, PREFIX, visible={})
    cache = prefilled(model, PREFIX)
    assert_close(reference.forward(SUFFIX), forward(model, SUFFIX, cache))
    step = token_ids(1, seed=3)
    assert_close(reference.forward(step), forward(model, step, cache))


def test_a_reference_that_hides_tokens_is_the_model_with_a_4d_mask(tiny_model):
    model = tiny_model("llama")
    visible = visible_tokens(torch.tensor([[0, 3]]), PREFIX.shape[1])
    reference = PrunedReference(model, PREFIX, visible=dict.fromkeys(full_attention_layers(model), visible))
    suffix_tokens = SUFFIX.shape[1]
    causal = torch.ones(suffix_tokens, suffix_tokens, dtype=torch.bool).tril()
    mask = torch.cat([visible.expand(suffix_tokens, -1), causal], dim=1)[None, None]
    position_ids = torch.arange(suffix_tokens)[None] + PREFIX.shape[1]
    expected = forward(model, SUFFIX, prefilled(model, PREFIX), attention_mask=mask, position_ids=position_ids)
    assert_close(reference.forward(SUFFIX), expected)


@pytest.mark.parametrize("family", PRUNABLE)
def test_a_reference_that_chooses_spreads_each_query_over_prefix_and_suffix(tiny_model, family):
    model = tiny_model(family)
    reference = PrunedReference(model, PREFIX[:, :80], budget=0.4, period=2)
    reference.forward(SUFFIX)
    for importance in reference.importance.values():
        assert importance.shape == (1, 5)
        assert (importance > 0).all()
        assert importance.sum() < SUFFIX.shape[1]
    assert all(len(reference.chunks(layer)[0]) == 2 for layer in full_attention_layers(model))


def test_a_reference_that_chooses_everything_is_the_model(tiny_model):
    model = tiny_model("qwen3")
    reference = PrunedReference(model, PREFIX, budget=1.0)
    assert_close(reference.forward(SUFFIX), forward(model, SUFFIX, prefilled(model, PREFIX)))


def test_leader_layers_stand_a_period_apart(tiny_model):
    model = tiny_model("llama", layers=5)
    reference = PrunedReference(model, PREFIX, budget=0.4, period=2)
    reference.forward(SUFFIX)
    assert sorted(reference.importance) == [0, 2, 4]
