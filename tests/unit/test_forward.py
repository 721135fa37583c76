"""Arguments of a forward: re-fed prompts, moved padding, equal rows."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_contiguouskv.errors import InputError
from hf_contiguouskv.session.forward_inputs import (
    Prompt,
    cut_cached,
    mask_behind_prefix,
    ordinary_prompt,
    rows_of,
    uncut_prefix,
)
from hf_contiguouskv.session.prompt_checks import is_refed

IDS = torch.arange(12).view(2, 6) + 10


def test_left_padding_moves_behind_the_prefix():
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]])
    moved = mask_behind_prefix(mask, 3)
    assert moved.tolist() == [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 1, 1]]
    assert mask_behind_prefix(moved, 3) is moved


def test_a_row_that_cannot_hold_the_prefix_is_refused():
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]])
    with pytest.raises(InputError, match="begin with the prefix"):
        mask_behind_prefix(mask, 3)
    # Unless it is a block of a longer prompt, which is all padding for that row.
    assert mask_behind_prefix(mask, 3, more_follows=True).tolist()[1] == [1, 1, 1, 0, 0]


@pytest.mark.parametrize(
    ("mask", "positions"),
    [
        (None, torch.arange(6)[None]),
        (torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]]), torch.tensor([[0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 3]])),
    ],
)
def test_an_ordinary_prompt_is_recognised(mask, positions):
    prompt = ordinary_prompt({"input_ids": IDS, "attention_mask": mask, "position_ids": positions})
    assert isinstance(prompt, Prompt)
    assert prompt.row(1).tolist() == IDS[1, prompt.pads[1] :].tolist()


@pytest.mark.parametrize(
    "inputs",
    [
        {"input_ids": None, "inputs_embeds": torch.zeros(2, 6, 4)},
        {"input_ids": IDS, "attention_mask": torch.tensor([[1] * 6, [1, 1, 1, 0, 1, 1]])},
        {"input_ids": IDS, "attention_mask": torch.tensor([[1] * 6, [1, 1, 1, 1, 1, 0]])},
        {"input_ids": IDS, "attention_mask": torch.ones(2, 1, 6, 6)},
        {"input_ids": IDS, "position_ids": torch.arange(6)[None] + 1},
        {"input_ids": IDS, "attention_mask": torch.tensor([[1] * 6, [0, 1, 1, 1, 1, 1]])},
        {"input_ids": IDS, "token_type_ids": torch.zeros(2, 6)},
    ],
    ids=["embeds", "hole", "right padding", "4D mask", "shifted", "padded without positions", "token types"],
)
def test_an_unusual_prompt_is_left_alone(inputs):
    assert isinstance(ordinary_prompt(inputs), str)


def holding(prefix: torch.Tensor, suffix: int = 0, automatic: bool = False, continued: bool = False) -> Any:
    """A cache that holds a prefix, int64 `(n,)`, and a suffix, which prompts continue or not."""
    return SimpleNamespace(
        length=len(prefix) + suffix,
        suffix_length=suffix,
        automatic=automatic,
        prefix=prefix,
        slot=SimpleNamespace(attached=object(), ids=prefix),
        suffix=SimpleNamespace(continued_by=lambda *about: continued),
    )


def test_mask_and_positions_tell_a_refed_prompt():
    ids, held = torch.arange(8)[None], holding(torch.arange(5))
    assert is_refed(held, {"input_ids": ids, "attention_mask": torch.ones(1, 8)}, True)
    assert not is_refed(held, {"input_ids": ids, "attention_mask": torch.ones(1, 13)}, True)
    assert is_refed(held, {"input_ids": ids, "position_ids": torch.arange(8)[None]}, False)
    assert not is_refed(held, {"input_ids": ids, "position_ids": torch.arange(5, 13)[None]}, False)
    assert not is_refed(holding(torch.arange(0)), {"input_ids": ids}, True)


def test_without_them_the_tokens_tell_it():
    ids, held = torch.arange(8)[None], holding(torch.arange(5))
    assert is_refed(held, {"input_ids": ids}, True)
    assert is_refed(held, {"input_ids": ids}, False)
    assert not is_refed(held, {"input_ids": ids[:, :5]}, False)
    assert not is_refed(held, {"input_ids": ids + 1}, False)


@pytest.mark.parametrize(("length", "refed"), [(20, False), (64, False), (80, True)])
def test_behind_a_suffix_a_part_of_the_prefix_is_new_text(length, refed):
    ids, held = torch.arange(80)[None, :length], holding(torch.arange(64), suffix=8)
    assert is_refed(held, {"input_ids": ids}, False) == refed
    # (A `generate` passes its prompt first.)
    assert is_refed(held, {"input_ids": ids}, True)


@pytest.mark.parametrize("continued", [False, True])
@pytest.mark.parametrize("length", [64, 72, 80])
def test_an_automatic_cache_takes_only_what_continues_it_for_the_prompt(length, continued):
    ids, held = torch.arange(80)[None, :length], holding(torch.arange(64), 8, automatic=True, continued=continued)
    assert is_refed(held, {"input_ids": ids}, False) == (continued and length > 72)


def test_cutting_and_uncutting_are_inverse():
    mask = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])
    prefix = torch.tensor([5, 6, 7])
    whole = torch.tensor([[5, 6, 7, 1, 2, 3, 4], [0, 0, 5, 6, 7, 8, 9]])
    inputs = {"input_ids": whole, "attention_mask": mask, "position_ids": torch.zeros(2, 7, dtype=torch.long)}
    cut_cached(inputs, 3)
    assert inputs["input_ids"].shape == inputs["position_ids"].shape == (2, 4)
    uncut_prefix(inputs, prefix)
    assert inputs["input_ids"].tolist() == whole.tolist()
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 6], [0, 0, 0, 1, 2, 3, 4]]


def test_equal_rows_are_one_and_padding_does_not_matter():
    ids = torch.tensor([[0, 1, 2], [7, 1, 2], [3, 1, 2], [3, 1, 2]])
    mask = torch.tensor([[1, 1, 0, 1, 1]] * 2 + [[1, 1, 1, 1, 1]] * 2)
    rows = rows_of({"input_ids": ids, "attention_mask": mask}, 2, 0)
    assert rows.representatives.tolist() == [0, 2]
    assert rows.of_batch.tolist() == [0, 0, 1, 1]
    assert rows.voting.tolist() == [[False, True, True], [True, True, True]]


def test_drafts_are_visible_but_do_not_vote():
    rows = rows_of({"input_ids": torch.tensor([[1, 2, 3, 4]])}, 9, 2)
    assert rows.voting.tolist() == [[True, True, False, False]]
    assert rows.visible.all()


def test_a_mask_of_the_wrong_length_is_refused():
    with pytest.raises(InputError, match="columns"):
        rows_of({"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.ones(1, 5)}, 9, 0)
