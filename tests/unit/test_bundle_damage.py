"""A bundle is untrusted: nothing that was damaged or made up gets in, whatever was done to it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from bundle_helpers import content, manifest, tree
from store_helpers import geometry, some_tokens, write_prefix

from hf_contiguouskv.errors import StoreFormatError, StoreFullError
from hf_contiguouskv.store import PrefixStore
from hf_contiguouskv.store.bundle import BundleError, export_bundle, import_bundle
from hf_contiguouskv.store.format import FORMAT_VERSION, SegmentHeader, parse_header, read_header
from hf_contiguouskv.store.hashing import root_hash
from hf_contiguouskv.store.local_disk import FileBlob

Tamper = Callable[[Path, str], None]


def edit_list(change: Callable[[dict], object]) -> Tamper:
    def tamper(bundle: Path, key: str) -> None:
        listed = manifest(bundle)
        change(listed)
        (bundle / "bundle.json").write_text(json.dumps(listed))

    return tamper


def edit_entry(**fields: object) -> Tamper:
    return edit_list(lambda listed: listed["segments"][-1].update(fields))


def write_list(text: bytes) -> Tamper:
    return lambda bundle, key: (bundle / "bundle.json").write_bytes(text) and None


def edit_file(change: Callable[[bytearray], object], also_list: bool = False) -> Tamper:
    """Change the file of the child; with `also_list`, the digest and length in the list as well."""

    def tamper(bundle: Path, key: str) -> None:
        path = bundle / "segments" / f"{key}.safetensors"
        octets = bytearray(path.read_bytes())
        change(octets)
        path.write_bytes(octets)
        if also_list:
            edit_entry(sha256=hashlib.sha256(octets).hexdigest(), bytes=len(octets))(bundle, key)

    return tamper


def flip(place: int) -> Callable[[bytearray], object]:
    def change(octets: bytearray) -> None:
        octets[place] ^= 1

    return change


def flip_token(octets: bytearray) -> None:
    place = octets.index(some_tokens(40)[20:].tobytes())
    octets[place] ^= 1


def edit_header(**fields: object) -> Tamper:
    """A forged header with a right checksum, and a list that agrees with it."""

    def tamper(bundle: Path, key: str) -> None:
        path = bundle / "segments" / f"{key}.safetensors"
        blob = FileBlob(path)
        header, data_start = read_header(blob, parse_header)
        blob.close()
        forged: SegmentHeader = replace(header, **fields)
        octets = forged.encoded + path.read_bytes()[data_start:]
        path.write_bytes(octets)
        tokens = forged.first_chunk * forged.geometry.chunk_size + forged.num_tokens
        edit_entry(sha256=hashlib.sha256(octets).hexdigest(), bytes=len(octets), tokens=tokens, parent=forged.parent)(
            bundle, key
        )

    return tamper


def replace_file(make: Callable[[Path, Path], object]) -> Tamper:
    def tamper(bundle: Path, key: str) -> None:
        path = bundle / "segments" / f"{key}.safetensors"
        kept = bundle.parent / "kept.safetensors"
        path.rename(kept)
        make(path, kept)

    return tamper


def link_folder(bundle: Path, key: str) -> None:
    (bundle / "segments").rename(bundle.parent / "elsewhere")
    (bundle / "segments").symlink_to(bundle.parent / "elsewhere")


def link_list(bundle: Path, key: str) -> None:
    (bundle / "bundle.json").rename(bundle.parent / "list.json")
    (bundle / "bundle.json").symlink_to(bundle.parent / "list.json")


# What is done to the second segment, and a part of the reason for which it must be refused.
REFUSED: dict[str, tuple[Tamper, str]] = {
    "payload": (edit_file(flip(4096 + 10)), "layer 0, chunk 5: checksum"),
    "payload, digest corrected": (edit_file(flip(4096 + 10), also_list=True), "layer 0, chunk 5: checksum"),
    "index, digest corrected": (edit_file(flip(-500), also_list=True), "bytes of key_index.1 do not match"),
    "token ids, digest corrected": (edit_file(flip_token, also_list=True), "bytes of token_ids do not match"),
    "checksums, digest corrected": (edit_file(flip(-1), also_list=True), "do not match their checksum"),
    "header": (edit_file(flip(100), also_list=True), "of its header, expected"),
    "cut": (edit_file(lambda octets: octets.__delitem__(slice(-1, None)), also_list=True), "cut or extended"),
    "extended": (edit_file(lambda octets: octets.append(0), also_list=True), "cut or extended"),
    "emptied": (edit_file(lambda octets: octets.clear(), also_list=False), "too short"),
    "not a segment": (
        edit_file(lambda octets: octets.__setitem__(slice(None), b"GGUF" * 2000), also_list=True),
        "not a segment",
    ),
    "missing file": (replace_file(lambda path, kept: None), "missing"),
    "link": (replace_file(lambda path, kept: path.symlink_to(kept)), "not an ordinary file"),
    "pipe": (replace_file(lambda path, kept: os.mkfifo(path)), "not an ordinary file"),
    "folder in its place": (replace_file(lambda path, kept: path.mkdir()), "not an ordinary file"),
    "digest": (edit_entry(sha256="0" * 64), "SHA-256"),
    "length": (edit_entry(bytes=5), "not those that bundle.json tells"),
    "tokens": (edit_entry(tokens=41), "not those that bundle.json tells"),
    "parent": (edit_entry(parent="0" * 32), "not those that bundle.json tells"),
    "no parent": (edit_entry(parent=""), "not those that bundle.json tells"),
    "another model": (edit_header(fingerprint="ab" * 16, root=root_hash("ab" * 16, 4).hex()), "its model is not"),
    "another model, root as it was": (edit_header(fingerprint="ab" * 16), "its root is not that of its model"),
    "a fingerprint that is none": (edit_header(fingerprint="\x1b[2J"), "fingerprint"),
    "another place": (edit_header(first_chunk=6), "its position is not"),
    "another root": (edit_header(root="1" * 32), "its root is not"),
    "another tenant": (edit_header(salted=True), "claims to be stored with a salt"),
    "claims to begin a prefix": (edit_header(beginning="2" * 32), "claims to begin"),
    "other leaders": (edit_header(geometry=geometry(leader_layers=(0, 1))), "leader_keys.1: not the keys"),
    "a parent that nobody has": (edit_header(parent="3" * 32), "do not match the key"),
}
UNREADABLE: dict[str, Tamper] = {
    "no JSON": write_list(b"{"),
    "no text": write_list(bytes(range(256))),
    "deep": write_list(b"[" * 200_000),
    "a list": write_list(b"[]"),
    "another format": edit_list(lambda listed: listed.update(format="zip")),
    "no version": edit_list(lambda listed: listed.pop("version")),
    "version is true": edit_list(lambda listed: listed.update(version=True)),
    "no segments": edit_list(lambda listed: listed.update(segments=[])),
    "segments is a name": edit_list(lambda listed: listed.update(segments="all")),
    "entry is null": edit_list(lambda listed: listed["segments"].append(None)),
    "twice": edit_list(lambda listed: listed["segments"].append(listed["segments"][0])),
    "key is a path": edit_entry(key="../../../../etc/passwd"),
    "key is upper case": edit_list(lambda listed: listed["segments"][-1].update(key="A" * 32)),
    "key is a number": edit_entry(key=7),
    "file leads out": edit_entry(file="../kept.safetensors"),
    "parent is a path": edit_entry(parent="../x"),
    "parent is null": edit_entry(parent=None),
    "length is negative": edit_entry(bytes=-1),
    "length is a text": edit_entry(bytes="5"),
    "tokens is true": edit_entry(tokens=True),
    "digest is short": edit_entry(sha256="ab"),
    "digest is a list": edit_entry(sha256=[]),
    "list is a link": link_list,
}


@pytest.fixture
def source(tmp_path: Path) -> PrefixStore:
    return PrefixStore(tmp_path / "source")


@pytest.fixture
def target(tmp_path: Path) -> PrefixStore:
    return PrefixStore(tmp_path / "target")


@pytest.fixture
def bundle(source: PrefixStore, tmp_path: Path) -> tuple[Path, str, str]:
    root, child, *_ = tree(source)
    export_bundle(source, [child], tmp_path / "b" / "bundle")
    return tmp_path / "b" / "bundle", root, child


@pytest.mark.parametrize("name", REFUSED)
def test_a_damaged_segment_is_refused(name: str, bundle: tuple[Path, str, str], target: PrefixStore) -> None:
    folder, _, child = bundle
    tamper, reason = REFUSED[name]
    tamper(folder, child)
    write_prefix(target, some_tokens(7, seed=5))
    before = content(target.path)
    report = import_bundle(target, folder)
    assert [refused.key for refused in report.refused] == [child]
    assert reason in report.refused[0].reason
    assert (report.added, report.already_there) == ((), ())
    assert content(target.path) == before


def test_no_byte_is_beyond_the_checks(bundle: tuple[Path, str, str], target: PrefixStore) -> None:
    folder, root, _ = bundle
    path = folder / "segments" / f"{root}.safetensors"
    sound, whole = path.read_bytes(), manifest(folder)
    for place in range(0, len(sound), 211):
        octets = bytearray(sound)
        octets[place] ^= 16
        path.write_bytes(octets)
        # An attacker who forges a file can forge its digest.
        whole["segments"][0]["sha256"] = hashlib.sha256(octets).hexdigest()
        (folder / "bundle.json").write_text(json.dumps(whole))
        assert root in [refused.key for refused in import_bundle(target, folder).refused], place
    assert target.entries() == []


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_list_that_makes_no_sense_is_refused(name: str, bundle: tuple[Path, str, str], target: PrefixStore) -> None:
    folder, _, child = bundle
    UNREADABLE[name](folder, child)
    before = content(target.path)
    with pytest.raises(BundleError):
        import_bundle(target, folder)
    assert content(target.path) == before


def test_a_linked_folder_of_segments_is_refused(bundle: tuple[Path, str, str], target: PrefixStore) -> None:
    folder, root, child = bundle
    link_folder(folder, child)
    assert {refused.key for refused in import_bundle(target, folder).refused} == {root, child}
    assert target.entries() == []


def test_a_damaged_parent_takes_its_children_with_it(bundle: tuple[Path, str, str], target: PrefixStore) -> None:
    folder, root, child = bundle
    path = folder / "segments" / f"{root}.safetensors"
    octets = bytearray(path.read_bytes())
    octets[4096] ^= 1
    path.write_bytes(octets)
    report = import_bundle(target, folder, skip_refused=True)
    assert [refused.key for refused in report.refused] == [root, child]
    assert "layer 0, chunk 0" in report.refused[0].reason
    assert target.entries() == []


def test_a_made_up_root_is_refused(source: PrefixStore, target: PrefixStore, tmp_path: Path) -> None:
    _, _, _, alone = tree(source)
    for number, fields in enumerate(({"fingerprint": "ab" * 16}, {"root": "1" * 32}, {"beginning": "2" * 32})):
        folder = tmp_path / str(number)
        export_bundle(source, [alone], folder)
        edit_header(**fields)(folder, alone)
        report = import_bundle(target, folder)
        assert [refused.key for refused in report.refused] == [alone], fields
    assert target.entries() == []


def test_no_bundle_and_newer_bundles(bundle: tuple[Path, str, str], target: PrefixStore, tmp_path: Path) -> None:
    with pytest.raises(StoreFormatError, match="not a bundle"):
        import_bundle(target, tmp_path / "nowhere")
    with pytest.raises(StoreFormatError, match="not a bundle"):
        import_bundle(target, target.path)
    edit_list(lambda listed: listed.update(version=99))(bundle[0], "")
    with pytest.raises(StoreFormatError, match="format 99"):
        import_bundle(target, bundle[0])


def test_a_segment_of_a_newer_format_is_refused(bundle: tuple[Path, str, str], target: PrefixStore) -> None:
    folder, root, _ = bundle
    path = folder / "segments" / f"{root}.safetensors"
    octets = path.read_bytes()
    newer = re.sub(rb'"version":"[0-9]"', b'"version":"%d"' % (FORMAT_VERSION + 1), octets, count=1)
    assert newer != octets
    path.write_bytes(newer)
    report = import_bundle(target, folder)
    assert "Update it" in {refused.key: refused.reason for refused in report.refused}[root]
    assert target.entries() == []


def test_no_room(bundle: tuple[Path, str, str], tmp_path: Path) -> None:
    folder, *_ = bundle
    with PrefixStore(tmp_path / "small", max_disk_bytes=20_000) as small:
        with pytest.raises(StoreFullError):
            import_bundle(small, folder)
        assert small.entries() == []
        assert list((small.path / "partial").iterdir()) == []


def test_segments_of_a_bundle_do_not_drive_each_other_out(source: PrefixStore, tmp_path: Path) -> None:
    root, _, _, alone = tree(source)
    report = export_bundle(source, [root, alone], tmp_path / "bundle")
    bound = report.bytes - 1  # There is room for any one of them.
    with PrefixStore(tmp_path / "small", max_disk_bytes=bound) as small:
        with pytest.raises(StoreFullError):
            import_bundle(small, tmp_path / "bundle")
        assert small.entries() == []
        assert small.stats.evicted == 0


def test_an_import_that_is_cut_off_leaves_whole_segments_only(
    bundle: tuple[Path, str, str], target: PrefixStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, root, child = bundle
    publish, calls = target.inner.publisher.publish, []

    def full(*arguments: object) -> bool:
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return publish(*arguments)

    monkeypatch.setattr(target.inner.publisher, "publish", full)
    with pytest.raises(StoreFullError):
        import_bundle(target, folder)
    assert [entry.key for entry in target.entries()] == [root]
    assert list((target.path / "partial").iterdir()) == []
    assert target.verify() == []
    monkeypatch.undo()
    report = import_bundle(target, folder)
    assert (report.added, report.already_there) == ((child,), (root,))


def test_a_file_that_changes_after_it_was_verified_is_not_added(
    bundle: tuple[Path, str, str], target: PrefixStore
) -> None:
    folder, root, _ = bundle
    path = folder / "segments" / f"{root}.safetensors"
    total = sum(segment["bytes"] for segment in manifest(folder)["segments"])

    def change(done: int, _: int) -> None:
        if done == total:  # Everything has been checked, nothing has been copied.
            octets = bytearray(path.read_bytes())
            octets[5000] ^= 1
            path.write_bytes(octets)

    with pytest.raises(BundleError, match="changed while"):
        import_bundle(target, folder, change)
    assert target.entries() == []
    assert list((target.path / "partial").iterdir()) == []


def test_a_segment_that_the_store_lost_is_imported_again(bundle: tuple[Path, str, str], target: PrefixStore) -> None:
    folder, root, child = bundle
    import_bundle(target, folder)
    target.backend.delete(root)
    report = import_bundle(target, folder)
    assert (report.added, report.already_there) == ((root,), (child,))
    assert target.verify() == []


@pytest.mark.parametrize("share", [0.1, 0.6, 0.7, 0.9, 1.0])
def test_a_killed_import_leaves_whole_segments_only(
    bundle: tuple[Path, str, str], target: PrefixStore, share: float
) -> None:
    folder, root, child = bundle
    target.close()

    def kill(done: int, total: int) -> None:
        if done >= share * total:
            os.kill(os.getpid(), signal.SIGKILL)

    pid = os.fork()
    if pid == 0:
        try:
            import_bundle(PrefixStore(target.path), folder, kill)
        finally:
            os._exit(0)  # Only if nothing has killed it.
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    # Half of the bytes only have been checked; the root's are copied before the child's.
    added = [entry.key for entry in PrefixStore(target.path).entries()]
    assert added == ([] if share < 0.8 else [root])
    with PrefixStore(target.path) as store:
        assert list((store.path / "partial").iterdir()) == []
        assert store.verify() == []
        assert import_bundle(store, folder).added == tuple(key for key in (root, child) if key not in added)
        assert store.verify() == []
