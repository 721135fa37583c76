"""Our backends keep every promise of the protocol, and a backend that breaks one is told so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from broken_backends import BREAKAGES
from contract.models import build, token_ids
from contract.references import assert_same_generation, generate, prefilled
from store_helpers import FINGERPRINT, expected_kv, geometry, read_back, some_tokens, write_prefix

from hf_contiguouskv import ContiguousKVCache, PrefixStore
from hf_contiguouskv.store.backend import Leftovers
from hf_contiguouskv.store.conformance import CHECKS, SHARED_CHECKS, Check, check_backend
from hf_contiguouskv.store.local_disk import LocalDisk
from hf_contiguouskv.store.memory_backend import MemoryBackend

EVERY_CHECK = CHECKS + SHARED_CHECKS


def name_of(check: Check) -> str:
    return check.__name__


# ---- ours ----


@pytest.mark.parametrize("check", EVERY_CHECK, ids=name_of)
@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
def test_the_local_disk_keeps_its_promises(tmp_path: Path, direct: bool, check: Check) -> None:
    check(lambda: LocalDisk(tmp_path, direct=direct))
    left = LocalDisk(tmp_path)
    assert (left.list_keys(), list(left.quarantined()), left.collect()) == (set(), [], Leftovers())


@pytest.mark.parametrize("check", CHECKS, ids=name_of)
def test_memory_keeps_its_promises(check: Check) -> None:
    check(MemoryBackend)


def test_all_checks_run_at_once(tmp_path: Path) -> None:
    check_backend(lambda: LocalDisk(tmp_path))
    check_backend(MemoryBackend, shared=False)
    with pytest.raises(AssertionError, match="shares_what_is_published"):
        check_backend(MemoryBackend)  # Each of these is a place of its own.


def test_the_local_disk_collects_what_nobody_is_writing(tmp_path: Path) -> None:
    disk = LocalDisk(tmp_path)
    writer = disk.create("a" * 32, 5000)
    dead = tmp_path / "partial" / f"{'b' * 32}.00000000.partial"
    dead.write_bytes(bytes(5000))
    for dry_run in (True, False):
        found = disk.collect(dry_run)
        assert found.removed == (f"partial/{dead.name}",)
        assert found.in_use == (f"partial/{Path(writer.name).name}",)
        assert found.bytes_freed >= 5000
        assert dead.exists() == dry_run
    writer.discard()
    assert not list((tmp_path / "partial").iterdir())


# ---- broken ones ----


@pytest.mark.parametrize(("name", "complaint", "make"), BREAKAGES, ids=[f"{b[0]}-{b[1]}" for b in BREAKAGES])
def test_a_broken_promise_is_noticed(name: str, complaint: str, make: object) -> None:
    check = next(check for check in EVERY_CHECK if name_of(check) == name)
    with pytest.raises(AssertionError, match=complaint) as caught:
        check(make)  # type: ignore[arg-type]
    assert str(caught.value).startswith(f"{name}: ")


def test_a_collector_that_removes_the_files_of_other_objects_is_noticed(tmp_path: Path) -> None:
    class Ruthless(LocalDisk):
        def collect(self, dry_run: bool = False) -> Leftovers:
            for path in (self.folder / "partial").iterdir():
                path.unlink()
            return Leftovers()

    (check,) = (check for check in SHARED_CHECKS if name_of(check) == "collects_no_writer_of_another")
    with pytest.raises(AssertionError, match="collects_no_writer_of_another"):
        check(lambda: Ruthless(tmp_path))


def test_every_check_has_been_seen_to_fail() -> None:
    seen = {name for name, _, _ in BREAKAGES} | {"collects_no_writer_of_another"}
    assert seen == {name_of(check) for check in EVERY_CHECK}


# ---- a store on another backend ----


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_request_is_answered_from_memory_alone(store_path: Path) -> None:
    model, prefix = build("llama", "sdpa", layers=2), token_ids(83, seed=1)
    prompt = torch.cat([prefix, token_ids(6, seed=2)], dim=1)
    expected = generate(model, prompt, prefilled(model, prefix))
    backend = MemoryBackend()
    with PrefixStore(store_path, backend=backend) as store:
        ContiguousKVCache(model, prefix, store=store, budget=1.0).close()
        assert store.stats.direct_reads
    assert len(backend.list_keys()) == 1
    with PrefixStore(store_path, backend=backend, host_bytes=0, device_bytes=0) as store:
        cache = ContiguousKVCache(model, prefix, store=store, budget=1.0)
        assert_same_generation(generate(model, prompt, cache), expected)
        assert cache.stats.tokens_from_store == 83
        assert cache.stats.hits["disk"] == 2 * 6
        cache.close()
        assert store.verify() == []
        held = sum(info.nbytes for info in backend.list_blobs())
        assert (store.stats.segments, store.stats.segment_bytes) == (1, held)
    assert files(store_path) <= {"contiguouskv-store.json", *(f"index.{end}" for end in ("sqlite", "lock"))}


def test_a_store_in_memory_forgets_quarantines_and_rebuilds(store_path: Path) -> None:
    ids, backend = some_tokens(30), MemoryBackend()
    with PrefixStore(store_path, backend=backend) as store:
        write_prefix(store, ids[:20])
        stored = write_prefix(store, ids, first_chunk=5)
        for layer, kv in enumerate(read_back(store, stored, range(3))):
            assert torch.equal(kv, expected_kv(geometry(), ids, layer))
        store.inner.discard(stored.spans[1].segment, "a test")
        assert store.inner.lookup(FINGERPRINT, ids, 4).tokens == 20  # type: ignore[union-attr]
        assert store.stats.quarantined_bytes == stored.spans[1].segment.nbytes
        assert len(store.gc().quarantine) == 1
        assert store.stats.quarantined_bytes == 0
    (store_path / "index.sqlite").unlink()
    with PrefixStore(store_path, backend=backend) as store:
        assert store.inner.lookup(FINGERPRINT, ids, 4).tokens == 20  # type: ignore[union-attr]
        assert store.delete(store.entries()[0].key)
        assert backend.list_keys() == set()
