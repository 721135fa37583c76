"""What makes room, and what outlives its time, compared with plain models of both."""

from __future__ import annotations

import sqlite3
import time
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clock import Clock
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from store_helpers import FINGERPRINT, expected_kv, geometry, path_of, some_tokens, write_prefix

from hf_contiguouskv.errors import StoreFullError
from hf_contiguouskv.store import PrefixStore
from hf_contiguouskv.store.eviction import choose_victims, expired_segments, typical_cost, worth
from hf_contiguouskv.store.format import SegmentHeader
from hf_contiguouskv.store.hashing import TokenIds, root_hash, segment_hashes
from hf_contiguouskv.store.rows import SCHEMA, SegmentRow, insert_segment

NOW = 1_000_000
G = geometry(num_layers=1, kv_heads=1, head_dim=1, chunk_size=2, leader_layers=(), indexed_layers=())
C = G.chunk_size


# ---- a plain model: segments know their whole prefix, and there are no hashes and no tables ----


@dataclass(frozen=True)
class Known:
    """A segment: chunks from `first` on of the prefix `ids`."""

    ids: tuple[int, ...]
    first: int
    nbytes: int
    compute_ms: int
    idle: int
    uses: int
    pinned: bool
    created: int

    @property
    def tokens(self) -> int:
        return len(self.ids) - self.first * C

    def continues(self, other: Known) -> bool:
        """Whether `other` holds the chunk before this segment."""
        before = self.ids[: self.first * C]
        return other.first < self.first and other.ids[: len(before)] == before

    def worth(self, per_token: Fraction) -> Fraction:
        cost = Fraction(self.compute_ms, 1000) if self.compute_ms else self.tokens * per_token
        return (self.uses + 1) * cost / (self.idle + 1) / self.nbytes


def seconds_per_token(all_known: list[Known]) -> Fraction:
    measured = [known for known in all_known if known.compute_ms]
    if not measured:
        return Fraction(1)
    return Fraction(sum(known.compute_ms for known in measured), 1000 * sum(known.tokens for known in measured))


def header(ids: tuple[int, ...], first: int, compute_ms: int = 0) -> SegmentHeader:
    root = root_hash(FINGERPRINT, C)
    names = [root, *segment_hashes(root, np.array(ids), C, first=True)]
    parent = names[first].hex() if first else ""
    return SegmentHeader(
        G, FINGERPRINT, root.hex(), parent, names[-1].hex(), first, len(ids) - first * C, compute_ms=compute_ms
    )


def database(all_known: list[Known]) -> sqlite3.Connection:
    db = sqlite3.connect(":memory:", isolation_level=None)
    db.executescript(SCHEMA)
    for known in all_known:
        own = np.array(known.ids[known.first * C :], dtype=np.int64)
        head = header(known.ids, known.first, known.compute_ms)
        insert_segment(db, head, own, known.nbytes, known.created, known.pinned)
        db.execute(
            "UPDATE segments SET uses = ?, last_used = ? WHERE key = ?", (known.uses, NOW - known.idle, head.key)
        )
    return db


def keys(rows: list[SegmentRow]) -> list[str]:
    return [row.key for row in rows]


def key_of(known: Known) -> str:
    return header(known.ids, known.first).key


