"""docs/FORMAT.md is enough to read and to write segments: both are done here without the library."""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from format_by_document import NUMPY, Array, chain, places, read_segment, root_of, write_segment
from store_helpers import FINGERPRINT, expected_kv, geometry, path_of, read_back, some_tokens, write_prefix

from hf_contiguouskv.store import KVGeometry, PrefixStore
from hf_contiguouskv.store.bundle import export_bundle, import_bundle
from hf_contiguouskv.store.layer_index import layer_index
from hf_contiguouskv.store.packing import pack_chunks
from hf_contiguouskv.store.small_forms import small_forms
from hf_contiguouskv.store.tensor_places import index_tensors

DOCUMENT = Path(__file__).parents[2] / "docs" / "FORMAT.md"
# ---- against the library ----


def raw_kv(g: KVGeometry, ids: Array) -> Array:
    """`expected_kv` of all layers, `[layers, 2, kv_heads, tokens, head_dim]`, bfloat16 as its bits."""
    layers = []
    for layer in range(g.num_layers):
        kv = expected_kv(g, ids, layer).permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, : len(ids)].contiguous()
        layers.append(kv.view(torch.int16).numpy().view("<u2") if g.dtype == torch.bfloat16 else kv.numpy())
    return np.stack(layers)


GEOMETRIES = {
    "plain": geometry(leader_layers=(), indexed_layers=()),
    "all of it": geometry(),
    "groups": geometry(num_layers=5, layers_per_group=2, dtype=torch.float16, leader_layers=(1, 4)),
    "packed": geometry(packed_layers=(1,)),
    "packed, several scales": geometry(
        dtype=torch.float16, kv_heads=1, head_dim=130, indexed_layers=(0, 1, 2), packed_layers=(0, 2)
    ),
    "packed bfloat16": geometry(dtype=torch.bfloat16, head_dim=64, indexed_layers=(0, 2), packed_layers=(0, 2)),
    "compact": geometry(leader_layers=(0,), indexed_layers=(0,), packed_layers=(0,), compact_layers=(1, 2)),
    "compact bfloat16": geometry(
        dtype=torch.bfloat16, head_dim=64, chunk_size=16, indexed_layers=(), compact_layers=(0, 1, 2)
    ),
    "compact float16": geometry(
        dtype=torch.float16, head_dim=130, kv_heads=1, chunk_size=128, indexed_layers=(), compact_layers=(1,)
    ),
    "bfloat16": geometry(dtype=torch.bfloat16, chunk_size=16, kv_heads=1, head_dim=5, indexed_layers=(0, 1, 2)),
}


