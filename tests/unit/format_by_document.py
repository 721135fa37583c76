"""Segments read and written by docs/FORMAT.md alone: nothing of the library is imported here."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import safetensors
import xxhash

PAGE = 4096
Array = np.ndarray[Any, Any]

# Of K and V: the name in safetensors, and a numpy type with as many bits.
KINDS = {"float32": ("F32", "<f4"), "float16": ("F16", "<f2"), "bfloat16": ("BF16", "<u2")}
NUMPY = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I8": "|i1", "U8": "|u1", "I64": "<i8", "U64": "<u8"}


def h(octets: bytes, person: bytes = b"") -> bytes:
    return hashlib.blake2b(octets, digest_size=16, person=person).digest()


def field(octets: bytes) -> bytes:
    return struct.pack("<Q", len(octets)) + octets


def root_of(fingerprint: str, c: int, salt: bytes) -> bytes:
    fields = (b"hf_contiguouskv/3", fingerprint.encode(), str(c).encode(), salt)
    return h(b"".join(map(field, fields)), b"hf_ckv root")


def chain(before: bytes, ids: Array, c: int, first: bool) -> list[bytes]:
    found = []
    for start in range(0, len(ids), c):
        octets = before + b"".join(struct.pack("<q", int(token)) for token in ids[start : start + c])
        before = h(octets, b"hf_ckv first" if first and start == 0 else b"")
        found.append(before)
    return found


class Digests:
    """Checksums of a segment, and its code: XXH3 and zeros without a key, BLAKE2b with one."""

    def __init__(self, secret: bytes | None, name: str) -> None:
        self.key = b""
        if secret is not None:
            self.key = hashlib.blake2b(secret, digest_size=32, person=b"hf_ckv key").digest()
            own = hashlib.blake2b(name.encode(), digest_size=32, key=self.key, person=b"hf_ckv checks")
            self.own = own.digest()

    def of(self, octets: bytes) -> int:
        if not self.key:
            return xxhash.xxh3_64_intdigest(octets)
        return int.from_bytes(hashlib.blake2b(octets, digest_size=8, key=self.own).digest(), "little")

    def mac(self, header: bytes, checksums: bytes) -> str:
        if not self.key:
            return "0" * 64
        blank = re.sub(rb'"mac":"[0-9a-f]{64}"', b'"mac":"' + b"0" * 64 + b'"', header)
        blank = re.sub(rb'"checksum":"[0-9a-f]{16}"', b'"checksum":"' + b"0" * 16 + b'"', blank)
        octets = struct.pack("<Q", len(blank)) + blank + checksums
        return hashlib.blake2b(octets, digest_size=32, key=self.key, person=b"hf_ckv mac").hexdigest()


def header_checksum(header: bytes) -> str:
    blank, count = re.subn(rb'"checksum":"[0-9a-f]{16}"', b'"checksum":"' + b"0" * 16 + b'"', header)
    assert count == 1
    return f"{xxhash.xxh3_64_intdigest(blank):016x}"


def layer_list(text: str) -> list[int]:
    return [int(part) for part in text.split(",")] if text else []


def expected_tensors(meta: dict[str, str]) -> list[tuple[str, str, list[int], int]]:
    """Name, dtype, shape and alignment, without padding."""
    layers, heads, d, c, per_group, tokens = (
        int(meta[name])
        for name in ("num_layers", "kv_heads", "head_dim", "chunk_size", "layers_per_group", "num_tokens")
    )
    m, kind = -(-tokens // c), KINDS[meta["dtype"]][0]
    leaders, indexed = layer_list(meta["leader_layers"]), layer_list(meta["indexed_layers"])
    packed, compact = layer_list(meta.get("packed_layers", "")), layer_list(meta.get("compact_layers", ""))
    packed_bytes = heads * c * (d // 2 + 4 * (d // sharing(d)))
    compact_bytes = packed_bytes + heads * (c + 2) * d
    n, blocks = blocks_of(c, m)
    groups = -(-layers // per_group)
    sizes = [min(layers, (g + 1) * per_group) - g * per_group for g in range(groups)]
    return [
        *((f"payload.{g}", kind, [m, sizes[g], 2, heads, c, d], PAGE) for g in range(groups)),
        *((f"leader_keys.{layer}", kind, [m, heads, c, d], PAGE) for layer in leaders),
        *((f"key_index.{layer}", "I8", [heads, c, m, d], PAGE) for layer in indexed),
        *((f"coarse_index.{layer}", "U8", [heads, c // 4, n, blocks, d], PAGE) for layer in compact),
        *((f"coarse_levels.{layer}", "I8", [heads, 2, blocks, d], 8) for layer in compact),
        *((f"key_scale.{layer}", "F32", [heads, d], 8) for layer in sorted(indexed + compact)),
        *((f"values4.{layer}", "U8", [m, packed_bytes], PAGE) for layer in packed),
        *((f"compact.{layer}", "U8", [m, compact_bytes], PAGE) for layer in compact),
        ("token_ids", "I64", [tokens], 8),
        ("checksums.payload", "U64", [layers, m], 8),
        *([("checksums.values4", "U64", [len(packed), m], 8)] if packed else []),
        *([("checksums.compact", "U64", [len(compact), m], 8)] if compact else []),
        (
            "checksums.tensors",
            "U64",
            [groups + len(leaders) + 2 * len(indexed) + len(packed) + 4 * len(compact) + 1],
            8,
        ),
    ]


def blocks_of(c: int, m: int) -> tuple[int, int]:
    """Chunks of a block, and blocks."""
    n = max(1, 64 // c)
    return n, -(-m // n)


def sharing(d: int) -> int:
    return max(s for s in range(1, min(d, 64) + 1) if d % s == 0)


def bfloat16(number: np.float32) -> tuple[int, np.float32]:
    """The nearest bfloat16, halves to even: its bits, and what it is worth."""
    bits = int(np.array(number, "<f4").view("<u4"))
    kept = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return kept, np.array(kept << 16, "<u4").view("<f4")[()]


def packed_values(values: Array) -> Array:
    """Packed extents `[m, packed bytes]` of values `[m, heads, c, d]`, float32."""
    return np.stack([np.frombuffer(b"".join(parts), "|u1") for parts in packed_parts(values)])


def compact_chunks(keys: Array, values: Array) -> Array:
    """Compact extents `[m, compact bytes]` of keys and values `[m, heads, c, d]`, float32."""
    rows = []
    for chunk, (codes, lowest, step) in zip(keys, packed_parts(values), strict=True):
        heads, c, d = chunk.shape
        rounded, scale = np.zeros((heads, c, d), "|i1"), np.zeros((heads, d), "<u2")
        for place in np.ndindex(heads, d):
            own = chunk[place[0], :, place[1]]
            scale[place], width = bfloat16(np.abs(own).max() / np.float32(127))
            if not width > 0:
                scale[place], width = bfloat16(np.float32(1))
            rounded[place[0], :, place[1]] = np.clip(np.rint(own / width), -127, 127)
        rows.append(np.frombuffer(rounded.tobytes() + codes + scale.tobytes() + lowest + step, "|u1"))
    return np.stack(rows)


def coarse_index(index: Array, tokens: int) -> tuple[Array, Array]:
    """Codes and levels of a key index `[heads, c, m, d]`."""
    heads, c, m, d = index.shape
    n, blocks = blocks_of(c, m)
    codes, levels = np.zeros((heads, c // 4, n, blocks, d), "|u1"), np.zeros((heads, 2, blocks, d), "|i1")
    for head, block, channel in np.ndindex(heads, blocks, d):
        there = [
            (block * n + j, place)
            for j in range(n)
            for place in range(c)
            if block * n + j < m and (block * n + j) * c + place < tokens
        ]
        numbers = [int(index[head, place, chunk, channel]) for chunk, place in there]
        step = (max(numbers) - min(numbers) + 2) // 4
        lowest = (max(numbers) + min(numbers) - 3 * step) // 2
        levels[head, :, block, channel] = lowest, step
        for (chunk, place), number in zip(there, numbers, strict=True):
            code = 0 if step == 0 else min(3, max(0, (2 * (number - lowest) + step) // (2 * step)))
            codes[head, place % (c // 4), chunk % n, block, channel] |= code << 2 * (place // (c // 4))
    return codes, levels


def packed_parts(values: Array) -> list[tuple[bytes, bytes, bytes]]:
    """Codes, lowest values and steps of each chunk."""
    _, heads, c, d = values.shape
    s = sharing(d)
    rows = []
    for chunk in values:
        codes = np.zeros((heads, c, d), "|u1")
        lowest, step = np.zeros((heads, c, d // s), "<u2"), np.zeros((heads, c, d // s), "<u2")
        for place in np.ndindex(heads, c, d // s):
            group = slice(place[2] * s, (place[2] + 1) * s)
            some = chunk[place[0], place[1], group]
            lowest[place], low = bfloat16(some.min())
            step[place], width = bfloat16((some.max() - low) / np.float32(15))
            if not width > 0:
                step[place], width = bfloat16(np.float32(1))
            codes[place[0], place[1], group] = np.clip(np.rint((some - low) / width), 0, 15)
        both = codes[..., : d // 2] | (codes[..., d // 2 :] << 4)
        rows.append((both.tobytes(), lowest.tobytes(), step.tobytes()))
    return rows


def places(meta: dict[str, str]) -> dict[str, dict[str, Any]]:
    """What the header says of every tensor, paddings included."""
    found: dict[str, dict[str, Any]] = {}
    end = 0
    for name, dtype, shape, alignment in expected_tensors(meta):
        gap = -end % alignment
        if gap:
            found[f"padding.{len(found)}"] = {"dtype": "U8", "shape": [gap], "data_offsets": [end, end + gap]}
            end += gap
        nbytes = int(np.prod(shape)) * np.dtype(NUMPY[dtype]).itemsize
        found[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    return found


def read_segment(path: Path, secret: bytes | None = None) -> tuple[dict[str, str], dict[str, Array]]:
    """Metadata and tensors of a segment; everything that the document tells a reader to check is asserted."""
    content = path.read_bytes()
    n = int.from_bytes(content[:8], "little")
    assert 2 <= n <= 2 * 2**20
    assert 8 + n <= len(content)
    assert (8 + n) % PAGE == 0
    header = content[8 : 8 + n]
    assert header.rstrip(b" ").endswith(b"}")
    told = json.loads(header)
    meta = told.pop("__metadata__")
    assert (meta["format"], meta["version"]) == ("hf_contiguouskv", "4" if meta.get("compact_layers") else "3")
    assert not set(layer_list(meta.get("compact_layers", ""))) & set(layer_list(meta["indexed_layers"]))
    assert set(layer_list(meta.get("packed_layers", ""))) <= set(layer_list(meta["indexed_layers"]))
    assert meta["checksum"] == header_checksum(header)
    assert all(re.fullmatch(r"[0-9a-f]{32}", meta[name]) for name in ("root", "key"))
    assert all(re.fullmatch(r"([0-9a-f]{32})?", meta[name]) for name in ("parent", "beginning"))
    assert (meta["parent"] == "") == (meta["first_chunk"] == "0") == (meta["beginning"] != "")
    assert meta["salted"] in ("0", "1")
    assert re.fullmatch(r"[0-9]{1,15}", meta["compute_ms"])
    assert told == places(meta)
    assert 8 + n + max(tensor["data_offsets"][1] for tensor in told.values()) == len(content)
    tensors = {
        name: np.frombuffer(tensor["data"], NUMPY[tensor["dtype"]]).reshape(tensor["shape"])
        for name, tensor in safetensors.deserialize(content)
    }
    assert set(tensors) == set(told)
    digests = Digests(secret, meta["key"])
    check_contents(meta, tensors, digests)
    kinds = ("checksums.payload", "checksums.values4", "checksums.compact", "checksums.tensors")
    checksums = b"".join(tensors[name].tobytes() for name in kinds if name in tensors)
    assert meta["mac"] == digests.mac(header, checksums)
    assert path.name == f"{meta['key']}.safetensors"
    return meta, tensors


def check_contents(meta: dict[str, str], tensors: dict[str, Array], digests: Digests) -> None:
    c, per_group = int(meta["chunk_size"]), int(meta["layers_per_group"])
    names = [name for name, *_ in expected_tensors(meta)]
    whole = [digests.of(tensors[name].tobytes()) for name in names if not name.startswith("checksums")]
    assert tensors["checksums.tensors"].tolist() == whole
    for name, tensor in tensors.items():
        assert not name.startswith("padding") or not tensor.any()
    ids = tensors["token_ids"]
    assert 1 <= len(ids) <= 2**26
    m = -(-len(ids) // c)
    for layer in range(int(meta["num_layers"])):
        group, inside = divmod(layer, per_group)
        extents = tensors[f"payload.{group}"][:, inside]
        assert np.isfinite(as_float(extents)).all()
        sums = [digests.of(extents[j].tobytes()) for j in range(m)]
        assert tensors["checksums.payload"][layer].tolist() == sums
        assert not extents[m - 1, :, :, len(ids) - (m - 1) * c :].any()
        if layer in layer_list(meta["leader_layers"]):
            assert np.array_equal(tensors[f"leader_keys.{layer}"], extents[:, 0])
        if layer in layer_list(meta.get("packed_layers", "")):
            rows = tensors[f"values4.{layer}"]
            assert np.array_equal(rows, packed_values(as_float(extents[:, 1])))
            sums = [digests.of(row.tobytes()) for row in rows]
            row_of_sums = layer_list(meta["packed_layers"]).index(layer)
            assert tensors["checksums.values4"][row_of_sums].tolist() == sums
        if layer in layer_list(meta.get("compact_layers", "")):
            in_order = extents[:, 0].swapaxes(0, 1).reshape(extents.shape[2], m * c, -1)[:, : len(ids)]
            index, scale = key_index(as_float(in_order), c, m)
            assert np.array_equal(tensors[f"key_scale.{layer}"], scale)
            codes, levels = coarse_index(index, len(ids))
            assert np.array_equal(tensors[f"coarse_index.{layer}"], codes)
            assert np.array_equal(tensors[f"coarse_levels.{layer}"], levels)
            rows = tensors[f"compact.{layer}"]
            assert np.array_equal(rows, compact_chunks(as_float(extents[:, 0]), as_float(extents[:, 1])))
            sums = [digests.of(row.tobytes()) for row in rows]
            row_of_sums = layer_list(meta["compact_layers"]).index(layer)
            assert tensors["checksums.compact"][row_of_sums].tolist() == sums
    parent = bytes.fromhex(meta["parent"] or meta["root"])
    assert chain(parent, ids, c, not meta["parent"])[-1].hex() == meta["key"]


def as_float(array: Array) -> Array:
    """bfloat16 bits (or ordinary numbers) as float32."""
    return (array.astype("<u4") << 16).view("<f4") if array.dtype == "<u2" else array.astype("<f4")


def write_segment(
    kv: Array,
    ids: Array,
    first_chunk: int,
    *,
    dtype: str,
    c: int,
    per_group: int = 1,
    leaders: str = "",
    indexed: str = "",
    packed: str = "",
    compact: str = "",
    fingerprint: str,
    salt: bytes = b"",
    compute_ms: int = 0,
    secret: bytes | None = None,
    header: Mapping[str, str] = MappingProxyType({}),
    **more: str,
) -> tuple[str, bytes]:
    """Key and bytes of a segment.

    Args:
        kv: `[layers, 2, kv_heads, tokens, head_dim]` of this segment.
        ids: of the whole prefix.
        secret: the key of the store.
        header: metadata that are told in the place of the right ones.
        more: further metadata.
    """  # fmt: skip
    layers, _, heads, tokens, d = kv.shape
    root = root_of(fingerprint, c, salt)
    names = chain(root, ids, c, True)
    meta = (
        {
            "format": "hf_contiguouskv",
            "version": "4" if compact else "3",
            "fingerprint": fingerprint,
            "root": root.hex(),
            "parent": names[first_chunk - 1].hex() if first_chunk else "",
            "key": names[-1].hex(),
            "first_chunk": str(first_chunk),
            "num_tokens": str(tokens),
            "salted": "1" if salt else "0",
            "beginning": "" if first_chunk else chain(root_of("", c, salt), ids[:c], c, True)[0].hex(),
            "compute_ms": f"{compute_ms:012d}",
            "mac": "0" * 64,
            "checksum": "0" * 16,
            "num_layers": str(layers),
            "kv_heads": str(heads),
            "head_dim": str(d),
            "dtype": dtype,
            "chunk_size": str(c),
            "layers_per_group": str(per_group),
            "leader_layers": leaders,
            "indexed_layers": indexed,
        }
        | ({"packed_layers": packed} if packed else {})
        | ({"compact_layers": compact} if compact else {})
        | more
        | dict(header)
    )
    told = places(meta)
    text = json.dumps({"__metadata__": meta} | told, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    digests = Digests(secret, meta["key"])
    tensors = contents(meta, kv, ids[first_chunk * c :], digests)
    checksums = b"".join(tensors[name].tobytes() for name in told if name.startswith("checksums"))
    text = text.replace(b'"mac":"' + b"0" * 64, f'"mac":"{digests.mac(text, checksums)}'.encode())
    text = text.replace(b'"checksum":"' + b"0" * 16, f'"checksum":"{header_checksum(text)}'.encode())
    data = b"".join(
        tensors[name].astype(NUMPY[tensor["dtype"]]).tobytes() if name in tensors else bytes(tensor["shape"][0])
        for name, tensor in told.items()
    )
    return meta["key"], struct.pack("<Q", len(text)) + text + data


def key_index(keys: Array, c: int, m: int) -> tuple[Array, Array]:
    """Key index `[heads, c, m, d]` and scales of keys `[heads, tokens, d]`, float32."""
    heads, tokens, d = keys.shape
    peak = np.abs(keys).max(axis=1)
    scale = np.where(peak != 0, peak / np.float32(127), np.float32(1))
    index = np.zeros((heads, m * c, d), "|i1")
    index[:, :tokens] = np.rint(keys / scale[:, None]).astype("|i1")
    return index.reshape(heads, m, c, d).swapaxes(1, 2), scale


def contents(meta: dict[str, str], kv: Array, ids: Array, digests: Digests) -> dict[str, Array]:
    c, per_group = int(meta["chunk_size"]), int(meta["layers_per_group"])
    layers, _, heads, tokens, d = kv.shape
    m = -(-tokens // c)
    padded = np.zeros((layers, 2, heads, m * c, d), kv.dtype)
    padded[:, :, :, :tokens] = kv
    # [layers, chunks, 2, heads, c, d]
    extents = padded.reshape(layers, 2, heads, m, c, d).transpose(0, 3, 1, 2, 4, 5)
    tensors: dict[str, Array] = {}
    for group, first in enumerate(range(0, layers, per_group)):
        tensors[f"payload.{group}"] = extents[first : first + per_group].swapaxes(0, 1)
    for layer in layer_list(meta["leader_layers"]):
        tensors[f"leader_keys.{layer}"] = extents[layer][:, 0]
    packed, compact = layer_list(meta.get("packed_layers", "")), layer_list(meta.get("compact_layers", ""))
    indexed = layer_list(meta["indexed_layers"])
    indexes = {layer: key_index(as_float(kv[layer, 0]), c, m) for layer in sorted(indexed + compact)}
    tensors |= {f"key_index.{layer}": indexes[layer][0] for layer in indexed}
    coarse = {layer: coarse_index(indexes[layer][0], tokens) for layer in compact}
    tensors |= {f"coarse_index.{layer}": codes for layer, (codes, _) in coarse.items()}
    tensors |= {f"coarse_levels.{layer}": levels for layer, (_, levels) in coarse.items()}
    tensors |= {f"key_scale.{layer}": scale for layer, (_, scale) in indexes.items()}
    for layer in packed:
        tensors[f"values4.{layer}"] = packed_values(as_float(extents[layer][:, 1]))
    for layer in compact:
        tensors[f"compact.{layer}"] = compact_chunks(as_float(extents[layer][:, 0]), as_float(extents[layer][:, 1]))
    tensors["token_ids"] = ids
    sums = [[digests.of(extents[layer, j].tobytes()) for j in range(m)] for layer in range(layers)]
    whole = [digests.of(tensor.tobytes()) for tensor in tensors.values()]
    for kind, layers_of_kind in (("values4", packed), ("compact", compact)):
        if layers_of_kind:
            own = [[digests.of(row.tobytes()) for row in tensors[f"{kind}.{layer}"]] for layer in layers_of_kind]
            tensors[f"checksums.{kind}"] = np.array(own, "<u8")
    return tensors | {"checksums.payload": np.array(sums, "<u8"), "checksums.tensors": np.array(whole, "<u8")}
