"""What processes, threads and tenants that share a store may rely on."""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
import time
from pathlib import Path

import pytest
import torch
from store_helpers import FINGERPRINT, expected_kv, geometry, path_of, read_back, some_tokens, write_prefix

from hf_contiguouskv.store import PrefixStore, StoredPrefix, publishing
from hf_contiguouskv.store.local_disk import FileBlob

IDS = some_tokens(40)


def find(store: PrefixStore, ids=IDS, **options) -> StoredPrefix | None:
    return store.inner.lookup(FINGERPRINT, ids, 4, **options)


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES])
def test_what_only_this_process_cannot_read_stays_in_service(
    store_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    with PrefixStore(store_path) as store:
        write_prefix(store, IDS)
    with PrefixStore(store_path) as store:

        def refuse(*_: object, **__: object) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(FileBlob, "__init__", refuse)
        assert find(store) is None
        monkeypatch.undo()
        assert find(store).tokens == 40  # type: ignore[union-attr]
        assert store.stats.quarantined == 0


def test_what_has_expired_and_is_stored_again_is_found_again(store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with PrefixStore(store_path, ttl_s=100) as store:
        write_prefix(store, IDS[:20])
        write_prefix(store, IDS, first_chunk=5)
        real = time.time
        monkeypatch.setattr(time, "time", lambda: real() + 1000)
        assert find(store) is None
        write_prefix(store, IDS[:20])
        write_prefix(store, IDS, first_chunk=5)
        assert find(store).tokens == 40  # type: ignore[union-attr]


def test_other_processes_learn_of_uses_within_seconds(store_path: Path) -> None:
    with PrefixStore(store_path, ttl_s=1) as store:
        write_prefix(store, IDS)
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            find(store)
            time.sleep(0.05)
        store.flush()
        with PrefixStore(store_path) as other:
            assert other.entries()[0].uses > 1


def test_a_forked_child_may_use_the_background_of_its_parent(store_path: Path) -> None:
    with PrefixStore(store_path) as store:
        store.inner.submit_background(lambda: write_prefix(store, IDS))
        store.flush()
        child = os.fork()
        if child == 0:
            done: list[int] = []
            threading.Timer(20, os._exit, (2,)).start()
            store.inner.submit_background(lambda: done.append(1))
            store.flush()
            os._exit(0 if done == [1] and find(store, wait=True) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_look_up_waits_only_for_a_prompt_that_helps(store_path: Path) -> None:
    with PrefixStore(store_path) as store:
        write_prefix(store, IDS[:20])
        go_on = threading.Event()
        store.inner.submit_background(lambda: go_on.wait(30), [some_tokens(40, seed=1), IDS[:20]])
        question = IDS.copy()
        question[20:] += 1
        assert find(store, question, wait=True).tokens == 20  # type: ignore[union-attr]
        assert not go_on.is_set()
        store.inner.submit_background(lambda: write_prefix(store, IDS, first_chunk=5), [IDS])
        threading.Timer(0.2, go_on.set).start()
        assert find(store, wait=True).tokens == 40  # type: ignore[union-attr]


def test_a_segment_that_names_another_model_than_its_hashes_goes(
    store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with PrefixStore(store_path) as store:
        header = publishing.Publisher._header

        def lying(*arguments: object) -> object:
            made = header(*arguments)  # type: ignore[arg-type]
            return type(made)(**(vars_of(made) | {"fingerprint": "00" * 16}))

        monkeypatch.setattr(publishing.Publisher, "_header", lying)
        with store.inner.begin_segment(FINGERPRINT, geometry(), IDS) as writer:
            for layer in range(3):
                writer.write_chunks(layer, 0, expected_kv(geometry(), IDS, layer))
            writer.write_index(1, torch.ones(2, 4, 10, 8, dtype=torch.int8), torch.ones(2, 8))
            writer.commit()
        monkeypatch.undo()
        assert find(store) is None
        assert store.stats.quarantined == 1
        write_prefix(store, IDS)
        assert find(store).tokens == 40  # type: ignore[union-attr]


def vars_of(header: object) -> dict[str, object]:
    return {name: getattr(header, name) for name in header.__dataclass_fields__}  # type: ignore[attr-defined]


def test_segments_of_one_chain_may_group_their_layers_differently(store_path: Path) -> None:
    with PrefixStore(store_path) as store:
        write_prefix(store, IDS[:20])
        stored = write_prefix(store, IDS, first_chunk=5, g=geometry(layers_per_group=2))
        for layer, kv in enumerate(read_back(store, stored, range(3))):
            assert torch.equal(kv, expected_kv(geometry(), IDS, layer))


def test_a_path_does_not_lead_to_the_store_of_a_tenant(store_path: Path) -> None:
    with PrefixStore(store_path, salt="tenant") as tenants:
        write_prefix(tenants, IDS)
        with PrefixStore.shared(store_path) as shared:
            assert shared is not tenants
            assert find(shared) is None


def test_gc_leaves_a_pin_that_somebody_sets_meanwhile(store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with PrefixStore(store_path) as store, PrefixStore(store_path) as other:
        key = write_prefix(store, IDS).spans[0].segment.key
        real = store.backend.collect

        def collect_and_pin(dry_run: bool = False) -> object:
            other.pin(key)
            return real(dry_run)

        monkeypatch.setattr(store.backend, "collect", collect_and_pin)
        assert store.gc().repaired == ()
        assert store.entries()[0].pinned


def test_gc_does_not_keep_others_from_writing_while_it_reads(store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with PrefixStore(store_path) as store:
        path = path_of(write_prefix(store, IDS).spans[0].segment)
        wrote: list[int] = []
        real = FileBlob.__init__

        def open_while_another_writes(blob: FileBlob, where: Path, **options: bool) -> None:
            if where == path and not wrote:
                with sqlite3.connect(store_path / "index.sqlite", timeout=5) as db:
                    db.execute("UPDATE segments SET uses = uses + 1")
                wrote.append(1)
            real(blob, where, **options)

        monkeypatch.setattr(FileBlob, "__init__", open_while_another_writes)
        store.gc()
        assert wrote == [1]
