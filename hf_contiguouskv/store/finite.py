"""Whether the numbers in a range of a segment are finite, and no larger than any that a model computes.

They are told by their bits. Numbers of 2**56 and above count as infinite: no sound key or value comes near, and
products of a few of them are infinite indeed, which spoils an answer as well.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from ..model.kv_geometry import KVGeometry
from .format import SegmentHeader
from .small_forms import SmallForm, small_forms


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


class SmallInFloat16(NamedTuple):
    """Scales of packed values, and of the keys of compact extents, that become float16: bfloat16 says more than that.

    They come extent by extent: `scales` of keys, then `pairs` lowest values before as many steps.
    """

    scales: int
    pairs: int

    def are_finite(self, octets: bytes | memoryview) -> bool:
        """Whether all keys and values that these scales can give are finite in float16."""
        bits = np.frombuffer(octets, "<u2").astype("<u4").reshape(-1, self.scales + 2 * self.pairs)
        numbers = (bits << 16).view("<f4")
        scale, lowest, step = np.split(numbers, [self.scales, self.scales + self.pairs], axis=1)
        with np.errstate(all="ignore"):  # (Infinity less infinity is no number, and not below anything.)
            largest = np.maximum(np.abs(lowest), np.abs(lowest + _LARGEST_CODE * step))
            keys = np.abs(scale) * _LARGEST_KEY
            return bool((largest <= _LARGEST_FLOAT16).all() and (keys <= _LARGEST_FLOAT16).all())


# Of K and V: 2**56; in float16, all that is finite.
_NUMBERS = {torch.bfloat16: Kind(2, 0x5B80), torch.float16: Kind(2, 0x7C00), torch.float32: Kind(4, 0x5B800000)}
# Of the scales of a key index, float32, which 127 is multiplied with: 2**49; in float16, its largest number / 127.
_SCALES = {torch.bfloat16: Kind(4, 0x58000000), torch.float16: Kind(4, 0x4400F974), torch.float32: Kind(4, 0x58000000)}
# Of the numbers of extents in few bits, bfloat16: 2**56.
_SMALL = Kind(2, 0x5B80)
_LARGEST_CODE = 15
_LARGEST_KEY = 127
# Above it, the nearest float16 is infinite.
_LARGEST_FLOAT16 = 65519.0


class _Small(NamedTuple):
    """Where chunks in few bits lie in the file, and where in each of their extents the numbers begin."""

    kind: Kind | SmallInFloat16
    begin: int
    end: int
    nbytes: int
    numbers_from: int

    @classmethod
    def of(cls, g: KVGeometry, small: SmallForm, region: tuple[int, int]) -> _Small:
        codes = g.kv_heads * g.chunk_size * (g.head_dim // 2)
        pairs = (g.packed_bytes - codes) // 4
        scales, codes = (g.kv_heads * g.head_dim, 3 * codes) if small.form == "compact" else (0, codes)
        kind = SmallInFloat16(scales, pairs) if g.dtype == torch.float16 else _SMALL
        return cls(kind, *region, small.nbytes, codes)


class NumberPlaces:
    """Where the floating-point numbers of a segment lie.

    Args:
        header: of the segment.
        data_start: where its data section begins, in bytes.
    """

    __slots__ = (
        "_extents",
        "_extents_kind",
        "_scales",
        "_scales_kind",
        "_small",
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
        self._small = [_Small.of(g, small, region(small.kind)) for small in small_forms(g)]

    def octets_in(self, offset: int, octets: memoryview) -> tuple[Kind | SmallInFloat16, memoryview] | None:
        """The bytes of the floating-point numbers in `octets`, which lie at `offset` of the file; `None`: no numbers.

        Of chunks in few bits, the range is whole extents. Numbers that an end of the range cuts are left out.
        """
        begin, end = self._extents
        if begin <= offset < end:
            return self._extents_kind, _whole(octets, offset - begin, end - offset, self._extents_kind.itemsize)
        for small in self._small:
            if small.begin <= offset < small.end and octets.nbytes % small.nbytes == 0:
                if octets.nbytes == small.nbytes:
                    return small.kind, octets[small.numbers_from :]
                rows = np.frombuffer(octets, "u1").reshape(-1, small.nbytes)
                return small.kind, memoryview(rows[:, small.numbers_from :].tobytes())
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
