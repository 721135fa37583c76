"""Several processes on one store: writers, readers and one that cleans up get in nobody's way."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from unit.store_helpers import expected_kv, read_back

from hf_contiguouskv.errors import SegmentMissingError, StoreError, StoreFullError
from hf_contiguouskv.store import PrefixStore, StoredPrefix

from .conftest import (
    Children,
    Figures,
    Link,
    Prefix,
    check_store,
    in_token_order,
    indexed_keys,
    leftovers,
    segment_keys,
)
from .scale import SEED, scaled

WRITES = scaled(60)
"""Prefixes that each writer stores."""


def numbers(count: int, *seed: int) -> np.ndarray:
    return np.random.default_rng([SEED, *seed]).integers(0, 1000, count)


def a_forest(trees: int = 4) -> list[Prefix]:
    """Roots of several models, two continuations of each, and one of these; some end inside a chunk."""
    forest = []
    for tree in range(trees):
        root = Prefix(numbers(40 + 7 * tree, 1, tree), tree % 4)
        first = Prefix(np.concatenate([root.ids, numbers(30, 2, tree)]), root.kind, len(root.ids))
        second = Prefix(np.concatenate([root.ids, numbers(33, 3, tree)]), root.kind, len(root.ids))
        third = Prefix(np.concatenate([first.ids, numbers(24, 4, tree)]), root.kind, len(first.ids))
        forest += [root, first, second, third]
    return forest


def is_right(store: PrefixStore, stored: StoredPrefix, prefix: Prefix) -> bool:
    """Whether all bytes of what was found, however much of `prefix` that is, are the ones that were written."""
    layers, end = range(prefix.geometry.num_layers), stored.tokens
    found = read_back(store, stored, layers)
    return all(
        torch.equal(
            in_token_order(found[layer])[:end],
            in_token_order(expected_kv(prefix.geometry, prefix.ids[:end], layer))[:end],
        )
        for layer in layers
    )


def find(store: PrefixStore, prefix: Prefix) -> StoredPrefix | None:
    return store.inner.lookup(prefix.fingerprint, prefix.ids, prefix.geometry.chunk_size)


# ---- everybody at once ----


def keep_writing(link: Link, path: Path, forest: list[Prefix], seed: int, bound: int | None) -> None:
    """Store prefixes in a random order. What is continued may be missing, or go meanwhile: then it says so."""
    rng = random.Random(f"writer {seed} {SEED}")
    refused = 0
    with PrefixStore(path, max_disk_bytes=bound) as store:
        for _ in range(WRITES):
            prefix = rng.choice(forest)
            try:
                prefix.write(store)
            except StoreFullError:
                assert bound is not None
                refused += 1
            except SegmentMissingError:
                refused += 1  # It was deleted as soon as it was published.
            except StoreError as error:
                if "not stored" not in str(error) and "deleted meanwhile" not in str(error):
                    raise
                refused += 1
        stats = store.stats
        link.say("wrote", WRITES - refused, stats.published, stats.quarantined)


def keep_reading(link: Link, path: Path, forest: list[Prefix], seed: int, stop: Path) -> None:
    """Look up and read back until told to stop."""
    rng = random.Random(f"reader {seed} {SEED}")
    reads = wrong = 0
    with PrefixStore(path) as store:
        while not stop.exists():
            prefix = rng.choice(forest)
            stored = find(store, prefix)
            if stored is not None:
                reads += 1
                wrong += not is_right(store, stored, prefix)
        link.say("read", reads, wrong, store.stats.quarantined)


def keep_cleaning(link: Link, path: Path, seed: int, stop: Path) -> None:
    """Delete, collect garbage, pin, verify and rebuild until told to stop."""
    rng = random.Random(f"cleaner {seed} {SEED}")
    deleted = collected = 0
    with PrefixStore(path) as store:
        while not stop.exists():
            if entries := store.entries():
                key = rng.choice(entries).key
                try:
                    if rng.random() < 0.3:
                        store.pin(key)
                        store.unpin(key)
                    else:
                        deleted += len(store.delete(key, recursive=True))
                except StoreError as error:
                    if "no stored prefix" not in str(error):
                        raise  # (Another process may have taken its place.)
            report = store.gc()
            assert report.unreadable == (), report
            collected += len(report.removed)
            if rng.random() < 0.1:
                store.inner.index.rebuild()
        link.say("cleaned", deleted, collected, store.stats.quarantined)


@pytest.mark.parametrize("bounded", [False, True], ids=["deleting", "evicting"])
def test_everybody_at_once(
    children: Children, figures: Figures, store_path: Path, tmp_path: Path, bounded: bool
) -> None:
    forest, stop = a_forest(), tmp_path / "stop"
    bound = None
    if bounded:
        with PrefixStore(tmp_path / "to measure") as store:
            for prefix in forest:
                prefix.write(store)
            bound = store.stats.segment_bytes // 2
    writers = [
        children(lambda link, seed=seed: keep_writing(link, store_path, forest, seed, bound)) for seed in range(3)
    ]
    others = [children(lambda link, seed=seed: keep_reading(link, store_path, forest, seed, stop)) for seed in range(2)]
    if not bounded:
        others.append(children(lambda link: keep_cleaning(link, store_path, 0, stop)))
    wrote = [child.finish()[-1] for child in writers]
    stop.touch()
    told = [child.finish()[-1] for child in others]
    figures.add("processes that shared a store", len(writers) + len(others))
    figures.add("prefixes written by several processes", sum(written for _, written, _, _ in wrote))
    figures.add("prefixes read while others wrote", sum(reads for what, reads, _, _ in told if what == "read"))
    wrong = sum(wrong for what, _, wrong, _ in told if what == "read")
    figures.add("wrong bytes read while others wrote", wrong)
    taken = sum(message[-1] for message in [*wrote, *told])
    figures.add("sound segments taken out of service", taken)
    assert wrong == 0
    assert taken == 0
    assert all(published > 0 for _, _, published, _ in wrote)
    assert all(reads > 0 for what, reads, _, _ in told if what == "read")
    # Not only after the next process has put it right: the last one to leave leaves a sound store.
    assert indexed_keys(store_path) == segment_keys(store_path)
    assert leftovers(store_path) == []
    check_store(store_path, [], forest, figures, f"seed {SEED}")
    if bound is not None:
        with PrefixStore(store_path) as store:
            assert 0 < store.stats.segment_bytes <= bound
    with PrefixStore(store_path) as store:
        for prefix in forest:  # Parents come first.
            prefix.write(store)
    check_store(store_path, forest, [], figures, f"seed {SEED}, at last", sample=len(forest))


def test_processes_that_open_a_store_with_a_lower_bound_at_once_evict_no_more_than_one_would(
    children: Children, figures: Figures, store_path: Path
) -> None:
    forest = a_forest()
    with PrefixStore(store_path) as store:
        for prefix in forest:
            prefix.write(store)
        largest = max(entry.bytes for entry in store.entries())
        bound = store.stats.segment_bytes // 2

    def open_it(link: Link) -> None:
        link.say("ready")
        link.hear()
        with PrefixStore(store_path, max_disk_bytes=bound) as store:
            prefix = forest[0]
            stored = find(store, prefix)
            right = stored is None or is_right(store, stored, prefix)
            store.flush()
            link.say("evicted", store.stats.evicted, right)

    openers = [children(open_it) for _ in range(4)]
    for child in openers:
        assert child.link.hear() == ["ready"]
    for child in openers:
        child.link.say("go")
    told = [child.finish()[-1] for child in openers]
    assert all(right for _, _, right in told)
    check_store(store_path, [], forest, figures, f"seed {SEED}")
    with PrefixStore(store_path) as store:
        assert bound - largest < store.stats.segment_bytes <= bound
        assert sum(evicted for _, evicted, _ in told) == len(forest) - store.stats.segments


@pytest.mark.parametrize("processes", [2, 5])
def test_writers_of_the_same_prefix_publish_it_once_and_all_succeed(
    children: Children, store_path: Path, figures: Figures, processes: int
) -> None:
    prefix = Prefix(numbers(90, 5), 0)

    def write(link: Link) -> None:
        store = PrefixStore(store_path)
        with store.inner.begin_segment(prefix.fingerprint, prefix.geometry, prefix.ids) as writer:
            for layer in range(prefix.geometry.num_layers):
                writer.write_chunks(layer, 0, expected_kv(prefix.geometry, prefix.ids, layer))
            g, chunks = prefix.geometry, writer.header.num_chunks
            for layer in g.indexed_layers:
                index = torch.zeros(g.kv_heads, g.chunk_size, chunks, g.head_dim, dtype=torch.int8)
                writer.write_index(layer, index, torch.ones(g.kv_heads, g.head_dim))
            link.say("complete")
            link.hear()
            stored = writer.commit()
        link.say("committed", stored.tokens, store.stats.published, is_right(store, stored, prefix))

    writers = [children(write) for _ in range(processes)]
    for child in writers:
        assert child.link.hear() == ["complete"]
    assert len(list((store_path / "partial").glob("*.partial"))) == processes
    for child in writers:
        child.link.say("go")
    outcomes = [child.finish()[-1] for child in writers]
    assert [tokens for _, tokens, _, _ in outcomes] == [len(prefix.ids)] * processes
    assert sum(published for _, _, published, _ in outcomes) == 1
    assert all(right for _, _, _, right in outcomes)
    check_store(store_path, [prefix], [], figures, "the same prefix")


@pytest.mark.parametrize("how", ["delete", "evict", "gc of an expired one"])
def test_who_has_a_prefix_open_reads_on_while_another_process_removes_it(
    children: Children, store_path: Path, how: str
) -> None:
    prefix, other = Prefix(numbers(120, 6), 0), Prefix(numbers(120, 7), 0)

    def remove(link: Link) -> None:
        with PrefixStore(store_path) as store:
            (entry,) = store.entries()
            nbytes = entry.bytes
            if how == "delete":
                store.delete(entry.key)
        if how == "evict":
            with PrefixStore(store_path, max_disk_bytes=nbytes) as store:
                other.write(store)
        if how.startswith("gc"):
            with closing(sqlite3.connect(store_path / "index.sqlite")) as db:
                db.execute("UPDATE segments SET last_used = 1.0")
                db.commit()
            with PrefixStore(store_path, ttl_s=1000.0) as store:
                assert store.gc().expired == (entry.key,)
        link.say("removed")

    with PrefixStore(store_path) as store:
        prefix.write(store)
        store.close()
    child_may_start = children(lambda link: (link.hear(), remove(link)))
    with PrefixStore(store_path) as store:
        stored = find(store, prefix)
        assert stored is not None
        assert is_right(store, stored, prefix)
        (entry,) = store.entries()
        child_may_start.link.say("go")
        assert child_may_start.finish() == [["removed"]]
        assert not store.backend.path_of(entry.key).exists()
        assert is_right(store, stored, prefix)
        assert find(store, prefix) is None
        assert store.verify() == []


# ---- the lock of the index ----


def hold_the_lock(link: Link, path: Path) -> None:
    """Begin a write in the index, and end it only when told to."""
    with closing(sqlite3.connect(path / "index.sqlite", isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        db.execute("UPDATE segments SET uses = uses + 1")
        link.say("held")
        assert link.hear() == ["release"]
        db.execute("ROLLBACK")
        link.say("released")


@pytest.fixture
def locked(children: Children, store_path: Path) -> Any:
    """A store with two prefixes whose index is locked by another process; and that process."""
    prefixes = [Prefix(numbers(50, 8), 0), Prefix(numbers(60, 9), 1)]
    with PrefixStore(store_path) as store:
        for prefix in prefixes:
            prefix.write(store)
    holder = children(lambda link: hold_the_lock(link, store_path))
    assert holder.link.hear() == ["held"]
    return prefixes, holder


def _lock_is_held(path: Path) -> bool:
    with closing(sqlite3.connect(path / "index.sqlite", isolation_level=None, timeout=0.0)) as db:
        try:
            db.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return True
        db.execute("ROLLBACK")
        return False


def test_a_look_up_does_not_wait_for_a_writer_of_another_process(locked: Any, store_path: Path) -> None:
    """The other process lets go only after the look-ups have returned."""
    (first, second), holder = locked
    store = PrefixStore(store_path)
    for prefix in (first, second):
        stored = find(store, prefix)
        assert stored is not None
        assert stored.tokens == len(prefix.ids)
        assert is_right(store, stored, prefix)
    # Nor does one that finds a segment lost, and would like to tell the index.
    for entry in store.entries():
        if entry.fingerprint == second.fingerprint:
            store.backend.path_of(entry.key).unlink()
    assert find(store, second) is None
    assert find(store, first) is not None
    assert _lock_is_held(store_path)
    holder.link.say("release")
    assert holder.finish() == [["released"]]
    store.close()


def test_a_write_waits_for_the_lock_and_then_succeeds(
    locked: Any, children: Children, store_path: Path, figures: Figures
) -> None:
    (first, second), holder = locked
    new = Prefix(numbers(70, 10), 2)

    def write(link: Link) -> None:
        store = PrefixStore(store_path)
        link.say("begins")
        new.write(store)
        link.say("published")

    writer = children(write)
    assert writer.link.hear() == ["begins"]
    assert _lock_is_held(store_path)
    holder.link.say("release")
    assert holder.finish() == [["released"]]
    assert writer.finish() == [["published"]]
    check_store(store_path, [first, second, new], [], figures, "after waiting")


def test_the_lock_goes_with_the_process_that_held_it(locked: Any, store_path: Path, figures: Figures) -> None:
    (first, second), holder = locked
    holder.kill()
    assert holder.wait() < 0
    new = Prefix(numbers(70, 11), 2)
    with PrefixStore(store_path) as store:
        new.write(store)
    check_store(store_path, [first, second, new], [], figures, "after the holder was killed")


def test_a_look_up_that_misses_a_file_does_not_forget_one_that_is_published_meanwhile(
    store_path: Path, figures: Figures, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look that finds no file and the note in the index, another process stores the prefix again."""
    prefix = Prefix(numbers(50, 12), 0)
    with PrefixStore(store_path) as reader, PrefixStore(store_path) as writer:
        prefix.write(writer)
        (entry,) = writer.entries()
        reader.backend.path_of(entry.key).unlink()
        identity: Callable[[str], object] = reader.backend.identity
        looks = []

        def look_then_publish(key: str) -> object:
            found = identity(key)
            looks.append(found)
            if len(looks) == 1:  # This look misses the file; the next one holds the index's write lock.
                prefix.write(writer)
            return found

        monkeypatch.setattr(reader.backend, "identity", look_then_publish)
        assert find(reader, prefix) is None or prefix.is_intact(reader)
        assert looks[0] is None
        assert looks[1] is not None
        assert prefix.tokens_found(writer) == len(prefix.ids)
        assert indexed_keys(store_path) == segment_keys(store_path)
    check_store(store_path, [prefix], [], figures, "published meanwhile")
