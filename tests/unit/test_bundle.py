"""Bundles: what is exported arrives whole elsewhere, and nothing that was damaged or made up gets in."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from bundle_helpers import content, manifest, tree
from contract.models import CACHE, build, token_ids
from contract.references import prefilled
from huggingface_hub import CommitOperationAdd, ModelCard
from store_helpers import FINGERPRINT, expected_kv, geometry, read_back, some_tokens, write_prefix

from hf_contiguouskv import ContiguousKVCache
from hf_contiguouskv.errors import InputError, SegmentCorruptError, StoreError, StoreFormatError
from hf_contiguouskv.store import PrefixStore
from hf_contiguouskv.store.bundle import export_bundle, import_bundle
from hf_contiguouskv.store.chains import parents_of_all
from hf_contiguouskv.store.hashing import root_hash


@pytest.fixture
def source(tmp_path: Path) -> PrefixStore:
    return PrefixStore(tmp_path / "source")


@pytest.fixture
def target(tmp_path: Path) -> PrefixStore:
    return PrefixStore(tmp_path / "target")


def test_a_prefix_goes_with_all_that_it_continues(source: PrefixStore, target: PrefixStore, tmp_path: Path) -> None:
    root, child, aside, alone = tree(source)
    calls: list[tuple[int, int]] = []
    report = export_bundle(source, [child], tmp_path / "bundle", lambda *done: calls.append(done))
    assert [(segment.key, segment.tokens) for segment in report.segments] == [(root, 20), (child, 40)]
    assert set(content(tmp_path / "bundle")) == {
        "README.md",
        "bundle.json",
        f"segments/{root}.safetensors",
        f"segments/{child}.safetensors",
    }
    for segment in manifest(tmp_path / "bundle")["segments"]:
        copy = (tmp_path / "bundle" / segment["file"]).read_bytes()
        assert copy == source.backend.path_of(segment["key"]).read_bytes()
        assert (segment["sha256"], segment["bytes"]) == (hashlib.sha256(copy).hexdigest(), len(copy))
    sizes = [segment.bytes for segment in report.segments]
    assert calls == [(sizes[0], sum(sizes)), (sum(sizes), sum(sizes))]

    imported = import_bundle(target, tmp_path / "bundle", lambda *done: calls.append(done))
    assert (imported.added, imported.already_there, imported.refused) == ((root, child), (), ())
    assert imported.bytes == report.bytes
    assert calls[-1] == (2 * report.bytes, 2 * report.bytes)
    assert target.verify() == []
    ids = some_tokens(40)
    found = target.inner.lookup(FINGERPRINT, ids, 4)
    assert found is not None
    assert found.tokens == 40
    g = geometry()
    for layer, kv in enumerate(read_back(target, found, range(g.num_layers))):
        assert torch.equal(kv, expected_kv(g, ids, layer))
    # Once more: nothing is copied, nothing is lost.
    again = import_bundle(target, tmp_path / "bundle")
    assert (again.added, again.already_there) == ((), (root, child))
    assert {aside, alone}.isdisjoint(entry.key for entry in target.entries())


def test_a_prefix_that_leaves_another_in_the_middle(source: PrefixStore, target: PrefixStore, tmp_path: Path) -> None:
    root, child, aside, alone = tree(source)
    assert parents_of_all(source) == {child: root, aside: root}
    report = export_bundle(source, [aside, alone], tmp_path / "bundle")
    assert [segment.key for segment in report.segments] == [root, alone, aside]
    assert import_bundle(target, tmp_path / "bundle").added == (root, alone, aside)
    assert parents_of_all(target) == {aside: root}


def test_of_several_parents_the_one_that_a_look_up_takes_goes_along(source: PrefixStore, tmp_path: Path) -> None:
    ids = some_tokens(44)
    aside = ids[:36].copy()
    aside[33:] += 1
    write_prefix(source, ids[:20])
    write_prefix(source, ids[:40], first_chunk=5)
    write_prefix(source, aside)  # Whole: it holds the first eight chunks once more.
    child = ids.copy()
    child[32:] += 2
    found = write_prefix(source, child, first_chunk=8)
    taken = [span.segment.key for span in found.spans]
    assert len(taken) == 2
    report = export_bundle(source, [taken[-1]], tmp_path / "bundle")
    assert [segment.key for segment in report.segments] == taken
    assert parents_of_all(source)[taken[-1]] == taken[0]


def test_a_child_follows_a_parent_that_the_store_has(source: PrefixStore, target: PrefixStore, tmp_path: Path) -> None:
    root, child, *_ = tree(source)
    export_bundle(source, [root], tmp_path / "first")
    export_bundle(source, [child], tmp_path / "second")
    import_bundle(target, tmp_path / "first")
    only_child(tmp_path / "second", child)
    report = import_bundle(target, tmp_path / "second")
    assert report.added == (child,)
    assert target.inner.lookup(FINGERPRINT, some_tokens(40), 4).tokens == 40


def only_child(bundle: Path, key: str) -> None:
    """Take all segments but one out of a bundle."""
    listed = manifest(bundle)
    listed["segments"] = [segment for segment in listed["segments"] if segment["key"] == key]
    (bundle / "bundle.json").write_text(json.dumps(listed))
    for path in bundle.glob("segments/*"):
        if key not in path.name:
            path.unlink()


def test_an_orphan_is_refused_by_name(source: PrefixStore, target: PrefixStore, tmp_path: Path) -> None:
    root, child, _, alone = tree(source)
    export_bundle(source, [child, alone], tmp_path / "bundle")
    listed = manifest(tmp_path / "bundle")
    listed["segments"] = [segment for segment in listed["segments"] if segment["key"] != root]
    (tmp_path / "bundle" / "bundle.json").write_text(json.dumps(listed))
    before = content(target.path)
    report = import_bundle(target, tmp_path / "bundle")
    assert report.added == ()
    assert [(refused.key, root in refused.reason) for refused in report.refused] == [(child, True)]
    assert content(target.path) == before
    # The sound part is imported on request.
    report = import_bundle(target, tmp_path / "bundle", skip_refused=True)
    assert (report.added, [refused.key for refused in report.refused]) == ((alone,), [child])


def test_a_request_hits_what_was_imported_and_answers_exactly(tmp_path: Path) -> None:
    model = build("llama", "sdpa", layers=2)
    prefix, question = token_ids(50, seed=1), token_ids(5, seed=2)
    with PrefixStore(tmp_path / "one") as store:
        with ContiguousKVCache(model, prefix, store=store, budget=1.0) as cache:
            assert cache.stats.tokens_prefilled == 50
        export_bundle(store, [entry.key for entry in store.entries()], tmp_path / "bundle")
    shutil.rmtree(tmp_path / "one")
    with PrefixStore(tmp_path / "two") as store:
        import_bundle(store, tmp_path / "bundle")
        with ContiguousKVCache(model, prefix, store=store, budget=1.0) as cache:
            assert (cache.stats.tokens_from_store, cache.stats.tokens_prefilled) == (50, 0)
            ids = torch.cat([prefix, question], dim=1)
            answer = model.generate(ids, **{CACHE: cache}, max_new_tokens=8, do_sample=False)
        assert store.stats.hits == 1
    expected = model.generate(ids, **{CACHE: prefilled(model, prefix)}, max_new_tokens=8, do_sample=False)
    assert answer.tolist() == expected.tolist()


# -- writing ------------------------------------------------------------------------------------------------------


def test_nothing_is_overwritten(source: PrefixStore, tmp_path: Path) -> None:
    root, *_ = tree(source)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for folder in (tmp_path / "full", tmp_path / "file", tmp_path / "link", source.path / "segments" / "bundle"):
        with pytest.raises(InputError):
            export_bundle(source, [root], folder)
    assert content(tmp_path / "full") == {"note": b"mine"}
    (tmp_path / "empty").mkdir()
    export_bundle(source, [root], tmp_path / "empty")
    assert (tmp_path / "empty" / "bundle.json").exists()
    with pytest.raises(InputError, match="not an empty folder"):
        export_bundle(source, [root], tmp_path / "empty")


@pytest.mark.parametrize("existing", [False, True])
def test_an_export_that_fails_leaves_nothing(source: PrefixStore, tmp_path: Path, existing: bool) -> None:
    _, child, *_ = tree(source)
    folder = tmp_path / "exports" / "bundle"
    folder.parent.mkdir()
    if existing:
        folder.mkdir()

    def stop(done: int, total: int) -> None:
        # What a crash would leave now does not look like a bundle.
        places = [folder] if existing else list(folder.parent.iterdir())
        assert len(list(places[0].rglob("*.safetensors"))) == 1
        with pytest.raises(StoreFormatError):
            import_bundle(source, places[0])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_bundle(source, [child], folder, stop)
    assert [str(path.relative_to(folder.parent)) for path in folder.parent.rglob("*")] == ["bundle"] * existing


def test_a_damaged_segment_is_not_exported(source: PrefixStore, tmp_path: Path) -> None:
    root, child, *_ = tree(source)
    path = source.backend.path_of(root)
    octets = bytearray(path.read_bytes())
    octets[5000] ^= 1
    path.write_bytes(octets)
    with pytest.raises(SegmentCorruptError, match=root):
        export_bundle(source, [child], tmp_path / "bundle")
    assert not list(tmp_path.glob("bundle*"))


def test_what_cannot_be_exported_is_named(source: PrefixStore, tmp_path: Path) -> None:
    root, child, *_ = tree(source)
    with pytest.raises(StoreError, match="0" * 32):
        export_bundle(source, ["0" * 32], tmp_path / "bundle")
    with pytest.raises(InputError):
        export_bundle(source, ["../../etc/passwd"], tmp_path / "bundle")
    with pytest.raises(InputError, match="nothing to export"):
        export_bundle(source, [], tmp_path / "bundle")
    with pytest.raises(InputError, match="base_model"):
        export_bundle(source, [root], tmp_path / "bundle", base_model="no such/name at all\n")
    source.backend.delete(root)
    source.gc()
    with pytest.raises(StoreError, match=f"{child} continues a prefix that is not stored"):
        export_bundle(source, [child], tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_the_hub_accepts_the_folder(source: PrefixStore, tmp_path: Path) -> None:
    root, child, *_ = tree(source)
    report = export_bundle(source, [child], tmp_path / "bundle", base_model="HuggingFaceTB/SmolLM2-135M-Instruct")
    card = ModelCard.load(tmp_path / "bundle" / "README.md")
    assert card.data.library_name == "hf_contiguouskv"
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "kv-cache" in card.data.tags
    assert all(key in card.text for key in (root, child))
    assert "0 to 20" in card.text
    assert "20 to 40" in card.text
    assert "salt" not in card.text
    by_path = {segment.file: segment for segment in report.segments}
    for name in content(tmp_path / "bundle"):
        info = CommitOperationAdd(name, tmp_path / "bundle" / name).upload_info
        assert info.size == (tmp_path / "bundle" / name).stat().st_size
        if name in by_path:
            # The list names what the Hub would name: its digest of large files is SHA-256 too.
            assert (info.sha256.hex(), info.size) == (by_path[name].sha256, by_path[name].bytes)
    export_bundle(source, [root], tmp_path / "plain")
    assert ModelCard.load(tmp_path / "plain" / "README.md").data.get("base_model") is None


def test_a_salted_prefix_is_found_with_the_same_salt_only(tmp_path: Path, target: PrefixStore) -> None:
    with PrefixStore(tmp_path / "salted", salt="tenant") as source:
        key = write_prefix(source, some_tokens(12)).spans[0].segment.key
        report = export_bundle(source, [key], tmp_path / "bundle")
    assert report.salted == (key,)
    assert "same `salt`" in (tmp_path / "bundle" / "README.md").read_text()
    refused = import_bundle(target, tmp_path / "bundle")
    assert refused.added == ()
    root = root_hash(FINGERPRINT, 4, b"tenant").hex()
    assert [(segment.key, root in segment.reason) for segment in refused.refused] == [(key, True)]
    imported = import_bundle(target, tmp_path / "bundle", foreign_roots=[root])
    assert (imported.added, imported.other_salt) == ((key,), (key,))
    assert target.inner.lookup(FINGERPRINT, some_tokens(12), 4) is None
    with PrefixStore(tmp_path / "same", salt="tenant") as same:
        assert import_bundle(same, tmp_path / "bundle").other_salt == ()
        assert same.inner.lookup(FINGERPRINT, some_tokens(12), 4).tokens == 12