@st.composite
def stores(draw: st.DrawFn) -> list[Known]:
    """Trees of segments in which no chunk is stored twice."""
    found: list[Known] = []
    for number in range(draw(st.integers(1, 8))):
        starts: list[tuple[int, ...]] = [()]
        for known in found:
            starts += [known.ids[: end * C] for end in range(known.first + 1, len(known.ids) // C + 1)]
        start = draw(st.sampled_from(starts))
        # Token ids of its own: it shares nothing with others but what it continues.
        own = tuple(100 * (number + 1) + i for i in range(draw(st.integers(1, 3 * C))))
        found.append(
            Known(
                ids=start + own,
                first=len(start) // C,
                nbytes=draw(st.integers(1, 50)) * 100,
                compute_ms=draw(st.sampled_from([0, 0, 10, 700, 5000])),
                idle=draw(st.integers(0, 1000)),
                uses=draw(st.integers(0, 5)),
                pinned=draw(st.integers(0, 5)) == 0,
                created=number,
            )
        )
    return found


def model_of_choice(all_known: list[Known], new: tuple[tuple[int, ...], int], excess: int) -> list[str] | None:
    """Keys of the victims, or `None` where there is too little to give up."""
    ids, first = new
    left, victims = list(all_known), []
    per_token = seconds_per_token(all_known)
    ancestors = [known for known in all_known if first and _holds_part_of(known, ids[: first * C])]
    while excess > 0:
        free = [
            known
            for known in left
            if not known.pinned and known not in ancestors and not any(other.continues(known) for other in left)
        ]
        if not free:
            return None
        victim = min(free, key=lambda known: known.worth(per_token))
        left.remove(victim)
        victims.append(key_of(victim))
        excess -= victim.nbytes
    return victims


def _holds_part_of(known: Known, prefix: tuple[int, ...]) -> bool:
    """Whether `prefix` is stored in part in `known` (no chunk is stored twice)."""
    first_chunk = known.ids[: (known.first + 1) * C]
    return len(first_chunk) % C == 0 and prefix[: len(first_chunk)] == first_chunk


@settings(max_examples=150, deadline=None)
@given(all_known=stores(), data=st.data())
def test_victims_are_those_of_the_model(all_known: list[Known], data: st.DataObject) -> None:
    worths = [known.worth(seconds_per_token(all_known)) for known in all_known]
    assume(len(set(worths)) == len(worths))  # (Ties are a test of their own.)
    parent = data.draw(st.sampled_from([None, *all_known]))
    whole = 0 if parent is None else len(parent.ids) // C
    start = parent.ids[: whole * C] if parent and whole > parent.first else ()
    new = ((*start, 7, 8, 9), len(start) // C)
    total, nbytes = sum(known.nbytes for known in all_known), 100
    room = data.draw(st.integers(0, total + 2 * nbytes))
    expected = model_of_choice(all_known, new, total + nbytes - room)
    db = database(all_known)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: NOW)
        if expected is None:
            with pytest.raises(StoreFullError, match=f"max_disk_bytes={room}"):
                choose_victims(db, header(*new), nbytes, room)
        else:
            assert keys(choose_victims(db, header(*new), nbytes, room)) == expected


@settings(max_examples=100, deadline=None)
@given(all_known=stores(), limit=st.integers(0, 1000))
def test_what_expires_is_what_the_model_says(all_known: list[Known], limit: int) -> None:
    def expires(known: Known) -> bool:
        children = [other for other in all_known if other.continues(known)]
        return known.idle > limit and not known.pinned and all(expires(child) for child in children)

    found = keys(expired_segments(database(all_known), NOW - limit))
    assert sorted(found) == sorted(key_of(known) for known in all_known if expires(known))
    for known in all_known:
        for other in all_known:
            if known.continues(other) and {key_of(known), key_of(other)} <= set(found):
                assert found.index(key_of(known)) < found.index(key_of(other))


# ---- what worth depends on ----

ROW = SegmentRow(1, "0" * 32, "", "", bytes(16), 0, 10, 40, 4, 3, "float32", 4096, 500, 0.0, NOW - 9.0, 3, 0)


@pytest.mark.parametrize(
    ("change", "factor"),
    [
        pytest.param({"nbytes": 8192}, Fraction(1, 2), id="twice the bytes"),
        pytest.param({"uses": 7}, Fraction(2), id="8 expected uses for 4"),
        pytest.param({"uses": 0}, Fraction(1, 4), id="never used"),
        pytest.param({"last_used": NOW - 19.0}, Fraction(1, 2), id="idle for twice as long, a second of grace each"),
        pytest.param({"last_used": NOW - 0.0}, Fraction(10), id="used just now"),
        pytest.param({"last_used": NOW + 50.0}, Fraction(10), id="used in the future: a clock went back"),
        pytest.param({"compute_ms": 1500}, Fraction(3), id="three times the computing"),
        pytest.param({"num_tokens": 4000}, Fraction(1), id="more tokens, but the cost is measured"),
        pytest.param({"created": 5.0}, Fraction(1), id="age alone"),
    ],
)
def test_worth_is_expected_seconds_saved_per_byte(change: dict[str, Any], factor: Fraction) -> None:
    # 4 expected uses in 10 s, each of which saves half a second, for 4096 bytes.
    base = Fraction(4) / 10 / 2 / 4096
    assert worth(ROW, NOW, 1.0) == pytest.approx(float(base))
    assert worth(replace(ROW, **change), NOW, 1.0) == pytest.approx(float(base * factor))


def test_where_nothing_was_measured_tokens_count() -> None:
    unknown = replace(ROW, compute_ms=0)
    # 40 tokens at 12.5 ms each cost what was measured for the row above.
    assert worth(unknown, NOW, 0.0125) == pytest.approx(worth(ROW, NOW, 1.0))
    assert typical_cost([unknown]) == 1.0
    assert typical_cost([]) == 1.0
    assert typical_cost([ROW, unknown, replace(ROW, num_tokens=60, compute_ms=1000)]) == pytest.approx(1.5 / 100)


def test_of_equals_the_least_recent_and_then_the_oldest_goes() -> None:
    # Worth is equal: twice the uses, half as recent.
    one = Known((1, 2), 0, 100, 1000, idle=9, uses=0, pinned=False, created=2)
    two = replace(one, ids=(3, 4), idle=19, uses=1, created=3)
    three = replace(one, ids=(5, 6), created=1)
    order = [two, three, one]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: NOW)
        for count in (1, 2, 3):
            victims = choose_victims(database([one, two, three]), header((7, 8), 0), 100 * count, 300)
            assert keys(victims) == [key_of(known) for known in order[:count]]


def test_a_chunk_that_several_hold_keeps_what_continues_it_reachable() -> None:
    first = Known((1, 2, 3, 4), 0, 100, 0, idle=900, uses=0, pinned=False, created=1)
    longer = replace(first, ids=(1, 2, 3, 4, 5), idle=800)
    child = replace(first, ids=(1, 2, 3, 4, 6, 7), first=2, idle=1, uses=9)
    chosen = keys(choose_victims(database([first, longer, child]), header((8, 9), 0), 100, 300))
    # Both hold what the child continues: it goes first, although it is worth most, rather than lose its way.
    assert chosen == [key_of(child)]


# ---- through a store ----


def stored_bytes(tmp_path: Path, count: int) -> int:
    with PrefixStore(tmp_path / "measure") as store:
        return write_prefix(store, some_tokens(count)).spans[0].segment.blob.stored_bytes


def write_measured(store: PrefixStore, ids: TokenIds, compute_s: float) -> None:
    g = geometry(leader_layers=(), indexed_layers=())
    with store.inner.begin_segment(FINGERPRINT, g, ids) as writer:
        for layer in range(g.num_layers):
            writer.write_chunks(layer, 0, expected_kv(g, ids, layer))
        writer.commit(compute_s=compute_s)


def kept(store: PrefixStore, prefixes: list[TokenIds]) -> list[bool]:
    return [store.inner.lookup(FINGERPRINT, ids, 4, count=False) is not None for ids in prefixes]


def test_what_is_dear_to_compute_stays_and_what_is_cheap_goes(store_path: Path, clock: Clock) -> None:
    prefixes = [some_tokens(16, seed) for seed in range(4)]
    with PrefixStore(store_path) as store:
        for ids, seconds in zip(prefixes[:3], (5.0, 0.5, 2.0), strict=True):
            write_measured(store, ids, seconds)
        size = store.stats.segment_bytes
    with PrefixStore(store_path, max_disk_bytes=size) as store:
        write_measured(store, prefixes[3], 9.0)
        assert kept(store, prefixes) == [True, False, True, True]
        # Ten times as long without use outweighs what the first costs more than the third.
        clock.now += 99
        store.inner.lookup(FINGERPRINT, prefixes[2], 4)
        store.inner.lookup(FINGERPRINT, prefixes[3], 4)
        write_measured(store, prefixes[1], 9.0)
        assert kept(store, prefixes) == [False, True, True, True]
        assert (store.stats.evicted, store.stats.published) == (2, 2)
        assert store.stats.segment_bytes <= size


def test_what_is_damaged_goes_before_anything_sound(tmp_path: Path, store_path: Path) -> None:
    size = stored_bytes(tmp_path, 16)
    prefixes = [some_tokens(16, seed) for seed in range(5)]
    with PrefixStore(store_path, max_disk_bytes=3 * size) as store:
        for ids in prefixes[:2]:
            write_prefix(store, ids)
        store.inner.discard(write_prefix(store, prefixes[2]).spans[0].segment, "a test")
        assert store.stats.quarantined_bytes == size
        write_prefix(store, prefixes[3])
        assert (store.stats.quarantined_bytes, store.stats.evicted) == (0, 0)
        assert not list((store_path / "damaged").iterdir())
        assert kept(store, prefixes) == [True, True, False, True, False]
        write_prefix(store, prefixes[4])
        assert store.stats.evicted == 1


def test_while_there_is_room_the_damaged_are_kept(tmp_path: Path, store_path: Path) -> None:
    size = stored_bytes(tmp_path, 16)
    with PrefixStore(store_path, max_disk_bytes=3 * size) as store:
        store.inner.discard(write_prefix(store, some_tokens(16)).spans[0].segment, "a test")
        write_prefix(store, some_tokens(16, seed=1))
        write_prefix(store, some_tokens(16, seed=2))
        assert store.stats.quarantined_bytes == size


def test_what_nobody_used_for_its_time_is_neither_found_nor_kept(store_path: Path, clock: Clock) -> None:
    used, unused = some_tokens(16, 1), some_tokens(16, 2)
    with PrefixStore(store_path, ttl_s=100) as store:
        write_prefix(store, used)
        path = path_of(write_prefix(store, unused).spans[0].segment)
        clock.now += 100
        assert kept(store, [used, unused]) == [True, True]  # Not before its time is over.
        store.inner.lookup(FINGERPRINT, used, 4)
        clock.now += 1
        assert store.inner.lookup(FINGERPRINT, unused, 4) is None
        assert (store.stats.misses["expired"], store.stats.expired) == (1, 0)
        assert kept(store, [used, unused]) == [True, False]
        (expected,) = (entry.key for entry in store.entries() if entry.key in path.name)
        assert store.gc(dry_run=True).expired == (expected,)
        assert path.exists()
        report = store.gc()
        assert (report.expired, report.bytes_freed >= 4096) == ((expected,), True)
        assert not path.exists()
        assert (store.stats.expired, len(store.entries())) == (1, 1)
        assert store.gc().expired == ()
    with PrefixStore(store_path, ttl_s=100) as store:  # The next process knows what was used.
        clock.now += 99
        assert kept(store, [used]) == [True]
        clock.now += 1.5
        assert kept(store, [used]) == [False]
    with PrefixStore(store_path) as store:
        assert kept(store, [used]) == [True]  # A store without a limit finds it still.


def test_a_use_counts_for_all_that_it_continues(store_path: Path, clock: Clock) -> None:
    ids = some_tokens(24)
    with PrefixStore(store_path, ttl_s=100) as store:
        write_prefix(store, ids[:16])
        write_prefix(store, ids, first_chunk=4)
        clock.now += 90
        store.inner.lookup(FINGERPRINT, ids, 4)
        clock.now += 90
        assert store.gc().expired == ()
        store.inner.lookup(FINGERPRINT, ids[:16], 4)
        clock.now += 20
        # The child's time is over, its parent's is not.
        assert store.inner.lookup(FINGERPRINT, ids, 4).tokens == 16  # type: ignore[union-attr]
        assert len(store.gc().expired) == 1
        clock.now += 200
        assert store.inner.lookup(FINGERPRINT, ids, 4) is None
        assert len(store.gc().expired) == 1
        assert store.entries() == []


def test_a_tree_expires_at_once_and_children_first(store_path: Path, clock: Clock) -> None:
    ids = some_tokens(32)
    with PrefixStore(store_path, ttl_s=10) as store:
        write_prefix(store, ids[:16])
        write_prefix(store, ids[:24], first_chunk=4)
        write_prefix(store, ids, first_chunk=6)
        order = [entry.key for entry in store.entries()]
        clock.now += 11
        assert store.gc().expired == tuple(reversed(order))
        assert not list(store_path.glob("segments/*/*"))


def test_pinned_prefixes_do_not_expire(store_path: Path, clock: Clock) -> None:
    ids, other = some_tokens(16), some_tokens(16, seed=1)
    with PrefixStore(store_path, ttl_s=10) as store:
        write_prefix(store, ids)
        write_prefix(store, other)
        store.pin(store.entries()[0].key)
        clock.now += 1000
        assert kept(store, [ids, other]) == [True, False]
        assert len(store.gc().expired) == 1
        store.unpin(store.entries()[0].key)
        clock.now += 11
        assert kept(store, [ids]) == [False]


def test_what_a_pinned_prefix_continues_does_not_expire_either(store_path: Path, clock: Clock) -> None:
    ids = some_tokens(24)
    with PrefixStore(store_path, ttl_s=10) as store:
        write_prefix(store, ids[:16])
        store.pin(write_prefix(store, ids, first_chunk=4).spans[1].segment.key)
        clock.now += 1000
        assert store.gc().expired == ()
        assert store.inner.lookup(FINGERPRINT, ids, 4).tokens == 24  # type: ignore[union-attr]
