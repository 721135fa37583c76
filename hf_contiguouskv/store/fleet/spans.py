"""A set of ranges of bytes: which parts of an object this machine holds."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator


class Spans:
    """Ranges `[begin, end)` of whole numbers; those that touch are one.

    Args:
        ranges: to begin with; in any order, overlapping or not.
    """

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self._begins: list[int] = []
        self._ends: list[int] = []
        for begin, end in ranges:
            self.add(begin, end)

    def add(self, begin: int, end: int) -> None:
        """Add a range."""
        if begin >= end:
            return
        first = bisect_left(self._ends, begin)
        last = bisect_right(self._begins, end)
        if first < last:
            begin, end = min(begin, self._begins[first]), max(end, self._ends[last - 1])
        self._begins[first:last], self._ends[first:last] = [begin], [end]

    def __contains__(self, span: tuple[int, int]) -> bool:
        """Whether all of `(begin, end)` is in it."""
        begin, end = span
        place = bisect_right(self._begins, begin) - 1
        return begin >= end or (place >= 0 and end <= self._ends[place])

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(list(zip(self._begins, self._ends, strict=True)))

    def within(self, begin: int, end: int) -> int:
        """How many numbers of `[begin, end)` are in it."""
        first, last = bisect_right(self._ends, begin), bisect_left(self._begins, end)
        return sum(min(self._ends[n], end) - max(self._begins[n], begin) for n in range(first, last))

    def first_gap(self, begin: int, end: int) -> tuple[int, int]:
        """The first range of `[begin, end)` of which nothing is in it; an empty one where all is."""
        place = bisect_right(self._begins, begin)
        if place and self._ends[place - 1] > begin:
            begin = min(self._ends[place - 1], end)
        return begin, min(self._begins[place], end) if place < len(self._begins) else end

    @property
    def total(self) -> int:
        """How many numbers are in it."""
        return sum(self._ends) - sum(self._begins)
