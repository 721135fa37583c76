"""One published segment, open for reading."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

import numpy as np
import numpy.typing as npt
import torch

from ..errors import SegmentCorruptError, SegmentKeyError, SegmentReadError
from .backend import Blob
from .extents import ExtentPlaces, Form, exact_extents, small_extents
from .finite import NumberPlaces
from .format import KVGeometry, SegmentHeader, covered_by_mac, parse_header, read_header
from .hashing import TokenIds
from .key import NO_MAC, Checksums, StoreKey, same_mac
from .small_forms import small_forms
from .tensor_places import TORCH_DTYPES

# A read of so many bytes is made without asking whether they are there.
_UNASKED_BYTES = 64 * 1024


class Segment:
    """A segment in an open blob.

    Most of its methods are one-line properties of its header.

    The blob stays open until the segment is closed or collected, so deleting what lies under its key does not disturb
    readers.

    Args:
        blob: open blob; it is closed when it holds no segment.
        key: of the store: only segments that were made with it are opened. `None`: only those without a key.
        parse: reads the JSON part of the header (see `format.read_header`).

    Attributes:
        blob: where the bytes are.
        name: of the blob, for messages.
        header: its header, checked.
        checksum: the checksum of some bytes, as this segment's are made.
        numbers: where its floating-point numbers lie.
        retired: it was removed from its store, and lives only as long as it is in use.

    Raises:
        SegmentCorruptError, StoreFormatError: see `format.read_header`.
        SegmentKeyError: it was made with another key, or with none; or with one, and `key` is `None`.
        SegmentReadError: the storage failed.
    """

    def __init__(
        self,
        blob: Blob,
        key: StoreKey | None = None,
        *,
        parse: Callable[[bytes, int, str], SegmentHeader] = parse_header,
    ) -> None:
        self.blob = blob
        self.retired = False
        self.name = blob.name
        try:
            self.header, self._data_start = read_header(blob, parse)
        except OSError as error:
            blob.close()
            raise SegmentReadError(f"{self.name}: read failed: {error.strerror or error}", None, error.errno) from error
        except BaseException:
            blob.close()
            raise
        self.numbers = NumberPlaces(self.header, self._data_start)
        self.read_into = blob.read_into
        # By form: where extents lie, and their checksums, once these have been read.
        self._extents: dict[Form, ExtentPlaces] = {"exact": exact_extents(self.header, self._data_start)}
        for small in small_forms(self.geometry):
            self._extents[small.form] = small_extents(self.header, self._data_start, small)
        self._checksums: dict[str, npt.NDArray[np.uint64]] = {}
        self._tensor_checksums: dict[str, int] = {}
        self._token_octets = memoryview(b"")
        self._token_ids: TokenIds | None = None
        self.checksums = Checksums() if key is None else key.checksums(self.header.key)
        self.checksum = self.checksums.of
        try:
            self._require_key(key)
        except BaseException:
            blob.close()
            raise

    def _require_key(self, key: StoreKey | None) -> None:
        told = self.header.mac
        if key is None:
            if told != NO_MAC:
                raise SegmentKeyError(
                    f"{self.name}: was stored with a key; open the store with it (`PrefixStore(..., key=...)`)"
                )
            return
        if told == NO_MAC:
            raise SegmentKeyError(f"{self.name}: was stored without a key, and this store has one; it is not used")
        # What is compared with the code is what is used: bytes that change meanwhile, or later, do not count.
        text = bytes(self.read_bytes(8, self._data_start - 8))
        code = key.mac(covered_by_mac(text), self._load_end())
        if not same_mac(code, told) or parse_header(text, self.nbytes, self.name) != self.header:
            raise SegmentKeyError(f"{self.name}: was not stored with the key of this store; it is not used")

    @property
    def nbytes(self) -> int:
        """Length of the blob."""
        return self.blob.nbytes

    @property
    def identity(self) -> Hashable:
        """Tells this blob from others under the same key."""
        return self.blob.identity

    @property
    def geometry(self) -> KVGeometry:
        """Shapes and layout."""
        return self.header.geometry

    @property
    def num_layers(self) -> int:
        """Layers of the model, all of which it has chunks of."""
        return self.geometry.num_layers

    @property
    def in_memory(self) -> bool:
        """Whether its bytes lie in memory."""
        return bool(getattr(self.blob, "in_memory", False))

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
            if not self._checksums:
                self._load_end()
            if self.checksum(self._token_octets) != self.tensor_checksum("token_ids"):
                raise SegmentCorruptError(f"{self.name}: the bytes of token_ids do not match their checksum", self)
            self._token_ids = np.frombuffer(self._token_octets, dtype="<i8")
        return self._token_ids

    def extents(self, form: Form = "exact") -> ExtentPlaces:
        """Where chunks lie in one form.

        Raises:
            KeyError: the segment has no chunks in this form.
        """
        return self._extents[form]

    def extent_bytes(self, form: Form = "exact") -> int:
        """Bytes of one chunk of one layer in one form.

        Raises:
            KeyError: the segment has no chunks in this form.
        """
        return self._extents[form].nbytes

    def tensor_extent(self, name: str) -> tuple[int, int]:
        """`(offset, nbytes)` in the file of tensor `name`.

        Raises:
            KeyError: the segment has no such tensor.
        """
        place = self.header.places[name]
        return self._data_start + place.start, place.nbytes

    def layer_checksum(self, layer: int, form: Form = "exact") -> int | None:
        """Checksum of all chunks of `layer` together, if they are one range of the file."""
        tensor = self._extents[form].tensors[layer]
        return self.tensor_checksum(tensor) if tensor else None

    def run_checksums(self, layer: int, first: int, chunks: int, form: Form = "exact") -> list[int]:
        """Checksum of each extent of consecutive chunks of `layer`, `first` counted in this segment."""
        if not self._checksums:
            self._load_end()
        extents = self._extents[form]
        # As an array: lists of all of them would take five times the memory, for every open segment.
        found: list[int] = self._checksums[extents.checksums][extents.rows[layer], first : first + chunks].tolist()
        return found

    def tensor_checksum(self, name: str) -> int:
        """Checksum of the whole tensor `name`, one of `header.checked_tensors`."""
        if not self._checksums:
            self._load_end()
        return self._tensor_checksums[name]

    def read_tensor(self, name: str) -> torch.Tensor:
        """Read a whole tensor and compare its checksum, where it has one.

        Raises:
            KeyError: the segment has no such tensor.
            SegmentCorruptError: the blob was cut, or its bytes do not match.
            SegmentReadError: the storage failed.
        """
        offset, nbytes = self.tensor_extent(name)
        octets = self.read_bytes(offset, nbytes)
        if name in self.header.checked_tensors and self.checksum(octets) != self.tensor_checksum(name):
            raise SegmentCorruptError(f"{self.name}: the bytes of {name} do not match their checksum", self)
        if not name.startswith("padding."):  # (It holds no numbers, and some lies between packed extents.)
            self.require_finite(offset, memoryview(octets))
        place = self.header.places[name]
        return torch.frombuffer(octets, dtype=TORCH_DTYPES[place.dtype]).reshape(place.shape)

    def shaped(self, names: Iterable[str], octets: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        """Bytes of tensors, uint8 `(nbytes,)` each, as the tensors with these names."""
        places = (self.header.places[name] for name in names)
        return [
            some.view(TORCH_DTYPES[place.dtype]).view(place.shape) for place, some in zip(places, octets, strict=True)
        ]

    def read_bytes(self, offset: int, nbytes: int) -> bytearray:
        """Read `nbytes` from `offset`, here and now.

        Raises:
            SegmentCorruptError: the blob ends before.
            SegmentReadError: the storage failed.
        """
        if nbytes > _UNASKED_BYTES and not self.blob.is_backed(offset, nbytes):
            # Memory for it would be taken on the word of the file alone.
            raise SegmentCorruptError(f"{self.name}: {self.describe(offset)} is a hole in the file", self)
        octets = bytearray(nbytes)
        try:
            self.blob.read_into([(offset, memoryview(octets))])
        except EOFError as error:
            raise self.cut_short(offset, error) from None
        except OSError as error:
            raise SegmentReadError(f"{self.name}: read failed: {error.strerror or error}", self, error.errno) from error
        return octets

    def require_finite(self, offset: int, octets: memoryview) -> None:
        """Refuse numbers that are not finite: no model computes them, and one of them spoils a whole answer.

        Args:
            offset: of `octets` in the file; where they are extents, of the first one.
            octets: bytes of the file.

        Raises:
            SegmentCorruptError: there is one.
        """
        if not self.numbers.are_finite(offset, octets):
            raise SegmentCorruptError(
                f"{self.name}: {self.describe(offset)} holds numbers that are not finite, or too large", self
            )

    def cut_short(self, offset: int, error: EOFError) -> SegmentCorruptError:
        """The error for a blob that ends inside what begins at `offset`."""
        return SegmentCorruptError(f"{self.name}: ends inside {self.describe(offset)} ({error})", self)

    def describe(self, offset: int) -> str:
        """What lies at `offset` of the file, in words: layer and chunk, or a tensor."""
        start = offset - self._data_start
        for name, place in self.header.places.items():
            if place.start <= start < place.start + place.nbytes:
                kind, _, number = name.partition(".")
                inside = start - place.start
                for small in small_forms(self.geometry):
                    if kind == small.kind:
                        chunk = self.first_chunk + inside // small.nbytes
                        return f"{small.form} layer {number}, chunk {chunk}"
                if kind != "payload":
                    return f"tensor {name}"
                group, extent = int(number), self.geometry.extent_bytes
                chunk, rest = divmod(inside, self.geometry.group_layers(group) * extent)
                layer = group * self.geometry.layers_per_group + rest // extent
                return f"layer {layer}, chunk {self.first_chunk + chunk}"
        return f"offset {offset}"

    def _load_end(self) -> memoryview:
        """Read token ids and checksums, the neighbours at the end of the file, at once; the bytes of the checksums."""
        offset, ids_bytes = self.tensor_extent("token_ids")
        last, last_bytes = self.tensor_extent("checksums.tensors")
        octets = memoryview(self.read_bytes(offset, last + last_bytes - offset))
        self._token_octets = octets[:ids_bytes]
        index = np.frombuffer(octets, dtype="<u8", offset=last - offset)
        self._tensor_checksums = dict(zip(self.header.checked_tensors, index.tolist(), strict=True))
        found = {}
        for extents in self._extents.values():
            start, nbytes = self.tensor_extent(extents.checksums)
            shape = self.header.places[extents.checksums].shape
            sums = np.frombuffer(octets, dtype="<u8", count=nbytes // 8, offset=start - offset)
            found[extents.checksums] = sums.reshape(shape)
        self._checksums = found
        # (Each of them has 8 bytes or a multiple: there is no padding between.)
        return octets[ids_bytes:]

    def close(self) -> None:
        """Close the blob; reads that are under way must have ended."""
        self.blob.close()

    def __deepcopy__(self, memo: object) -> Segment:
        # An open file is shared by the copies of a cache; its descriptors belong to one object.
        return self

    def __repr__(self) -> str:
        return f"Segment({self.name}, chunks {self.first_chunk}+{self.num_chunks}, {self.num_tokens} tokens)"


# Makes a segment of an open blob; knows the key of the store. `functools.partial(Segment, key=...)` is one.
SegmentOpener = Callable[[Blob], Segment]
