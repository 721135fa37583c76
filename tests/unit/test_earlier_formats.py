"""Stores of formats 1 and 2, as earlier releases wrote them: prompts find what is in them, and `repack` brings all."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from earlier_releases import as_earlier_store, kept_store, named, versions, with_flipped_bit
from store_helpers import FINGERPRINT, expected_kv, geometry, read_back, some_tokens, write_prefix
from typer.testing import CliRunner

from hf_contiguouskv.cli import app
from hf_contiguouskv.errors import SegmentCorruptError, StoreFormatError
from hf_contiguouskv.store import PrefixStore, StoredPrefix
from hf_contiguouskv.store.format import parse_earlier_header
from hf_contiguouskv.store.hashing import TokenIds

IDS = some_tokens(41)
OTHER = some_tokens(6, seed=1)
PACKED = geometry(packed_layers=(1,))
of_kept_stores = pytest.mark.parametrize("version", [1, 2])


def look_up(store: PrefixStore, ids: TokenIds = IDS) -> StoredPrefix | None:
    return store.inner.lookup(FINGERPRINT, ids, 4)


def assert_whole(store: PrefixStore, stored: StoredPrefix | None, ids: TokenIds = IDS) -> None:
    assert stored is not None
    assert stored.tokens == len(ids)
    for layer, kv in enumerate(read_back(store, stored, range(3))):
        assert torch.equal(kv, expected_kv(geometry(), ids, layer))


def told_of(store: PrefixStore) -> list[tuple[int, bool]]:
    return [(entry.tokens, entry.pinned) for entry in store.entries()]


def earlier_chain(path: Path, salt: str | None = None) -> None:
    """A store of format 2: 20 tokens, 21 that continue them, and the beginning of another prefix."""
    with PrefixStore(path, salt=salt) as store:
        write_prefix(store, IDS[:20], g=PACKED)
        write_prefix(store, IDS, first_chunk=5, g=PACKED)
        write_prefix(store, OTHER, g=PACKED)
    as_earlier_store(path, b"" if salt is None else salt.encode())


# ---- what an earlier release itself wrote ----


@of_kept_stores
def test_a_prompt_finds_what_an_earlier_release_stored(tmp_path: Path, version: int) -> None:
    path = kept_store(version, tmp_path)
    with PrefixStore(path) as store:
        assert store.entries() == []
        stored = look_up(store)
        assert_whole(store, stored)
        assert stored is not None
        assert [span.chunks for span in stored.spans] == [5, 6]
        assert [span.segment.geometry.packed_layers for span in stored.spans] == [(1,), (1,)]
        assert told_of(store) == [(20, True), (41, False)]
    # What this prompt does not need waits, and what a tenant stored is not for those without its salt.
    assert versions(path) == sorted([str(version)] * 2 + ["3"] * 2)
    with PrefixStore(path) as store:
        waiting = {problem.key: problem.problem for problem in store.verify(deep=True)}
        assert set(waiting) == {named(path, 6).stem, named(path, 13).stem}
        assert all("contiguouskv repack STORE --all" in text for text in waiting.values())
        assert set(store.gc().unreadable) == set(waiting.values())
        assert_whole(store, look_up(store))


@of_kept_stores
def test_only_its_own_salt_finds_what_a_tenant_stored(tmp_path: Path, version: int) -> None:
    path = kept_store(version, tmp_path)
    with PrefixStore(path, salt="another") as store:
        assert look_up(store) is None
        assert store.repack_earlier() == []
    assert versions(path) == [str(version)] * 4
    with PrefixStore(path, salt="tenant") as store:
        assert_whole(store, look_up(store, IDS[:13]), IDS[:13])
        assert told_of(store) == [(13, False)]
        assert store.verify(deep=True) == []
    assert versions(path) == sorted([str(version)] * 3 + ["3"])


@of_kept_stores
def test_repack_brings_all_to_the_form_that_it_is_asked_for(tmp_path: Path, version: int) -> None:
    path = kept_store(version, tmp_path)
    done = CliRunner().invoke(app, ["repack", str(path), "--all", "--json"])
    assert done.exit_code == 0
    told = json.loads(done.stdout)
    assert len(told["brought"]) == 3
    assert sorted(told["repacked"]) == sorted(told["brought"])
    assert versions(path) == sorted([str(version), "4", "4", "4"])
    with PrefixStore(path) as store:
        assert_whole(store, look_up(store))
        assert_whole(store, look_up(store, OTHER), OTHER)
        (pinned,) = store.inner.parts.pins.keys()
        assert {entry.key for entry in store.entries() if entry.pinned} == {pinned}
    again = CliRunner().invoke(app, ["repack", str(path), "--all", "--json"])
    assert json.loads(again.stdout)["brought"] == []


# ---- what a prompt needs ----


def test_a_segment_has_the_bytes_that_it_would_have_if_it_were_stored_today(store_path: Path, tmp_path: Path) -> None:
    earlier_chain(store_path)
    with PrefixStore(tmp_path / "today") as store:
        write_prefix(store, IDS[:20], g=PACKED)
        write_prefix(store, IDS, first_chunk=5, g=PACKED)
    with PrefixStore(store_path) as store:
        assert_whole(store, look_up(store))
        for entry in store.entries():
            assert store.repack(entry.key, 2) is not None
            assert store.repack(entry.key, 8) is not None
    for made in (tmp_path / "today").glob("segments/*/*"):
        assert (store_path / made.relative_to(tmp_path / "today")).stat().st_size == made.stat().st_size


def test_a_prompt_that_turns_away_brings_what_it_shares(store_path: Path) -> None:
    earlier_chain(store_path)
    with PrefixStore(store_path) as store:
        # Chunk 5 begins the second segment, and differs.
        prompt = IDS.copy()
        prompt[22] += 1
        found = look_up(store, prompt)
        assert found is not None
        assert found.tokens == 20
        assert told_of(store) == [(20, False)]
        assert_whole(store, look_up(store))


@pytest.mark.parametrize("prompt", [some_tokens(41, seed=9), IDS[:3], IDS[:0]], ids=["another", "short", "empty"])
def test_a_prompt_that_shares_no_chunk_brings_nothing(store_path: Path, prompt: TokenIds) -> None:
    earlier_chain(store_path)
    with PrefixStore(store_path) as store:
        assert look_up(store, prompt) is None
    assert versions(store_path) == ["2"] * 3


def test_what_continues_nothing_waits_until_that_is_stored(store_path: Path) -> None:
    earlier_chain(store_path)
    named(store_path, 20).unlink()
    with PrefixStore(store_path) as store:
        assert look_up(store) is None
        assert len(store.repack_earlier()) == 1  # (The other prefix.)
    with PrefixStore(store_path) as store:
        write_prefix(store, IDS[:20], g=PACKED)
        assert len(store.repack_earlier()) == 1
        assert_whole(store, look_up(store))


def test_what_is_stored_in_the_present_format_needs_no_earlier_one(store_path: Path) -> None:
    earlier_chain(store_path)
    with PrefixStore(store_path) as store:
        write_prefix(store, IDS[:20], g=PACKED)
        written = write_prefix(store, IDS, first_chunk=5, g=PACKED)
        assert_whole(store, look_up(store))
        assert versions(store_path) == ["2"] * 3 + ["3"] * 2
        store.repack_earlier()
        assert versions(store_path) == ["3"] * 3
        stored = look_up(store)
        assert stored is not None
        # (The files that were there are kept, and the earlier ones gone.)
        assert [span.segment.identity for span in stored.spans] == [span.segment.identity for span in written.spans]


def test_what_another_process_has_brought_is_found(store_path: Path, caplog: Any) -> None:
    earlier_chain(store_path)
    with PrefixStore(store_path) as one, PrefixStore(store_path) as another:
        assert_whole(one, look_up(one))
        caplog.clear()
        assert_whole(another, look_up(another))
        assert another.repack_earlier() != []
        assert one.repack_earlier() == []
    assert not caplog.records
    assert versions(store_path) == ["3"] * 3


def test_threads_that_ask_at_once_bring_it_once(store_path: Path) -> None:
    earlier_chain(store_path)
    with PrefixStore(store_path) as store, ThreadPoolExecutor(4) as threads:
        for stored in threads.map(lambda _: look_up(store), range(4)):
            assert_whole(store, stored)
        assert store.stats.prefix_tokens == 41


# ---- what cannot be brought ----


def first_payload_byte(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


@pytest.mark.parametrize(
    "where",
    [lambda path: first_payload_byte(path) + 11, lambda path: path.stat().st_size - 5, lambda path: 60],
    ids=["payload", "checksums", "header"],
)
def test_damage_is_left_as_it_is(store_path: Path, where: Callable[[Path], int], caplog: Any) -> None:
    earlier_chain(store_path)
    path = named(store_path, 21)
    content = with_flipped_bit(path, where(path))
    with PrefixStore(store_path) as store:
        found = look_up(store)
        assert found is not None
        assert found.tokens == 20
        store.repack_earlier()
        assert told_of(store) == [(20, False), (6, False)]
    assert path.read_bytes() == content
    assert not list(store_path.glob("partial/*"))
    assert any(record.levelno >= logging.WARNING and path.name in record.getMessage() for record in caplog.records)


def test_a_segment_with_another_name_is_left_as_it_is(store_path: Path) -> None:
    earlier_chain(store_path)
    path = named(store_path, 20)
    renamed = path.with_name(f"{path.name[:2]}{'0' * 30}.safetensors")
    path.rename(renamed)
    with PrefixStore(store_path) as store:
        assert look_up(store) is None
    assert renamed.exists()


def test_without_room_it_is_left_as_it_is(store_path: Path) -> None:
    earlier_chain(store_path)
    with PrefixStore(store_path, max_disk_bytes=5000) as store:
        assert look_up(store) is None
        assert store.repack_earlier() == []
    assert versions(store_path) == ["2"] * 3
    with PrefixStore(store_path) as store:
        assert_whole(store, look_up(store))


def test_a_store_with_a_key_does_not_take_what_was_stored_without(store_path: Path) -> None:
    earlier_chain(store_path)
    with PrefixStore(store_path, key=b"nobody can guess this") as store:
        assert look_up(store) is None
        assert store.repack_earlier() == []
    assert versions(store_path) == ["2"] * 3


def test_a_salted_chain_is_brought_for_its_tenant(store_path: Path) -> None:
    earlier_chain(store_path, salt="tenant")
    with PrefixStore(store_path) as store:
        assert look_up(store) is None
        assert store.repack_earlier() == []
    with PrefixStore(store_path, salt="tenant") as store:
        assert len(store.repack_earlier()) == 3
        assert_whole(store, look_up(store))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"version": "3"}, StoreFormatError),
        ({"version": "0"}, StoreFormatError),
        ({"version": "1"}, SegmentCorruptError),
        ({"mac": "0" * 64}, SegmentCorruptError),
        ({"compact_layers": "2"}, SegmentCorruptError),
        ({"num_tokens": "22"}, SegmentCorruptError),
    ],
)
def test_a_header_of_an_earlier_format_means_one_thing(store_path: Path, changes: Any, error: Any) -> None:
    earlier_chain(store_path)
    path = named(store_path, 21)
    content = path.read_bytes()
    begin = first_payload_byte(path)
    parse_earlier_header(content[8:begin], len(content), "name")
    whole = json.loads(content[8:begin])
    whole["__metadata__"] |= changes
    with pytest.raises(error):
        parse_earlier_header(json.dumps(whole, separators=(",", ":")).encode().ljust(begin - 8), len(content), "name")
