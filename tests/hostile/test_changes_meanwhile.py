"""Files that change while they are imported or exported: what is verified must be what is kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tally import Figures
from unit.store_helpers import FINGERPRINT, geometry, open_segment, some_tokens, write_prefix

from hf_contiguouskv.errors import InputError, SegmentCorruptError, StoreError
from hf_contiguouskv.store import PrefixStore
from hf_contiguouskv.store.bundle import export_bundle, exporting, import_bundle
from hf_contiguouskv.store.hashing import root_hash
from hostile.crafting import path_in

G = geometry(packed_layers=(1,))
IDS = some_tokens(20)

# What an enemy makes of a sound segment: the tensor, and its new bytes.
SPOILED: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "a payload that is no number": ("payload.0", lambda octets: np.float32("nan").tobytes() + octets[4:]),
    "an index of zeros": ("key_index.1", lambda octets: bytes(len(octets))),
    "packed values of another layer": ("values4.1", lambda octets: octets[::-1]),
    "other leader keys": ("leader_keys.0", lambda octets: octets[16:] + octets[:16]),
    "other tokens": ("token_ids", lambda octets: octets[8:] + octets[:8]),
}


def spoiled(path: Path, name: str, change: Callable[[bytes], bytes]) -> bytes:
    """The bytes of a segment in which one tensor was changed; its checksums are as they were."""
    content = bytearray(path.read_bytes())
    segment = open_segment(path)
    offset, nbytes = segment.tensor_extent(name)
    segment.close()
    content[offset : offset + nbytes] = change(bytes(content[offset : offset + nbytes]))
    return bytes(content)


@pytest.mark.parametrize("key", [None, b"nobody can guess this"], ids=["no key", "key"])
@pytest.mark.parametrize("what", SPOILED)
def test_a_bundle_that_changes_while_it_is_imported(
    store_path: Path, tmp_path: Path, what: str, key: bytes | None, attacks: Figures
) -> None:
    """The list tells the digest of the bad bytes, and the good ones are shown only while they are verified."""
    with PrefixStore(tmp_path / "from") as store:
        name = write_prefix(store, IDS, g=G).spans[0].segment.key
        write_prefix(store, some_tokens(24, seed=4), g=G)
        export_bundle(store, [entry.key for entry in store.entries()], tmp_path / "bundle")
    path = tmp_path / "bundle" / "segments" / f"{name}.safetensors"
    good, bad = path.read_bytes(), spoiled(path, *SPOILED[what])
    told = json.loads((tmp_path / "bundle" / "bundle.json").read_text())
    told["segments"].sort(key=lambda entry: entry["key"] != name)
    told["segments"][0]["sha256"] = hashlib.sha256(bad).hexdigest()
    (tmp_path / "bundle" / "bundle.json").write_text(json.dumps(told))
    path.write_bytes(bad)
    moments = []

    def progress(done: int, total: int) -> None:
        moments.append(done)
        if len(moments) == 1:
            path.write_bytes(good)  # It has been hashed, and is verified now.
        if len(moments) == 2:
            path.write_bytes(bad)  # The other one is looked at; then they are copied.

    with PrefixStore(store_path, key=key) as store:
        try:
            refused = import_bundle(store, tmp_path / "bundle", progress).refused
        except StoreError:
            refused = ()
        assert len(moments) >= 2 or refused  # (Of other tokens, the header tells at once.)
        assert name not in {entry.key for entry in store.entries()} or refused
        assert store.inner.lookup(FINGERPRINT, IDS, G.chunk_size) is None
        assert store.verify(deep=True) == []
        store.gc()
        assert store.backend.collect().removed == ()
    attacks.add("bundles that change while they are imported")


@pytest.mark.parametrize("what", [name for name in SPOILED if name != "other tokens"])
def test_a_segment_that_changes_while_it_is_exported(
    store_path: Path, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch, attacks: Figures
) -> None:
    """However often the original is read: what lies in the bundle is sound, or there is no bundle."""
    with PrefixStore(store_path) as store:
        key = write_prefix(store, IDS, g=G).spans[0].segment.key
        path = path_in(store, key)
        good, bad = path.read_bytes(), spoiled(path, *SPOILED[what])
        verify = exporting.segment_problems

        def verify_with_good_bytes_in_the_store(*args: object, **more: object) -> list[str]:
            with path.open("r+b") as file:
                file.write(good)
            found = verify(*args, **more)  # type: ignore[arg-type]
            with path.open("r+b") as file:
                file.write(bad)
            return found

        with path.open("r+b") as file:
            file.write(bad)
        monkeypatch.setattr(exporting, "segment_problems", verify_with_good_bytes_in_the_store)
        with pytest.raises(SegmentCorruptError, match="not exported"):
            export_bundle(store, [key], tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    attacks.add("segments that change while they are exported")


def test_a_tenant_reaches_nobody_else_by_the_names_of_roots(store_path: Path, tmp_path: Path, attacks: Figures) -> None:
    with PrefixStore(tmp_path / "from") as store:
        key = write_prefix(store, IDS, g=G).spans[0].segment.key
        export_bundle(store, [key], tmp_path / "bundle")
    with PrefixStore(store_path) as store:
        write_prefix(store, some_tokens(10, seed=7), g=G)
    everybody = root_hash(FINGERPRINT, G.chunk_size).hex()
    with (
        PrefixStore(store_path, salt="tenant", max_disk_bytes=10**6) as store,
        pytest.raises(InputError, match="operator"),
    ):
        import_bundle(store, tmp_path / "bundle", foreign_roots=[everybody])
    with PrefixStore(store_path) as store:
        assert store.inner.lookup(FINGERPRINT, IDS, G.chunk_size) is None
        assert len(store.entries()) == 1
    attacks.add("tenants who name others' roots")
