"""Whether the numbers in a range of a segment are finite, told by their bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .format import SegmentHeader

# Shifted left by one, the sign is gone; what is not below these is infinite or no number.
_INFINITE: dict[torch.dtype, tuple[np.dtype[Any], int]] = {
    torch.bfloat16: (np.dtype("<u2"), 0xFF00),
    torch.float16: (np.dtype("<u2"), 0xF800),
    torch.float32: (np.dtype("<u4"), 0xFF000000),
}
# Scales of packed values: lowest + 15 * step must be finite as well, which it is if both are below 2**123.
_SCALE, _TOO_LARGE_SCALE = np.dtype("<u2"), 0xFA00


class NumberPlaces:
    """Where the floating-point numbers of a segment lie.

    Args:
        header: of the segment.
        data_start: where its data section begins, in bytes.
    """

    __slots__ = ("_extents", "_kind", "_packed", "_packed_bytes", "_scales", "_scales_from")

    def __init__(self, header: SegmentHeader, data_start: int) -> None:
        g = header.geometry
        self._kind = _INFINITE[g.dtype]

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

    def are_finite(self, offset: int, octets: memoryview) -> bool:
        """Whether no number in `octets`, which lie at `offset` of the file, is infinite or none.

        Of packed values, the range is whole packed extents. Numbers that an end of the range cuts are not looked at,
        and what is no floating-point number is finite.
        """
        if self._extents[0] <= offset < self._extents[1]:
            return _all_below(octets, offset - self._extents[0], *self._kind)
        if self._packed[0] <= offset < self._packed[1] and octets.nbytes % self._packed_bytes == 0:
            rows = np.frombuffer(octets, "u1").reshape(-1, self._packed_bytes)
            scales = np.ascontiguousarray(rows[:, self._scales_from :])
            return _all_below(memoryview(scales.reshape(-1)), 0, _SCALE, _TOO_LARGE_SCALE)
        if self._scales[0] <= offset < self._scales[1]:
            return _all_below(octets, offset - self._scales[0], *_INFINITE[torch.float32])
        return True


def _all_below(octets: memoryview, position: int, dtype: np.dtype[Any], bound: int) -> bool:
    """Whether all whole numbers in `octets` are below `bound` without their sign; `position`: counted in bytes from
    where numbers begin."""
    skipped, size = -position % dtype.itemsize, octets.nbytes
    if skipped or size % dtype.itemsize:
        octets = octets[skipped : skipped + max(0, size - skipped) // dtype.itemsize * dtype.itemsize]
    return not octets.nbytes or int((np.frombuffer(octets, dtype) << 1).max()) < bound
