"""Stores of formats 1 and 2, as earlier releases wrote them: what prompts find in them, and what repacking brings."""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from earlier_releases import as_earlier_store, kept_store, named, versions, with_flipped_bit
from store_helpers import FINGERPRINT, expected_kv, geometry, path_of, read_back, some_tokens, write_prefix
from typer.testing import CliRunner

from hf_contiguouskv.cli import app
from hf_contiguouskv.errors import SegmentCorruptError, StoreFormatError
from hf_contiguouskv.store import PrefixStore, StoredPrefix, earlier_segments
from hf_contiguouskv.store.derived import write_again
from hf_contiguouskv.store.directory import Directory
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
    return sorted((entry.tokens, entry.pinned) for entry in store.entries())


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
        # They are no damage. But they take room, and `gc` says what they are.
        assert store.verify(deep=True) == []
        told = store.gc().unreadable
        assert {Path(text.partition(":")[0]) for text in told} == {named(path, 6), named(path, 13)}
        assert all("contiguouskv repack STORE --earlier" in text for text in told)
        # (What belongs to a tenant is not this handle's to count.)
        assert store.inner.earlier.waiting_bytes == named(path, 6).stat().st_size
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
def test_repack_brings_the_rest(tmp_path: Path, version: int, caplog: Any) -> None:
    path = kept_store(version, tmp_path)
    times = {tokens: named(path, tokens).stat().st_mtime for tokens in (20, 21, 6)}
    done = CliRunner().invoke(app, ["repack", str(path), "--earlier", "--json"])
    assert done.exit_code == 0
    told = json.loads(done.stdout)
    assert len(told["repacked"]) == 3
    assert told["bytes_left"] == 0
    assert versions(path) == sorted([str(version), "3", "3", "3"])
    assert not [record for record in caplog.records if "damaged" in record.getMessage()]
    with PrefixStore(path) as store:
        assert_whole(store, look_up(store))
        assert_whole(store, look_up(store, OTHER), OTHER)
        assert store.inner.parts.pins.keys() == {entry.key for entry in store.entries() if entry.pinned}
        assert {entry.tokens: entry.created for entry in store.entries()} == {
            20: times[20],
            41: times[21],
            6: times[6],
        }
        assert store.verify(deep=True) == []
    again = CliRunner().invoke(app, ["repack", str(path), "--earlier"])
    assert "0 segments repacked" in again.output
    assert CliRunner().invoke(app, ["repack", str(path), "--earlier", "--all"]).exit_code != 0


# ---- what a prompt needs ----


def test_a_segment_has_the_bytes_that_it_would_have_if_it_were_stored_today(store_path: Path, tmp_path: Path) -> None:
    with PrefixStore(store_path) as store:
        for ids, first in ((IDS[:20], 0), (IDS, 5)):
            write_prefix(store, ids, first, g=PACKED, compute_s=1.5)
    today = {path.name: path.read_bytes() for path in store_path.glob("segments/*/*")}
    as_earlier_store(store_path)
    assert not today.keys() & {path.name for path in store_path.glob("segments/*/*")}
    with PrefixStore(store_path) as store:
        assert_whole(store, look_up(store))
        assert {entry.compute_s for entry in store.entries()} == {1.5}
    assert {path.name: path.read_bytes() for path in store_path.glob("segments/*/*")} == today


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
        write_prefix(store, IDS[:20], g=PACKED)
        assert_whole(store, look_up(store))


def test_what_continues_a_compact_segment_takes_its_form(store_path: Path) -> None:
    earlier_chain(store_path)
    with PrefixStore(store_path) as store:
        found = look_up(store, IDS[:20])
        assert found is not None
        store.repack(found.spans[0].segment.key, 2)
        stored = look_up(store)
        assert_whole(store, stored)
        assert stored is not None
        assert [span.segment.geometry.compact_layers for span in stored.spans] == [(1,), (1,)]


@pytest.mark.parametrize("sound", [True, False], ids=["sound", "damaged"])
def test_what_is_stored_in_the_present_format_needs_no_earlier_one(store_path: Path, sound: bool) -> None:
    earlier_chain(store_path)
    (store_path / "pins" / named(store_path, 21).stem).parent.mkdir(mode=0o700, exist_ok=True)
    (store_path / "pins" / named(store_path, 21).stem).touch(mode=0o600)
    with PrefixStore(store_path) as store:
        write_prefix(store, IDS[:20], g=PACKED)
        written = write_prefix(store, IDS, first_chunk=5, g=PACKED)
        assert_whole(store, look_up(store))
        assert versions(store_path) == ["2"] * 3 + ["3"] * 2
        path = path_of(written.spans[1].segment)
        identities = [span.segment.identity for span in written.spans]
        if not sound:
            with_flipped_bit(path, first_payload_byte(path) + 11)
        store.repack_earlier()
        assert versions(store_path) == ["3"] * 3
        stored = look_up(store)
        assert_whole(store, stored)
        assert stored is not None
        # The files that were there are kept, if all is well with them, and the earlier ones are gone.
        assert [span.segment.identity == known for span, known in zip(stored.spans, identities, strict=True)] == [
            True,
            sound,
        ]
        assert told_of(store) == [(6, False), (20, False), (41, True)]
        assert store.verify(deep=True) == []


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


