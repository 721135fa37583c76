"""The arguments of a forward are fitted to a prefix by a function: it returns what they become, and changes nothing."""

from __future__ import annotations

import pytest
import torch

from hf_contiguouskv.errors import InputError
from hf_contiguouskv.session.fitting import Prefixed, fit_to_prefix

PREFIX, CACHED, NEW = 6, 6, 3


def prefixed(**changes):
    facts = {"tokens": PREFIX, "cached": CACHED, "prunes": True, "windowed": False, "begun": False, "multimodal": False}
    return Prefixed(**facts | changes)


def inputs_of(mask=None, rows=1, **more):
    inputs = {"input_ids": torch.arange(rows * NEW).view(rows, NEW)}
    return inputs | ({} if mask is None else {"attention_mask": mask}) | more


def ones(rows=1):
    return torch.ones(rows, PREFIX + NEW, dtype=torch.long)


@pytest.mark.parametrize("mask", [None, ones()])
def test_without_padding_everything_is_seen(mask):
    fitted = fit_to_prefix(prefixed(), inputs_of(mask), False, False)
    assert fitted.plain
    assert not fitted.without_prefix
    assert fitted.rows.visible.all()
    assert fitted.rows.voting.all()


def test_left_padding_moves_behind_the_prefix_and_the_arguments_stay_as_they_were():
    mask = ones(rows=2)
    mask[1, :2] = 0
    before, inputs = mask.clone(), inputs_of(mask, rows=2)
    fitted = fit_to_prefix(prefixed(), inputs, False, False)
    assert torch.equal(mask, before)
    assert inputs["attention_mask"] is mask
    assert fitted.attention_mask[1].tolist() == [1] * PREFIX + [0, 0, 1]
    assert fitted.rows.visible.tolist() == [[True] * 3, [False, False, True]]
    assert not fitted.plain


def test_windows_cannot_have_padding_before_the_prefix():
    mask = ones(rows=2)
    mask[1, :1] = 0
    assert fit_to_prefix(prefixed(windowed=True), inputs_of(mask, rows=2), False, False).without_prefix
    assert not fit_to_prefix(prefixed(windowed=True), inputs_of(ones(2), rows=2), False, False).without_prefix


def test_rows_are_told_of_the_first_suffix_tokens_only():
    assert fit_to_prefix(prefixed(begun=True), inputs_of(ones()), False, False).rows is None


@pytest.mark.parametrize(("generate_begins", "voting"), [(True, [True, False, False]), (False, [True] * 3)])
def test_drafts_of_assisted_decoding_do_not_vote(generate_begins, voting):
    fitted = fit_to_prefix(prefixed(), inputs_of(ones(), logits_to_keep=3), generate_begins, False)
    assert fitted.rows.voting.tolist() == [voting]


@pytest.mark.parametrize(
    ("generate_begins", "more_follows", "in_generate", "drafts"),
    [
        (False, False, False, 0),  # A forward of the user's: all tokens are real.
        (False, False, True, NEW - 1),  # In mid-answer `generate` passes one token, and then drafts.
        (True, False, True, 1),  # A prompt that goes on, with as many drafts as logits are wanted but one.
        (False, True, True, 0),  # A block of a prompt.
    ],
)
def test_tokens_in_mid_answer_are_told_from_drafts(generate_begins, more_follows, in_generate, drafts):
    inputs = inputs_of(torch.ones(1, PREFIX + 5 + NEW, dtype=torch.long), logits_to_keep=2)
    fitted = fit_to_prefix(prefixed(begun=True, cached=PREFIX + 5), inputs, generate_begins, more_follows, in_generate)
    assert fitted.rows is None
    later = fitted.later
    assert (later.batch, later.cached, later.new, later.drafts) == (1, 5, NEW, drafts)


def test_padding_in_mid_answer_is_where_the_mask_says():
    mask = torch.ones(2, PREFIX + 4 + NEW, dtype=torch.long)
    mask[1, :2] = 0
    later = fit_to_prefix(prefixed(begun=True, cached=PREFIX + 4), inputs_of(mask, rows=2), False, False).later
    assert later.visible(PREFIX).tolist() == [[True] * (4 + NEW), [False] * 2 + [True] * (2 + NEW)]
    alone = fit_to_prefix(prefixed(begun=True, cached=PREFIX + 4), inputs_of(), False, False).later
    assert alone.visible(PREFIX).tolist() == [[True] * (4 + NEW)]


def test_a_mask_may_not_hide_tokens_of_a_pruned_prefix():
    mask = ones()
    mask[0, 2] = 0
    with pytest.raises(InputError, match=r"budget=1\.0"):
        fit_to_prefix(prefixed(), inputs_of(mask), False, False)
    assert fit_to_prefix(prefixed(prunes=False), inputs_of(mask), False, False).rows is not None


def test_a_mask_of_four_dimensions_cannot_be_fitted_to_a_pruned_prefix():
    mask = torch.ones(1, 1, NEW, PREFIX + NEW)
    with pytest.raises(InputError, match="4D"):
        fit_to_prefix(prefixed(), inputs_of(mask), False, False)
    fitted = fit_to_prefix(prefixed(prunes=False), inputs_of(mask), False, False)
    assert fitted.attention_mask is None
    assert not fitted.plain


@pytest.mark.parametrize(("value", "multimodal", "plain"), [(0, True, True), (0, False, False), (1, True, False)])
def test_token_types_say_text_only_to_models_that_take_media(value, multimodal, plain):
    types = torch.full((1, NEW), value)
    fitted = fit_to_prefix(prefixed(multimodal=multimodal), inputs_of(ones(), token_type_ids=types), False, False)
    assert fitted.plain is plain
