"""One published segment file, open for reading."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from ..errors import SegmentCorruptError, StoreError
from .format import KVGeometry, read_header
from .hashing import TokenIds

_TORCH_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I64": torch.int64,
    "U64": torch.uint64,
}


class Segment:
    """An open handle of one segment file.

    The descriptors stay open until the handle is closed or collected, so deleting the file does not disturb readers.

    Attributes:
        path: of the file.
        header: its header, checked.
        fd_direct: descriptor with `O_DIRECT`, or `None` where the file system refuses it.
        fd_buffered: ordinary descriptor; -1 once closed.

    Raises:
        FileNotFoundError: no such file.
        SegmentCorruptError, StoreFormatError: see `format.read_header`.
    """

    def __init__(self, path: str | os.PathLike[str], *, direct: bool = True) -> None:
        self.path = Path(path)
        self.fd_direct: int | None = None
        self.fd_buffered = -1
        self.fd_buffered = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.header, self._data_start = read_header(self.fd_buffered, str(self.path))
            status = os.fstat(self.fd_buffered)
            self.file_bytes, self.inode = status.st_size, status.st_ino
            if direct and hasattr(os, "O_DIRECT"):
                self.fd_direct = _open_direct(self.path)
        except BaseException:
            self.close()
            raise
        geometry = self.header.geometry
        self._extent = geometry.extent_bytes
        self._layer_start: list[int] = []
        self._layer_stride: list[int] = []
        for layer in range(geometry.num_layers):
            group, inside = divmod(layer, geometry.layers_per_group)
            start = self._data_start + self.header.places[f"payload.{group}"].start
            self._layer_start.append(start + inside * self._extent)
            self._layer_stride.append(geometry.group_layers(group) * self._extent)
        self._checksums: npt.NDArray[np.uint64] | None = None
        self._checksum_rows: dict[int, list[int]] = {}
        self._tensor_checksums: dict[str, int] = {}
        self._token_ids: TokenIds | None = None

    @property
    def geometry(self) -> KVGeometry:
        """Shapes and layout of the file."""
        return self.header.geometry

    @property
    def key(self) -> str:
        """Chain hash of the last chunk, hex: the name of the segment."""
        return self.header.key

    @property
    def first_chunk(self) -> int:
        """Position of the first chunk of this segment in its prefix."""
        return self.header.first_chunk

    @property
    def num_chunks(self) -> int:
        """Chunks in this segment, a partial last one included."""
        return self.header.num_chunks

    @property
    def num_tokens(self) -> int:
        """Tokens in this segment."""
        return self.header.num_tokens

    @property
    def token_ids(self) -> TokenIds:
        """Token ids of this segment, int64 `[num_tokens]`; read at the first use."""
        if self._token_ids is None:
            self._token_ids = self.read_tensor("token_ids").numpy()
        return self._token_ids

    def payload_extent(self, layer: int, chunk: int) -> tuple[int, int]:
        """`(offset, nbytes)` in the file of K and V of `layer` for chunk number `chunk` of this segment.

        Consecutive chunks of a layer are `payload_stride(layer)` bytes apart; with one layer per group that is
        `nbytes`, so that a run of chunks is one range.
        """
        return self._layer_start[layer] + chunk * self._layer_stride[layer], self._extent

    def payload_stride(self, layer: int) -> int:
        """Bytes from one chunk of `layer` to the next."""
        return self._layer_stride[layer]

    def tensor_extent(self, name: str) -> tuple[int, int]:
        """`(offset, nbytes)` in the file of tensor `name`.

        Raises:
            KeyError: the segment has no such tensor.
        """
        place = self.header.places[name]
        return self._data_start + place.start, place.nbytes

    def payload_checksum(self, layer: int, chunk: int) -> int:
        """xxh3_64 of the extent of `layer` and chunk number `chunk` of this segment."""
        if self._checksums is None:
            self._load_checksums()
        checksums = self._checksums
        return checksums.item(layer, chunk)  # type: ignore[union-attr]

    def layer_checksum(self, layer: int) -> int | None:
        """xxh3_64 of all chunks of `layer` together, if they are one range of the file."""
        groups = self.header.geometry.layers_per_group
        return self.tensor_checksum(f"payload.{layer}") if groups == 1 else None

    def run_checksums(self, layer: int, first: int, chunks: int) -> list[int]:
        """`payload_checksum` of consecutive chunks."""
        row = self._checksum_rows.get(layer)
        if row is None:
            if self._checksums is None:
                self._load_checksums()
            # As a list: hundreds of reads of a layer look up one number each.
            row = self._checksum_rows[layer] = self._checksums[layer].tolist()  # type: ignore[index]
        return row[first : first + chunks]

    def tensor_checksum(self, name: str) -> int:
        """xxh3_64 of the whole tensor `name`, one of `header.checked_tensors`."""
        if self._checksums is None:
            self._load_checksums()
        return self._tensor_checksums[name]

    def read_tensor(self, name: str) -> torch.Tensor:
        """Read a whole tensor through the page cache and compare its checksum, where it has one.

        Raises:
            KeyError: the segment has no such tensor.
            SegmentCorruptError: the file was cut, or its bytes do not match.
        """
        offset, nbytes = self.tensor_extent(name)
        octets = self.read_bytes(offset, nbytes)
        if name in self.header.checked_tensors and xxhash.xxh3_64_intdigest(octets) != self.tensor_checksum(name):
            raise SegmentCorruptError(f"{self.path}: the bytes of {name} do not match their checksum")
        place = self.header.places[name]
        return torch.frombuffer(octets, dtype=_TORCH_DTYPES[place.dtype]).reshape(place.shape)

    def read_bytes(self, offset: int, nbytes: int) -> bytearray:
        """Read `nbytes` from `offset` through the page cache.

        Raises:
            SegmentCorruptError: the file ends before.
        """
        if self.fd_buffered < 0:
            raise StoreError(f"{self.path}: the segment is closed")
        octets = bytearray(nbytes)
        view = memoryview(octets)
        done = 0
        while done < nbytes:
            got = os.preadv(self.fd_buffered, (view[done:],), offset + done)
            if got == 0:
                raise SegmentCorruptError(f"{self.path}: file ends inside {self.describe(offset)}")
            done += got
        return octets

    def describe(self, offset: int) -> str:
        """What lies at `offset` of the file, in words: layer and chunk, or a tensor."""
        start = offset - self._data_start
        for name, place in self.header.places.items():
            if place.start <= start < place.start + place.nbytes:
                if not name.startswith("payload."):
                    return f"tensor {name}"
                group = int(name.removeprefix("payload."))
                chunk, rest = divmod(start - place.start, self.geometry.group_layers(group) * self._extent)
                layer = group * self.geometry.layers_per_group + rest // self._extent
                return f"layer {layer}, chunk {self.first_chunk + chunk}"
        return f"offset {offset}"

    def _load_checksums(self) -> None:
        # The two tensors of checksums are neighbours at the end of the file: one read.
        offset, nbytes = self.tensor_extent("checksums.payload")
        last, last_bytes = self.tensor_extent("checksums.tensors")
        octets = self.read_bytes(offset, last + last_bytes - offset)
        index = np.frombuffer(octets, dtype="<u8", offset=last - offset)
        self._tensor_checksums = dict(zip(self.header.checked_tensors, index.tolist(), strict=True))
        shape = self.header.places["checksums.payload"].shape
        self._checksums = np.frombuffer(octets, dtype="<u8", count=nbytes // 8).reshape(shape)

    def close(self) -> None:
        """Close the descriptors; reads that are under way must have ended."""
        buffered, direct = self.fd_buffered, self.fd_direct
        self.fd_buffered, self.fd_direct = -1, None
        for fd in (buffered, direct):
            if fd is not None and fd >= 0:
                os.close(fd)

    def __del__(self) -> None:
        # A handle that the store's table of open files has let go may still serve a request: the last user closes it.
        if getattr(self, "fd_buffered", -1) >= 0:
            self.close()

    def __deepcopy__(self, memo: object) -> Segment:
        # An open file is shared by the copies of a cache; its descriptors belong to one object.
        return self

    def __repr__(self) -> str:
        return f"Segment({self.path.name}, chunks {self.first_chunk}+{self.num_chunks}, {self.num_tokens} tokens)"


def _open_direct(path: Path) -> int | None:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError:
        # tmpfs of older kernels, some network and overlay file systems: reads go through the page cache instead.
        return None
