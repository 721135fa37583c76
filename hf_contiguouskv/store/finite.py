"""Whether the numbers in a range of a segment are finite, and no larger than any that a model computes.

They are told by their bits. Numbers of 2**56 and above count as infinite: no sound key or value comes near, and
products of a few of them are infinite indeed, which spoils an answer as well.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from .format import SegmentHeader


class Kind(NamedTuple):
    """A type of floating-point number, told by its bits.

    Read as a signed integer, a positive number that is too large is `limit` or more, and every negative one is below;
    read as an unsigned one, the same holds for negative numbers and `limit` with the bit of the sign.
    """

    itemsize: int
    limit: int

    def are_finite(self, octets: bytes | memoryview) -> bool:
        """Whether all numbers in these bytes are."""
        if not octets:
            return True
        signed, unsigned, sign = ("<i2", "<u2", 1 << 15) if self.itemsize == 2 else ("<i4", "<u4", 1 << 31)
        bits = np.frombuffer(octets, signed)
        return bool(np.maximum.reduce(bits) < self.limit and np.maximum.reduce(bits.view(unsigned)) < self.limit + sign)


class PackedInFloat16(NamedTuple):
    """Scales of packed values that become float16: bfloat16 says more than that.

    They come extent by extent, `pairs` lowest values before as many steps.
    """

    pairs: int

    def are_finite(self, octets: bytes | memoryview) -> bool:
        """Whether all values that these scales can give are finite in float16."""
        bits = np.frombuffer(octets, "<u2").astype("<u4").reshape(-1, 2, self.pairs)
        lowest, step = np.moveaxis((bits << 16).view("<f4"), 1, 0)
        with np.errstate(all="ignore"):  # (Infinity less infinity is no number, and not below anything.)
            largest = np.maximum(np.abs(lowest), np.abs(lowest + _LARGEST_CODE * step))
            return bool((largest <= _LARGEST_FLOAT16).all())


# Of K and V: 2**56; in float16, all that is finite.
_NUMBERS = {torch.bfloat16: Kind(2, 0x5B80), torch.float16: Kind(2, 0x7C00), torch.float32: Kind(4, 0x5B800000)}
# Of the scales of a key index, float32, which 127 is multiplied with: 2**49; in float16, its largest number / 127.
_SCALES = {torch.bfloat16: Kind(4, 0x58000000), torch.float16: Kind(4, 0x4400F974), torch.float32: Kind(4, 0x58000000)}
# Of the lowest value and the step of packed values, bfloat16: 2**56.
_PACKED = Kind(2, 0x5B80)
_LARGEST_CODE = 15
# Above it, the nearest float16 is infinite.
_LARGEST_FLOAT16 = 65519.0


class NumberPlaces:
    """Where the floating-point numbers of a segment lie.

    Args:
        header: of the segment.
        data_start: where its data section begins, in bytes.
    """

    __slots__ = (
        "_extents",
        "_extents_kind",
        "_packed",
        "_packed_bytes",
        "_packed_kind",
        "_scales",
        "_scales_from",
        "_scales_kind",
    )

    def __init__(self, header: SegmentHeader, data_start: int) -> None:
        g = header.geometry
        self._extents_kind, self._scales_kind = _NUMBERS[g.dtype], _SCALES[g.dtype]

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
        pairs = (g.packed_bytes - self._scales_from) // 4
        self._packed_kind = PackedInFloat16(pairs) if g.dtype == torch.float16 else _PACKED

    def octets_in(self, offset: int, octets: memoryview) -> tuple[Kind | PackedInFloat16, memoryview] | None:
        """The bytes of the floating-point numbers in `octets`, which lie at `offset` of the file; `None`: no numbers.

        Of packed values, the range is whole packed extents. Numbers that an end of the range cuts are left out.
        """
        begin, end = self._extents
        if begin <= offset < end:
            return self._extents_kind, _whole(octets, offset - begin, end - offset, self._extents_kind.itemsize)
        if self._packed[0] <= offset < self._packed[1] and octets.nbytes % self._packed_bytes == 0:
            if octets.nbytes == self._packed_bytes:
                return self._packed_kind, octets[self._scales_from :]
            rows = np.frombuffer(octets, "u1").reshape(-1, self._packed_bytes)
            return self._packed_kind, memoryview(rows[:, self._scales_from :].tobytes())
        begin, end = self._scales
        if begin <= offset < end:
            return self._scales_kind, _whole(octets, offset - begin, end - offset, self._scales_kind.itemsize)
        return None

    def are_finite(self, offset: int, octets: memoryview) -> bool:
        """Whether no number in `octets`, which lie at `offset` of the file, is infinite or none; see `octets_in`."""
        found = self.octets_in(offset, octets)
        return found is None or found[0].are_finite(found[1])


def _whole(octets: memoryview, position: int, left: int, itemsize: int) -> memoryview:
    """The whole numbers in `octets`, `position` bytes from where numbers begin, and `left` to where they end."""
    skipped, size = -position % itemsize, min(octets.nbytes, left)
    if not skipped and not size % itemsize and size == octets.nbytes:
        return octets
    return octets[skipped : skipped + max(0, size - skipped) // itemsize * itemsize]