@pytest.mark.parametrize("g", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("secret", [None, b"nobody can guess this"], ids=["no key", "key"])
def test_what_the_store_writes_is_read_by_the_document(store_path: Path, g: KVGeometry, secret: bytes | None) -> None:
    c = g.chunk_size
    ids = some_tokens(4 * c + 1)
    with PrefixStore(store_path, salt=b"tenant", key=secret) as store:
        paths = [path_of(write_prefix(store, ids[: 2 * c + 1], g=g).spans[0].segment)]
        paths.append(path_of(write_prefix(store, ids, first_chunk=2, g=g).spans[1].segment))
    for path, first, end in zip(paths, (0, 2), (2 * c + 1, 4 * c + 1), strict=True):
        meta, tensors = read_segment(path, secret)
        own = ids[first * c : end]
        assert tensors["token_ids"].tolist() == own.tolist()
        root = root_of(FINGERPRINT, c, b"tenant")
        names = [root, *chain(root, ids[:end], c, True)]
        assert (meta["root"], meta["key"]) == (root.hex(), names[-1].hex())
        assert meta["parent"] == (names[first].hex() if first else "")
        assert meta["beginning"] == ("" if first else chain(root_of("", c, b"tenant"), ids[:c], c, True)[0].hex())
        assert (meta["salted"], meta["fingerprint"], int(meta["first_chunk"])) == ("1", FINGERPRINT, first)
        kv = raw_kv(g, own)
        for layer in range(g.num_layers):
            stored = tensors[f"payload.{layer // g.layers_per_group}"][:, layer % g.layers_per_group]
            flat = stored.transpose(1, 2, 0, 3, 4).reshape(2, g.kv_heads, -1, g.head_dim)[:, :, : len(own)]
            assert np.array_equal(flat, kv[layer])


def test_damage_anywhere_is_seen_by_the_document(store_path: Path) -> None:
    with PrefixStore(store_path) as store:
        path = path_of(write_prefix(store, some_tokens(10)).spans[0].segment)
    content = path.read_bytes()
    meta, _ = read_segment(path)
    start = 8 + int.from_bytes(content[:8], "little")
    offsets = [0, 20, start - 1, *(start + tensor["data_offsets"][0] for tensor in places(meta).values())]
    offsets.append(content.index(b'"beginning":"') + 15)
    for offset in [*offsets, len(content) - 1]:
        damaged = bytearray(content)
        damaged[offset] ^= 1
        path.write_bytes(damaged)
        with pytest.raises((AssertionError, ValueError, KeyError)):
            read_segment(path)
    path.write_bytes(content)
    read_segment(path)


def place(folder: Path, key: str, content: bytes) -> None:
    path = folder / "segments" / key[:2] / f"{key}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def layers_as_text(layers: tuple[int, ...]) -> str:
    return ",".join(map(str, layers))


@pytest.mark.parametrize("g", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("secret", [None, b"nobody can guess this"], ids=["no key", "key"])
@pytest.mark.parametrize("how", ["opening", "gc", "rebuilding"])
def test_what_the_document_writes_is_served_by_the_store(
    store_path: Path, g: KVGeometry, how: str, secret: bytes | None
) -> None:
    c = g.chunk_size
    ids = some_tokens(3 * c + c // 2)
    PrefixStore(store_path).close()
    written = []
    for first, end in ((0, 2 * c), (2, len(ids))):
        own = raw_kv(g, ids[first * c : end])
        key, content = write_segment(
            own,
            ids[:end],
            first,
            dtype=g.dtype_name,
            c=c,
            per_group=g.layers_per_group,
            leaders=layers_as_text(g.leader_layers),
            indexed=layers_as_text(g.indexed_layers),
            packed=layers_as_text(g.packed_layers),
            compact=layers_as_text(g.compact_layers),
            compute_ms=1500,
            secret=secret,
            fingerprint=FINGERPRINT,
            a_later_field="which readers ignore",
        )
        written.append((key, content))
    if how == "gc":
        store = PrefixStore(store_path, key=secret)
    for key, content in written:
        place(store_path, key, content)
    if how == "gc":
        assert sorted(store.gc().indexed) == sorted(key for key, _ in written)
        store.close()
    elif how == "rebuilding":
        (store_path / "index.sqlite").unlink()
    with PrefixStore(store_path, key=secret) as store:
        assert store.verify(deep=True) == []
        stored = store.inner.lookup(FINGERPRINT, ids, c)
        assert stored is not None
        assert stored.tokens == len(ids)
        assert [span.segment.key for span in stored.spans] == [key for key, _ in written]
        for layer, kv in enumerate(read_back(store, stored, range(g.num_layers))):
            assert torch.equal(kv, expected_kv(g, ids, layer))
        for span in stored.spans:
            part = ids[span.first_chunk * c : span.first_chunk * c + span.segment.num_tokens]
            kv = torch.stack([expected_kv(g, part, layer) for layer in range(g.num_layers)])
            for layer in g.leader_layers:
                assert torch.equal(span.segment.read_tensor(f"leader_keys.{layer}"), kv[layer][:, 0])
            for layer in range(g.num_layers):
                keys = kv[layer][:, 0].transpose(0, 1).flatten(1, 2)[:, : len(part)]
                names = index_tensors(g, layer)
                for name, tensor in zip(names, layer_index(keys, g, layer) if names else (), strict=True):
                    assert torch.equal(span.segment.read_tensor(name), tensor)
            for small in small_forms(g):
                for layer in small.layers:
                    assert torch.equal(
                        span.segment.read_tensor(small.tensor(layer)), pack_chunks(small.form, kv[layer])
                    )
        assert [entry.compute_s for entry in store.entries()] == [1.5, 1.5]


def test_a_newer_segment_is_left_alone(store_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ids, g = some_tokens(8), geometry()
    PrefixStore(store_path).close()
    key, content = write_segment(raw_kv(g, ids), ids, 0, dtype="float32", c=4, fingerprint=FINGERPRINT, version="5")
    place(store_path, key, content)
    with PrefixStore(store_path) as store:
        assert store.inner.lookup(FINGERPRINT, ids, 4) is None
        assert "segment format 5" in caplog.text
        store.gc()
        assert store.stats.quarantined == 0
    assert (store_path / "segments" / key[:2] / f"{key}.safetensors").read_bytes() == content


# ---- bundles ----


def test_a_bundle_is_read_by_the_document(store_path: Path, tmp_path: Path) -> None:
    ids = some_tokens(18)
    with PrefixStore(store_path) as store:
        paths = [path_of(write_prefix(store, ids[:8]).spans[0].segment)]
        paths.append(path_of(write_prefix(store, ids, first_chunk=2).spans[1].segment))
        export_bundle(store, [paths[1].stem], tmp_path / "bundle")
    told = json.loads((tmp_path / "bundle" / "bundle.json").read_text())
    assert (told["format"], told["version"]) == ("hf_contiguouskv bundle", 1)
    assert len(told["segments"]) == 2
    for entry, original, tokens in zip(told["segments"], paths, (8, 18), strict=True):
        path = tmp_path / "bundle" / entry["file"]
        content = path.read_bytes()
        assert content == original.read_bytes()
        meta, _ = read_segment(path)
        assert (entry["key"], entry["parent"], entry["file"]) == (meta["key"], meta["parent"], f"segments/{path.name}")
        assert (entry["tokens"], entry["bytes"]) == (tokens, len(content))
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
        assert set(entry) == {"key", "parent", "tokens", "bytes", "sha256", "file"}
        assert all(f"| `{member}` |" in DOCUMENT.read_text() for member in entry)
    names = {path.relative_to(tmp_path / "bundle").as_posix() for path in (tmp_path / "bundle").rglob("*")}
    assert names == {"README.md", "bundle.json", "segments", *(entry["file"] for entry in told["segments"])}


def test_a_bundle_written_by_the_document_is_imported(store_path: Path, tmp_path: Path) -> None:
    g, ids, listed = geometry(), some_tokens(18), []
    (tmp_path / "bundle" / "segments").mkdir(parents=True)
    for first, end in ((0, 8), (2, 18)):
        kv = raw_kv(g, ids[4 * first : end])
        key, content = write_segment(
            kv, ids[:end], first, dtype="float32", c=4, leaders="0,2", indexed="1", fingerprint=FINGERPRINT
        )
        (tmp_path / "bundle" / "segments" / f"{key}.safetensors").write_bytes(content)
        facts_of_it = {"tokens": end, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        parent = chain(root_of(FINGERPRINT, 4, b""), ids[:8], 4, True)[-1].hex() if first else ""
        listed.append({"key": key, "parent": parent, "file": f"segments/{key}.safetensors"} | facts_of_it)
    manifest = {"format": "hf_contiguouskv bundle", "version": 1, "segments": listed}
    (tmp_path / "bundle" / "bundle.json").write_text(json.dumps(manifest))
    with PrefixStore(store_path) as store:
        assert import_bundle(store, tmp_path / "bundle").refused == ()
        stored = store.inner.lookup(FINGERPRINT, ids, 4)
        assert stored is not None
        assert stored.tokens == 18
        for layer, kv in enumerate(read_back(store, stored, range(3))):
            assert torch.equal(kv, expected_kv(g, ids, layer))
        assert store.verify() == []


# ---- the example in the document ----


def example() -> dict[str, Any]:
    (block,) = re.findall(r"```json\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    return json.loads(block)


def example_kv(told: dict[str, Any]) -> Array:
    """K of token t, layer l, channel d is (l + 1) * (t + 1) + d / 2, and V is -K."""
    layers, tokens, d = told["num_layers"], len(told["token_ids"]), told["head_dim"]
    keys = np.array(
        [
            [[(layer + 1) * (t + 1) + channel / 2 for channel in range(d)] for t in range(tokens)]
            for layer in range(layers)
        ],
        "<f4",
    )
    return np.stack([keys, -keys], axis=1)[:, :, None]


def example_file(told: dict[str, Any]) -> tuple[str, bytes]:
    return write_segment(
        example_kv(told),
        np.array(told["token_ids"]),
        0,
        dtype=told["dtype"],
        c=told["chunk_size"],
        leaders=layers_as_text(told["leader_layers"]),
        indexed=layers_as_text(told["indexed_layers"]),
        fingerprint=told["fingerprint"],
        compute_ms=told["compute_ms"],
    )


def facts(key: str, content: bytes) -> dict[str, Any]:
    """What the document says about the file of its example."""
    n = int.from_bytes(content[:8], "little")
    told = json.loads(content[8 : 8 + n])
    meta = told.pop("__metadata__")
    arrays = {
        name: np.frombuffer(content[8 + n :][slice(*t["data_offsets"])], NUMPY[t["dtype"]]).tolist()
        for name, t in told.items()
    }
    return {
        "root": meta["root"],
        "beginning": meta["beginning"],
        "hashes": [name.hex() for name in chain(bytes.fromhex(meta["root"]), np.array(arrays["token_ids"]), 2, True)],
        "key": key,
        "header_length": n,
        "checksum": meta["checksum"],
        "tensors": {name: [t["dtype"], t["shape"], t["data_offsets"]] for name, t in told.items()},
        "payload.1": arrays["payload.1"],
        "key_index.1": arrays["key_index.1"],
        "checksums.payload": [f"{number:016x}" for number in arrays["checksums.payload"]],
        "checksums.tensors": [f"{number:016x}" for number in arrays["checksums.tensors"]],
        "file_length": len(content),
        "file_sha256": hashlib.sha256(content).hexdigest(),
    }


def test_the_example_in_the_document_is_true() -> None:
    told = example()
    assert told["segment"] == facts(*example_file(told["input"]))


def test_the_store_writes_the_example_byte_for_byte(store_path: Path) -> None:
    told = example()
    given = told["input"]
    g = KVGeometry(
        **{name: given[name] for name in ("num_layers", "kv_heads", "head_dim", "chunk_size")},
        dtype=getattr(torch, given["dtype"]),
        leader_layers=tuple(given["leader_layers"]),
        indexed_layers=tuple(given["indexed_layers"]),
    )
    kv = torch.from_numpy(example_kv(given))
    padded = torch.nn.functional.pad(kv, (0, 0, 0, 1))
    with PrefixStore(store_path) as store:
        with store.inner.begin_segment(given["fingerprint"], g, np.array(given["token_ids"])) as writer:
            for layer in range(2):
                writer.write_chunks(layer, 0, padded[layer].unflatten(2, (2, 2)).permute(2, 0, 1, 3, 4).contiguous())
            writer.write_index(1, *layer_index(kv[1, 0], g, 1))
            segment = writer.commit(compute_s=given["compute_ms"] / 1000).spans[0].segment
        assert facts(segment.key, path_of(segment).read_bytes()) == told["segment"]
        for store_file in path_of(segment).parents[2].glob("segments/*/*"):
            assert store_file.name == f"{told['segment']['key']}.safetensors"


def test_the_document_names_every_file_and_column_of_a_store(store_path: Path) -> None:
    text = DOCUMENT.read_text()
    with PrefixStore(store_path) as store:
        segment = write_prefix(store, some_tokens(10)).spans[0].segment
        store.pin(segment.key)
        store.inner.index.rebuild()
        store.inner.discard(write_prefix(store, some_tokens(10, seed=1)).spans[0].segment, "a test")
        for path in store_path.rglob("*"):
            name = (
                path.relative_to(store_path).as_posix().replace(path.stem[:32] if len(path.stem) >= 32 else "?", "KEY")
            )
            name = re.sub(r"^segments/[0-9a-f]{2}", "segments/ab", name)
            assert name.removeprefix("index.sqlite") in text, name
    with sqlite3.connect(store_path / "index.sqlite") as db:
        tables = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for table in tables:
            assert f"| `{table}` |" in text
            row = next(line for line in text.splitlines() if line.startswith(f"| `{table}` |"))
            for column in db.execute(f"PRAGMA table_info({table})"):
                assert f"`{column[1]}`" in row, f"{table}.{column[1]}"
    for name in segment.header._metadata():
        assert f"| `{name}` |" in text, name
