"""Does a fleet find, lose and find again what an engine holds that cannot list and forgets?"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from machines import CHUNK, Machines, engine_of, found, found_tokens, is_right, remote
from memory_engine import MemoryEngine, Objects
from scenarios import IDS, branch_off, converse, damage_and_replace
from store_helpers import some_tokens, write_prefix

from hf_contiguouskv.errors import StoreError
from hf_contiguouskv.store.fleet import fleet
from hf_contiguouskv.store.fleet.catalog import Catalog
from hf_contiguouskv.store.fleet.conformance import ENGINE_CHECKS, EngineCheck
from hf_contiguouskv.store.fleet.keyed_index import KeyedIndex, pointer_name
from hf_contiguouskv.store.fleet.names import SharedSegment


@pytest.fixture
def objects() -> Objects:
    return Objects()


@pytest.fixture
def machines(objects: Objects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machines]:
    """Machines that share an engine of this kind."""
    monkeypatch.setattr(
        "hf_contiguouskv.store.prefix_store.engine_for", lambda address, timeout_s: MemoryEngine(objects)
    )
    with Machines("memory://tests", tmp_path) as some:
        yield some


@pytest.mark.parametrize("check", ENGINE_CHECKS, ids=lambda check: check.__name__)
def test_the_stand_in_keeps_the_promises(check: EngineCheck, objects: Objects) -> None:
    check(lambda: MemoryEngine(objects))


def test_another_machine_finds_what_was_stored(machines: Machines) -> None:
    one, two = machines("one"), machines("two")
    assert found_tokens(two, IDS) == 0
    write_prefix(one, IDS)
    assert one.flush()
    stored = found(two, np.concatenate([IDS, some_tokens(50, seed=1)]))
    assert stored is not None
    assert stored.tokens == len(IDS)
    assert is_right(two, stored, IDS)
    assert remote(one)["published"] == 1
    assert remote(two)["found"] == 1


@pytest.mark.parametrize("shared", [300, 640, 999])
def test_a_prompt_that_branches_off_finds_what_it_shares(machines: Machines, shared: int) -> None:
    branch_off(machines, shared)


def test_a_conversation_that_went_from_machine_to_machine(machines: Machines) -> None:
    converse(machines)


def test_what_vanished_is_stored_again_by_who_computes_it(machines: Machines, objects: Objects) -> None:
    write_prefix(machines("one"), IDS)
    machines("one").flush()
    # Its head and its pointers stay, as an engine that needs room may do.
    for name in [name for name in objects if name.startswith("segments/")]:
        del objects[name]
    two = machines("two")
    assert found_tokens(two, IDS) == 0
    longer = np.concatenate([IDS[:1000], some_tokens(200, seed=4)])
    write_prefix(two, longer)
    two.flush()
    # The pointers of what both share led to what vanished. They lead to the new segment now.
    stored = found(machines("three"), IDS[:600])
    assert stored is not None
    assert stored.tokens == 600
    assert is_right(machines("three"), stored, IDS[:600])


@pytest.mark.parametrize("kind", ["segments/", "heads/", "chunks/", ""])
def test_what_this_machine_has_is_sent_again(
    machines: Machines, objects: Objects, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "_LOOK_S", 0.0)
    one = machines("one")
    write_prefix(one, IDS)
    one.flush()
    for name in [name for name in objects if name.startswith(kind)]:
        del objects[name]
    assert found_tokens(one, IDS) == len(IDS)
    one.flush()
    assert found_tokens(machines("two"), IDS) == (0 if kind == "chunks/" else len(IDS))


def test_a_machine_that_publishes_what_is_there_helps_to_find_it(machines: Machines, objects: Objects) -> None:
    write_prefix(machines("one"), IDS)
    machines("one").flush()
    for name in [name for name in objects if name.startswith("chunks/")]:
        del objects[name]
    two = machines("two")
    assert found_tokens(two, IDS) == 0
    write_prefix(two, IDS)
    two.flush()
    assert remote(two)["published_by_others"] == 1
    assert found_tokens(machines("three"), IDS) == len(IDS)


def test_damage_there_is_replaced_by_who_has_it_right(machines: Machines, objects: Objects) -> None:
    def damage() -> None:
        (name,) = [name for name in objects if name.startswith("segments/")]
        octets = bytearray(objects[name][0])
        octets[len(octets) // 2] ^= 1
        objects[name] = (bytes(octets), *objects[name][1:])

    damage_and_replace(machines, damage)


def test_pointers_that_lie_stop_nothing(machines: Machines, objects: Objects) -> None:
    write_prefix(machines("one"), IDS)
    machines("one").flush()
    pointers = sorted(name for name in objects if name.startswith("chunks/"))
    lie = SharedSegment(secrets.token_hex(16), "00000000", 0, 2500 * CHUNK, 10**9)
    for name, octets in zip(pointers[:3], (b"", b"x" * 36, b"x" * 10**6), strict=True):
        objects[name] = (octets, "", 0.0)
    index = KeyedIndex(MemoryEngine(objects))
    index.add(lie, [bytes.fromhex(pointers[3].rpartition("/")[2])] * 2500, CHUNK, lambda segment: False)
    assert objects[pointers[3]][0] != objects[pointers[4]][0]
    assert found_tokens(machines("two"), IDS) == len(IDS)
    # Who computes it puts that in order.
    three = machines("three")
    write_prefix(three, IDS)
    three.flush()
    assert len({objects[name][0] for name in pointers}) == 1


def test_deleting_for_all_leaves_pointers_that_lead_nowhere(machines: Machines, objects: Objects) -> None:
    one = machines("one")
    key = write_prefix(one, IDS).spans[0].segment.key
    one.flush()
    Catalog(engine_of(one)).withdraw(key)
    assert {name.partition("/")[0] for name in objects} == {"chunks"}
    assert found_tokens(machines("two"), IDS) == 0


def test_what_makes_no_sense_on_a_volatile_engine_is_refused(machines: Machines) -> None:
    upkeep = machines("one").shared_upkeep
    with pytest.raises(StoreError, match="evicts what is not used"):
        upkeep.delete_unused(10.0)
    with pytest.raises(StoreError, match="evicts what is not used"):
        upkeep.collect()


# -- the index alone ----------------------------------------------------------------------------------------------


def chain(lengths: Sequence[int], seed: int = 0) -> tuple[list[bytes], list[SharedSegment]]:
    """Hashes of the chunks of a prefix, and the segments that hold it one after the other."""
    hashes = [np.random.default_rng([seed, number]).bytes(16) for number in range(sum(lengths))]
    segments, first = [], 0
    for length in lengths:
        key = hashes[first + length - 1].hex()
        segments.append(SharedSegment(key, secrets.token_hex(4), first, length * CHUNK, 1000))
        first += length
    return hashes, segments


def indexed(objects: Objects, lengths: Sequence[int]) -> tuple[KeyedIndex, list[bytes], list[SharedSegment]]:
    """An index that holds a chain."""
    index, (hashes, segments) = KeyedIndex(MemoryEngine(objects)), chain(lengths)
    for segment in segments:
        index.add(segment, hashes, CHUNK, lambda other: True)
    return index, hashes, segments


@pytest.mark.parametrize("lengths", [[1], [2048], [500, 300, 1000], [40] * 40, [1000, *[3] * 30, 1000]], ids=str)
def test_chains_are_found_with_few_questions(objects: Objects, lengths: list[int]) -> None:
    index, hashes, segments = indexed(objects, lengths)
    objects.questions = 0
    assert index.find(hashes, CHUNK, 0, lambda segment: True) == segments
    assert objects.questions <= 4
    assert index.find([*hashes, b"x" * 16], CHUNK, lengths[0], lambda segment: True) == segments[1:]


def test_what_is_of_no_use_is_passed_over(objects: Objects) -> None:
    index, hashes, segments = indexed(objects, [100, 100, 100])
    assert index.find(hashes, CHUNK, 0, lambda segment: segment != segments[2]) == segments[:2]
    assert index.find(hashes, CHUNK, 100, lambda segment: segment != segments[1]) == segments[2:]
    assert index.find(hashes, CHUNK, 0, lambda segment: False) == []


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_pointers_that_were_evicted_cost_little(objects: Objects, share: float) -> None:
    index, hashes, segments = indexed(objects, [300, 300, 300])
    rng = np.random.default_rng(7)
    for name in list(objects):
        if rng.random() < share:
            del objects[name]
    assert index.find(hashes, CHUNK, 0, lambda segment: True) == segments


def test_a_prompt_of_which_nothing_is_there(objects: Objects) -> None:
    index, _, _ = indexed(objects, [10])
    assert index.find([b"y" * 16] * 40, CHUNK, 0, lambda segment: True) == []
    assert index.find([], CHUNK, 0, lambda segment: True) == []
    assert pointer_name(b"\xab" * 16) == "chunks/" + "ab" * 16
