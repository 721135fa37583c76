"""What a file or the index claims is proved again: where prompts are looked up, stored, continued and superseded."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tally import Figures
from unit.format_by_document import chain, root_of
from unit.store_helpers import FINGERPRINT, expected_kv, geometry, read_back, some_tokens, tokens, write_prefix

from hf_contiguouskv.errors import StoreError
from hf_contiguouskv.store import KVGeometry, PrefixStore
from hf_contiguouskv.store.bundle import export_bundle
from hf_contiguouskv.store.hashing import TokenIds
from hostile.crafting import crafted, path_in, plant

G = geometry()
C = G.chunk_size


def assert_served(store: PrefixStore, ids: TokenIds, g: KVGeometry = G) -> None:
    stored = store.inner.lookup(FINGERPRINT, ids, g.chunk_size, geometry=g)
    assert stored is not None
    assert stored.tokens == len(ids)
    # (What is served may go on where the prompt ends.)
    whole = len(ids) // g.chunk_size
    for layer, kv in enumerate(read_back(store, stored, range(g.num_layers))):
        assert torch.equal(kv[:whole], expected_kv(g, ids, layer)[:whole])


def key_of(ids: TokenIds, fingerprint: str = FINGERPRINT) -> str:
    return chain(root_of(fingerprint, C, b""), ids, C, True)[-1].hex()


# How a file lies that lies under the name of the victim's segment, and has this name in its header.
LIES: dict[str, dict[str, Any]] = {
    "another model": {"header": {"fingerprint": "ab" * 16}},
    "a model with another root": {"header": {"root": "12" * 16}},
    "a tenant": {"header": {"salted": "1", "root": "12" * 16}},
    "a tenant with everybody's root": {"header": {"salted": "1"}},
    "fewer layers": {"g": geometry(num_layers=2, leader_layers=(0,))},
    "more heads": {"g": geometry(kv_heads=3)},
    "another dtype": {"g": geometry(dtype=torch.float16)},
    "other tokens": {"ids": some_tokens(14, seed=9)},
    "fewer tokens": {"ids": some_tokens(6, seed=9)},
    "a later place": {"header": {"first_chunk": "7", "parent": "34" * 16, "beginning": ""}},
    "a parent": {"header": {"first_chunk": "1", "parent": "34" * 16, "beginning": ""}},
}


@pytest.mark.parametrize("known_to_the_index", [True, False])
@pytest.mark.parametrize("lie", LIES)
def test_a_file_under_the_name_of_a_segment_is_not_used_and_is_replaced(
    store_path: Path, lie: str, known_to_the_index: bool, attacks: Figures
) -> None:
    ids = some_tokens(14)
    key = key_of(ids)
    told = dict(LIES[lie])
    content = crafted(told.pop("g", G), told.pop("ids", ids), header={"key": key} | told.pop("header", {}))
    PrefixStore(store_path).close()
    if known_to_the_index:
        with PrefixStore(store_path) as store:
            write_prefix(store, ids)
    plant(store_path, key, content)
    with PrefixStore(store_path) as store:
        stored = store.inner.lookup(FINGERPRINT, ids, C, geometry=G)
        assert stored is None or stored.tokens == 0
        write_prefix(store, ids)
        assert_served(store, ids)
        assert_served(store, ids[:9])
    with PrefixStore(store_path) as store:
        assert_served(store, ids)
        assert store.verify(deep=True) == []
    attacks.add("liars under a victim's name, replaced")


def test_what_was_published_over_a_liar_is_not_read_from_what_was_kept_of_it(
    store_path: Path, attacks: Figures
) -> None:
    ids = some_tokens(14)
    with PrefixStore(store_path) as store:
        key = write_prefix(store, ids).spans[0].segment.key
        assert_served(store, ids)
        plant(store_path, key, crafted(geometry(kv_heads=3), ids, header={"key": key}))
        assert store.inner.lookup(FINGERPRINT, ids, C, geometry=G) is None
        write_prefix(store, ids)
        assert_served(store, ids)
    attacks.add("liars under a victim's name, replaced while the store is open")


@pytest.mark.parametrize("chunk", [0, 1, 2])
def test_a_root_that_is_the_name_of_somebodys_chunk_leads_nowhere(
    store_path: Path, chunk: int, attacks: Figures
) -> None:
    """Anybody can compute the names of a known prompt's chunks, and call one of them the root of his own prefix."""
    ids = some_tokens(16)
    names = chain(root_of(FINGERPRINT, C, b""), ids, C, True)
    rest = ids[(chunk + 1) * C :]
    theirs = chain(names[chunk], rest, C, True)
    assert not set(theirs) & set(names)
    key = theirs[-1].hex()
    content = crafted(G, rest, header={"key": key, "root": names[chunk].hex(), "salted": "1"})
    PrefixStore(store_path).close()
    plant(store_path, key, content)
    with PrefixStore(store_path) as store:
        found = store.inner.lookup(FINGERPRINT, ids, C, geometry=G)
        assert found is None
        write_prefix(store, ids[: (chunk + 1) * C])
        found = store.inner.lookup(FINGERPRINT, ids, C, geometry=G)
        assert found is not None
        assert found.tokens == (chunk + 1) * C
        write_prefix(store, ids, first_chunk=chunk + 1)
        assert_served(store, ids)
    attacks.add("roots that are names of chunks")


