"""Ranges of an object that are read together: fewer requests, at a bounded cost in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .engine import Range

# A request to an object store takes as long as some hundred kilobytes do, so gaps are worth reading; but what crosses
# the network must stay within a tenth of what was asked for.
MOST_WASTE = 0.1
# One request brings at most so much: several at once are faster than a long one.
MOST_BYTES = 4 * 2**20


@dataclass(slots=True)
class Joined:
    """Neighbouring ranges that one request brings.

    Attributes:
        begin: of the first byte in the object.
        end: behind the last one.
        parts: the ranges in it, by offset.
    """

    begin: int
    end: int
    parts: list[Range] = field(default_factory=list)


def join_ranges(ranges: Sequence[Range], *, waste: float = MOST_WASTE, most: int = MOST_BYTES) -> list[Joined]:
    """Put ranges together whose gaps cost at most `waste` of all bytes wanted, the smallest gaps first.

    Args:
        ranges: offset and buffer of each; in any order.
        waste: bytes between ranges that may be read, as a share of the bytes wanted.
        most: bytes of one request; a longer range is cut.

    Returns:
        by offset; every byte of every range is in exactly one of them, unless ranges overlap.
    """
    pieces = sorted(_cut(ranges, most), key=lambda piece: piece[0])
    if not pieces:
        return []
    ends = [offset + into.nbytes for offset, into in pieces]
    gaps = [max(0, two[0] - end) for end, two in zip(ends, pieces[1:], strict=False)]
    spare = int(waste * sum(into.nbytes for _, into in pieces))
    joins = set()
    for number in sorted(range(len(gaps)), key=gaps.__getitem__):
        if gaps[number] > spare:
            break
        spare -= gaps[number]
        joins.add(number)
    found: list[Joined] = []
    for number, (offset, into) in enumerate(pieces):
        end = offset + into.nbytes
        last = found[-1] if found and number - 1 in joins else None
        if last is not None and max(last.end, end) - last.begin <= most:
            last.end = max(last.end, end)
            last.parts.append((offset, into))
        else:
            found.append(Joined(offset, end, [(offset, into)]))
    return found


def _cut(ranges: Sequence[Range], most: int) -> list[Range]:
    return [
        (offset + start, into[start : start + most]) for offset, into in ranges for start in range(0, into.nbytes, most)
    ]
