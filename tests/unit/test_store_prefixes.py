"""A store finds the longest beginning that it holds, and returns the bytes that were stored for it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_helpers import FINGERPRINT, expected_kv, geometry, read_back, some_tokens, tokens, write_prefix

from hf_contiguouskv.errors import (
    ConfigError,
    InputError,
    PrefixInUseError,
    StoreError,
    StoreFormatError,
    StoreFullError,
)
from hf_contiguouskv.store import PrefixStore
from hf_contiguouskv.store.hashing import TokenIds


def matched(store: PrefixStore, ids: TokenIds, chunk_size: int = 4, fingerprint: str = FINGERPRINT) -> int:
    stored = store.inner.lookup(fingerprint, ids, chunk_size)
    if stored is None:
        return 0
    assert sum(span.chunks for span in stored.spans) == -(-stored.tokens // chunk_size)
    return stored.tokens


def segment_bytes(tmp_path: Path, count: int) -> int:
    """What a segment of `count` tokens takes up."""
    with PrefixStore(tmp_path / "measure") as store:
        return write_prefix(store, some_tokens(count)).spans[0].segment.blob.stored_bytes


@pytest.mark.parametrize("length", [1, 3, 4, 5, 16, 99, 100])
def test_what_was_stored_is_found_to_the_token_and_read_back(store_path: Path, length: int) -> None:
    ids = some_tokens(length)
    with PrefixStore(store_path) as store:
        write_prefix(store, ids)
        assert matched(store, ids) == length
        assert matched(store, np.append(ids, [5, 6, 7, 8, 9])) == length
        assert matched(store, ids[: length - 1]) == length - 1
    with PrefixStore(store_path) as store:
        stored = store.inner.lookup(FINGERPRINT, ids, 4)
        assert stored is not None
        for layer, kv in enumerate(read_back(store, stored, range(3))):
            assert torch.equal(kv, expected_kv(geometry(), ids, layer))


def test_a_difference_inside_a_chunk_shortens_the_match_to_the_token(store_path: Path) -> None:
    ids = some_tokens(100)
    with PrefixStore(store_path) as store:
        write_prefix(store, ids)
        for position in (0, 1, 50, 97, 98, 99):
            changed = ids.copy()
            changed[position] += 1
            assert matched(store, changed) == position


def test_another_model_chunk_size_or_tenant_does_not_match(store_path: Path) -> None:
    ids = some_tokens(20)
    with PrefixStore(store_path) as store:
        write_prefix(store, ids)
        assert matched(store, ids, fingerprint="another") == 0
        assert matched(store, ids, chunk_size=8) == 0
    with PrefixStore(store_path, salt="tenant") as other:
        assert matched(other, ids) == 0
        segment = write_prefix(other, ids).spans[0].segment
        assert segment.header.salted
        assert matched(other, ids) == 20
    with PrefixStore(store_path, salt=b"tenant") as same:
        assert matched(same, ids) == 20
        same.inner.index.rebuild()
        assert matched(same, ids) == 20
        assert [entry.key for entry in same.entries()] == [segment.key]
    with PrefixStore(store_path) as whole:  # Who has no salt looks after everything, and finds only its own.
        assert len(whole.entries()) == 2
        assert matched(whole, ids) == 20


def test_prefixes_share_the_chunks_of_their_parents(store_path: Path) -> None:
    ids = some_tokens(30)
    branch = np.append(ids[:12], some_tokens(9, seed=1))
    with PrefixStore(store_path) as store:
        write_prefix(store, ids[:18])
        stored = write_prefix(store, ids, first_chunk=4)
        assert [(span.first_chunk, span.chunks, span.offset) for span in stored.spans] == [(0, 4, 0), (4, 4, 0)]
        write_prefix(store, branch, first_chunk=3)
        for wanted in (ids, branch, ids[:18], ids[:13]):
            found = store.inner.lookup(FINGERPRINT, wanted, 4)
            assert found is not None
            assert found.tokens == len(wanted)
            kv = read_back(store, found, [1])[0]
            expected = expected_kv(geometry(), wanted, 1)
            whole = len(wanted) // 4
            assert torch.equal(kv[:whole], expected[:whole])
            valid = len(wanted) % 4
            assert torch.equal(kv[whole:, :, :, :valid], expected[whole:, :, :, :valid])
        parents = {entry.tokens: entry.parent for entry in store.entries()}
        assert parents[18] == ""
        assert len(parents[30]) == len(parents[21]) == 32
        assert {entry.tokens: entry.chunks for entry in store.entries()} == {18: 5, 30: 4, 21: 3}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    stored=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=11), min_size=1, max_size=6),
    queries=st.lists(st.lists(st.integers(0, 1), max_size=13), min_size=1, max_size=6),
    extend=st.booleans(),
)
def test_the_match_is_the_longest_common_beginning(
    tmp_path_factory: pytest.TempPathFactory, stored: list[list[int]], queries: list[list[int]], extend: bool
) -> None:
    with PrefixStore(tmp_path_factory.mktemp("store"), direct=False) as store:
        for sequence in stored:
            ids = tokens(*sequence)
            first = matched(store, ids) // 4 if extend else 0
            if first * 4 < len(ids):
                write_prefix(store, ids, first_chunk=first)
        for query in queries + stored:
            expected = max(len(os.path.commonprefix([query, sequence])) for sequence in stored)  # noqa: RUF071
            assert matched(store, tokens(*query)) == expected
        store.inner.index.rebuild()
        for query in queries + stored:
            expected = max(len(os.path.commonprefix([query, sequence])) for sequence in stored)  # noqa: RUF071
            assert matched(store, tokens(*query)) == expected
        assert store.verify() == []


def test_a_parent_cannot_be_deleted_before_its_children(store_path: Path) -> None:
    ids = some_tokens(24)
    with PrefixStore(store_path) as store:
        write_prefix(store, ids[:12])
        write_prefix(store, ids[:18], first_chunk=3)
        write_prefix(store, ids, first_chunk=4)
        first, second, third = (entry.key for entry in store.entries())
        with pytest.raises(PrefixInUseError, match=second):
            store.delete(first)
        assert store.delete(third) == [third]
        assert matched(store, ids) == 18
        assert store.delete(first, recursive=True) == [first, second]
        assert store.entries() == []
        assert matched(store, ids) == 0
        assert not list(store_path.glob("segments/*/*"))
        with pytest.raises(StoreError, match="no stored prefix"):
            store.delete(first)


def test_a_parent_whose_chunks_lie_elsewhere_too_can_be_deleted(store_path: Path) -> None:
    ids = some_tokens(24)
    with PrefixStore(store_path) as store:
        write_prefix(store, ids[:12])
        write_prefix(store, ids[:16])
        write_prefix(store, ids, first_chunk=3)
        store.delete(store.entries()[0].key)
        assert matched(store, ids) == 24


def test_entries_count_uses_and_remember_pins(store_path: Path) -> None:
    ids = some_tokens(10)
    with PrefixStore(store_path) as store:
        write_prefix(store, ids)
        matched(store, ids)
        matched(store, ids)
        store.pin(store.entries()[0].key)
    with PrefixStore(store_path) as store:
        entry = store.entries()[0]
        assert (entry.uses, entry.pinned, entry.tokens, entry.chunks, entry.layers) == (2, True, 10, 3, 3)
        assert (entry.dtype, entry.fingerprint) == ("float32", FINGERPRINT)
        assert entry.created <= entry.last_used
        store.unpin(entry.key)
        assert not store.entries()[0].pinned
        with pytest.raises(StoreError, match="no stored prefix"):
            store.pin("00")


def test_the_least_recently_used_leaves_make_room(tmp_path: Path, store_path: Path) -> None:
    size = segment_bytes(tmp_path, 16)
    prefixes = [some_tokens(16, seed) for seed in range(5)]
    with PrefixStore(store_path, max_disk_bytes=3 * size) as store:
        for ids in prefixes[:3]:
            write_prefix(store, ids)
        matched(store, prefixes[0])
        store.pin(store.entries()[1].key)
        write_prefix(store, prefixes[3])
        assert [matched(store, ids) for ids in prefixes] == [16, 16, 0, 16, 0]
        assert store.stats.evicted == 1
        assert store.stats.segment_bytes <= 3 * size
        assert len(list(store_path.glob("segments/*/*"))) == 3


def test_what_a_new_segment_continues_is_not_evicted_for_it(tmp_path: Path, store_path: Path) -> None:
    size = segment_bytes(tmp_path, 16)
    ids = some_tokens(32)
    with PrefixStore(store_path, max_disk_bytes=int(2.5 * size)) as store:
        write_prefix(store, ids[:16])
        write_prefix(store, some_tokens(16, seed=1))
        write_prefix(store, ids, first_chunk=4)
        assert matched(store, ids) == 32
        with pytest.raises(StoreFullError):
            write_prefix(store, np.append(ids, some_tokens(16, seed=2)), first_chunk=8)
        assert matched(store, ids) == 32
        assert not list(store_path.glob("partial/*"))


def test_a_segment_that_cannot_fit_is_refused_before_anything_is_computed(store_path: Path) -> None:
    with PrefixStore(store_path, max_disk_bytes=1000) as store:
        with pytest.raises(StoreFullError, match="max_disk_bytes=1000"):
            store.inner.begin_segment(FINGERPRINT, geometry(), some_tokens(10), 0)
        assert store.entries() == []


def test_pinned_prefixes_are_never_evicted(tmp_path: Path, store_path: Path) -> None:
    size = segment_bytes(tmp_path, 16)
    with PrefixStore(store_path, max_disk_bytes=size) as store:
        write_prefix(store, some_tokens(16))
        store.pin(store.entries()[0].key)
        with pytest.raises(StoreFullError):
            write_prefix(store, some_tokens(16, seed=1))
        assert matched(store, some_tokens(16)) == 16


def test_a_full_disk_is_reported_as_a_full_store(store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with PrefixStore(store_path) as store:
        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(StoreFullError, match="No space left"):
            store.inner.begin_segment(FINGERPRINT, geometry(), some_tokens(10), 0)
        assert not list(store_path.glob("partial/*"))
        monkeypatch.undo()
        writer = store.inner.begin_segment(FINGERPRINT, geometry(), some_tokens(10), 0)
        monkeypatch.setattr(os, "pwrite", full)
        writer.write_chunks(0, 0, expected_kv(geometry(), some_tokens(10), 0))
        with pytest.raises(StoreFullError, match="No space left"):
            writer.commit()
        monkeypatch.undo()
        assert not list(store_path.glob("partial/*"))
        assert store.entries() == []


@pytest.mark.parametrize("content", ["a file", "other files", "newer", "no mark", "not JSON"])
def test_what_is_not_a_store_is_refused_and_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "thing"
    if content == "a file":
        path.write_text("mine")
    else:
        path.mkdir()
        texts = {"newer": '{"format": 99}', "no mark": "{}", "not JSON": "[[["}
        name = "notes.txt" if content == "other files" else "contiguouskv-store.json"
        (path / name).write_text(texts.get(content, "mine"))
    before = sorted((p.name, p.stat().st_mtime_ns) for p in tmp_path.rglob("*"))
    with pytest.raises(StoreFormatError, match="thing"):
        PrefixStore(path)
    assert sorted((p.name, p.stat().st_mtime_ns) for p in tmp_path.rglob("*")) == before


def test_a_new_folder_is_private_and_an_empty_one_is_accepted(tmp_path: Path) -> None:
    with PrefixStore(tmp_path / "deep" / "store") as store:
        assert store.path.stat().st_mode & 0o777 == 0o700
        assert (store.path / "contiguouskv-store.json").read_text() == '{"format": 2}'
    (tmp_path / "empty").mkdir()
    PrefixStore(tmp_path / "empty").close()
    with pytest.raises(StoreFormatError, match="no store"):
        PrefixStore(tmp_path / "missing", create=False)
    assert not (tmp_path / "missing").exists()


def test_wrong_arguments_are_refused_by_name(store_path: Path) -> None:
    with pytest.raises(ConfigError, match="host_bytes"):
        PrefixStore(store_path, host_bytes=-1)
    assert not store_path.exists()
    with PrefixStore(store_path) as store:
        with pytest.raises(InputError, match="first_chunk"):
            store.inner.begin_segment(FINGERPRINT, geometry(), some_tokens(8), 2)
        with pytest.raises(StoreError, match="from its beginning"):
            store.inner.begin_segment(FINGERPRINT, geometry(), some_tokens(8), 1)
        with pytest.raises(InputError, match=r"\[n\]"):
            store.inner.lookup(FINGERPRINT, np.zeros((2, 4), dtype=np.int64), 4)
        with pytest.raises(InputError, match="integers"):
            store.inner.lookup(FINGERPRINT, np.zeros(4), 4)  # type: ignore[arg-type]
        assert store.inner.lookup(FINGERPRINT, tokens(), 4) is None


def test_one_store_per_folder_is_shared_in_a_process(tmp_path: Path) -> None:
    first = PrefixStore.shared(tmp_path / "store")
    (tmp_path / "link").symlink_to(tmp_path / "store")
    assert PrefixStore.shared(str(tmp_path / "link")) is first
    first.close()
    second = PrefixStore.shared(tmp_path / "store")
    assert second is not first
    assert second.entries() == []
    second.close()


def test_a_closed_store_says_so(store_path: Path) -> None:
    store = PrefixStore(store_path)
    store.close()
    store.close()
    assert "closed" in repr(store)
    with pytest.raises(StoreError, match="closed"):
        store.entries()
    with pytest.raises(StoreError, match="closed"):
        _ = store.inner.reader


def test_where_direct_reads_are_refused_the_page_cache_serves(
    store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    real = os.open

    def refuse(path: str, flags: int, *rest: int, **named: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "refused")
        return real(path, flags, *rest, **named)

    ids = some_tokens(20)
    monkeypatch.setattr(os, "open", refuse)
    with PrefixStore(store_path) as store:
        stored = write_prefix(store, ids)
        assert stored.spans[0].segment.blob.fd_direct is None
        assert not store.stats.direct_reads
        assert torch.equal(read_back(store, stored, [2])[0], expected_kv(geometry(), ids, 2))


def test_statistics_say_what_is_stored_and_what_was_done(store_path: Path) -> None:
    with PrefixStore(store_path) as store:
        stored = write_prefix(store, some_tokens(20))
        read_back(store, stored, [0])
        stats = store.stats
        size = stored.spans[0].segment.nbytes
        assert (stats.segments, stats.prefix_tokens, stats.bytes_written) == (1, 20, size)
        assert stats.segment_bytes == stored.spans[0].segment.blob.stored_bytes >= size
        assert (stats.published, stats.evicted, stats.device_bytes) == (1, 0, 0)
        assert stats.bytes_read >= 5 * geometry().extent_bytes