def edit_index(folder: Path, *statements: tuple[str, tuple[Any, ...]]) -> None:
    with closing(sqlite3.connect(folder / "index.sqlite")) as db:
        for text, values in statements:
            assert db.execute(text, values).rowcount > 0, text
        db.commit()


PARENTS: dict[str, Callable[[TokenIds], dict[str, Any]]] = {
    "of another model": lambda ids: {"fingerprint": "ab" * 16},
    "of another tenant": lambda ids: {"salt": b"tenant"},
    "of another shape": lambda ids: {"g": geometry(kv_heads=3)},
    "with other tokens": lambda ids: {"ids": ids + 1},
}


@pytest.mark.parametrize("kind", PARENTS)
def test_a_child_is_not_stored_after_a_parent_that_the_index_made_up(
    store_path: Path, kind: str, attacks: Figures
) -> None:
    ids = some_tokens(16)
    told = dict(PARENTS[kind](ids[:8]))
    wrong = told.pop("ids", ids[:8])
    names = chain(root_of(FINGERPRINT, C, b""), ids, C, True)
    content = crafted(told.pop("g", G), wrong, **told)
    import json

    key = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")].rstrip())["__metadata__"]["key"]
    PrefixStore(store_path).close()
    plant(store_path, key, content)
    PrefixStore(store_path).close()
    edit_index(store_path, ("UPDATE chunks SET hash = ? WHERE position = 1", (names[1],)))
    with PrefixStore(store_path) as store:
        with pytest.raises(StoreError, match=r"not stored|deleted meanwhile"):
            write_prefix(store, ids, first_chunk=2)
        assert key_of(ids) not in {entry.key for entry in store.entries()}
        write_prefix(store, ids)
        assert_served(store, ids)
    attacks.add("parents that the index made up")


def test_a_child_of_a_chunk_that_is_not_full_is_not_stored(store_path: Path, attacks: Figures) -> None:
    ids = tokens(*range(1, 15))
    with PrefixStore(store_path) as store:
        write_prefix(store, ids[:6])
        partial = chain(root_of(FINGERPRINT, C, b""), ids[:6], C, True)[-1]
        own = chain(partial, ids[8:], C, False)[-1].hex()
        content = crafted(G, ids, first_chunk=2, header={"key": own, "parent": partial.hex()})
        plant(store_path, own, content)
        store.gc()
        stored = store.inner.lookup(FINGERPRINT, ids, C)
        assert stored is not None
        assert stored.tokens == 6
        write_prefix(store, ids)
        assert_served(store, ids)
    attacks.add("children of partial chunks")


def test_nothing_is_superseded_on_the_word_of_the_index(store_path: Path, attacks: Figures) -> None:
    """A segment of one partial chunk goes when a longer one takes its place; the index may say that of any segment."""
    ids, victim = some_tokens(12), some_tokens(3, seed=5)
    with PrefixStore(store_path) as store:
        key = write_prefix(store, victim).spans[0].segment.key
    root = root_of(FINGERPRINT, C, b"")
    edit_index(store_path, ("UPDATE chunks SET tokens = ?, parent = ?", (ids[:3].tobytes(), root)))
    with PrefixStore(store_path) as store:
        write_prefix(store, ids)
        assert path_in(store, key).exists()
        store.gc()
        assert_served(store, victim)
        assert_served(store, ids)
    attacks.add("segments superseded by the index")


@pytest.mark.parametrize("seed", range(8))
def test_an_index_that_mixes_everything_up_costs_time_and_nothing_else(
    store_path: Path, seed: int, attacks: Figures
) -> None:
    random = np.random.default_rng(seed)
    prompts = [some_tokens(int(length), seed=number) for number, length in enumerate(random.integers(3, 20, 5))]
    with PrefixStore(store_path) as store:
        for ids in prompts:
            write_prefix(store, ids)
    with closing(sqlite3.connect(store_path / "index.sqlite")) as db:
        for column in ("tokens", "parent", "hash"):
            rows = db.execute(f"SELECT hash, {column} FROM chunks").fetchall()
            values = [value for _, value in rows]
            random.shuffle(values)
            for (name, _), value in zip(rows, values, strict=True):
                try:
                    db.execute(f"UPDATE OR IGNORE chunks SET {column} = ? WHERE hash = ?", (value, name))
                except sqlite3.Error:
                    continue
        db.commit()
    with PrefixStore(store_path) as store:
        for ids in prompts:
            stored = store.inner.lookup(FINGERPRINT, ids, C, geometry=G)
            if stored is not None:
                for layer, kv in enumerate(read_back(store, stored, range(3))):
                    whole = stored.tokens // C
                    assert torch.equal(kv[:whole], expected_kv(G, ids, layer)[:whole])
            write_prefix(store, ids)
            assert_served(store, ids)
        store.gc()
        for ids in prompts:
            assert_served(store, ids)
    attacks.add("indexes that mix everything up")


def test_what_is_exported_is_what_was_asked_for(store_path: Path, tmp_path: Path, attacks: Figures) -> None:
    ids = some_tokens(14)
    with PrefixStore(store_path) as store:
        key = write_prefix(store, ids).spans[0].segment.key
        plant(store_path, key, crafted(G, some_tokens(14, seed=9), header={"key": key}))
        with pytest.raises(StoreError):
            export_bundle(store, [key], tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    attacks.add("liars that would be exported")
