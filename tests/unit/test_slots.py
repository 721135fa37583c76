"""Which chunks of a batch a row uses, and where they go: against loops; and numbers without repetitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_contiguouskv.loading.placement import chosen
from hf_contiguouskv.memory.blocks import among, distinct

numbers = st.integers(0, 30)


@given(batch=st.lists(numbers, unique=True, max_size=20), selected=st.sets(numbers, min_size=1))
def test_what_a_row_has_selected_goes_where_it_stands_in_the_text(batch: list[int], selected: set[int]) -> None:
    own = sorted(selected)
    expected = [(position, own.index(chunk)) for position, chunk in enumerate(batch) if chunk in selected]
    take, places = chosen(np.array(batch, dtype=np.int64), np.array(own), len(own))
    assert places.tolist() == [place for _, place in expected]
    if take is None:
        assert len(expected) == len(batch)
    else:
        assert take.tolist() == [position for position, _ in expected]
        assert len(expected) < len(batch)


@given(batch=st.lists(numbers, unique=True, max_size=20), keep=st.integers(1, 31))
def test_without_a_selection_the_first_chunks_of_the_prefix_are_used(batch: list[int], keep: int) -> None:
    take, places = chosen(np.array(batch, dtype=np.int64), None, keep)
    assert places.tolist() == [chunk for chunk in batch if chunk < keep]
    assert (take is None) is all(chunk < keep for chunk in batch)


@given(selected=st.sets(numbers, min_size=1), data=st.data(), tail=st.booleans())
def test_what_is_known_to_be_selected_is_not_looked_up_again(
    selected: set[int], data: st.DataObject, tail: bool
) -> None:
    """A batch of selected chunks, perhaps with the partial last one: the same as without that knowledge."""
    own = np.array(sorted(selected))
    part = data.draw(st.lists(st.sampled_from(sorted(selected)), unique=True))
    batch = np.array([*part, 31] if tail else part, dtype=np.int64)
    known = chosen(batch, own, len(own), selected_only=True)
    unknown = chosen(batch, own, len(own))
    assert known[1].tolist() == unknown[1].tolist()
    assert (known[0] is None) == (unknown[0] is None) == (not tail)
    if known[0] is not None and unknown[0] is not None:
        assert known[0].tolist() == unknown[0].tolist()


@given(some=st.lists(numbers), others=st.lists(numbers))
def test_among_is_isin(some: list[int], others: list[int]) -> None:
    found = among(np.array(some, dtype=np.int64), np.array(others, dtype=np.int64))
    assert found.dtype == bool
    assert found.tolist() == [number in others for number in some]


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@given(some=st.lists(st.integers(-5, 5)))
def test_distinct_is_unique(dtype: type, some: list[int]) -> None:
    found = distinct(np.array(some, dtype=dtype))
    assert found.dtype == dtype
    assert found.tolist() == sorted(set(some))
