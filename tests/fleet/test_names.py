"""Do the names of segments answer look-ups as reading all segments would?"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_contiguouskv.store.fleet.names import (
    FACTOR,
    Match,
    SharedSegment,
    anchors_of_prompt,
    anchors_of_segment,
    best_chain,
    folder_of,
    names_of,
    read_name,
    uploaded,
)
from hf_contiguouskv.store.hashing import chain_hashes, root_hash, segment_hashes

CHUNK = 4
ROOT = root_hash("f0" * 16, CHUNK)


def shared(ids: np.ndarray, first: int = 0, upload: str = "0a0b0c0d") -> tuple[SharedSegment, list[bytes]]:
    """A segment that holds chunks `first` to the end of a prefix, and the hashes of that."""
    hashes = chain_hashes(ROOT, ids, CHUNK, first=True)
    key = segment_hashes(ROOT, ids, CHUNK, first=True)[-1].hex()
    return SharedSegment(key, upload, first, len(ids) - first * CHUNK, 4096 * len(ids)), hashes


def listed(prompt: list[bytes], names: list[str], have: int = 0) -> list[Match]:
    """What a look-up of a prompt reads of all names: those below its own anchors."""
    found = []
    for anchor in anchors_of_prompt(len(prompt)):
        folder = folder_of(prompt[anchor - 1])
        for name in names:
            if anchor * FACTOR > have and name.startswith(folder):
                match = read_name(name, anchor, prompt, CHUNK)
                if match is not None:
                    found.append(match)
    return found


def test_anchors() -> None:
    assert anchors_of_prompt(0) == []
    assert anchors_of_prompt(63) == [1, 4, 16]
    assert anchors_of_segment(0, 70) == [1, 4, 16, 64]
    assert anchors_of_segment(20, 70) == [16, 64]
    assert anchors_of_segment(16, 20) == [16]
    assert anchors_of_segment(17, 20) == [16]


@pytest.mark.parametrize("tokens", [4, 5, 16, 17, 400, 4001])
def test_a_name_says_what_the_segment_is(tokens: int) -> None:
    segment, hashes = shared(np.arange(tokens))
    matches = listed(hashes, names_of(segment, hashes, CHUNK))
    assert {match.segment for match in matches} == {segment}
    assert max(match.chunks for match in matches) == tokens // CHUNK
    assert uploaded(segment.object_name) == (segment.key, segment.upload)


def test_another_prompt_finds_nothing() -> None:
    segment, hashes = shared(np.arange(4000))
    other = chain_hashes(ROOT, np.arange(4000) + 1, CHUNK, first=True)
    assert listed(other, names_of(segment, hashes, CHUNK)) == []


@pytest.mark.parametrize(
    "name",
    [
        "",
        "anchors/",
        "anchors/x/y/z",
        f"anchors/{'0' * 32}/000000-00000000/0000000-0000000000--{'0' * 32}-00000000",
        f"anchors/{'0' * 32}/000000-00000000/0000100-0000000000-zz-{'0' * 32}-00000000",
        f"anchors/{'0' * 32}/ffffff-00000000/fffffff-ffffffffff-{'00' * 48}-{'0' * 32}-00000000",
    ],
)
def test_names_that_say_nothing_are_passed_over(name: str) -> None:
    assert read_name(name, 1, [bytes(16)] * 10, CHUNK) is None


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_tree_of_segments_is_searched_as_by_reading_all(data: st.DataObject) -> None:
    """A few prefixes that branch anywhere, in segments that begin anywhere: what is found reaches as far as what is
    stored, up to the distance of two bytes in a name."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    stored: list[tuple[np.ndarray, int]] = []
    base = rng.integers(0, 9, data.draw(st.integers(4, 3000)))
    stored.append((base, 0))
    for _ in range(data.draw(st.integers(0, 5))):
        parent, _ = stored[int(rng.integers(len(stored)))]
        kept = int(rng.integers(1, len(parent) // CHUNK + 1)) * CHUNK
        grown = np.concatenate([parent[:kept], rng.integers(0, 9, int(rng.integers(4, 2000)))])
        stored.append((grown, kept // CHUNK if data.draw(st.booleans()) else 0))
    names = []
    for ids, first in stored:
        segment, hashes = shared(ids, first)
        if segment.end_chunk(CHUNK) > first:
            names += names_of(segment, hashes, CHUNK)
    source, _ = stored[int(rng.integers(len(stored)))]
    cut = int(rng.integers(1, len(source) + 1))
    prompt_ids = np.concatenate([source[:cut], rng.integers(100, 109, int(rng.integers(0, 500)))])
    prompt = chain_hashes(ROOT, prompt_ids, CHUNK, first=True)

    def agrees(ids: np.ndarray) -> int:
        theirs = chain_hashes(ROOT, ids, CHUNK, first=True)
        count = min(len(theirs), len(prompt))
        return next((n for n in range(count) if theirs[n] != prompt[n]), count)

    # By reading all: each segment holds its own chunks only, so a chain of them reaches as far as it has no hole.
    reach = 0
    while True:
        further = max((agrees(ids) for ids, first in stored if first <= reach and agrees(ids) > first), default=0)
        if further <= reach:
            break
        reach = further
    have = int(rng.integers(0, reach + 1)) if data.draw(st.booleans()) else 0
    chain = best_chain(listed(prompt, names, have), have)
    by_key = {shared(ids, first)[0].key: ids for ids, first in stored}
    got = have
    for segment in chain:
        assert segment.first_chunk <= got
        got = max(got, agrees(by_key[segment.key]))
    # (A name samples a range of chunks that is at most four times its anchor long with 48 bytes.)
    assert got >= reach - max(1, -(-3 * reach // 48))


def test_the_longest_of_equals_is_taken() -> None:
    short, hashes = shared(np.arange(40))
    long, more = shared(np.arange(80))
    chain = best_chain(listed(more, names_of(short, hashes, CHUNK) + names_of(long, more, CHUNK)), 0)
    assert chain == [long]
    assert best_chain(listed(more, names_of(short, hashes, CHUNK)), 10) == []
