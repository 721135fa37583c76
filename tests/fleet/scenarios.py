"""What every shared store must do, whatever its engine: used by the tests of each of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from machines import CHUNK, Machines, found, found_tokens, is_right, remote
from store_helpers import some_tokens, write_prefix

from hf_contiguouskv.errors import StoreError

IDS = some_tokens(1001)


def branch_off(machines: Machines, shared: int) -> None:
    """A prompt that shares `shared` tokens with a stored one finds these."""
    write_prefix(machines("one"), IDS)
    machines("one").flush()
    prompt = np.concatenate([IDS[:shared], some_tokens(500, seed=2) + 1000])
    two = machines("two")
    stored = found(two, prompt)
    assert stored is not None
    assert stored.tokens == shared
    assert is_right(two, stored, prompt)


def converse(machines: Machines) -> None:
    """A conversation goes from machine to machine; a third one finds all of it."""
    one, two, three = machines("one"), machines("two"), machines("three")
    turns = [IDS]
    write_prefix(one, IDS)
    one.flush()
    for number, store in enumerate((two, one, two), 1):
        before = turns[-1]
        turns.append(np.concatenate([before, some_tokens(300 + number, seed=number)]))
        assert found_tokens(store, turns[-1]) >= len(before) // CHUNK * CHUNK
        write_prefix(store, turns[-1], first_chunk=len(before) // CHUNK)
        store.flush()
    stored = found(three, turns[-1])
    assert stored is not None
    assert stored.tokens == len(turns[-1])
    assert len(stored.spans) == len(turns)
    assert is_right(three, stored, turns[-1])


def damage_and_replace(machines: Machines, damage: Callable[[], object]) -> None:
    """What is damaged in the shared store is noticed, and replaced by the next machine that computes it.

    Args:
        machines: share the store.
        damage: changes a byte of the only segment there.
    """
    one = machines("one")
    key = write_prefix(one, IDS).spans[0].segment.key
    one.flush()
    damage()
    two = machines("two")
    stored = found(two, IDS)
    assert stored is not None
    with pytest.raises(StoreError, match="checksum"):
        is_right(two, stored, IDS)
    two.inner.discard(stored.spans[0].segment, "its bytes were wrong")
    two.flush()
    assert remote(two)["damaged"] == 1
    assert found_tokens(two, IDS) == 0
    three = machines("three")
    write_prefix(three, IDS)
    three.flush()
    assert remote(three)["published"] == 1
    stored = found(two, IDS)
    assert stored is not None
    assert stored.spans[0].segment.key == key
    assert is_right(two, stored, IDS)
