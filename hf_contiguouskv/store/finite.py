"""Whether the numbers in a range of a segment are finite, told by their bits."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from .format import SegmentHeader

if TYPE_CHECKING:
    from .segment import Segment

Bits = npt.NDArray[Any]


class Kind(NamedTuple):
    """A type of floating-point number, told by its bits.

    Read as a signed integer, a positive number that is not finite is `limit` or more, and every negative one is below;
    read as an unsigned one, the same holds for negative numbers and `limit` with the bit of the sign.
    """

    signed: np.dtype[Any]
    unsigned: np.dtype[Any]
    limit: int

    def are_finite(self, bits: Bits) -> bool:
        """Whether all numbers are (of `signed`, any shape)."""
        if not bits.size:
            return True
        sign = 1 << (8 * self.signed.itemsize - 1)
        return int(bits.max()) < self.limit and int(bits.view(self.unsigned).max()) < self.limit + sign


Numbers = tuple[Kind, Bits]

_INFINITE: dict[torch.dtype, Kind] = {
    torch.bfloat16: Kind(np.dtype("<i2"), np.dtype("<u2"), 0x7F80),
    torch.float16: Kind(np.dtype("<i2"), np.dtype("<u2"), 0x7C00),
    torch.float32: Kind(np.dtype("<i4"), np.dtype("<u4"), 0x7F800000),
}
# Scales of packed values: lowest + 15 * step must be finite as well, which it is if both are below 2**123.
_PACKED = Kind(np.dtype("<i2"), np.dtype("<u2"), 0x7D00)
_SCALES = _INFINITE[torch.float32]
# So much stays in a core's own cache from the read to the look at it.
_TOGETHER_BYTES = 2**17

_of_thread = threading.local()


class NumberPlaces:
    """Where the floating-point numbers of a segment lie.

    Args:
        header: of the segment.
        data_start: where its data section begins, in bytes.
    """

    __slots__ = ("_extents", "_extents_kind", "_packed", "_packed_bytes", "_scales", "_scales_from")

    def __init__(self, header: SegmentHeader, data_start: int) -> None:
        g = header.geometry
        self._extents_kind = _INFINITE[g.dtype]

        def region(*kinds: str) -> tuple[int, int]:
            places = [place for name, place in header.places.items() if name.partition(".")[0] in kinds]
            if not places:
                return 0, 0
            return data_start + places[0].start, data_start + places[-1].start + places[-1].nbytes

        # Tensors of a kind are neighbours, and zeros of padding are finite.
        self._extents = region("payload", "leader_keys")
        self._scales = region("key_scale")
        self._packed = region("values4")
        self._packed_bytes = g.packed_bytes
        self._scales_from = g.kv_heads * g.chunk_size * (g.head_dim // 2)

    def numbers_in(self, offset: int, octets: memoryview) -> Numbers | None:
        """The floating-point numbers in `octets`, which lie at `offset` of the file; `None`: there are none.

        Of packed values, the range is whole packed extents. Numbers that an end of the range cuts are left out.
        """
        begin, end = self._extents
        if begin <= offset < end:
            if offset + octets.nbytes > end:
                octets = octets[: end - offset]
            return self._extents_kind, _whole(octets, offset - begin, self._extents_kind.signed)
        if self._packed[0] <= offset < self._packed[1] and octets.nbytes % self._packed_bytes == 0:
            rows = np.frombuffer(octets, "u1").reshape(-1, self._packed_bytes)
            scales = rows[0, self._scales_from :] if len(rows) == 1 else rows[:, self._scales_from :].reshape(-1)
            return _PACKED, scales.view(_PACKED.signed)
        begin, end = self._scales
        if begin <= offset < end:
            if offset + octets.nbytes > end:
                octets = octets[: end - offset]
            return _SCALES, _whole(octets, offset - begin, _SCALES.signed)
        return None

    def are_finite(self, offset: int, octets: memoryview) -> bool:
        """Whether no number in `octets`, which lie at `offset` of the file, is infinite or none; see `numbers_in`."""
        found = self.numbers_in(offset, octets)
        return found is None or found[0].are_finite(found[1])


def _whole(octets: memoryview, position: int, dtype: np.dtype[Any]) -> Bits:
    """The whole numbers in `octets`; `position`: counted in bytes from where numbers begin."""
    skipped, size = -position % dtype.itemsize, octets.nbytes
    if skipped or size % dtype.itemsize:
        octets = octets[skipped : skipped + max(0, size - skipped) // dtype.itemsize * dtype.itemsize]
    return np.frombuffer(octets, dtype)


def _together(some: list[Bits]) -> Bits:
    """All of them one after the other, in memory that the thread keeps."""
    size, dtype = sum(bits.size for bits in some), some[0].dtype
    kept: Bits | None = getattr(_of_thread, "buffer", None)
    if kept is None or kept.nbytes < size * dtype.itemsize:
        kept = _of_thread.buffer = np.empty(max(2 * _TOGETHER_BYTES, size * dtype.itemsize), "u1")
    return np.concatenate(some, out=kept[: size * dtype.itemsize].view(dtype))


class FiniteCheck:
    """Looks at the numbers of many small reads at once: one at a time, each would cost more than its checksum.

    (What costs is not the arithmetic: numpy gives up the interpreter lock, and a reader thread waits to get it back.)
    """

    __slots__ = ("_found", "_nbytes", "_ranges")

    def __init__(self) -> None:
        self._found: dict[Kind, list[Bits]] = {}
        self._ranges: list[tuple[Segment, int, memoryview]] = []
        self._nbytes = 0

    def add(self, segment: Segment, offset: int, octets: memoryview) -> None:
        """Note bytes that were read from `offset`; they are looked at now or in `finish`.

        Raises:
            SegmentCorruptError: a number is not finite, in these or in those that were noted before.
        """
        found = segment.numbers.numbers_in(offset, octets)
        if found is None:
            return
        kind, bits = found
        self._found.setdefault(kind, []).append(bits)
        self._ranges.append((segment, offset, octets))
        self._nbytes += bits.nbytes
        if self._nbytes >= _TOGETHER_BYTES:
            self.finish()

    def finish(self) -> None:
        """Look at what was noted.

        Raises:
            SegmentCorruptError: a number is not finite; the error names where.
        """
        found, ranges = self._found, self._ranges
        self._found, self._ranges, self._nbytes = {}, [], 0
        for kind, some in found.items():
            if not kind.are_finite(some[0] if len(some) == 1 else _together(some)):
                for segment, offset, octets in ranges:
                    segment.require_finite(offset, octets)
