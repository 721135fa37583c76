"""What is read: ranges of segment files, cut where they are long, joined where they are close, and compared."""

from __future__ import annotations

import errno
import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import SegmentCorruptError, SegmentReadError, StoreClosedError, StoreError
from ..hardware.aligned_memory import PAGE
from .finite_check import FiniteCheck
from .pread import MAX_PART
from .segment import Segment

Check = tuple[int, int, int]
# What a read by itself costs under the interpreter's lock (measured), and the bytes between two reads that are read
# instead: of a disk whose speed is not known yet, and at most.
SECONDS_PER_READ, DEFAULT_GAP, MAX_GAP = 10e-6, 16 * 1024, 128 * 1024


@dataclass(slots=True)
class Read:
    """One range of one segment file.

    Attributes:
        segment: the open file.
        offset: of the first byte in the file.
        nbytes: length of the range.
        into: writable bytes, `nbytes` long. Must stay alive and untouched until the ticket is done.
        checks: `(start, length, checksum)` of parts of the range, `start` counted from its beginning: they
            are compared when they have been read, and floating-point numbers in them must be finite.
    """

    segment: Segment
    offset: int
    nbytes: int
    into: memoryview
    checks: Sequence[Check] = ()


class Part:
    """A piece of a read that was cut because it is long."""

    __slots__ = ("checks", "into", "nbytes", "offset", "segment", "whole")

    def __init__(self, read: Read, start: int, nbytes: int, checks: list[Check], whole: Whole) -> None:
        self.segment = read.segment
        self.offset = read.offset + start
        self.nbytes = nbytes
        self.into = read.into[start : start + nbytes]
        self.checks = checks
        self.whole = whole


class Whole:
    """The read that parts belong to; the checks that cross a cut wait until all of them are there."""

    __slots__ = ("checks", "lock", "missing", "read")

    def __init__(self, read: Read, missing: int) -> None:
        self.read = read
        self.missing = missing
        self.checks: list[Check] = []
        self.lock = threading.Lock()

    def part_done(self) -> None:
        with self.lock:
            self.missing -= 1
            last = self.missing == 0
        if last and self.checks:
            read = self.read
            for begin, end in _verify(read.segment, read.offset, read.into, self.checks):
                read.segment.require_finite(read.offset + begin, read.into[begin:end])


class ReadBatch:
    """Parts of one segment that its backend takes in one call."""

    __slots__ = ("offset", "parts", "segment")

    def __init__(self, parts: list[Read | Part]) -> None:
        self.parts = parts
        self.segment = parts[0].segment
        self.offset = parts[0].offset

    @classmethod
    def grouped(cls, parts: list[Read | Part], gap: int) -> list[Read | Part | ReadBatch]:
        """Neighbours in `parts` put together, where their backend wants that."""
        found: list[Read | Part | ReadBatch] = []
        for segment, group in itertools.groupby(parts, key=lambda part: part.segment):
            own, size = list(group), segment.blob.extents_per_read
            if size <= 1:
                found += cls.joined(own, gap)
            else:
                found += [cls(own[start : start + size]) for start in range(0, len(own), size)]
        return found

    @classmethod
    def joined(cls, parts: list[Read | Part], gap: int) -> list[Read | Part | ReadBatch]:
        """What follows each other in a segment, with at most `gap` bytes between, put together, up to 1 MiB: one read
        that goes to several places."""
        found: list[Read | Part | ReadBatch] = []
        begin = 0
        for end in range(1, len(parts) + 1):
            if end < len(parts):
                before, part = parts[end - 1], parts[end]
                between = part.offset - before.offset - before.nbytes
                follows = 0 <= between <= gap and part.segment is before.segment
                if follows and part.offset + part.nbytes - parts[begin].offset <= MAX_PART:
                    continue
            found.append(parts[begin] if end == begin + 1 else cls(parts[begin:end]))
            begin = end
        return found


def cut(read: Read) -> list[Part]:
    """Pieces of at most 1 MiB: cut at page boundaries of the file, between checks where these are whole pages."""
    step, skew = MAX_PART, read.offset % PAGE
    if read.checks and not skew:
        length = read.checks[0][1]
        if 0 < length <= MAX_PART and length % PAGE == 0:
            step = MAX_PART // length * length
    # Piece i covers [i * step, (i + 1) * step) counted from the page in which the read begins.
    count = -(-(skew + read.nbytes) // step)
    whole = Whole(read, count)
    begins = [max(0, i * step - skew) for i in range(count)] + [read.nbytes]
    checks: list[list[Check]] = [[] for _ in range(count)]
    for start, length, checksum in read.checks:
        piece = (start + skew) // step
        if start + length <= begins[piece + 1]:
            checks[piece].append((start - begins[piece], length, checksum))
        else:
            whole.checks.append((start, length, checksum))
    return [Part(read, begins[i], begins[i + 1] - begins[i], checks[i], whole) for i in range(count)]


def finish(part: Read | Part, numbers: FiniteCheck) -> None:
    if part.checks:
        for begin, end in _verify(part.segment, part.offset, part.into, part.checks):
            numbers.add(part.segment, part.offset + begin, part.into[begin:end])
    if type(part) is Part:
        part.whole.part_done()


def _verify(segment: Segment, offset: int, into: memoryview, checks: Sequence[Check]) -> list[tuple[int, int]]:
    """Compare checksums; the ranges of `into` that they cover, as `(begin, end)`."""
    digest = segment.checksum
    covered: list[tuple[int, int]] = []
    begin = end = -1
    for start, length, checksum in checks:
        if digest(into[start : start + length]) != checksum:
            raise SegmentCorruptError(
                f"{segment.name}: {segment.describe(offset + start)}: bytes do not match their checksum", segment
            )
        if start != end:
            if end > begin:
                covered.append((begin, end))
            begin = start
        end = start + length
    covered.append((begin, end))
    return covered


def explain(error: BaseException, part: Read | Part | ReadBatch) -> BaseException:
    segment = part.segment
    if isinstance(error, EOFError):
        return segment.cut_short(part.offset, error)
    if not isinstance(error, OSError) or isinstance(error, StoreError):
        return error
    if error.errno == errno.EBADF:
        return StoreClosedError(f"{segment.name}: the segment was closed while it was being read")
    return SegmentReadError(f"{segment.name}: read failed: {error.strerror or error}", segment, error.errno)
