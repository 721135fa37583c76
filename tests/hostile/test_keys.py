"""A store with a key: what others put there is not used, whatever they know but the key."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
import torch
from contract.models import build
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tally import Figures
from unit.format_by_document import read_segment
from unit.store_helpers import FINGERPRINT, expected_kv, geometry, path_of, read_back, some_tokens, write_prefix

from hf_contiguouskv import ContiguousKVCache, ContiguousKVConfig, ReadOptions
from hf_contiguouskv.errors import ConfigError, SegmentCorruptError, StoreError
from hf_contiguouskv.store import PrefixStore
from hf_contiguouskv.store.bundle import export_bundle, import_bundle
from hf_contiguouskv.store.hashing import TokenIds
from hf_contiguouskv.store.key import StoreKey
from hostile.conftest import STRANGER, as_stranger, needs_root, open_to_all
from hostile.crafting import crafted, path_in, plant

SECRET = b"what nobody can guess"
G = geometry(packed_layers=(1,))
C = G.chunk_size


def tokens_found(store: PrefixStore, ids: TokenIds) -> int:
    found = store.inner.lookup(FINGERPRINT, ids, C)
    return found.tokens if found else 0


def assert_served(store: PrefixStore, ids: TokenIds) -> None:
    stored = store.inner.lookup(FINGERPRINT, ids, C)
    assert stored is not None
    assert stored.tokens == len(ids)
    for layer, kv in enumerate(read_back(store, stored, range(G.num_layers))):
        assert torch.equal(kv, expected_kv(G, ids, layer))


@pytest.mark.parametrize("theirs", [None, b"the key of another user"], ids=["no key", "another key"])
def test_what_was_made_without_the_key_is_not_used_and_is_replaced(
    store_path: Path, theirs: bytes | None, attacks: Figures, caplog: pytest.LogCaptureFixture
) -> None:
    ids = some_tokens(10)
    with PrefixStore(store_path, key=theirs) as store:
        key = write_prefix(store, ids, g=G).spans[0].segment.key
        before = path_in(store, key).read_bytes()
    with PrefixStore(store_path, key=SECRET) as store:
        assert tokens_found(store, ids) == 0
        assert "key" in caplog.text
        assert path_in(store, key).read_bytes() == before, "it may be another user's"
        write_prefix(store, ids, g=G)
        assert_served(store, ids)
        assert read_segment(path_in(store, key), SECRET)
    attacks.add("segments without the key, not used")


def test_a_store_opened_without_its_key_uses_nothing_and_breaks_nothing(store_path: Path, attacks: Figures) -> None:
    ids = some_tokens(10)
    with PrefixStore(store_path, key=SECRET) as store:
        write_prefix(store, ids, g=G)
    with PrefixStore(store_path) as store:
        assert tokens_found(store, ids) == 0
        assert any("key" in problem.problem for problem in store.verify())
        store.inner.index.rebuild()
        store.gc()
    with PrefixStore(store_path, key=SECRET) as store:
        assert_served(store, ids)
        assert store.verify(deep=True) == []
        assert store.stats.quarantined == 0
    attacks.add("keyed segments left alone by those without the key")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(where=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_no_byte_of_a_keyed_segment_can_be_changed(
    tmp_path_factory: pytest.TempPathFactory, where: float, flip: int, attacks: Figures
) -> None:
    ids = some_tokens(10)
    folder = tmp_path_factory.mktemp("keyed") / "store"
    with PrefixStore(folder, key=SECRET) as store:
        path = path_of(write_prefix(store, ids, g=G).spans[0].segment)
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= flip
    path.write_bytes(content)
    with PrefixStore(folder, key=SECRET) as store:
        stored = store.inner.lookup(FINGERPRINT, ids, C)
        if stored is None:
            attacks.add("changed keyed segments refused when they are opened")
            return
        segment = stored.spans[0].segment
        try:
            for name in segment.header.checked_tensors:
                segment.read_tensor(name)
        except SegmentCorruptError:
            attacks.add("changed keyed segments refused when they are read")
        else:
            # Only padding has neither checksum nor code, and nobody uses it.
            assert [problem for problem in store.verify() if "padding" not in problem.problem] == []


def test_chunks_cannot_change_places_together_with_their_checksums(store_path: Path, attacks: Figures) -> None:
    ids = some_tokens(12)
    with PrefixStore(store_path, key=SECRET) as store:
        segment = write_prefix(store, ids, g=G).spans[0].segment
        path, extents = path_of(segment), segment.extents()
        first, second = extents.offset(1, 0), extents.offset(1, 1)
        row = segment.tensor_extent("checksums.payload")[0] + 8 * segment.num_chunks
    content = bytearray(path.read_bytes())
    for a, b, size in ((first, second, extents.nbytes), (row, row + 8, 8)):
        content[a : a + size], content[b : b + size] = content[b : b + size], content[a : a + size]
    path.write_bytes(content)
    with PrefixStore(store_path, key=SECRET) as store:
        assert tokens_found(store, ids) == 0
    attacks.add("chunks that change places")


def test_the_code_of_another_segment_is_not_a_code_of_this_one(store_path: Path, attacks: Figures) -> None:
    ours, theirs = some_tokens(10), some_tokens(10, seed=1)
    with PrefixStore(store_path, key=SECRET) as store:
        path = path_of(write_prefix(store, ours, g=G).spans[0].segment)
        code = write_prefix(store, theirs, g=G).spans[0].segment.header.mac
    for forged in (code, "f" * 64):
        plant(store_path, path.stem, crafted(G, ours, header={"mac": forged}))
        with PrefixStore(store_path, key=SECRET) as store:
            assert tokens_found(store, ours) == 0
            assert tokens_found(store, theirs) == len(theirs)
        attacks.add("codes of other segments")


def test_a_bundle_is_signed_by_the_store_that_imports_it(store_path: Path, tmp_path: Path, attacks: Figures) -> None:
    ids = some_tokens(10)
    with PrefixStore(tmp_path / "from") as store:
        key = write_prefix(store, ids, g=G).spans[0].segment.key
        export_bundle(store, [key], tmp_path / "plain")
    with PrefixStore(store_path, key=SECRET) as store:
        assert import_bundle(store, tmp_path / "plain").added == (key,)
        assert_served(store, ids)
        export_bundle(store, [key], tmp_path / "keyed")
    for number, other in enumerate((None, b"the key of another user")):
        with PrefixStore(tmp_path / f"to {number}", key=other) as store:
            report = import_bundle(store, tmp_path / "keyed")
            assert report.added == ()
            assert "key" in report.refused[0].reason
        attacks.add("bundles of another key refused")
    with PrefixStore(tmp_path / "same key", key=SECRET) as store:
        assert import_bundle(store, tmp_path / "keyed").added == (key,)
        assert_served(store, ids)


def test_where_a_key_may_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attacks: Figures) -> None:
    ids = some_tokens(10)
    file = tmp_path / "key"
    file.write_bytes(SECRET + b"\n")
    file.chmod(0o600)
    monkeypatch.setenv("SOME_KEY", SECRET.decode())
    with PrefixStore(tmp_path / "store", key=SECRET) as store:
        write_prefix(store, ids, g=G)
    for key in (SECRET, file, f"file:{file}", "env:SOME_KEY"):
        with PrefixStore(tmp_path / "store", key=key) as store:
            assert_served(store, ids)
    file.chmod(0o666)
    with pytest.raises(ConfigError, match="chmod 600"):
        PrefixStore(tmp_path / "store", key=file)
    attacks.add("keys that others can change, refused")
    for wrong in ("what nobody can guess", "env:NO_SUCH_VARIABLE", "env:", b"short", 7, ""):
        with pytest.raises(ConfigError) as caught:
            PrefixStore(tmp_path / "store", key=wrong)  # type: ignore[arg-type]
        assert "what nobody can guess" not in str(caught.value), "a secret does not belong in a message"
    with pytest.raises(StoreError, match="cannot be read"):
        PrefixStore(tmp_path / "store", key=tmp_path / "missing")
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises((StoreError, ConfigError)):
        PrefixStore(tmp_path / "store", key=tmp_path / "pipe")
    attacks.add("keys that are none, refused")


@needs_root
def test_who_may_read_a_key_file(tmp_path: Path, attacks: Figures) -> None:
    """A secret that is mounted into a container belongs to root, and all may read it; one's own is one's own."""
    open_to_all(tmp_path)
    for owner, mode, fine in (
        (0, 0o444, True),
        (0, 0o640, True),
        (0, 0o660, False),
        (STRANGER, 0o600, True),
        (STRANGER, 0o640, False),
        (STRANGER, 0o604, False),
        (STRANGER + 1, 0o644, False),
    ):
        file = tmp_path / "key"
        file.unlink(missing_ok=True)
        file.write_bytes(SECRET)
        file.chmod(mode)
        os.chown(file, owner, STRANGER)

        def read(file: Path = file, fine: bool = fine) -> None:
            with contextlib.nullcontext() if fine else pytest.raises(ConfigError, match="chmod 600"):
                StoreKey.of(file)

        as_stranger(read)
    attacks.add("keys that others can read, refused", 4)


@pytest.mark.parametrize("budget", [0.25, 1.0])
def test_a_cache_answers_from_a_store_with_a_key(store_path: Path, budget: float, attacks: Figures) -> None:
    model = build("llama")
    ids = torch.from_numpy(some_tokens(100) % model.config.vocab_size)[None]
    answers = []
    for key in (None, SECRET, SECRET):
        with PrefixStore(store_path.with_name(f"{store_path.name}-{key is None}"), key=key) as store:
            cache = ContiguousKVCache(model, ids[:, :90], store=store, budget=budget)
            answers.append(model.generate(ids, cache=cache, max_new_tokens=4, do_sample=False))
            cache.close()
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[1], answers[2])
    with (
        PrefixStore(store_path.with_name(f"{store_path.name}-False"), key=SECRET) as store,
        pytest.raises(ConfigError, match="verify"),
    ):
        ContiguousKVCache(model, ids, store=store, config=ContiguousKVConfig(reading=ReadOptions(verify=False)))
    attacks.add("verification that cannot be left out")
