"""Stored prefixes that get another form, and what may happen meanwhile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from store_helpers import expected_kv, geometry, path_of, read_back, some_tokens, write_prefix
from typer.testing import CliRunner

from hf_contiguouskv.cli import app
from hf_contiguouskv.errors import InputError, SegmentCorruptError, StoreError
from hf_contiguouskv.store import KVGeometry, PrefixStore, StoredPrefix
from hf_contiguouskv.store import repacking as module

PACKED = geometry(packed_layers=(1,))
COMPACT = geometry(indexed_layers=(), compact_layers=(1,))
IDS = some_tokens(41)


def contents(stored: StoredPrefix) -> list[bytes]:
    """The files of a prefix."""
    return [path_of(span.segment).read_bytes() for span in stored.spans]


def look_up(store: PrefixStore, ids: Any = IDS) -> StoredPrefix:
    found = store.inner.lookup("f0" * 16, ids, 4)
    assert found is not None
    return found


def store_chain(store: PrefixStore, g: KVGeometry) -> list[str]:
    write_prefix(store, IDS[:20], g=g)
    return [span.segment.key for span in write_prefix(store, IDS, first_chunk=5, g=g).spans]


@pytest.mark.parametrize("secret", [None, b"nobody can guess this"], ids=["no key", "key"])
def test_there_and_back_gives_the_very_bytes_that_a_new_prefix_has(
    store_path: Path, tmp_path: Path, secret: bytes | None
) -> None:
    with PrefixStore(tmp_path / "compact", key=secret) as other:
        store_chain(other, COMPACT)
        expected = contents(look_up(other))
    with PrefixStore(store_path, key=secret) as store:
        keys = store_chain(store, PACKED)
        before = contents(look_up(store))
        for key in keys:
            done = store.repack(key, 2)
            assert done is not None
            assert (done.key, done.after) == (
                key,
                path_of(look_up(store).spans[keys.index(key)].segment).stat().st_size,
            )
            assert store.repack(key, 2) is None
        assert contents(look_up(store)) == expected
        assert store.verify(deep=True) == []
        for layer, kv in enumerate(read_back(store, look_up(store), range(3))):
            assert torch.equal(kv, expected_kv(COMPACT, IDS, layer))
        for key in keys:
            assert store.repack(key, 8) is not None
        assert contents(look_up(store)) == before
        assert store.verify(deep=True) == []


def test_history_and_pins_stay(store_path: Path) -> None:
    with PrefixStore(store_path) as store:
        keys = store_chain(store, PACKED)
        store.pin(keys[0])
        look_up(store)
        before = {entry.key: entry for entry in store.entries()}
        for key in keys:
            store.repack(key)
        for entry in store.entries():
            known = before[entry.key]
            assert (entry.created, entry.pinned, entry.compute_s) == (known.created, known.pinned, known.compute_s)
            assert entry.uses == known.uses > 0
        assert store.stats.disk_bytes >= sum(path.stat().st_blocks * 512 for path in store_path.glob("segments/*/*"))


def test_a_prefix_that_is_open_stays_what_it_was(store_path: Path) -> None:
    with PrefixStore(store_path) as store:
        keys = store_chain(store, PACKED)
        stored = look_up(store)
        for key in keys:
            store.repack(key)
        assert [span.segment.geometry.packed_layers for span in stored.spans] == [(1,), (1,)]
        for layer, kv in enumerate(read_back(store, stored, range(3))):
            assert torch.equal(kv, expected_kv(PACKED, IDS, layer))
        assert [span.segment.geometry.compact_layers for span in look_up(store).spans] == [(1,), (1,)]


def test_damage_is_not_repacked(store_path: Path) -> None:
    with PrefixStore(store_path) as store:
        keys = store_chain(store, PACKED)
        path = path_of(look_up(store).spans[1].segment)
    content = bytearray(path.read_bytes())
    content[4096 + 11] ^= 8
    path.write_bytes(content)
    with PrefixStore(store_path) as store:
        with pytest.raises(SegmentCorruptError, match="do not match their checksum"):
            store.repack(keys[1])
        assert path.read_bytes() == content
        assert not list(store_path.glob("partial/*"))


@pytest.mark.parametrize("what", ["deleted", "replaced"])
def test_what_changes_meanwhile_is_left_alone(store_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    with PrefixStore(store_path) as store, PrefixStore(store_path) as another:
        keys = store_chain(store, PACKED)
        write = module.write_again

        def meanwhile(*about: Any) -> None:
            write(*about)
            monkeypatch.setattr(module, "write_again", write)
            if what == "deleted":
                another.delete(keys[1])
            else:
                assert another.repack(keys[1]) is not None

        monkeypatch.setattr(module, "write_again", meanwhile)
        assert store.repack(keys[1]) is None
        assert [entry.key for entry in store.entries()] == (keys[:1] if what == "deleted" else keys)
        assert store.verify(deep=True) == []
        assert not list(store_path.glob("partial/*"))


def test_a_crash_before_the_end_leaves_the_old_file(store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*about: Any) -> None:
        raise KeyboardInterrupt

    with PrefixStore(store_path) as store:
        keys = store_chain(store, PACKED)
        before = contents(look_up(store))
        monkeypatch.setattr(module, "_put_in_place", crash)
        with pytest.raises(KeyboardInterrupt):
            store.repack(keys[0])
        assert contents(look_up(store)) == before
        assert not list(store_path.glob("partial/*"))


def test_what_has_no_index_or_no_such_form(store_path: Path) -> None:
    with PrefixStore(store_path) as store:
        plain = write_prefix(store, some_tokens(9, seed=1), g=geometry(indexed_layers=())).spans[0].segment.key
        assert store.repack(plain) is None
        odd = write_prefix(store, some_tokens(9, seed=2), g=geometry(head_dim=5)).spans[0].segment.key
        with pytest.raises(InputError, match="cannot have an index of 2 bits"):
            store.repack(odd)
        with pytest.raises(InputError, match="index_bits must be 8 or 2"):
            store.repack(odd, 4)
        with pytest.raises(StoreError, match="no"):
            store.repack("0" * 32)


def test_a_tenant_repacks_only_what_is_its_own(store_path: Path) -> None:
    with PrefixStore(store_path, salt=b"one") as store:
        key = write_prefix(store, IDS, g=PACKED).spans[0].segment.key
    with PrefixStore(store_path, salt=b"two") as store, pytest.raises(StoreError):
        store.repack(key)


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(one) for one in arguments])


def test_the_command_takes_along_what_a_prefix_continues(store_path: Path) -> None:
    with PrefixStore(store_path) as store:
        keys = store_chain(store, PACKED)
        other = write_prefix(store, some_tokens(9, seed=1), g=PACKED).spans[0].segment.key
    found = run("repack", store_path, keys[1][:8], "--json")
    assert found.exit_code == 0, found.output
    told = json.loads(found.stdout)
    assert sorted(told["repacked"]) == sorted(keys)
    assert 0 < told["bytes_before"] < told["bytes_after"]
    found = run("repack", store_path, "--all")
    assert "1 segment repacked" in found.stdout
    assert "2 unchanged" in found.stdout
    assert f"repacked {other}" in found.stdout
    found = run("repack", store_path, "--all", "--index-bits", 8)
    assert "3 segments repacked" in found.stdout
    for wrong in (("repack", store_path), ("repack", store_path, keys[0], "--all"), ("repack", store_path, "ff" * 16)):
        assert run(*wrong).exit_code == 2
