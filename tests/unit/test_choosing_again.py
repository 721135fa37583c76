"""Chunks change places as a slow copy of all of them would; who votes in mid-answer is known without a model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_contiguouskv.config import IndexedKeys
from hf_contiguouskv.loading.replacement import Exchange
from hf_contiguouskv.request.choosing_again import ChoosingAgain
from hf_contiguouskv.request.rows import NextTokens, Rows

KEEP, OF = 5, 12
CHOICES = st.sets(st.integers(0, OF - 1), min_size=KEEP, max_size=KEEP).map(sorted).map(np.array)


@settings(max_examples=100, deadline=None)
@given(before=CHOICES, after=CHOICES)
def test_an_exchange_turns_one_choice_into_another(before, after):
    change = Exchange.between(before, after)
    row = before.copy()
    row[change.targets] = before[change.origins]
    row[change.places] = change.missing
    assert row.tolist() == after.tolist()
    assert not set(change.missing) & set(before)
    assert not np.any(change.origins == change.targets)


class Answer:
    """A request that goes on token by token; what it remembers is told from `remembered` itself."""

    def __init__(self, every: int, question: int, rows: int = 1, **rule: int) -> None:
        self.again = ChoosingAgain(every, IndexedKeys(**{"queries": 4, "recent": 2} | rule))
        distinct = Rows.distinct(rows, question)
        self.again.begin(distinct, distinct.voters(4, 2))
        self.rows, self.length = rows, question
        self.held = self.again.remembered(None, self._queries(0, question))

    def _queries(self, start: int, end: int) -> torch.Tensor:
        """Queries that are their own positions."""
        return torch.arange(start, end).float().expand(self.rows, 1, -1)[..., None]

    def pass_tokens(self, new: int = 1, drafts: int = 0, mask: torch.Tensor | None = None) -> list[list[int]] | None:
        """The positions that vote in each row; `None`: this forward chooses nothing."""
        self.again.advance(NextTokens(self.rows, self.length, new, drafts, mask), 0)
        self.held = self.again.remembered(self.held, self._queries(self.length, self.length + new))
        self.length += new
        choice = self.again.choice
        if choice is None:
            return None
        assert self.held[0, 0, :, 0].tolist() == choice.positions.tolist()
        return [choice.positions[voters].tolist() for voters in choice.voters]

    def remembered(self) -> list[int]:
        return [int(position) for position in self.held[0, 0, :, 0]]


def test_the_question_and_the_latest_tokens_vote_every_so_many_tokens():
    answer = Answer(6, question=20)
    asked = [4, 13, 18, 19]
    assert answer.remembered() == asked
    found = [answer.pass_tokens() for _ in range(12)]
    assert found == [None] * 5 + [[[*asked, 22, 23, 24, 25]]] + [None] * 5 + [[[*asked, 28, 29, 30, 31]]]


def test_at_every_token_the_newest_one_votes():
    answer = Answer(1, question=2)
    assert [answer.pass_tokens() for _ in range(3)] == [[[0, 1, 2]], [[0, 1, 3]], [[0, 1, 4]]]


def test_no_more_is_remembered_than_can_vote():
    answer = Answer(50, question=20)
    for number in range(200):
        answer.pass_tokens()
        assert len(answer.remembered()) <= 8
        if number % 50 < 40:
            assert len(answer.remembered()) in (4, 8)


def test_drafts_are_remembered_but_vote_only_once_they_are_kept():
    answer = Answer(2, question=4)
    assert answer.pass_tokens(4, drafts=3) is None  # 4, and drafts 5, 6, 7.
    answer.length = 6  # 5 was right.
    assert answer.pass_tokens(4, drafts=3) == [[0, 1, 2, 3, 4, 5, 6]]
    answer.length = 9  # 7 and 8 were right.
    assert answer.pass_tokens(4, drafts=3) == [[0, 1, 2, 3, 7, 8, 9]]


def test_what_was_cropped_does_not_vote():
    answer = Answer(3, question=4)
    for expected in (None, None, [[0, 1, 2, 3, 4, 5, 6]], None):
        assert answer.pass_tokens() == expected
    answer.length = 7  # As far as the last choice knew.
    assert answer.pass_tokens() is None
    answer.length = 3  # Into the question.
    assert answer.pass_tokens() == [[0, 1, 2, 3]]
    assert [answer.pass_tokens() for _ in range(3)] == [None, None, [[0, 1, 2, 4, 5, 6]]]


def test_tokens_that_were_cropped_between_two_choices_are_forgotten():
    answer = Answer(100, question=4)
    for _ in range(98):
        answer.pass_tokens()
    answer.length = 50
    found = [answer.pass_tokens() for _ in range(54)]
    assert found[:-1] == [None] * 53
    assert found[-1] == [[0, 1, 2, 3, 100, 101, 102, 103]]


def test_each_row_is_asked_its_own_question():
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, :3] = 0  # Three columns of padding.
    again = ChoosingAgain(1, IndexedKeys(queries=4))
    real = mask[:, :6].bool()
    again.begin(Rows(torch.arange(2), torch.arange(2), real, real), [torch.tensor([0, 1, 4, 5]), torch.tensor([4, 5])])
    for length in (6, 7):
        again.take_rows(torch.tensor([1, 0]))
        again.advance(NextTokens(2, length, 1, 0, mask[[1, 0] if length == 6 else [0, 1], : length + 1]), 0)
        voters = [again.choice.positions[one].tolist() for one in again.choice.voters]
        assert voters == ([[4, 5, 6], [0, 1, 4, 5, 6]] if length == 6 else [[0, 1, 4, 5, 7], [4, 5, 7]])


def test_another_number_of_rows_is_left_to_the_layers():
    answer = Answer(1, question=4)
    answer.rows = 2
    answer.again.advance(NextTokens(2, 4, 1, 0, None), 0)
    assert answer.again.choice is None


@pytest.mark.parametrize("new", [2, 7])
def test_a_prompt_that_goes_on_is_the_question_from_then_on(new):
    answer = Answer(2, question=4)
    (voters,) = answer.pass_tokens(new)
    asked = voters[4:]
    assert voters[:4] == [0, 1, 2, 3]
    assert len(asked) == min(new, 4)
    assert answer.pass_tokens() is None
    assert answer.pass_tokens() == [[*asked, 4 + new, 5 + new]]
