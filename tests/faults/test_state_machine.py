"""`PrefixStore` against a model of it that is a list of sequences: whatever happens in whatever order, they agree."""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from unit.store_helpers import FINGERPRINT, expected_kv, geometry, read_back, write_prefix

from hf_contiguouskv.errors import PrefixInUseError, StoreFullError
from hf_contiguouskv.store import PrefixStore, StoredPrefix, eviction, finding, publishing, room, rows, uses

from .damage import segment_files, segment_path
from .scale import REPRODUCIBLE, scaled

C = 4
GEOMETRY = geometry(num_layers=2, chunk_size=C, leader_layers=(), indexed_layers=())
TTL_S = 100
# No sum of these comes close to `TTL_S`: the seconds that a test takes do not matter.
STEPS_S = (30, 80)

Tokens = tuple[int, ...]


@dataclass(eq=False)
class Stored:
    """A segment as the model knows it: all tokens up to its end, and the chunk that it begins with."""

    ids: Tokens
    first: int
    pinned: bool = False
    used_s: float = 0.0

    @property
    def chunks(self) -> set[Tokens]:
        """Its chunks, each named by all tokens up to its end."""
        ends = [*range((self.first + 1) * C, len(self.ids), C), len(self.ids)]
        return {self.ids[:end] for end in ends}

    @property
    def parent(self) -> Tokens:
        """The chunk that it continues; of no tokens if it begins a prefix."""
        return self.ids[: self.first * C]


