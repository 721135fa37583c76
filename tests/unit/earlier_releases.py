"""Stores as earlier releases wrote them: kept ones, and present ones that get the names of formats 1 and 2."""

from __future__ import annotations

import json
import struct
import tarfile
from pathlib import Path

import numpy as np
from unit.format_by_document import PAGE, chain, field, h, header_checksum

STORES = Path(__file__).parent / "stores"


def kept_store(version: int, folder: Path) -> Path:
    """The store of format `version` in `stores/`, in a folder of its own."""
    with tarfile.open(STORES / f"format-{version}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / f"format-{version}"


def as_earlier_store(store: Path, salt: bytes = b"") -> None:
    """Give all that lies in a closed store the names and headers of formats 1 and 2.

    Args:
        store: its folder; it has segments with this salt, and with an index of 8 bits, alone.
        salt: of the tenant.
    """
    names: dict[str, str] = {}
    files = [(read_header(path), path) for path in store.glob("segments/*/*.safetensors")]
    for (meta, tensors, begin), path in sorted(files, key=lambda file: int(file[0][0]["first_chunk"])):
        content = path.read_bytes()
        c, place = int(meta["chunk_size"]), tensors["token_ids"]["data_offsets"]
        ids = np.frombuffer(content[begin + place[0] : begin + place[1]], "<i8")
        parts = (b"hf_contiguouskv/1", meta["fingerprint"].encode(), str(c).encode(), salt)
        root = h(b"".join(map(field, parts)))
        before = bytes.fromhex(names[meta["parent"]]) if meta["parent"] else root
        first = hashes(before, ids, c)
        nobody = h(b"".join(map(field, (parts[0], b"", parts[2], salt))))
        present = hashes_by_document(meta, ids)
        names |= dict(zip(present, (name.hex() for name in first), strict=True))
        old = {name: value for name, value in meta.items() if name != "mac"} | {
            "version": "2" if "packed_layers" in meta else "1",
            "root": root.hex(),
            "parent": before.hex() if meta["parent"] else "",
            "key": first[-1].hex(),
            "beginning": "" if meta["parent"] else hashes(nobody, ids[:c], c)[0].hex(),
            "checksum": "0" * 16,
        }
        text = json.dumps({"__metadata__": old} | tensors, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % PAGE)
        text = text.replace(b'"checksum":"' + b"0" * 16, b'"checksum":"' + header_checksum(text).encode())
        target = store / "segments" / old["key"][:2] / f"{old['key']}.safetensors"
        target.parent.mkdir(mode=0o700, exist_ok=True)
        target.write_bytes(struct.pack("<Q", len(text)) + text + content[begin:])
        target.chmod(0o600)
        path.unlink()
    (store / "contiguouskv-store.json").write_text('{"format": 1}')
    for path in store.glob("index.sqlite*"):
        path.unlink()


def read_header(path: Path) -> tuple[dict[str, str], dict[str, dict[str, list[int]]], int]:
    """Metadata, the places of tensors, and where the data begins."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        tensors = json.loads(file.read(length))
    return tensors.pop("__metadata__"), tensors, 8 + length


def hashes(before: bytes, ids: np.ndarray, c: int) -> list[bytes]:
    """Names of chunks in formats 1 and 2."""
    found = []
    for start in range(0, len(ids), c):
        before = h(before + ids[start : start + c].tobytes())
        found.append(before)
    return found


def hashes_by_document(meta: dict[str, str], ids: np.ndarray) -> list[str]:
    """Names of chunks in the present format."""
    before = bytes.fromhex(meta["parent"] or meta["root"])
    return [name.hex() for name in chain(before, ids, int(meta["chunk_size"]), first=not meta["parent"])]


def versions(store: Path) -> list[str]:
    """The formats of all segments in a store, sorted."""
    return sorted(read_header(path)[0]["version"] for path in store.glob("segments/*/*.safetensors"))


def with_flipped_bit(path: Path, offset: int) -> bytes:
    """Damage a file; its bytes afterwards."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 8
    path.write_bytes(content)
    return bytes(content)


def named(store: Path, tokens: int) -> Path:
    """The file of the segment with so many tokens."""
    found = [path for path in store.glob("segments/*/*") if read_header(path)[0]["num_tokens"] == str(tokens)]
    assert len(found) == 1
    return found[0]
