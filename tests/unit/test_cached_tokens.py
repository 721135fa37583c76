"""Which prompts continue what a cache holds: by ids, per row, and only where all of them are known."""

from __future__ import annotations

import pytest
import torch

from hf_contiguouskv.session.cached_tokens import CachedTokens

PREFIX = torch.tensor([5, 6, 7])
SUFFIX = torch.tensor([[1, 2, 3, 4]])


def holding(ids: torch.Tensor, mask: torch.Tensor | None = None) -> CachedTokens:
    cached = CachedTokens()
    cached.append_new({"input_ids": ids, "attention_mask": mask})
    return cached


def prompt(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


def test_a_prompt_continues_what_it_begins_with():
    cached = holding(SUFFIX)
    assert cached.continued_by(prompt([5, 6, 7, 1, 2, 3, 4, 9]), None, PREFIX, 4)
    assert cached.continued_by(prompt([5, 6, 7, 1, 2, 3, 4]), None, PREFIX, 4)
    assert cached.continued_by(prompt([1, 2, 3, 4, 9]), None, None, 4)


@pytest.mark.parametrize(
    "other", [[5, 6, 7, 1, 2, 3], [5, 6, 7, 1, 2, 9, 4, 9], [5, 6, 8, 1, 2, 3, 4, 9]], ids=["short", "suffix", "prefix"]
)
def test_a_prompt_that_differs_anywhere_does_not(other):
    assert not holding(SUFFIX).continued_by(prompt(other), None, PREFIX, 4)


def test_every_row_must_continue_its_own():
    cached = holding(torch.tensor([[1, 2], [3, 4]]))
    assert cached.continued_by(prompt([1, 2, 9], [3, 4, 9]), None, None, 2)
    assert not cached.continued_by(prompt([1, 2, 9], [1, 2, 9]), None, None, 2)
    assert not cached.continued_by(prompt([1, 2, 9]), None, None, 2)


def test_rows_are_followed_through_beams_copies_and_selections():
    cached = holding(torch.tensor([[1, 2], [3, 4]]))
    cached.select(torch.tensor([1, 1]))
    assert cached.known(2).tolist() == [[3, 4], [3, 4]]
    cached = holding(torch.tensor([[1, 2], [3, 4]]))
    cached.repeat(2)
    assert cached.known(2).tolist() == [[1, 2], [1, 2], [3, 4], [3, 4]]
    cached.select(torch.tensor([True, False, False, True]))
    assert cached.known(2).tolist() == [[1, 2], [3, 4]]


def test_a_crop_takes_ids_from_the_end():
    cached = holding(SUFFIX)
    cached.crop(2)
    assert cached.known(2).tolist() == [[1, 2]]
    assert cached.known(4) is None
    cached.crop(-1)
    assert cached.known(0) is not None


def test_what_was_not_seen_is_unknown_until_all_of_it_is_gone():
    cached = holding(SUFFIX)
    cached.append_new({"inputs_embeds": torch.zeros(1, 2, 8)})
    assert cached.known(6) is None
    assert not cached.continued_by(prompt([1, 2, 3, 4, 5, 6, 7]), None, None, 6)
    cached.crop(4)
    assert cached.known(4) is None
    cached.crop(0)
    assert cached.known(0) is not None


def test_more_tokens_than_were_seen_are_unknown():
    assert holding(SUFFIX).known(5) is None


def test_another_number_of_rows_is_unknown():
    cached = holding(SUFFIX)
    cached.append_new({"input_ids": torch.tensor([[1], [2]])})
    assert cached.known(5) is None


def test_padding_before_the_prefix_is_between_prefix_and_suffix_in_the_cache():
    ids, mask = prompt([0, 0, 1, 2]), torch.tensor([[1, 1, 1, 0, 0, 1, 1]])
    cached = holding(ids, mask)
    before, hidden = prompt([0, 0, 5, 6, 7, 1, 2, 9]), torch.tensor([[True, True] + [False] * 6])
    assert cached.continued_by(before, hidden, PREFIX, 4)
    between = prompt([5, 6, 7, 0, 0, 1, 2, 9])
    assert cached.continued_by(between, torch.tensor([[False] * 3 + [True] * 2 + [False] * 3]), PREFIX, 4)
    assert not cached.continued_by(before, None, PREFIX, 4)
    assert not cached.continued_by(prompt([0, 5, 6, 7, 1, 2, 9, 9]), hidden, PREFIX, 4)


def test_a_mask_that_hides_more_than_before_does_not_continue():
    hidden = torch.tensor([[False, True, False, False, False]])
    assert not holding(SUFFIX).continued_by(prompt([1, 2, 3, 4, 9]), hidden, None, 4)