@dataclass
class Model:
    """What a store should hold."""

    segments: dict[str, Stored] = field(default_factory=dict)

    def longest(self, ids: Tokens, segments: list[Stored] | None = None) -> int:
        """How many leading tokens are stored: chunk by chunk, and then the most of one more."""
        chunks = set[Tokens]().union(*(one.chunks for one in (segments or self.segments.values())))
        whole = 0
        while whole + C <= len(ids) and ids[: whole + C] in chunks:
            whole += C
        following = [chunk for chunk in chunks if whole < len(chunk) <= whole + C and chunk[:whole] == ids[:whole]]
        return max((_shared(chunk, ids) for chunk in following), default=whole)

    def next_stored(self, ids: Tokens, first: int) -> int | None:
        chunks = set[Tokens]().union(*(one.chunks for one in self.segments.values()))
        return next((j for j in range(first, len(ids) // C) if ids[: (j + 1) * C] in chunks), None)

    def add(self, key: str, new: Stored) -> None:
        """Also forget what the new one makes superfluous: a single partial chunk that its first chunk begins with."""
        own = len(new.ids) - new.first * C
        for other, old in list(self.segments.items()):
            short = len(old.ids) - old.first * C < min(C, own)
            if short and not old.pinned and old.first == new.first and new.ids[: len(old.ids)] == old.ids:
                del self.segments[other]
        # One that continues what was lost is replaced by one that begins earlier: same name, same pin.
        new.pinned = key in self.segments and self.segments[key].pinned
        self.segments[key] = new

    def lost_without(self, key: str) -> set[str]:
        """The segment, and all that could not be reached any more."""
        lost = {key}
        while True:
            held = set[Tokens]().union(*(one.chunks for name, one in self.segments.items() if name not in lost))
            gone = set[Tokens]().union(*(self.segments[name].chunks for name in lost))
            more = {
                name
                for name, one in self.segments.items()
                if name not in lost and one.first and one.parent in gone and one.parent not in held
            }
            if not more:
                return lost
            lost |= more

    def leaves(self) -> set[str]:
        parents = {one.parent for one in self.segments.values() if one.first}
        return {name for name, one in self.segments.items() if not one.chunks & parents}

    def ancestors(self, key: str) -> set[str]:
        """Segments that the prefix of this one goes through, itself included."""
        ids = self.segments[key].ids
        heads = {ids[:end] for end in range(C, len(ids) + 1, C)}
        return {name for name, one in self.segments.items() if one.chunks & heads} | {key}


def _shared(left: Tokens, right: Tokens) -> int:
    length = min(len(left), len(right))
    return next((i for i in range(length) if left[i] != right[i]), length)


class Clock:
    """The time module with another `time`."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def time(self) -> float:
        return time.time() + self.ahead_s

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


sequences = st.lists(st.integers(1, 2), min_size=1, max_size=3 * C + 2).map(tuple)
picks = st.integers(0, 1000)


class Machine(RuleBasedStateMachine):
    """What all machines share: a store, a model, and the rules that need no more."""

    options: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="machine"))
        self.model = Model()
        self.history: list[Tokens] = []
        self.clock = Clock()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(logging.getLogger("hf_contiguouskv"), "disabled", True)
        for module in (eviction, finding, publishing, room, rows, uses):
            self.patch.setattr(module, "time", self.clock)
        self.store = self.open()

    def open(self) -> PrefixStore:
        return PrefixStore(self.folder / "store", direct=False, **self.options)

    def teardown(self) -> None:
        self.store.close()
        self.patch.undo()
        shutil.rmtree(self.folder)

    # -- helpers ----------------------------------------------------------------------------------------------------

    def find(self, ids: Tokens) -> StoredPrefix | None:
        return self.store.inner.lookup(FINGERPRINT, np.array(ids, dtype=np.int64), C)

    def pick(self, number: int) -> str:
        return sorted(self.model.segments)[number % len(self.model.segments)]

    def pick_to_lose(self, number: int) -> str:
        """Not a pinned one; one that others continue, if there is one and `number` is even."""
        keys = sorted(key for key, one in self.model.segments.items() if not one.pinned)
        if number % 2 == 0:
            keys = [key for key in keys if key not in self.model.leaves()] or keys
        return keys[number // 2 % len(keys)]

    def note_use(self, found: StoredPrefix | None) -> None:
        for span in found.spans if found else ():
            self.model.segments[span.segment.key].used_s = self.clock.ahead_s

    def is_expired(self, one: Stored) -> bool:
        return False

    def assert_bytes(self, ids: Tokens, found: StoredPrefix) -> None:
        """K and V of every found token are those of this token in every layer."""
        chunks = -(-found.tokens // C)
        layers = range(GEOMETRY.num_layers)
        for layer, kv in zip(layers, read_back(self.store, found, layers), strict=True):
            expected = expected_kv(GEOMETRY, np.array(ids[: found.tokens]), layer)
            assert kv.shape[0] == chunks
            for chunk in range(chunks):
                tokens = min(C, found.tokens - chunk * C)
                assert torch.equal(kv[chunk, :, :, :tokens], expected[chunk, :, :, :tokens])

    def write(self, ids: Tokens) -> None:
        """Store a prefix as the library does: what is missing of it, up to what is stored already."""
        self.history.append(ids)
        for _ in range(len(ids) + 1):
            found = self.find(ids)
            self.note_use(found)
            done = found.tokens if found else 0
            if done == len(ids):
                return
            array = np.array(ids, dtype=np.int64)
            later = self.store.inner.next_stored(FINGERPRINT, array, C, done // C + 1)
            assert later == self.model.next_stored(ids, done // C + 1)
            end = len(ids) if later is None else later * C
            stored = write_prefix(self.store, array[:end], done // C, GEOMETRY)
            assert stored.tokens == end
            self.published(stored.spans[-1].segment.key, Stored(ids[:end], done // C, used_s=self.clock.ahead_s))
            self.note_use(None)
        raise AssertionError(f"{ids} is not found although it was stored")

    def published(self, key: str, new: Stored) -> None:
        self.model.add(key, new)

    # -- rules ------------------------------------------------------------------------------------------------------

    @rule(ids=sequences)
    def store_prefix(self, ids: Tokens) -> None:
        self.write(ids)

    @precondition(lambda self: self.model.segments)
    @rule(number=picks, more=sequences)
    def continue_prefix(self, number: int, more: Tokens) -> None:
        self.write((self.model.segments[self.pick(number)].ids + more)[: 5 * C])

    @rule(turns=st.lists(st.lists(st.integers(1, 2), min_size=1, max_size=C + 1).map(tuple), min_size=2, max_size=3))
    def store_a_conversation(self, turns: list[Tokens]) -> None:
        """Each turn continues what is stored of it, mostly in the middle of a chunk."""
        ids: Tokens = (1,) * C
        for turn in turns:
            ids += turn
            self.write(ids)

    @precondition(lambda self: self.history)
    @rule(number=picks)
    def store_again(self, number: int) -> None:
        self.write(self.history[number % len(self.history)])

    @rule(ids=sequences)
    def look_up(self, ids: Tokens) -> None:
        found = self.find(ids)
        tokens = found.tokens if found else 0
        fresh = [one for one in self.model.segments.values() if not self.is_expired(one)]
        if len(fresh) == len(self.model.segments):
            assert tokens == self.model.longest(ids)
        else:
            assert tokens <= (self.model.longest(ids, fresh) if fresh else 0)
        self.note_use(found)
        if found:
            self.assert_bytes(ids, found)

    @precondition(lambda self: self.model.segments)
    @rule(number=picks, more=sequences)
    def look_up_what_begins_with_something_stored(self, number: int, more: Tokens) -> None:
        self.look_up(self.model.segments[self.pick(number)].ids + more)

    @precondition(lambda self: self.model.segments)
    @rule(number=picks, recursive=st.booleans())
    def delete(self, number: int, recursive: bool) -> None:
        key = self.pick(number)
        lost = self.model.lost_without(key)
        if len(lost) > 1 and not recursive:
            with pytest.raises(PrefixInUseError):
                self.store.delete(key)
            return
        assert set(self.store.delete(key, recursive=recursive)) == lost
        for name in lost:
            del self.model.segments[name]

    @precondition(lambda self: self.model.segments)
    @rule(number=picks, pinned=st.booleans())
    def pin_or_unpin(self, number: int, pinned: bool) -> None:
        key = self.pick(number)
        (self.store.pin if pinned else self.store.unpin)(key)
        self.model.segments[key].pinned = pinned

    @rule()
    def collect_garbage(self) -> None:
        report = self.store.gc()
        assert (report.indexed, report.forgotten, report.unreadable, report.in_use) == ((), (), (), ())
        self.expire(set(report.expired))
        held = set[Tokens]().union(*(one.chunks for one in self.model.segments.values()))
        orphans = {key for key, one in self.model.segments.items() if one.first and one.parent not in held}
        assert set(report.unreachable) == orphans
        assert not list((self.folder / "store" / "partial").iterdir())
        assert not list((self.folder / "store").glob("damaged/*"))

    def expire(self, reported: set[str]) -> None:
        assert reported == set()

    @rule()
    def rebuild_index(self) -> None:
        self.store.inner.index.rebuild()

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = self.open()

    # -- what a crash or a bad disk does ----------------------------------------------------------------------------

    @rule(ids=sequences, locked=st.booleans())
    def crash_while_writing(self, ids: Tokens, locked: bool) -> None:
        """A partial file is left; while its writer lives it is left alone."""
        partial = self.folder / "store" / "partial"
        if locked:
            with self.store.inner.begin_segment(FINGERPRINT, GEOMETRY, np.array(ids, dtype=np.int64)) as writer:
                writer.write_chunks(0, 0, expected_kv(GEOMETRY, np.array(ids), 0))
                assert len(self.store.gc(dry_run=True).in_use) == 1
                self.reopen_beside()
                assert len(list(partial.iterdir())) == 1
        else:
            (partial / f"{'ab' * 16}.deadbeef.partial").write_bytes(b"x" * 5000)
            self.reopen()
        assert not list(partial.iterdir())

    def reopen_beside(self) -> None:
        self.open().close()

    @rule()
    def lose_the_index(self) -> None:
        self.store.close()
        for path in (self.folder / "store").glob("index.sqlite*"):
            path.unlink()
        self.store = self.open()
        for one in self.model.segments.values():
            one.used_s = 0.0  # All that is known is when the file was written, by a clock that was never put ahead.

    @precondition(lambda self: any(not one.pinned for one in self.model.segments.values()))
    @rule(number=picks, closed=st.booleans())
    def lose_a_file(self, number: int, closed: bool) -> None:
        key = self.pick_to_lose(number)
        if closed:
            self.store.close()
        segment_path(self.folder / "store", key).unlink()
        if closed:
            self.store = self.open()
        else:
            # A look-up that meets it finds what lies before it; otherwise `gc` forgets it.
            found = self.find(self.model.segments[key].ids)
            assert (found.tokens if found else 0) <= self.model.longest(self.model.segments[key].ids)
            self.store.gc()
            self.model_expires()
        self.model.segments.pop(key, None)

    def model_expires(self) -> object:
        """Forget what `gc` removes because it is too old."""

    @precondition(lambda self: any(not one.pinned for one in self.model.segments.values()))
    @rule(number=picks)
    def lose_a_file_and_store_what_continued_it(self, number: int) -> None:
        key = self.pick_to_lose(number)
        lost = self.model.segments[key]
        self.lose_a_file(number, True)
        after = [one.ids for one in self.model.segments.values() if one.first and one.parent in lost.chunks]
        for ids in sorted(after):
            self.write(ids)

    @precondition(lambda self: any(not one.pinned for one in self.model.segments.values()))
    @rule(number=picks)
    def take_a_segment_out_of_service(self, number: int) -> None:
        key = self.pick_to_lose(number)
        found = self.find(self.model.segments[key].ids)
        self.note_use(found)
        for span in found.spans if found else ():
            if span.segment.key == key:
                self.store.inner.discard(span.segment, "as a test")
                del self.model.segments[key]
                assert (self.folder / "store" / "damaged" / f"{key}.safetensors").exists()

    # -- what always holds ------------------------------------------------------------------------------------------

    @invariant()
    def index_files_and_model_agree(self) -> None:
        entries = {entry.key: (entry.tokens, entry.pinned) for entry in self.store.entries()}
        assert entries == {key: (len(one.ids), one.pinned) for key, one in self.model.segments.items()}
        assert set(segment_files(self.folder / "store")) == set(entries)
        assert self.store.verify() == []


class TimedMachine(Machine):
    """With a time to live."""

    options: ClassVar[dict[str, Any]] = {"ttl_s": TTL_S}

    def is_expired(self, one: Stored) -> bool:
        return not one.pinned and one.used_s < self.clock.ahead_s - TTL_S

    @rule(seconds=st.sampled_from(STEPS_S))
    def wait(self, seconds: int) -> None:
        self.clock.ahead_s += seconds

    def model_expires(self) -> set[str]:
        gone: set[str] = set()
        while more := {key for key in self.model.leaves() if self.is_expired(self.model.segments[key])}:
            for key in more:
                del self.model.segments[key]
            gone |= more
        return gone

    def expire(self, reported: set[str]) -> None:
        assert reported == self.model_expires()

    def write(self, ids: Tokens) -> None:
        # What is too old is neither found nor stored again before it goes.
        self.collect_garbage()
        self.wait_for_parents()
        super().write(ids)

    def wait_for_parents(self) -> None:
        """Parents that are too old stay for their children: they are used now, so that nothing is."""
        for one in list(self.model.segments.values()):
            if self.is_expired(one):
                for key in self.model.leaves():
                    self.note_use(self.find(self.model.segments[key].ids))


class BoundedMachine(Machine):
    """With room for few segments: who goes is the store's choice, within limits."""

    options: ClassVar[dict[str, Any]] = {"max_disk_bytes": 6 * 8192}

    @initialize()
    def nothing(self) -> None:
        self.before: set[str] = set()

    def published(self, key: str, new: Stored) -> None:
        pinned = {name for name, one in self.model.segments.items() if one.pinned}
        super().published(key, new)
        left = {entry.key for entry in self.store.entries()}
        assert key in left
        assert left <= set(self.model.segments)
        assert pinned <= left
        for name in left:
            # Whatever stays can be reached, if it could before: nothing that it continues has gone.
            assert self.model.ancestors(name) <= left
        self.model.segments = {name: one for name, one in self.model.segments.items() if name in left}

    def write(self, ids: Tokens) -> None:
        try:
            super().write(ids)
        except StoreFullError:
            kept = {key for key, one in self.model.segments.items() if one.pinned}
            assert kept  # Unpinned leaves would have made room (at most two segments are those that it continues).

    @invariant()
    def the_bound_holds(self) -> None:
        assert self.store.stats.segment_bytes <= self.options["max_disk_bytes"]


def bounded(examples: int) -> settings:
    """The same examples in every run. A failure is shown as it was found: shrinking takes minutes (`Phase.shrink`)."""
    return settings(
        max_examples=scaled(examples),
        stateful_step_count=25,
        deadline=None,
        derandomize=REPRODUCIBLE,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )


def test_a_child_of_one_partial_chunk_is_found_again_after_its_parent_was_lost(store_path: Path) -> None:
    """The least that a turn of a conversation adds. Its name is that of the whole prefix, which is computed again."""
    parent = np.arange(2 * C)
    child = np.append(parent, [91, 92])
    with PrefixStore(store_path) as store:
        lost = write_prefix(store, parent, 0, GEOMETRY).spans[-1].segment.key
        write_prefix(store, child, 2, GEOMETRY)
    segment_path(store_path, lost).unlink()
    with PrefixStore(store_path) as store:
        assert store.inner.lookup(FINGERPRINT, child, C) is None
        assert store.inner.next_stored(FINGERPRINT, child, C, 1) is None  # So all of it is computed again:
        write_prefix(store, child, 0, GEOMETRY)
        found = store.inner.lookup(FINGERPRINT, child, C)
        assert found is not None
        assert found.tokens == len(child)


def test_the_match_is_exact_to_the_token_before_a_lost_parent(store_path: Path) -> None:
    """Behind the gap something is stored; before it, another prefix shares a token. That token is found."""
    parent = np.arange(C)
    with PrefixStore(store_path) as store:
        lost = write_prefix(store, parent, 0, GEOMETRY).spans[-1].segment.key
        write_prefix(store, np.arange(4 * C), 1, GEOMETRY)
        write_prefix(store, np.array([0, 91, 92]), 0, GEOMETRY)
    segment_path(store_path, lost).unlink()
    with PrefixStore(store_path) as store:
        found = store.inner.lookup(FINGERPRINT, np.arange(4 * C), C)
        assert found is not None
        assert found.tokens == 1


TestStore = Machine.TestCase
TestStore.settings = bounded(120)
TestStoreWithALifetime = TimedMachine.TestCase
TestStoreWithALifetime.settings = bounded(30)
TestStoreWithABound = BoundedMachine.TestCase
TestStoreWithABound.settings = bounded(40)
