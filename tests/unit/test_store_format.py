"""The bytes of a segment: any safetensors reader opens them, and nothing malformed is taken for a segment."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from store_helpers import expected_kv, geometry, open_segment, path_of, some_tokens, write_prefix

from hf_contiguouskv.errors import InputError, SegmentCorruptError, StoreError, StoreFormatError
from hf_contiguouskv.hardware.aligned_memory import PAGE
from hf_contiguouskv.store import KVGeometry, PrefixStore
from hf_contiguouskv.store.format import SegmentHeader, parse_header
from hf_contiguouskv.store.hashing import ChainMemory, chain_hashes, chunk_hash, root_hash, segment_hashes
from hf_contiguouskv.store.layer_index import layer_index
from hf_contiguouskv.store.packing import pack_chunks
from hf_contiguouskv.store.small_forms import small_forms
from hf_contiguouskv.store.tensor_places import index_tensors, place_tensors


@st.composite
def geometries(draw: st.DrawFn) -> KVGeometry:
    layers = draw(st.integers(1, 6))
    some_layers = st.lists(st.integers(0, layers - 1), unique=True).map(lambda found: tuple(sorted(found)))
    g = KVGeometry(
        num_layers=layers,
        kv_heads=draw(st.integers(1, 3)),
        head_dim=draw(st.integers(1, 9)),
        dtype=draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
        chunk_size=draw(st.sampled_from([1, 2, 4, 16])),
        layers_per_group=draw(st.integers(1, layers)),
        leader_layers=draw(some_layers),
    )
    indexed, packed, compact = (set(draw(some_layers)) for _ in range(3))
    if g.head_dim % 2:
        return replace(g, indexed_layers=tuple(sorted(indexed)))
    compact = compact - indexed if g.chunk_size % 4 == 0 else set()
    return replace(
        g,
        indexed_layers=tuple(sorted(indexed)),
        packed_layers=tuple(sorted(packed & indexed)),
        compact_layers=tuple(sorted(compact)),
    )


def header(g: KVGeometry, num_tokens: int) -> SegmentHeader:
    return SegmentHeader(g, "ab", "0" * 32, "", "1" * 32, 0, num_tokens)


@given(geometries())
def test_a_geometry_survives_its_metadata(g: KVGeometry) -> None:
    assert KVGeometry.from_metadata(g.to_metadata()) == g


@given(geometries(), st.integers(1, 40))
def test_a_header_survives_its_bytes_and_starts_the_data_on_a_page(g: KVGeometry, num_tokens: int) -> None:
    written = header(g, num_tokens)
    assert len(written.encoded) % PAGE == 0
    size = len(written.encoded) + written.data_bytes
    assert parse_header(written.encoded[8:], size, "name") == written


@given(geometries(), st.integers(1, 40))
def test_tensors_lie_side_by_side_and_payload_comes_first_on_pages(g: KVGeometry, num_tokens: int) -> None:
    places = place_tensors(g, -(-num_tokens // g.chunk_size), num_tokens)
    end = 0
    for name, place in places.items():
        assert place.start == end
        end += place.nbytes
        if name.startswith(("payload", "leader_keys", "key_index", "coarse_index", "values4", "compact")):
            assert place.start % PAGE == 0
    assert next(iter(places)) == "payload.0"


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(g=geometries(), num_tokens=st.integers(1, 40))
def test_safetensors_reads_every_tensor_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, g: KVGeometry, num_tokens: int
) -> None:
    ids = some_tokens(num_tokens, seed=num_tokens)
    with PrefixStore(tmp_path_factory.mktemp("store")) as store:
        stored = write_prefix(store, ids, g=g)
        assert store.verify() == []
        segment = stored.spans[0].segment
        with safe_open(path_of(segment), "pt") as file:
            assert set(file.keys()) == set(segment.header.places)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            assert file.metadata()["num_tokens"] == str(num_tokens)
    assert tensors["token_ids"].tolist() == ids.tolist()
    for layer in range(g.num_layers):
        group, inside = divmod(layer, g.layers_per_group)
        kv = expected_kv(g, ids, layer)
        assert torch.equal(tensors[f"payload.{group}"][:, inside], kv)
        if layer in g.leader_layers:
            assert torch.equal(tensors[f"leader_keys.{layer}"], kv[:, 0])
        if index_tensors(g, layer):
            keys = kv[:, 0].transpose(0, 1).flatten(1, 2)[:, :num_tokens]
            for name, tensor in zip(index_tensors(g, layer), layer_index(keys, g, layer), strict=True):
                assert torch.equal(tensors[name], tensor)
    for small in small_forms(g):
        for layer in small.layers:
            assert torch.equal(tensors[small.tensor(layer)], pack_chunks(small.form, expected_kv(g, ids, layer)))


@given(st.binary(max_size=300), st.integers(0, 10**6))
def test_random_bytes_are_never_a_header(text: bytes, size: int) -> None:
    with pytest.raises(StoreError):
        parse_header(text, size, "name")


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.integers(-(10**30), 10**30).map(str),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300)
@given(st.data())
def test_a_header_with_one_changed_field_is_refused_or_consistent(data: st.DataObject) -> None:
    good = header(geometry(), 10)
    size = len(good.encoded) + good.data_bytes
    content = json.loads(good.encoded[8:])
    part = data.draw(st.sampled_from(sorted(content)))
    field = data.draw(st.sampled_from(sorted(content[part])))
    content[part][field] = data.draw(_json)
    text = json.dumps(content).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    try:
        parsed = parse_header(text, size, "name")
    except StoreError:
        return
    # What still parses has the same shapes and places: only free text or an equal value was drawn.
    assert parsed.places == good.places


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda b: b[:4], id="shorter than its length field"),
        pytest.param(lambda b: b[:2000], id="cut inside the header"),
        pytest.param(lambda b: b[:-1], id="cut at the end"),
        pytest.param(lambda b: b + b"\0", id="extended"),
        pytest.param(lambda b: b"\xff" * 8 + b[8:], id="huge header length"),
        pytest.param(lambda b: bytes(8) + b[8:], id="no header"),
        pytest.param(lambda b: b[:8] + b"[" * (PAGE - 8) + b[PAGE:], id="deeply nested header"),
        pytest.param(lambda b: b"", id="empty"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, damage: object) -> None:
    with PrefixStore(tmp_path / "store") as store:
        content = path_of(write_prefix(store, some_tokens(10)).spans[0].segment).read_bytes()
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(damage(content))  # type: ignore[operator]
    with pytest.raises(SegmentCorruptError, match=r"damaged\.safetensors"):
        open_segment(path)


@pytest.mark.parametrize(("version", "advice"), [("5", "Update it"), ("2", "repack"), ("1", "repack")])
def test_another_format_is_named_as_such(version: str, advice: str) -> None:
    good = header(geometry(), 10)
    content = json.loads(good.encoded[8:])
    content["__metadata__"]["version"] = version
    with pytest.raises(StoreFormatError, match=rf"segment format {version}.*{advice}"):
        parse_header(json.dumps(content).encode(), 10**6, "name")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": 0},
        {"kv_heads": -1},
        {"head_dim": 2.0},
        {"chunk_size": True},
        {"dtype": torch.int8},
        {"leader_layers": (3,)},
        {"indexed_layers": (1, 0)},
    ],
)
def test_a_geometry_that_makes_no_sense_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(InputError, match="geometry"):
        geometry(**changes)


def test_a_chunk_name_covers_model_chunk_size_salt_and_everything_before() -> None:
    ids = some_tokens(32)
    base = chain_hashes(root_hash("model", 4), ids, 4, first=True)
    assert len(base) == 8
    assert chain_hashes(root_hash("model", 4), ids[:30], 4, first=True) == base[:7]
    others = [root_hash("other", 4), root_hash("model", 8), root_hash("model", 4, b"tenant"), root_hash("model4", 4)]
    for other in others:
        assert not set(chain_hashes(other, ids, 4, first=True)) & set(base)
    changed = ids.copy()
    changed[0] += 1
    assert not set(chain_hashes(root_hash("model", 4), changed, 4, first=True)) & set(base)


def test_a_chunk_that_is_called_a_root_gives_no_names_of_what_follows_it() -> None:
    ids = some_tokens(32)
    names = chain_hashes(root_hash("model", 4), ids, 4, first=True)
    for j in range(1, 8):
        assert chain_hashes(names[j - 1], ids[4 * j :], 4, first=False) == names[j:]
        assert not set(chain_hashes(names[j - 1], ids[4 * j :], 4, first=True)) & set(names)


@given(st.lists(st.integers(0, 3), max_size=20), st.sampled_from([1, 2, 4]), st.booleans())
def test_chained_hashes_are_the_hashes_of_single_chunks(numbers: list[int], c: int, first: bool) -> None:
    ids = np.array(numbers, dtype=np.int64)
    parent = root = root_hash("model", c)
    expected = []
    for start in range(0, len(ids), c):
        parent = chunk_hash(parent, ids[start : start + c].tobytes(), first=first and start == 0)
        expected.append(parent)
    assert segment_hashes(root, ids, c, first=first) == expected
    assert chain_hashes(root, ids, c, first=first) == expected[: len(ids) // c]


@given(
    st.lists(
        st.tuples(st.sampled_from([b"r" * 16, b"s" * 16]), st.lists(st.integers(0, 1), max_size=30)),
        min_size=1,
        max_size=20,
    ),
    st.sampled_from([1, 2, 4]),
)
def test_remembered_hashes_are_the_hashes(prompts: list[tuple[bytes, list[int]]], c: int) -> None:
    memory = ChainMemory(prompts=3)
    for root, numbers in prompts:
        ids = np.array(numbers, dtype=np.int64)
        assert memory.hashes(root, ids, c) == chain_hashes(root, ids, c, first=True)
