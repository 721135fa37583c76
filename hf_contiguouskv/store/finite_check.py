"""Looking at the numbers of many small reads at once."""

from __future__ import annotations

from .finite import Kind, PackedInFloat16
from .segment import Segment

# Numbers are looked at when there are so many bytes of them: they are still in the core's own cache then.
_TOGETHER_BYTES = 2**17


class FiniteCheck:
    """Looks at the numbers of many small reads at once: one at a time, each would cost more than its checksum.

    (What costs is not the arithmetic: numpy gives up the interpreter lock, and a reader thread waits to get it back.)
    """

    __slots__ = ("_found", "_nbytes", "_ranges")

    def __init__(self) -> None:
        self._found: dict[Kind | PackedInFloat16, list[memoryview]] = {}
        self._ranges: list[tuple[Segment, int, memoryview]] = []
        self._nbytes = 0

    def add(self, segment: Segment, offset: int, octets: memoryview) -> None:
        """Note bytes that were read from `offset`; they are looked at now or in `finish`.

        Raises:
            SegmentCorruptError: a number is not finite, in these or in those that were noted before.
        """
        if octets.nbytes >= _TOGETHER_BYTES:
            segment.require_finite(offset, octets)
            return
        found = segment.numbers.octets_in(offset, octets)
        if found is None:
            return
        kind, numbers = found
        some = self._found.get(kind)
        if some is None:
            self._found[kind] = [numbers]
        else:
            some.append(numbers)
        self._ranges.append((segment, offset, octets))
        self._nbytes += numbers.nbytes
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
            if not kind.are_finite(b"".join(some)):
                for segment, offset, octets in ranges:
                    segment.require_finite(offset, octets)
