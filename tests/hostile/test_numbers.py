"""Numbers that no model computes, and approximations that do not approximate what is exact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract.models import build
from tally import Figures
from unit import format_by_document
from unit.format_by_document import Array
from unit.store_helpers import FINGERPRINT, expected_kv, geometry, read_back, some_tokens, write_prefix

from hf_contiguouskv import ContiguousKVCache, ContiguousKVConfig
from hf_contiguouskv.errors import SegmentCorruptError, StoreError
from hf_contiguouskv.store import KVGeometry, PrefixStore
from hf_contiguouskv.store.bundle import export_bundle, import_bundle
from hf_contiguouskv.store.finite import NumberPlaces
from hostile.crafting import crafted, plant, raw_kv

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NOT_FINITE = [float("nan"), float("inf"), float("-inf")]


def every_form(dtype: torch.dtype = torch.float32) -> KVGeometry:
    """A geometry of which one layer is packed and one is compact."""
    return geometry(dtype=dtype, indexed_layers=(0, 1), packed_layers=(1,), compact_layers=(2,))


def bits_of(number: float, dtype: torch.dtype) -> Any:
    tensor = torch.tensor([number], dtype=dtype)
    return tensor.view(torch.int16).numpy().view("<u2")[0] if dtype == torch.bfloat16 else tensor.numpy()[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", NOT_FINITE)
def test_they_are_not_published(store_path: Path, dtype: torch.dtype, number: float, attacks: Figures) -> None:
    g, ids = every_form(dtype), some_tokens(10)
    with PrefixStore(store_path) as store:
        for layer in range(g.num_layers):
            kv = expected_kv(g, ids, layer)
            kv[1, 1, 0, 2, 3] = number
            with store.inner.begin_segment(FINGERPRINT, g, ids) as writer:
                writer.write_chunks(layer, 0, kv)
                with pytest.raises(StoreError, match=f"layer {layer}"):
                    writer.commit()
            attacks.add("numbers that are not finite, not published")
        assert store.stats.segments == 0
        assert store.backend.collect().in_use == ()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", NOT_FINITE)
def test_they_are_refused_when_they_are_read_and_by_verify(
    store_path: Path, tmp_path: Path, dtype: torch.dtype, number: float, attacks: Figures
) -> None:
    g, ids = every_form(dtype), some_tokens(10)
    with PrefixStore(store_path) as store:
        key = write_prefix(store, ids, g=g).spans[0].segment.key
        export_bundle(store, [key], tmp_path / "bundle")
    kv = raw_kv(g, ids)
    kv[1, 1, 0, 6, 3] = bits_of(number, dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        content = crafted(g, ids, kv=kv)
    plant(store_path, key, content)
    with PrefixStore(store_path) as store:
        assert any("not finite" in problem.problem for problem in store.verify())
        stored = store.inner.lookup(FINGERPRINT, ids, g.chunk_size)
        assert stored is not None
        read_back(store, stored, [0, 2])
        with pytest.raises(SegmentCorruptError, match="layer 1, chunk 1"):
            read_back(store, stored, [1])
    attacks.add("numbers that are not finite, refused when read")
    bundle_with(tmp_path / "bundle", key, content)
    with PrefixStore(tmp_path / "other") as store:
        report = import_bundle(store, tmp_path / "bundle")
        assert report.added == ()
        assert "not finite" in report.refused[0].reason
    attacks.add("numbers that are not finite, not imported")


def bundle_with(folder: Path, key: str, content: bytes) -> None:
    """Put other bytes into a bundle of one segment, and make its list say so."""
    import hashlib
    import json

    (folder / "segments" / f"{key}.safetensors").write_bytes(content)
    told = json.loads((folder / "bundle.json").read_text())
    (entry,) = told["segments"]
    entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "bundle.json").write_text(json.dumps(told))


# What an enemy changes, checksums made to match: the tensor, and what he makes of it.
CHANGES: dict[str, tuple[str, Callable[[Array], Array]]] = {
    "zeroed key index": ("key_index.1", np.zeros_like),
    "negated key index": ("key_index.0", lambda tensor: -tensor),
    "one number of the key index": ("key_index.1", lambda tensor: with_change(tensor, 1)),
    "scales twice as large": ("key_scale.1", lambda tensor: tensor * 2),
    "scales of zero": ("key_scale.0", np.zeros_like),
    "negative scales": ("key_scale.0", lambda tensor: -tensor),
    "zeroed leader keys": ("leader_keys.2", np.zeros_like),
    "leader keys of another chunk": ("leader_keys.0", lambda tensor: tensor[::-1].copy()),
    "packed values of zero": ("values4.1", np.zeros_like),
    "one code of the packed values": ("values4.1", lambda tensor: with_change(tensor, 1)),
    "codes of a coarse index": ("coarse_index.2", np.zeros_like),
    "levels of a coarse index": ("coarse_levels.2", lambda tensor: -tensor),
    "scales of a coarse index": ("key_scale.2", lambda tensor: tensor * 2),
    "compact chunks of zero": ("compact.2", np.zeros_like),
    "one key of the compact chunks": ("compact.2", lambda tensor: with_change(tensor[:, ::-1], 1)[:, ::-1]),
}
INFINITE: dict[str, tuple[str, Callable[[Array], Array]]] = {
    "scales that are no numbers": ("key_scale.1", lambda tensor: np.full_like(tensor, np.nan)),
    "an infinite scale": ("key_scale.0", lambda tensor: with_change(tensor, np.inf)),
    "packed values with infinite steps": ("values4.1", lambda tensor: np.full_like(tensor, 0x7F)),
    "leader keys that are no numbers": ("leader_keys.0", lambda tensor: np.full_like(tensor, np.nan)),
    "scales that no product of is finite": ("key_scale.1", lambda tensor: np.full_like(tensor, 3e38)),
    "a scale that is too large": ("key_scale.0", lambda tensor: with_change(tensor, 1e37)),
    "packed values of 2**121": ("values4.1", lambda tensor: np.full_like(tensor, 0x7C)),
    "a scale of a coarse index that is no number": ("key_scale.2", lambda tensor: with_change(tensor, np.nan)),
    "compact chunks that are no numbers": ("compact.2", lambda tensor: np.full_like(tensor, 0x7F)),
    "compact chunks of 2**121": ("compact.2", lambda tensor: np.full_like(tensor, 0x7C)),
}


def with_change(tensor: Array, number: float) -> Array:
    changed = tensor.copy()
    changed.flat[-1] = number if number != changed.flat[-1] else number + 1
    return changed


def tampered(g: KVGeometry, ids: Array, name: str, change: Callable[[Array], Array], monkeypatch: Any) -> bytes:
    """A segment in which one tensor was changed before its checksums were made."""
    maker = {"values4": "packed_values", "compact": "compact_chunks"}.get(name.partition(".")[0])
    with monkeypatch.context() as patch:
        if maker is not None:
            made = getattr(format_by_document, maker)
            patch.setattr(format_by_document, maker, lambda *states: np.ascontiguousarray(change(made(*states))))
        contents = format_by_document.contents

        def change_and_sum(meta: Any, kv: Array, own: Array, digests: Any) -> dict[str, Array]:
            tensors = contents(meta, kv, own, digests)
            if maker is None:
                tensors[name] = change(np.ascontiguousarray(tensors[name]))
            kinds = [key for key in tensors if not key.startswith("checksums")]
            return tensors | {
                "checksums.tensors": np.array([digests.of(tensors[key].tobytes()) for key in kinds], "<u8")
            }

        patch.setattr(format_by_document, "contents", change_and_sum)
        return crafted(g, ids)


@pytest.mark.parametrize("change", CHANGES)
def test_what_approximates_is_made_again_by_import_and_verify(
    store_path: Path, tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch, attacks: Figures
) -> None:
    g, ids = every_form(), some_tokens(10)
    with PrefixStore(store_path) as store:
        key = write_prefix(store, ids, g=g).spans[0].segment.key
        export_bundle(store, [key], tmp_path / "bundle")
        assert store.verify(deep=True) == []
    content = tampered(g, ids, *CHANGES[change], monkeypatch)
    plant(store_path, key, content)
    with PrefixStore(store_path) as store:
        assert store.verify() == [], "every checksum matches"
        problems = store.verify(deep=True)
        assert [problem.key for problem in problems] == [key]
        assert CHANGES[change][0] in problems[0].problem
    attacks.add("approximations of something else, found by verify")
    bundle_with(tmp_path / "bundle", key, content)
    with PrefixStore(tmp_path / "other") as store:
        report = import_bundle(store, tmp_path / "bundle")
        assert report.added == ()
        assert CHANGES[change][0] in report.refused[0].reason
        assert store.stats.segments == 0
    attacks.add("approximations of something else, not imported")


@pytest.mark.parametrize("change", INFINITE)
def test_scales_that_are_not_finite_are_refused_by_every_reader(
    store_path: Path, change: str, monkeypatch: pytest.MonkeyPatch, attacks: Figures
) -> None:
    g, ids = every_form(), some_tokens(10)
    with PrefixStore(store_path) as store:
        key = write_prefix(store, ids, g=g).spans[0].segment.key
    name, make = INFINITE[change]
    plant(store_path, key, tampered(g, ids, name, make, monkeypatch))
    with PrefixStore(store_path) as store:
        assert any("not finite" in problem.problem for problem in store.verify())
        stored = store.inner.lookup(FINGERPRINT, ids, g.chunk_size)
        assert stored is not None
        with pytest.raises(SegmentCorruptError, match="not finite"):
            stored.spans[0].segment.read_tensor(name)
    attacks.add("scales that are not finite, refused when read")


@pytest.mark.parametrize("dtype", DTYPES)
def test_finite_numbers_are_told_from_others_by_their_bits(store_path: Path, dtype: torch.dtype) -> None:
    g, ids = every_form(dtype), some_tokens(10)
    with PrefixStore(store_path) as store:
        segment = write_prefix(store, ids, g=g).spans[0].segment
        offset, _ = segment.tensor_extent("payload.0")
        places: NumberPlaces = segment.numbers
        info = torch.finfo(dtype)
        bound = info.max if dtype == torch.float16 else 2.0**56
        below = bound if dtype == torch.float16 else bound * (1 - info.eps)
        for number in (0.0, -0.0, 1.0, below, -below, info.tiny, info.smallest_normal / 2, 2 * bound, *NOT_FINITE):
            tensor = torch.tensor([1.0, number, -2.0], dtype=dtype)
            octets = memoryview(tensor.view(torch.uint8).numpy().tobytes())
            assert places.are_finite(offset, octets) == (tensor.abs().double() <= below).all().item(), number


class TestRequests:
    """A request whose chunks hold such numbers answers as if they had not been stored."""

    @pytest.mark.parametrize("budget", [0.3, 1.0])
    @pytest.mark.parametrize("tensor", ["payload.1", "payload.3", "values4.2", "compact.2", "key_scale.1"])
    @pytest.mark.parametrize(
        ("octet", "dtype"), [(0xFF, "float32"), (0x7C, "float32"), (0x7C, "bfloat16"), (0x7B, "float16")]
    )
    def test_answers_are_those_of_a_sound_store(
        self, store_path: Path, budget: float, tensor: str, octet: int, dtype: str, attacks: Figures
    ) -> None:
        if (octet, dtype) == (0x7B, "float16") and tensor.startswith("payload"):
            pytest.skip("a number of float16 like others")
        model = build("llama").to(getattr(torch, dtype))
        ids = torch.from_numpy(some_tokens(120) % model.config.vocab_size)[None]

        config = ContiguousKVConfig(budget=budget, index_bits=2 if tensor.startswith("compact") else 8)

        def answer(store: PrefixStore) -> torch.Tensor:
            cache = ContiguousKVCache(model, ids[:, :112], store=store, config=config)
            logits = model(ids[:, 112:], cache=cache).logits
            cache.close()
            return logits

        with PrefixStore(store_path) as store:
            expected = answer(store)
            (entry,) = store.entries()
        path = store_path / "segments" / entry.key[:2] / f"{entry.key}.safetensors"
        path.write_bytes(spoiled(path, tensor, octet))
        with PrefixStore(store_path) as store:
            assert torch.equal(answer(store), expected)
            touched = store.stats.quarantined
            assert touched == (tensor.startswith("payload") == (budget == 1.0))
        attacks.add("requests on numbers that are not finite, answered")


def spoiled(path: Path, name: str, octet: int) -> bytes:
    """The bytes of a segment in which all bytes of one tensor are `octet`, and all checksums match."""
    meta, tensors = format_by_document.read_segment(path)
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    told = format_by_document.places(meta)

    def put(tensor: str, array: Array) -> None:
        begin, end = told[tensor]["data_offsets"]
        content[start + begin : start + end] = array.tobytes()

    digests = format_by_document.Digests(None, meta["key"])
    changed = {key: array.copy() for key, array in tensors.items()}
    changed[name].view("|u1")[...] = octet
    layer = int(name.rpartition(".")[2])
    kind = name.partition(".")[0]
    if kind in ("payload", "values4", "compact"):
        lists = {"values4": "packed_layers", "compact": "compact_layers"}
        row = layer if kind == "payload" else format_by_document.layer_list(meta[lists[kind]]).index(layer)
        for chunk, extent in enumerate(changed[name]):
            changed[f"checksums.{kind}"][row, chunk] = digests.of(extent.tobytes())
    names = [key for key, *_ in format_by_document.expected_tensors(meta) if not key.startswith("checksums")]
    changed["checksums.tensors"][:] = [digests.of(changed[key].tobytes()) for key in names]
    for key, array in changed.items():
        put(key, array)
    return bytes(content)
