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
_TOO_LARGE_SCALE = 0xFA00


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

        A range of packed values must be whole packed extents; other ranges, whole numbers. What is no floating-point
        number is finite.
        """
        if not octets.nbytes:
            return True
        if self._extents[0] <= offset < self._extents[1]:
            dtype, bound = self._kind
            return int((np.frombuffer(octets, dtype) << 1).max()) < bound
        if self._packed[0] <= offset < self._packed[1]:
            rows = np.frombuffer(octets, "u1").reshape(-1, self._packed_bytes)
            scales = np.ascontiguousarray(rows[:, self._scales_from :]).view("<u2")
            return int((scales << 1).max()) < _TOO_LARGE_SCALE
        if self._scales[0] <= offset < self._scales[1]:
            dtype, bound = _INFINITE[torch.float32]
            return int((np.frombuffer(octets, dtype) << 1).max()) < bound
        return True
