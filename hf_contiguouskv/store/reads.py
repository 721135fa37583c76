"""What is read: ranges of segment files, cut where they are long, joined where they are close, read and checked."""

from __future__ import annotations

import errno
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ..errors import SegmentCorruptError, SegmentReadError, StoreClosedError, StoreError
from ..hardware.aligned_memory import PAGE
from .files import MAX_PART
from .finite import Kind, SmallInFloat16
from .read_totals import ReadTotals
from .segment import Segment

Check = tuple[int, int, int]
# What a read by itself costs under the interpreter's lock (measured), and the bytes between two reads that are read
# instead: of a disk whose speed is not known yet, and at most.
SECONDS_PER_READ, DEFAULT_GAP, MAX_GAP = 10e-6, 16 * 1024, 128 * 1024
# Numbers are looked at when there are so many bytes of them: they are still in the core's own cache then.
_TOGETHER_BYTES = 2**17


def gap_worth_reading(bytes_s: float | None) -> int:
    """How far apart two reads may lie so that what is between is read as well: the disk's bytes in the time of a read.

    Args:
        bytes_s: bytes per second of the disk; `None`: not known yet.
    """
    return DEFAULT_GAP if bytes_s is None else min(MAX_GAP, int(bytes_s * SECONDS_PER_READ))


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


class FiniteCheck:
    """Looks at the numbers of many small reads at once: one at a time, each would cost more than its checksum.

    (What costs is not the arithmetic: numpy gives up the interpreter lock, and a reader thread waits to get it back.)
    """

    __slots__ = ("_found", "_nbytes", "_ranges")

    def __init__(self) -> None:
        self._found: dict[Kind | SmallInFloat16, list[memoryview]] = {}
        self._ranges: list[tuple[Segment, int, memoryview]] = []
        self._nbytes = 0

    def add(self, segment: Segment, offset: int, octets: memoryview) -> None:
        """Note bytes that were read from `offset`; they are looked at now or in `finish`.

        Raises:
            SegmentCorruptError: a number is not finite, in these or in those that were noted before.
        """
        if octets.nbytes >= _TOGETHER_BYTES:
            if not segment.numbers.are_finite(offset, octets):
                segment.require_finite(offset, octets)  # Raises, and says where.
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


class Ticket:
    """The reads of one `submit`, to wait for.

    Args:
        parts: what threads share out.
        then: see `ExtentReader.submit`.
        long: whether its time tells how fast storage is.

    Attributes:
        bytes_read: bytes that storage was asked for, page rounding included; complete once `done`.
        started, ended: when the first read began and the last one ended, seconds on `time.perf_counter`.
    """

    __slots__ = (
        "_counted",
        "_error",
        "_gate",
        "_lock",
        "_long",
        "_missing",
        "_next",
        "_parts",
        "_then",
        "bytes_read",
        "ended",
        "started",
    )

    def __init__(
        self, parts: Sequence[Read | Part | ReadBatch], then: Callable[[], None] | None = None, long: bool = False
    ) -> None:
        self.bytes_read = 0
        self._long = long
        self._counted = 0
        self.started = self.ended = 0.0
        self._then = then
        self._parts = parts
        self._missing = len(parts)
        # next() on this iterator is atomic: threads share out the parts without a lock.
        self._next: Iterator[int] = itertools.count()
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._gate = threading.Lock()
        if parts:
            self._gate.acquire()

    @property
    def parts(self) -> int:
        """How many threads could share the reads."""
        return len(self._parts)

    @property
    def done(self) -> bool:
        """Whether all reads have ended, well or badly."""
        return self._missing == 0

    @property
    def succeeded(self) -> bool:
        """Whether all reads have ended well."""
        return self._missing == 0 and self._error is None

    def take_count(self) -> int:
        """Bytes read that no call has returned before: several layers may share a ticket."""
        found, self._counted = self.bytes_read - self._counted, self.bytes_read
        return found

    def wait(self) -> None:
        """Block until all reads have ended.

        Raises:
            SegmentCorruptError: a segment ends too early, or a checksum does not match.
            SegmentReadError: the storage failed.
            StoreClosedError: a segment was closed.
        """
        if self._missing:
            with self._gate:
                pass
        if self._error is not None:
            raise self._error

    def serve(self, total: ReadTotals) -> None:
        """Read parts until none is left; called by every reader thread that is free."""
        parts, order = self._parts, self._next
        count = len(parts)
        began = time.perf_counter()
        numbers = FiniteCheck()
        served = physical = 0
        while True:
            position = next(order)
            if position >= count:
                break
            if position == 0 and self._long:
                total.begins(began)
            served += 1
            if self._error is not None:
                continue
            part = parts[position]
            try:
                if type(part) is ReadBatch:
                    physical += part.segment.read_into([(one.offset, one.into) for one in part.parts])
                    for one in part.parts:
                        _finish(one, numbers)
                else:
                    physical += part.segment.read_into(((part.offset, part.into),))  # type: ignore[union-attr]
                    _finish(part, numbers)  # type: ignore[arg-type]
            except BaseException as error:
                self._error = _explain(error, part)
        if not served:
            return
        try:
            numbers.finish()
        except BaseException as error:
            self._error = error
        total.add(physical)
        with self._lock:
            self.bytes_read += physical
            self.started = min(self.started or began, began)
            last = self._missing == served
            if not last:
                self._missing -= served
                return
        # Nobody else serves this ticket any more.
        then, self._then = self._then, None
        if then is not None and self._error is None:
            try:
                then()
            except BaseException as error:
                self._error = error
        self._parts = ()  # Let go of the buffers: a ticket may be kept for its counters.
        self.ended = time.perf_counter()
        if self._long:
            total.ends(self.started, self.ended, self.bytes_read)
        self._missing = 0
        self._gate.release()


def _finish(part: Read | Part, numbers: FiniteCheck) -> None:
    if part.checks:
        for begin, end in _verify(part.segment, part.offset, part.into, part.checks):
            numbers.add(part.segment, part.offset + begin, part.into[begin:end])
    if type(part) is Part:
        part.whole.part_done()


def _explain(error: BaseException, part: Read | Part | ReadBatch) -> BaseException:
    segment = part.segment
    if isinstance(error, EOFError):
        return segment.cut_short(part.offset, error)
    if not isinstance(error, OSError) or isinstance(error, StoreError):
        return error
    if error.errno == errno.EBADF:
        return StoreClosedError(f"{segment.name}: the segment was closed while it was being read")
    return SegmentReadError(f"{segment.name}: read failed: {error.strerror or error}", segment, error.errno)
