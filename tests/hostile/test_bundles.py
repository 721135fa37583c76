"""A bundle that an enemy made: its list, its archive, its claims about tenants, parents and worth."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tally import Figures
from unit.format_by_document import chain
from unit.store_helpers import FINGERPRINT, expected_kv, geometry, read_back, some_tokens, write_prefix

from hf_contiguouskv.errors import InputError, StoreError
from hf_contiguouskv.store import PrefixStore
from hf_contiguouskv.store.bundle import BundleError, ImportReport, export_bundle, import_bundle, read_manifest
from hf_contiguouskv.store.bundle.manifest import MAX_SEGMENTS, BundledSegment, encode_manifest, parse_manifest
from hf_contiguouskv.store.hashing import TokenIds, root_hash
from hf_contiguouskv.store.rows import segment_by_key
from hostile.conftest import in_child
from hostile.crafting import crafted, path_in, plant

G = geometry()
C = G.chunk_size
IDS = some_tokens(40)
MIB = 2**20


def content(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def told_by(segment: bytes) -> dict[str, str]:
    """What the header of a segment says."""
    told: dict[str, str] = json.loads(segment[8 : 8 + int.from_bytes(segment[:8], "little")])["__metadata__"]
    return told


def bundle(folder: Path, *segments: bytes) -> Path:
    """A bundle whose list agrees with what its segments say."""
    (folder / "segments").mkdir(parents=True)
    listed = []
    for segment in segments:
        told = told_by(segment)
        path = folder / "segments" / f"{told['key']}.safetensors"
        path.write_bytes(segment)
        tokens = int(told["first_chunk"]) * int(told["chunk_size"]) + int(told["num_tokens"])
        digest = hashlib.sha256(segment).hexdigest()
        listed.append(BundledSegment(told["key"], told["parent"], tokens, len(segment), digest))
    (folder / "bundle.json").write_bytes(encode_manifest(listed))
    return folder


def reasons(report: ImportReport) -> list[str]:
    assert report.added == ()
    return [refused.reason for refused in report.refused]


def assert_served(store: PrefixStore, ids: TokenIds) -> None:
    """A look-up of these tokens finds all of them, and their own keys and values."""
    found = store.inner.lookup(FINGERPRINT, ids, C, geometry=G)
    assert found is not None
    assert found.tokens == len(ids)
    for layer, kv in enumerate(read_back(store, found, range(G.num_layers))):
        assert np.array_equal(kv.numpy(), expected_kv(G, ids, layer).numpy())


# -- the list ---------------------------------------------------------------------------------------------------------

ENTRY = {"key": "0" * 32, "parent": "", "tokens": 1, "bytes": 1, "sha256": "0" * 64}
# Lists of up to 32 MiB of which Python would make gigabytes, or that mean two things.
BOMBS: dict[str, Callable[[], bytes]] = {
    "objects": lambda: b'{"segments":[' + b"{}," * (10 * MIB) + b"{}]}",
    "lists": lambda: b'{"segments":[' + b"[]," * (10 * MIB) + b"[]]}",
    "numbers": lambda: b'{"segments":[' + b"1," * (15 * MIB) + b"1]}",
    "fields": lambda: b"{" + b",".join(b'"%x":0' % number for number in range(3 * MIB)) + b"}",
    "lists in lists": lambda: b"[" * (31 * MIB),
    "objects in objects": lambda: b'{"":' * (7 * MIB),
    "a long number": lambda: b'{"format":' + b"9" * (31 * MIB) + b"}",
    "a long word": lambda: b'{"format":"' + b"x" * (31 * MIB) + b'"}',
    "more bytes": lambda: b" " * (33 * MIB),
    "one segment too many": lambda: json.dumps(
        {
            "format": "hf_contiguouskv bundle",
            "version": 1,
            "segments": [{"key": f"{number:032x}"} for number in range(MAX_SEGMENTS + 1)],
        }
    ).encode(),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_list_that_unfolds_is_refused_within_bounds(tmp_path: Path, bomb: str, attacks: Figures) -> None:
    (tmp_path / "bundle.json").write_bytes(BOMBS[bomb]())

    def read() -> None:
        with pytest.raises(BundleError) as caught:
            read_manifest(tmp_path)
        assert len(str(caught.value)) < 1000

    in_child(read, memory=160 * MIB)
    attacks.add("list of a bundle that unfolds, refused")


def test_as_many_segments_as_allowed_are_read_within_bounds(tmp_path: Path) -> None:
    listed = [BundledSegment(f"{number:032x}", "", 1, 1, "0" * 64) for number in range(MAX_SEGMENTS)]
    (tmp_path / "bundle.json").write_bytes(encode_manifest(listed))

    def read() -> None:
        assert len(read_manifest(tmp_path)) == MAX_SEGMENTS

    in_child(read, memory=400 * MIB)
    with pytest.raises(InputError, match="at most 100,000"):
        encode_manifest([*listed, listed[0]])


@pytest.mark.parametrize("field", [*ENTRY, "file"])
def test_a_name_that_comes_twice_is_refused(field: str, attacks: Figures) -> None:
    entry = json.dumps(ENTRY | {"file": f"segments/{'0' * 32}.safetensors"})
    honest = f'{{"format": "hf_contiguouskv bundle", "version": 1, "segments": [{entry}]}}'
    assert len(parse_manifest(honest.encode(), "the list")) == 1
    value = json.loads(entry)[field]
    for twice in (
        honest.replace(f'"{field}":', f'"{field}": {json.dumps(value)}, "{field}":'),
        honest.replace(f'"{field}":', f'"{field}": 7, "{field}":'),
        honest.replace('"version":', '"version": 2, "version":'),
        honest.replace('"segments":', '"segments": [], "segments":'),
    ):
        with pytest.raises(BundleError, match="twice"):
            parse_manifest(twice.encode(), "the list")
    attacks.add("name that comes twice in a list refused")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.usefixtures("bounded_memory")
@given(
    entry=st.dictionaries(st.sampled_from([*ENTRY, "file"]), json_values), more=st.dictionaries(st.text(), json_values)
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_list_says_is_a_list_or_one_of_our_errors(
    entry: dict[str, Any], more: dict[str, Any], attacks: Figures
) -> None:
    honest = ENTRY | {"file": f"segments/{'0' * 32}.safetensors"}
    told = {"format": "hf_contiguouskv bundle", "version": 1, "segments": [honest | entry]} | more
    try:
        (segment,) = parse_manifest(json.dumps(told).encode(), "the list")
    except StoreError as error:
        refusal = str(error)
    else:
        refusal = ""
        assert segment.file == f"segments/{segment.key}.safetensors"
        assert len(segment.key) == 32
        assert 0 < segment.bytes < 2**53
    assert refusal.isprintable()
    attacks.add("made up list refused or harmless")


@given(st.binary(max_size=200))
def test_bytes_that_are_no_list_are_one_of_our_errors(octets: bytes) -> None:
    with pytest.raises(StoreError):
        parse_manifest(octets, "the list")


def test_a_list_that_is_a_pipe_or_a_device_is_not_waited_for(tmp_path: Path, attacks: Figures) -> None:
    os.mkfifo(tmp_path / "bundle.json")
    with pytest.raises(BundleError, match="not an ordinary file"):
        read_manifest(tmp_path)
    attacks.add("list that is a pipe refused")


# -- what an archive unpacks to ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["all but the header", "one tensor"])
def test_a_file_of_holes_is_refused_before_anything_is_copied(
    tmp_path: Path, store_path: Path, place: str, attacks: Figures
) -> None:
    ids = some_tokens(20_000)
    zeros = np.zeros((G.num_layers, 2, G.kv_heads, len(ids), G.head_dim), np.float32)
    segment = crafted(G, ids, kv=zeros)
    folder = bundle(tmp_path / "bundle", segment)
    path = next(folder.glob("segments/*"))
    begin = 8 + int.from_bytes(segment[:8], "little")
    length = len(segment) - begin if place == "all but the header" else 2 * MIB
    with open(path, "wb") as file:  # (Zeros that nobody writes are holes.)
        file.write(segment[:begin])
        file.seek(begin + length)
        file.write(segment[begin + length :])
        file.truncate(len(segment))
    if os.stat(path).st_blocks * 512 >= len(segment):
        pytest.skip("this file system has no holes")
    if place == "one tensor":
        assert path.read_bytes() == segment  # All checksums match.

    def take() -> None:
        with PrefixStore(store_path) as store:
            assert any("holes" in reason for reason in reasons(import_bundle(store, folder)))

    in_child(take, memory=256 * MIB)
    assert not list(store_path.glob("segments/*/*"))
    attacks.add("file of holes not imported")


def test_a_list_that_claims_more_than_is_there_counts_nothing(tmp_path: Path, store_path: Path) -> None:
    folder = bundle(tmp_path / "bundle", crafted(G, IDS))
    listed = json.loads((folder / "bundle.json").read_text())
    listed["segments"][0]["bytes"] = 2**52
    (folder / "bundle.json").write_text(json.dumps(listed))
    calls: list[tuple[int, int]] = []
    with PrefixStore(store_path) as store:
        report = import_bundle(store, folder, lambda *done: calls.append(done))
    assert "not those that bundle.json tells" in reasons(report)[0]
    assert calls == []


# -- tenants ----------------------------------------------------------------------------------------------------------


def test_what_was_stored_with_another_salt_comes_only_by_name(
    tmp_path: Path, store_path: Path, attacks: Figures
) -> None:
    folder = bundle(tmp_path / "bundle", crafted(G, IDS, salt=b"another"))
    root = root_hash(FINGERPRINT, C, b"another").hex()
    plain = bundle(tmp_path / "plain", crafted(G, IDS))
    plain_root = root_hash(FINGERPRINT, C).hex()
    for salt, source, needed in ((None, folder, root), ("own", folder, root), ("own", plain, plain_root)):
        path = store_path / f"{salt} {source.name}"
        with PrefixStore(path, **({} if salt is None else {"salt": salt})) as store:
            before = content(store.path)
            assert needed in reasons(import_bundle(store, source))[0]
            attacks.add("segment of another tenant not imported")
            if salt is not None:
                with pytest.raises(InputError, match="operator"):
                    import_bundle(store, source, foreign_roots=[needed])
                assert content(store.path) == before
                continue
            others = [needed[:-1] + ("0" if needed[-1] != "0" else "1"), "f" * 32]
            assert needed in reasons(import_bundle(store, source, foreign_roots=others))[0]
            assert content(store.path) == before
            assert len(import_bundle(store, source, foreign_roots=[needed]).other_salt) == 1
            for wrong in ("", "G" * 32, root.upper(), root + "\n", 7):
                with pytest.raises(InputError, match="32 lower-case"):
                    import_bundle(store, source, foreign_roots=[wrong])  # type: ignore[list-item]
    with PrefixStore(store_path / "same", salt="another") as store:
        assert len(import_bundle(store, folder).added) == 1
        assert_served(store, IDS)


@pytest.mark.parametrize(
    "told",
    [
        {"salted": "1"},
        {"salted": "0", "root": "ab" * 16},
        {"fingerprint": "ef" * 16, "header": {"root": root_hash(FINGERPRINT, C).hex()}},
        {"fingerprint": "no hash"},
        {"fingerprint": "AB" * 16},
    ],
)
@pytest.mark.parametrize("first_chunk", [0, 5])
def test_claims_about_salt_and_model_that_cannot_be_are_refused_even_by_name(
    tmp_path: Path, store_path: Path, told: dict[str, Any], first_chunk: int, attacks: Figures
) -> None:
    own = {name: value for name, value in told.items() if name in ("fingerprint", "header")}
    header = dict(own.pop("header", {})) | {name: value for name, value in told.items() if name in ("salted", "root")}
    segment = crafted(G, IDS, first_chunk, header=header, **own)
    folder = bundle(tmp_path / "bundle", segment)
    with PrefixStore(store_path) as store:
        write_prefix(store, IDS[:20])
        report = import_bundle(store, folder, foreign_roots=[told_by(segment)["root"]])
        assert len(reasons(report)) == 1
        assert_served(store, IDS[:20])
    attacks.add("impossible claim about salt or model not imported")


def test_a_root_that_is_the_name_of_a_victims_chunk_does_nothing_even_by_name(
    tmp_path: Path, store_path: Path, attacks: Figures
) -> None:
    with PrefixStore(store_path) as store:
        stored = write_prefix(store, IDS[:20])
        names = stored.spans[0].segment.header.hashes(IDS[:20])
        victim = names[4].hex()
        # As if what follows were a prefix of its own, of another tenant, that begins where the victim's first 20 end.
        segment = crafted(G, IDS[20:], header={"root": victim, "salted": "1"})
        folder = bundle(tmp_path / "bundle", segment)
        assert len(reasons(import_bundle(store, folder))) == 1
        assert import_bundle(store, folder, foreign_roots=[victim]).added == ()
        write_prefix(store, IDS, first_chunk=5)
        assert_served(store, IDS)
        assert store.verify() == []
    attacks.add("root that is a victim's chunk not imported")


# -- parents ----------------------------------------------------------------------------------------------------------


def child(**told: Any) -> bytes:
    return crafted(G, IDS, 5, **told)


def test_a_child_of_a_chunk_that_is_not_whole_is_refused(tmp_path: Path, store_path: Path, attacks: Figures) -> None:
    parent = crafted(G, IDS[:18])  # Its last chunk holds two tokens.
    # The name that its tokens have after that chunk.
    names = chain(bytes.fromhex(told_by(parent)["key"]), IDS[20:], C, False)
    after = crafted(G, IDS, 5, header={"parent": told_by(parent)["key"], "key": names[-1].hex()})
    with PrefixStore(store_path) as store:
        report = import_bundle(store, bundle(tmp_path / "together", parent, after))
        assert any("neither the store nor a sound segment" in reason for reason in reasons(report))
        write_prefix(store, IDS[:18])
        report = import_bundle(store, bundle(tmp_path / "alone", after))
        assert "neither the store nor a sound segment" in reasons(report)[0]
    attacks.add("child of a partial chunk not imported")


@pytest.mark.parametrize(
    "parent",
    [
        {"header": {"root": root_hash(FINGERPRINT, C, b"x").hex(), "salted": "1"}},
        {"header": {"fingerprint": "ef" * 16}},
        {"header": {"first_chunk": "1", "parent": "1" * 32, "beginning": ""}},
        {"g": geometry(kv_heads=1)},
        {"ids": np.concatenate([IDS[:16], IDS[:4]])},
    ],
    ids=["of another tenant", "of another model", "at another place", "of another shape", "with other tokens"],
)
def test_a_parent_in_the_store_must_prove_to_be_one(
    tmp_path: Path, store_path: Path, parent: dict[str, Any], attacks: Figures
) -> None:
    """What lies in the store may have been planted, and the index says what the planter wants."""
    with PrefixStore(store_path) as store:
        key = write_prefix(store, IDS[:20]).spans[0].segment.key
    told = parent.get("header", {}) | {"key": key}
    plant(store_path, key, crafted(parent.get("g", G), parent.get("ids", IDS[:20]), header=told))
    with PrefixStore(store_path) as store:
        report = import_bundle(store, bundle(tmp_path / "bundle", child()))
        assert "neither the store" in reasons(report)[0]
    attacks.add("unproved parent not continued")


# -- what is there already --------------------------------------------------------------------------------------------


def test_what_only_has_the_name_is_replaced(tmp_path: Path, store_path: Path, attacks: Figures) -> None:
    honest = crafted(G, IDS[:20])
    key = told_by(honest)["key"]
    folder = bundle(tmp_path / "bundle", honest)
    lies = (
        crafted(G, IDS[:20], header={"fingerprint": "ef" * 16}),
        crafted(G, np.concatenate([IDS[:16], IDS[:4]]), header={"key": key}),
        crafted(G, IDS[:20], header={"root": "ab" * 16, "salted": "1"}),
        b"no segment at all",
        b"",
    )
    for number, lie in enumerate(lies):
        with PrefixStore(store_path / str(number)) as store:
            write_prefix(store, IDS[:20])
        plant(store_path / str(number), key, lie)
        with PrefixStore(store_path / str(number)) as store:
            report = import_bundle(store, folder)
            assert (report.added, report.already_there, report.refused) == ((key,), (), ())
            assert_served(store, IDS[:20])
            assert store.verify() == []
            assert import_bundle(store, folder).already_there == (key,)
        attacks.add("impostor replaced by an import")


def test_what_is_there_in_another_shape_is_not_replaced(tmp_path: Path, store_path: Path, attacks: Figures) -> None:
    """Tokens, model and name are right, but no model has KV of two shapes: the answer that is served stays."""
    lie = bundle(tmp_path / "bundle", crafted(geometry(kv_heads=1), IDS[:20]))
    with PrefixStore(store_path) as store:
        key = write_prefix(store, IDS[:20]).spans[0].segment.key
        before = path_in(store, key).read_bytes()
        assert "another shape or dtype" in reasons(import_bundle(store, lie))[0]
        assert path_in(store, key).read_bytes() == before
        assert_served(store, IDS[:20])
    attacks.add("segment of another shape not imported over a sound one")


# -- worth, and what else nobody can check ----------------------------------------------------------------------------


def test_claims_that_nobody_can_check_are_left_out(tmp_path: Path, store_path: Path, attacks: Figures) -> None:
    folder = bundle(tmp_path / "bundle", crafted(G, IDS, compute_ms=10**11))
    for path in folder.rglob("*"):
        os.utime(path, (2**32, 2**32))
    with PrefixStore(store_path) as store:
        (key,) = import_bundle(store, folder).added
        row = store.inner.read(lambda db: segment_by_key(db, key))
        assert row is not None
        assert (row.compute_ms, told_by(path_in(store, key).read_bytes())["compute_ms"]) == (0, "0" * 12)
        assert row.created <= time.time()
        assert row.last_used <= time.time()
        assert path_in(store, key).stat().st_mtime <= time.time()
    (store_path / "index.sqlite").unlink()
    with PrefixStore(store_path) as store:  # (Nor does the index learn them when it is rebuilt.)
        row = store.inner.read(lambda db: segment_by_key(db, key))
        assert row is not None
        assert row.compute_ms == 0
        assert row.created <= time.time()
    attacks.add("claimed worth left out")


@pytest.mark.parametrize("length", [10, 5000, 100_000])
def test_a_header_with_more_in_it_than_ours_is_copied_right(
    tmp_path: Path, store_path: Path, length: int, attacks: Figures
) -> None:
    """Unknown fields are ignored; where the data begin must not change what is served."""
    folder = bundle(tmp_path / "bundle", crafted(G, IDS, note="x" * length))
    with PrefixStore(store_path) as store:
        (key,) = import_bundle(store, folder).added
        assert_served(store, IDS)
        assert store.verify(deep=True) == []
        assert "note" not in told_by(path_in(store, key).read_bytes())
        export_bundle(store, [key], tmp_path / "again")
    attacks.add("unknown fields left out")


def test_the_list_and_the_reasons_reach_people_in_printable_lines(
    tmp_path: Path, store_path: Path, attacks: Figures
) -> None:
    folder = bundle(tmp_path / "bundle\x1b[2J\nforged", crafted(G, IDS))
    path = next(folder.glob("segments/*"))
    path.write_bytes(path.read_bytes()[:-1])
    with PrefixStore(store_path) as store:
        (reason,) = reasons(import_bundle(store, folder))
    assert reason.isprintable()
    assert len(reason) <= 500
    attacks.add("words of a bundle escaped")
