"""What does a look-up find where more segments share a beginning than it lists?"""

from __future__ import annotations

import numpy as np
import pytest
from machines import CHUNK, Machines, engine_of, found, is_right, remote
from store_helpers import FINGERPRINT, some_tokens, write_prefix

from hf_contiguouskv.store import PrefixStore
from hf_contiguouskv.store.fleet import listed_index
from hf_contiguouskv.store.fleet.engine import DeadlineError, ObjectInfo
from hf_contiguouskv.store.fleet.names import folder_of, read_entry
from hf_contiguouskv.store.hashing import TokenIds

# All prefixes begin with these tokens: 20 chunks, which anchors 1, 4 and 16 lie in, and 64 does not.
SHARED = some_tokens(20 * CHUNK)
LISTED, LISTED_AT_MOST = 5, 10
# The names of short ones come first.
SHORT = [np.concatenate([SHARED, some_tokens(12 * CHUNK, seed=seed)]) for seed in range(1, 31)]
LONG = np.concatenate([SHARED, some_tokens(300 * CHUNK, seed=99)])
QUESTION = some_tokens(300, seed=100)


@pytest.fixture(autouse=True)
def short_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listed_index, "_LISTED", LISTED)
    monkeypatch.setattr(listed_index, "_LISTED_AT_MOST", LISTED_AT_MOST)


@pytest.fixture
def reader(folder_machines: Machines) -> PrefixStore:
    """A machine beside one that has stored all of them."""
    one = folder_machines("one")
    for ids in (*SHORT, LONG):
        write_prefix(one, ids)
    one.flush()
    assert remote(one)["published"] == len(SHORT) + 1
    return folder_machines("two")


def lists(reader: PrefixStore, monkeypatch: pytest.MonkeyPatch, fail_from: int = 100) -> list[int]:
    """The limits of the listings that a machine asks for from now on; the engine is too slow from one of them on."""
    engine, limits = engine_of(reader), list[int]()
    list_each = engine.list_each

    def noted(folders: list[str], limit: int) -> list[list[ObjectInfo]]:
        limits.append(limit)
        if len(limits) > fail_from:
            raise DeadlineError("for a test")
        return list_each(folders, limit)

    monkeypatch.setattr(engine, "list_each", noted)
    return limits


def key_of(reader: PrefixStore, ids: TokenIds) -> str:
    """The key of the segment that a prefix of whole chunks has."""
    return reader.inner.finder.hashes(FINGERPRINT, ids, CHUNK)[-1].hex()


def tokens_found(reader: PrefixStore, ids: TokenIds) -> int:
    """How many tokens are found, all of them right; 0 where nothing is."""
    stored = found(reader, ids)
    if stored is None:
        return 0
    assert is_right(reader, stored, ids)
    return stored.tokens


@pytest.mark.parametrize("prompt", [LONG[: 100 * CHUNK], np.concatenate([LONG, QUESTION])], ids=["part", "more"])
def test_deeper_anchors_find_what_shallow_ones_cut(
    reader: PrefixStore, prompt: TokenIds, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = lists(reader, monkeypatch)
    assert tokens_found(reader, prompt) == min(len(prompt), len(LONG))
    # Nothing is read on for it.
    assert limits == [LISTED]


def listed(reader: PrefixStore, limit: int) -> list[TokenIds]:
    """The short prefixes that a listing below their last anchor shows, up to so many."""
    hashes = reader.inner.finder.hashes(FINGERPRINT, SHARED, CHUNK)
    (names,) = engine_of(reader).list_each([folder_of(hashes[15])], limit)
    assert len(names) == limit
    keys = {read_entry(info.name)[0] for info in names}  # type: ignore[index]
    return [ids for ids in SHORT if key_of(reader, ids) in keys]


def test_what_ends_before_the_next_anchor_is_found_among_those_listed(
    reader: PrefixStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = listed(reader, LISTED)[0]
    limits = lists(reader, monkeypatch)
    assert tokens_found(reader, np.concatenate([ids, QUESTION])) == len(ids)
    assert limits == [LISTED, LISTED_AT_MOST]


def test_of_what_is_not_listed_the_shared_beginning_is_found(reader: PrefixStore) -> None:
    lengths = {key_of(reader, ids): tokens_found(reader, np.concatenate([ids, QUESTION])) for ids in SHORT}
    # This is the limit: of those that end before the next anchor, it finds as many as it lists.
    whole = {key_of(reader, ids) for ids in listed(reader, LISTED_AT_MOST)}
    assert 0 < len(whole) < len(SHORT)
    assert lengths == {key: len(SHORT[0]) if key in whole else len(SHARED) for key in lengths}


def test_a_list_that_is_not_read_on_in_time_still_serves(reader: PrefixStore, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = lists(reader, monkeypatch, fail_from=1)
    assert tokens_found(reader, np.concatenate([SHORT[0], QUESTION])) >= len(SHARED)
    assert limits == [LISTED, LISTED_AT_MOST]
    assert "failures" not in remote(reader)
