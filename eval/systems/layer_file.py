"""One file for each prefix, as systems that load all of it want it: layer by layer, nothing cut into chunks.

    magic, length and checksum of the header | header (JSON) | padding | layer 0 | layer 1 | ...

A layer is one *part*, or several (FlexGen keeps some in memory and the rest on disk), each of a range of tokens. A part
is `[2 (K, V), kv_heads, tokens, head_dim]`, contiguous. The tokens of a part are padded so that each row of a head
begins and ends at a page: direct reads land where attention looks for K and V, without a copy. Each part has one
checksum, which is built from those of its *ranges* of 4 MiB: several threads read and check one part together.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from transformers import DynamicCache

from hf_contiguouskv.hardware.aligned_memory import PAGE, aligned_buffer, as_memoryview

MAGIC = b"KVLAYERS"
RANGE_BYTES = 4 * 2**20
_FIXED = len(MAGIC) + 16


class DamagedFileError(Exception):
    """A file of layers is not as it was written."""


@dataclass(frozen=True)
class LayerShape:
    """K and V of one prefix in one model.

    Attributes:
        layers: of the model.
        kv_heads: per layer.
        head_dim: channels of a head.
        dtype: name of the dtype in torch, such as `"bfloat16"`.
        parts: tokens of each part of a layer; together those of the prefix. All but the last are multiples of `align`.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    parts: tuple[int, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    @property
    def tokens(self) -> int:
        """Tokens of the prefix."""
        return sum(self.parts)

    @property
    def rows(self) -> int:
        """Rows of a layer: K and V of each head."""
        return 2 * self.kv_heads

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in one row."""
        return self.head_dim * self.torch_dtype.itemsize

    @property
    def align(self) -> int:
        """Tokens of a row that are the fewest whole pages."""
        return PAGE // math.gcd(PAGE, self.token_bytes)

    def padded(self, tokens: int) -> int:
        """The next multiple of `align`."""
        return -(-tokens // self.align) * self.align

    @cached_property
    def firsts(self) -> tuple[int, ...]:
        """First token of each part."""
        return tuple(sum(self.parts[:number]) for number in range(len(self.parts)))

    def part_bytes(self, part: int) -> int:
        """Bytes of a part of a layer in the file."""
        return self.rows * self.padded(self.parts[part]) * self.token_bytes

    @property
    def layer_bytes(self) -> int:
        """Bytes of a layer in the file."""
        return sum(self.part_bytes(part) for part in range(len(self.parts)))

    def capacity(self, room: int) -> int:
        """Tokens of a buffer for a layer, whole pages per row: the prefix with `room` tokens behind it."""
        return self.padded(self.padded(self.tokens) + room)

    def offset(self, layer: int, part: int) -> int:
        """Where a part begins, behind the header."""
        return layer * self.layer_bytes + sum(self.part_bytes(before) for before in range(part))


class RangeSums:
    """Checksum of a part, from those of its ranges, which may come in any order."""

    def __init__(self, nbytes: int) -> None:
        self._sums = np.zeros(-(-nbytes // RANGE_BYTES), dtype="<u8")

    def note(self, number: int, views: Sequence[memoryview]) -> None:
        """The bytes of a range, in order."""
        state = xxhash.xxh3_64()
        for view in views:
            state.update(view)
        self._sums[number] = state.intdigest()

    def hexdigest(self) -> str:
        """Of all ranges."""
        found: str = xxhash.xxh3_64_hexdigest(self._sums.tobytes())
        return found


def ranges_of(nbytes: int) -> Iterator[tuple[int, int, int]]:
    """`(number, begin, end)` of each range of a part."""
    for number, begin in enumerate(range(0, nbytes, RANGE_BYTES)):
        yield number, begin, min(nbytes, begin + RANGE_BYTES)


def row_pieces(rows: Sequence[memoryview], begin: int, end: int) -> list[tuple[int, memoryview]]:
    """Bytes `begin` to `end` of a part as pieces of its rows (of equal lengths): `(place in the part, bytes)`."""
    length = rows[0].nbytes
    found = []
    while begin < end:
        row, first = divmod(begin, length)
        last = min(length, first + end - begin)
        found.append((begin, rows[row][first:last]))
        begin += last - first
    return found


def write_layers(path: Path, shape: LayerShape, states: DynamicCache) -> None:
    """Write a file and make it durable; it appears when it is complete.

    Args:
        path: of the file. Its folder exists.
        shape: of the prefix.
        states: K and V `(1, kv_heads, n, head_dim)` of each layer, on any device.
    """
    largest = max((shape.part_bytes(part) for part in range(len(shape.parts))), default=0)
    buffer = aligned_buffer(max(1, largest))
    # Of the length that it will have: checksums have one length.
    empty = [["0" * 16] * len(shape.parts)] * shape.layers
    begin = len(_header(shape, empty))
    partial = path.with_suffix(".partial")
    sums = []
    with partial.open("wb") as file:
        file.write(bytes(begin))
        for layer in states.layers:
            both = torch.cat([layer.keys, layer.values]).to(dtype=shape.torch_dtype)
            own = []
            for first, tokens, part in zip(shape.firsts, shape.parts, range(len(shape.parts)), strict=True):
                octets = buffer[: shape.part_bytes(part)]
                octets.zero_()
                place = octets.view(shape.torch_dtype).view(2, shape.kv_heads, shape.padded(tokens), shape.head_dim)
                place[:, :, :tokens] = both[:, :, first : first + tokens].to(place.device)
                view = as_memoryview(octets)
                found = RangeSums(len(view))
                for number, low, high in ranges_of(len(view)):
                    found.note(number, [view[low:high]])
                own.append(found.hexdigest())
                file.write(view)
            sums.append(own)
        file.seek(0)
        file.write(_header(shape, sums))
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def _header(shape: LayerShape, sums: Sequence[Sequence[str]]) -> bytes:
    text = json.dumps(asdict(shape) | {"checksums": sums}).encode()
    fixed = MAGIC + len(text).to_bytes(8, "little") + xxhash.xxh3_64_digest(text)
    return (fixed + text).ljust(-(-(_FIXED + len(text)) // PAGE) * PAGE, b"\0")


@dataclass(frozen=True)
class Header:
    """What a file says of itself.

    Attributes:
        shape: of the prefix.
        checksums: by layer and part, 16 hexadecimal digits.
        begin: where layer 0 begins.
    """

    shape: LayerShape
    checksums: tuple[tuple[str, ...], ...]
    begin: int


def read_header(path: Path) -> Header:
    """The header of a file.

    Raises:
        DamagedFileError: it is not as it was written.
        OSError: it cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        # At once, since a second read would wait for the disk again.
        first = _read_fully(file, 2 * PAGE)
        length = int.from_bytes(first[len(MAGIC) : len(MAGIC) + 8], "little")
        size = os.fstat(file.fileno()).st_size
        if first[: len(MAGIC)] != MAGIC or _FIXED + length > size:
            raise DamagedFileError(f"{path}: this is no file of layers")
        text = (first + _read_fully(file, max(0, _FIXED + length - len(first))))[_FIXED : _FIXED + length]
        # The file was not read for its K and V: those are read past the page cache.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if xxhash.xxh3_64_digest(text) != first[len(MAGIC) + 8 : _FIXED]:
        raise DamagedFileError(f"{path}: the checksum of the header does not match")
    said: dict[str, Any] = json.loads(text)
    sums = tuple(tuple(own) for own in said.pop("checksums"))
    shape = LayerShape(**(said | {"parts": tuple(said["parts"])}))
    begin = -(-(_FIXED + length) // PAGE) * PAGE
    if size < begin + shape.layers * shape.layer_bytes:
        raise DamagedFileError(f"{path}: it ends too early")
    return Header(shape, sums, begin)


def _read_fully(file: Any, nbytes: int) -> bytes:
    found = b""
    while len(found) < nbytes:
        more = file.read(nbytes - len(found))
        if not more:
            break
        found += more
    return found
