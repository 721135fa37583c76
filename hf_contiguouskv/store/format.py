"""The bytes of a segment file: a safetensors file whose tensors have fixed places.

    8 bytes  header length, little-endian
    header   JSON, padded with spaces so that the data section starts on a 4 KiB boundary
    data     payload.{g}      [chunks, layers_in_group, 2, kv_heads, c, head_dim]  model dtype, one per layer group
             leader_keys.{l}  [chunks, kv_heads, c, head_dim]                      model dtype, one per leader layer
             key_index.{l}    [kv_heads, c, chunks, head_dim]                      int8, one per indexed layer
             coarse_index.{l}  [kv_heads, c / 4, chunks of a block, blocks, head_dim] uint8, one per compact layer
             coarse_levels.{l} [kv_heads, 2, blocks, head_dim]                     int8, one per compact layer
             key_scale.{l}    [kv_heads, head_dim]                                 float32, one per layer with an index
             values4.{l}      [chunks, bytes]                                      uint8, one per packed layer
             compact.{l}      [chunks, bytes]                                      uint8, one per compact layer
             token_ids        [num_tokens]                                         int64, of this segment only
             checksums.payload [num_layers, chunks]                                uint64, of each extent
             checksums.values4 [packed layers, chunks]                             uint64, the same, if there are any
             checksums.compact [compact layers, chunks]                            uint64, the same, if there are any
             checksums.tensors [k]                                                 uint64, of whole tensors:
                              all of the above but the other checksums, in their order
             padding.{i}      [n]   uint8 zeros, so that payload, leader_keys, key_index, coarse_index, values4 and
                              compact start on a page

Checksums are xxh3_64, or made with the key of the store (`key.py`).

Everything follows from the geometry and the number of tokens, so a header is written before any data is known, and a
header that is read is compared with the one that its own geometry demands. `docs/FORMAT.md` tells the whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import xxhash

from ..errors import EarlierFormatError, InputError, SegmentCorruptError, StoreFormatError
from ..hardware.aligned_memory import PAGE
from ..model.kv_geometry import KVGeometry, whole_number
from ..wording import quoted
from .backend import Blob
from .hashing import TokenIds, segment_hashes
from .key import MAC_BYTES, NO_MAC
from .strict_json import once_each
from .tensor_places import TensorPlace, place_tensors, places_as_json

__all__ = [
    "MAX_HEADER_BYTES",
    "PAGE",
    "KVGeometry",
    "SegmentHeader",
    "parse_earlier_header",
    "parse_header",
    "read_header",
]

# Versions 1 and 2 name chunks in another way (`earlier_names.py`). Version 4 is version 3 with compact layers; what
# has none is still written as version 3, which earlier releases read.
FORMAT_VERSION, OLDEST_VERSION = 4, 3
EARLIER_VERSIONS = ("1", "2")
# A hundred layers take 50 KiB. What is parsed takes up to twenty times its length in memory.
MAX_HEADER_BYTES = 2 * 2**20
MAX_TOKENS = 2**26
_FIRST_READ = 64 * 1024

_HASH = re.compile(r"[0-9a-f]{32}")
# The header covers itself: its checksum is taken with these digits in the place of the checksum.
_NO_CHECKSUM = "0" * 16
_CHECKSUM = re.compile(rb'"checksum":"([0-9a-f]{16})"')
_MAC = re.compile(rb'"mac":"([0-9a-f]{64})"')
_MAC_DIGITS = re.compile(r"[0-9a-f]{64}")
_BEGINNING = b'{"__metadata__":'


@dataclass(frozen=True)
class SegmentHeader:
    """What the header of a segment file says.

    Attributes:
        geometry: shapes and layout.
        fingerprint: of the model, hex.
        root: chain hash before the first chunk of the whole prefix, hex.
        parent: chain hash of the chunk before this segment, hex; "" when the segment begins the prefix.
        key: chain hash of the last chunk of this segment, hex.
        first_chunk: position of the first chunk of this segment in the prefix.
        num_tokens: tokens in this segment; the last chunk may be partial.
        salted: whether the root hash covers a tenant salt.
        beginning: name of the first chunk's tokens for no model in particular (same salt, same chunk size), hex; "" for
            a segment that does not begin its prefix. Tells "stored for another model" from "not stored".
        compute_ms: how long the model took to compute it, in milliseconds; 0 is unknown.
        mac: code of the store's key over header and checksums, hex; zeros: there is no key.
    """

    geometry: KVGeometry
    fingerprint: str
    root: str
    parent: str
    key: str
    first_chunk: int
    num_tokens: int
    salted: bool = False
    beginning: str = ""
    compute_ms: int = 0
    mac: str = NO_MAC

    @property
    def num_chunks(self) -> int:
        """Chunks in this segment, a partial last one included."""
        return -(-self.num_tokens // self.geometry.chunk_size)

    @property
    def parent_hash(self) -> bytes:
        """The chain hash that the first chunk of this segment continues."""
        return bytes.fromhex(self.parent or self.root)

    @property
    def prefix_tokens(self) -> int:
        """Length of the whole prefix that ends with this segment."""
        return self.first_chunk * self.geometry.chunk_size + self.num_tokens

    def hashes(self, ids: TokenIds) -> list[bytes]:
        """The names of its chunks, if `ids` (int64 `[num_tokens]`) are its own token ids."""
        return segment_hashes(self.parent_hash, ids, self.geometry.chunk_size, first=self.first_chunk == 0)

    @cached_property
    def places(self) -> dict[str, TensorPlace]:
        """The place of every tensor, relative to `data_start`."""
        return place_tensors(self.geometry, self.num_chunks, self.num_tokens)

    @cached_property
    def encoded(self) -> bytes:
        """Length, JSON and padding: the bytes before the data section, a multiple of 4096."""
        text = self._text()
        return len(text).to_bytes(8, "little") + text

    def _text(self) -> bytes:
        content: dict[str, Any] = {"__metadata__": self._metadata()}
        content |= places_as_json(self.places)
        text = json.dumps(content, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % PAGE)
        return _with_checksum(text, _header_checksum(text))

    @cached_property
    def checked_tensors(self) -> tuple[str, ...]:
        """Names of the tensors that `checksums.tensors` covers, in its order.

        Payload is among them: a layer that is read as a whole is checked as a whole.
        """
        return tuple(name for name in self.places if name.split(".")[0] not in ("padding", "checksums"))

    @property
    def nbytes(self) -> int:
        """Bytes of the whole segment."""
        return len(self.encoded) + self.data_bytes

    @property
    def data_bytes(self) -> int:
        """Bytes of the data section."""
        last = next(reversed(self.places.values()))
        return last.start + last.nbytes

    def _metadata(self) -> dict[str, str]:
        own = {
            "format": "hf_contiguouskv",
            "version": str(FORMAT_VERSION if self.geometry.compact_layers else OLDEST_VERSION),
            "fingerprint": self.fingerprint,
            "root": self.root,
            "parent": self.parent,
            "key": self.key,
            "first_chunk": str(self.first_chunk),
            "num_tokens": str(self.num_tokens),
            "salted": "1" if self.salted else "0",
            "beginning": self.beginning,
            # Of fixed width: it is known only when everything else has been written.
            "compute_ms": f"{min(self.compute_ms, 10**12 - 1):012d}",
            "mac": self.mac,
            "checksum": _NO_CHECKSUM,
        }
        return own | self.geometry.to_metadata()


def _header_checksum(text: bytes) -> str:
    """xxh3_64 of the JSON and its padding, taken with zeros for the checksum itself."""
    return f"{xxhash.xxh3_64_intdigest(_with_checksum(text, _NO_CHECKSUM)):016x}"


def _with_checksum(text: bytes, checksum: str) -> bytes:
    return _CHECKSUM.sub(f'"checksum":"{checksum}"'.encode(), text, count=1)


def covered_by_mac(text: bytes) -> bytes:
    """The JSON and padding of a header as the code of a key covers it: with zeros for that code and the checksum."""
    return _MAC.sub(f'"mac":"{NO_MAC}"'.encode(), _with_checksum(text, _NO_CHECKSUM), count=1)


def read_header(blob: Blob, parse: Callable[[bytes, int, str], SegmentHeader]) -> tuple[SegmentHeader, int]:
    """Read and check the header of an open blob.

    Args:
        blob: holds the segment.
        parse: reads the JSON part: `parse_header` or `parse_earlier_header`.

    Returns:
        the header, and where the data section starts, in bytes.

    Raises:
        SegmentCorruptError: truncated, foreign, or a header that contradicts itself or its checksum.
        StoreFormatError: written by another format; `EarlierFormatError`, if that is format 1 or 2.
        OSError: the storage failed.
    """
    size, name = blob.nbytes, blob.name
    if size < 8:
        raise SegmentCorruptError(f"{name}: {size} bytes is too short for a segment")
    beginning = bytearray(min(size, _FIRST_READ))
    try:
        blob.read_into([(0, memoryview(beginning))])
        length = int.from_bytes(beginning[:8], "little")
        if not 2 <= length <= MAX_HEADER_BYTES or 8 + length > size:
            raise SegmentCorruptError(
                f"{name}: header of {length} bytes in a file of {size} bytes; not a segment, or cut"
            )
        if 8 + length > len(beginning):
            if not blob.is_backed(0, 8 + length):
                raise SegmentCorruptError(f"{name}: its header of {length} bytes is a hole in the file")
            rest = bytearray(8 + length - len(beginning))
            blob.read_into([(len(beginning), memoryview(rest))])
            beginning += rest
    except EOFError as error:
        raise SegmentCorruptError(f"{name}: ends inside its header ({error})") from None
    return parse(bytes(beginning[8 : 8 + length]), size, name), 8 + length


def parse_header(text: bytes, file_bytes: int, name: str) -> SegmentHeader:
    """Check the JSON part of a header against what its own geometry demands and against the size of the file.

    Raises:
        SegmentCorruptError, StoreFormatError: see `read_header`.
    """
    header = _as_written_here(text)
    if header is None:
        header = _parse_any(text, file_bytes, name, _require_this_format)
    return _of_whole_file(header, text, file_bytes, name)


def parse_earlier_header(text: bytes, file_bytes: int, name: str) -> SegmentHeader:
    """As `parse_header`, of a segment of format 1 or 2. The names in it are those of its format.

    Raises:
        SegmentCorruptError: see `read_header`.
        StoreFormatError: it is of another format.
    """
    return _of_whole_file(_parse_any(text, file_bytes, name, _require_earlier_format), text, file_bytes, name)


def _of_whole_file(header: SegmentHeader, text: bytes, file_bytes: int, name: str) -> SegmentHeader:
    wanted = 8 + len(text) + header.data_bytes
    if (8 + len(text)) % PAGE or wanted != file_bytes:
        raise SegmentCorruptError(f"{name}: {file_bytes} bytes, expected {wanted}; the file was cut or extended")
    return header


def _as_written_here(text: bytes) -> SegmentHeader | None:
    """The header, if this library would write it just so, as nearly all are: that takes less time than to parse it."""
    end = text.find(b"}") + 1
    if not text.startswith(_BEGINNING) or not end:
        return None
    try:
        header = _header_from(json.loads(text[len(_BEGINNING) : end]))
    except (ValueError, AttributeError, RecursionError):
        return None
    return header if header._text() == text else None


def _parse_any(
    text: bytes, file_bytes: int, name: str, adapted: Callable[[dict[str, str], str], dict[str, str]]
) -> SegmentHeader:
    """The header, from metadata that `adapted` accepts, and brings to the present fields."""
    try:
        content = _loads(text)
    except (ValueError, RecursionError) as error:
        raise SegmentCorruptError(f"{name}: header is not JSON ({error})") from None
    metadata = content.pop("__metadata__", None) if isinstance(content, dict) else None
    if not isinstance(metadata, dict) or metadata.get("format") != "hf_contiguouskv":
        raise SegmentCorruptError(f"{name}: not a segment of this library (no format mark in its metadata)")
    # Of another format nothing is known but its number.
    metadata = adapted(metadata, name)
    checksum = _header_checksum(text)
    if metadata.get("checksum") != checksum:
        raise SegmentCorruptError(
            f"{name}: checksum {checksum} of its header, expected {quoted(metadata.get('checksum'))}"
        )
    try:
        header = _header_from(metadata)
    except InputError as error:
        raise SegmentCorruptError(f"{name}: {error}") from None
    # Token ids alone take 8 bytes each: a bound on the work below, whatever the header claims.
    if 8 * header.num_tokens > file_bytes:
        raise SegmentCorruptError(f"{name}: {header.num_tokens} tokens do not fit in {file_bytes} bytes")
    expected = places_as_json(header.places)
    if _exactly(content) != _exactly(expected):
        wrong = next(n for n in [*expected, *content] if _exactly(content.get(n)) != _exactly(expected.get(n)))
        raise SegmentCorruptError(
            f"{name}: tensor {quoted(wrong)} is {quoted(content.get(wrong))}, expected {expected.get(wrong)}"
        )
    return header


def _loads(text: bytes) -> Any:
    """The JSON in a header. Where readers could differ on what it says, it is refused."""
    if not text.startswith(b"{") or not text.rstrip(b" ").endswith(b"}"):
        raise ValueError("it must begin with a brace, and end with one and spaces")
    return json.loads(text.decode(), object_pairs_hook=once_each, parse_int=_plain_int)


def _plain_int(digits: str) -> int:
    if not re.fullmatch(r"0|[1-9][0-9]{0,18}", digits):
        raise ValueError(f"{digits[:20]} is no size")
    return int(digits)


def _exactly(value: Any) -> str:
    # True == 1 == 1.0 in Python, but not in a header.
    return json.dumps(value, sort_keys=True)


def _version_of(metadata: Mapping[str, object]) -> str:
    """The number of the format that metadata name; empty: they name none, which is damage."""
    version = metadata.get("version")
    return version if isinstance(version, str) and re.fullmatch(r"[0-9]{1,9}", version) else ""


def _require_this_format(metadata: dict[str, str], name: str) -> dict[str, str]:
    version = _version_of(metadata)
    if version and int(version) > FORMAT_VERSION:
        raise StoreFormatError(
            f"{name}: segment format {version}; this library reads formats up to {FORMAT_VERSION}. Update it."
        )
    if version in EARLIER_VERSIONS:
        raise EarlierFormatError(
            f"{name}: segment format {version}, of an earlier release; in a store, `contiguouskv repack STORE "
            "--earlier` brings it to the present one"
        )
    return metadata


def _require_earlier_format(metadata: dict[str, str], name: str) -> dict[str, str]:
    version = _version_of(metadata)
    if version not in EARLIER_VERSIONS:
        raise StoreFormatError(f"{name}: not a segment of format {' or '.join(EARLIER_VERSIONS)}")
    # (There were no keys of stores then. Packed values are what makes a segment one of version 2.)
    if (version == "2") != ("packed_layers" in metadata) or "mac" in metadata or "compact_layers" in metadata:
        raise SegmentCorruptError(f"{name}: its fields are not those of segment format {version}")
    return metadata | {"version": str(OLDEST_VERSION), "mac": NO_MAC}


def _header_from(metadata: Mapping[str, Any]) -> SegmentHeader:
    for field in ("root", "key", "parent", "beginning"):
        value = metadata.get(field)
        optional = field in ("parent", "beginning")
        if not isinstance(value, str) or not (_HASH.fullmatch(value) or (optional and not value)):
            raise InputError(f"{field} must be 32 hex digits, got {quoted(value)}")
    fingerprint, mac = metadata.get("fingerprint"), metadata.get("mac")
    readable = isinstance(fingerprint, str) and fingerprint.isascii() and fingerprint.isprintable()
    if not readable or len(metadata["fingerprint"]) > 256 or metadata.get("salted") not in ("0", "1"):
        raise InputError("fingerprint or salted is missing, or makes no sense")
    if not isinstance(mac, str) or not _MAC_DIGITS.fullmatch(mac):
        raise InputError(f"mac must be {2 * MAC_BYTES} hex digits, got {quoted(mac)}")
    header = SegmentHeader(
        geometry=KVGeometry.from_metadata(metadata),
        fingerprint=metadata["fingerprint"],
        root=metadata["root"],
        parent=metadata["parent"],
        key=metadata["key"],
        first_chunk=whole_number(metadata, "first_chunk"),
        num_tokens=whole_number(metadata, "num_tokens"),
        salted=metadata["salted"] == "1",
        beginning=metadata["beginning"],
        compute_ms=whole_number(metadata, "compute_ms"),
        mac=mac,
    )
    for field, text in header._metadata().items():
        if metadata.get(field) != text and field != "checksum":
            raise InputError(f"{field} must be written as {quoted(text)}, got {quoted(metadata.get(field))}")
    if not 0 < header.num_tokens <= MAX_TOKENS or (header.first_chunk == 0) != (header.parent == ""):
        raise InputError(
            f"{header.num_tokens} tokens (1 to {MAX_TOKENS}) from chunk {header.first_chunk} after {header.parent!r}"
        )
    return header