def test_a_store_that_is_opened_while_another_one_writes_knows_them(store_path: Path) -> None:
    earlier_chain(store_path)
    with PrefixStore(store_path) as one:
        with closing(sqlite3.connect(store_path / "index.sqlite", isolation_level=None)) as writer:
            writer.execute("BEGIN IMMEDIATE")
            with PrefixStore(store_path) as another:
                writer.execute("ROLLBACK")
                assert_whole(another, look_up(another))
        assert_whole(one, look_up(one))


def test_a_look_up_that_needs_none_does_not_wait(store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    earlier_chain(store_path)
    begun, may_end = threading.Event(), threading.Event()

    def slowly(*about: Any) -> None:
        begun.set()
        assert may_end.wait(60)
        write_again(*about)

    monkeypatch.setattr(earlier_segments, "write_again", slowly)
    with PrefixStore(store_path) as store:
        ids = some_tokens(41, seed=3)
        write_prefix(store, ids, g=PACKED)
        thread = threading.Thread(target=store.repack_earlier)
        thread.start()
        assert begun.wait(60)
        assert_whole(store, look_up(store, ids), ids)  # (It would wait for ever.)
        may_end.set()
        thread.join()
        assert_whole(store, look_up(store))


def test_a_crash_before_the_old_file_is_deleted_leaves_one_of_them(
    store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier_chain(store_path)
    with PrefixStore(store_path) as store:
        with monkeypatch.context() as patch:
            patch.setattr(store.backend, "delete", Mock(side_effect=KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                look_up(store)
        assert versions(store_path) == ["2"] * 3 + ["3"]
    with PrefixStore(store_path) as store:
        assert_whole(store, look_up(store))
        store.repack_earlier()
        assert versions(store_path) == ["3"] * 3
        assert store.verify(deep=True) == []


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
        assert told_of(store) == [(6, False), (20, False)]
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


def test_nothing_is_evicted_to_make_room(store_path: Path) -> None:
    earlier_chain(store_path)
    with PrefixStore(store_path) as store:
        ids = some_tokens(41, seed=3)
        one = path_of(write_prefix(store, ids, g=PACKED).spans[0].segment).stat().st_blocks * 512
    with PrefixStore(store_path, max_disk_bytes=2 * one) as store:
        assert len(store.repack_earlier()) == 1
        assert look_up(store, ids) is not None
        assert store.stats.evicted == 0
        assert store.inner.earlier.waiting_bytes > 0
    with PrefixStore(store_path) as store:
        assert_whole(store, look_up(store))


def test_what_was_replaced_after_the_store_was_opened_is_left_as_it_is(store_path: Path) -> None:
    earlier_chain(store_path)
    path, other = named(store_path, 21), named(store_path, 6)
    with PrefixStore(store_path) as store:
        path.write_bytes(other.read_bytes())
        found = look_up(store)
        assert found is not None
        assert found.tokens == 20
        assert look_up(store) is not None
    assert path.read_bytes() == other.read_bytes()


def lie(store: PrefixStore, position: int, tokens: bytes) -> None:
    """Let the index say that the chunk there has these tokens."""
    query = "UPDATE chunks SET tokens = ? WHERE position = ?"
    store.inner.write(lambda db: db.execute(query, (tokens, position)))


def test_an_index_that_lies_makes_no_prefix_of_two(store_path: Path) -> None:
    earlier_chain(store_path)
    named(store_path, 20).unlink()
    other = some_tokens(41, seed=3)
    with PrefixStore(store_path) as store:
        write_prefix(store, other[:20], g=PACKED)
        octets = IDS[:20].tobytes()
        # The other prompt's chunks say that they have this prompt's tokens.
        for chunk in range(5):
            lie(store, chunk, octets[32 * chunk : 32 * chunk + 32])
        assert len(store.repack_earlier()) == 1  # (The short one.)
        store.inner.index.rebuild()
        found = look_up(store, np.concatenate([other[:20], IDS[20:]]))
        assert found is not None
        assert found.tokens == 20


def test_a_tenant_is_told_of_its_own_alone(store_path: Path) -> None:
    with PrefixStore(store_path, salt="one") as store:
        write_prefix(store, IDS, g=PACKED)
    as_earlier_store(store_path, b"one")
    told: list[tuple[int, int]] = []
    with PrefixStore(store_path, salt="another") as store:
        store.repack_earlier(lambda done, total: told.append((done, total)))
        assert store.inner.earlier.waiting_bytes == 0
    assert told == []


def test_a_folder_that_cannot_be_marked_is_named(store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    earlier_chain(store_path)
    monkeypatch.setattr(Directory, "write_file", Mock(side_effect=PermissionError(13, "Permission denied")))
    with pytest.raises(StoreFormatError, match=r"store format 1.*Open it once where it may be written"):
        PrefixStore(store_path)


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
