"""Reading many extents at once: a few named threads that hand them to the backend.

A request submits all reads of one layer as one `Ticket` and waits for it when it needs them. Reads are served in the
order in which they were submitted. The work per read is kept small on purpose: a request has hundreds of reads of a
few KiB, and the interpreter lock is shared with the model.
"""

from __future__ import annotations

import errno
import itertools
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from types import TracebackType

import xxhash

from ..errors import InputError, SegmentCorruptError, SegmentReadError, StoreClosedError, StoreError
from .pread import MAX_PART, PAGE, aligned_buffer, as_memoryview
from .segment import Segment

__all__ = ["Check", "ExtentReader", "Read", "Ticket", "aligned_buffer", "as_memoryview"]

Check = tuple[int, int, int]
# What a read by itself costs under the interpreter's lock (measured), and the bytes between two reads that are read
# instead: of a disk whose speed is not known yet, and at most.
SECONDS_PER_READ, DEFAULT_GAP, MAX_GAP = 10e-6, 16 * 1024, 128 * 1024
# From this size on a ticket says something of the disk's speed.
TELLING_BYTES = 2**20


@dataclass(slots=True)
class Read:
    """One range of one segment file.

    Attributes:
        segment: the open file.
        offset: of the first byte in the file.
        nbytes: length of the range.
        into: writable bytes, `nbytes` long. Must stay alive and untouched until the ticket is done.
        checks: `(start, length, checksum)` of parts of the range, `start` counted from its beginning: their xxh3_64
            is compared when they have been read.
    """

    segment: Segment
    offset: int
    nbytes: int
    into: memoryview
    checks: Sequence[Check] = ()


class _Part:
    """A piece of a read that was cut because it is long."""

    __slots__ = ("checks", "into", "nbytes", "offset", "segment", "whole")

    def __init__(self, read: Read, start: int, nbytes: int, checks: list[Check], whole: _Whole) -> None:
        self.segment = read.segment
        self.offset = read.offset + start
        self.nbytes = nbytes
        self.into = read.into[start : start + nbytes]
        self.checks = checks
        self.whole = whole


class _Whole:
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
            _verify(self.read.segment, self.read.offset, self.read.into, self.checks)


class _Batch:
    """Parts of one segment that its backend takes in one call."""

    __slots__ = ("offset", "parts", "segment")

    def __init__(self, parts: list[Read | _Part]) -> None:
        self.parts = parts
        self.segment = parts[0].segment
        self.offset = parts[0].offset

    @classmethod
    def grouped(cls, parts: list[Read | _Part], gap: int) -> list[Read | _Part | _Batch]:
        """Neighbours in `parts` put together, where their backend wants that."""
        found: list[Read | _Part | _Batch] = []
        for segment, group in itertools.groupby(parts, key=lambda part: part.segment):
            own, size = list(group), segment.blob.extents_per_read
            if size <= 1:
                found += cls.joined(own, gap)
            else:
                found += [cls(own[start : start + size]) for start in range(0, len(own), size)]
        return found

    @classmethod
    def joined(cls, parts: list[Read | _Part], gap: int) -> list[Read | _Part | _Batch]:
        """What follows each other in a segment, with at most `gap` bytes between, put together, up to 1 MiB: one read
        that goes to several places."""
        found: list[Read | _Part | _Batch] = []
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


class Ticket:
    """The reads of one `submit`, to wait for.

    Attributes:
        bytes_read: bytes that storage was asked for, page rounding included; complete once `done`.
        started, ended: when the first read began and the last one ended, seconds on `time.perf_counter`.
    """

    __slots__ = ("_error", "_gate", "_lock", "_missing", "_next", "_parts", "_then", "bytes_read", "ended", "started")

    def __init__(self, parts: Sequence[Read | _Part | _Batch], then: Callable[[], None] | None = None) -> None:
        self.bytes_read = 0
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

    def _serve(self, total: _Total) -> None:
        """Read parts until none is left; called by every reader thread that is free."""
        parts, order = self._parts, self._next
        count = len(parts)
        began = time.perf_counter()
        served = physical = 0
        while True:
            position = next(order)
            if position >= count:
                break
            served += 1
            if self._error is not None:
                continue
            part = parts[position]
            try:
                if type(part) is _Batch:
                    physical += part.segment.read_into([(one.offset, one.into) for one in part.parts])
                    for one in part.parts:
                        _finish(one)
                else:
                    physical += part.segment.read_into(((part.offset, part.into),))  # type: ignore[union-attr]
                    _finish(part)  # type: ignore[arg-type]
            except BaseException as error:
                self._error = _explain(error, part)
        if not served:
            return
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
        total.note_speed(self.bytes_read, self.ended - self.started)
        self._missing = 0
        self._gate.release()


class Task:
    """Work that a reader thread does in the order of the queue; it must not wait for reads."""

    __slots__ = ("_error", "_function", "_gate")

    def __init__(self, function: Callable[[], None]) -> None:
        self._function: Callable[[], None] | None = function
        self._error: BaseException | None = None
        self._gate = threading.Lock()
        self._gate.acquire()

    def wait(self) -> None:
        """Block until it has been done; raises what it raised."""
        with self._gate:
            pass
        if self._error is not None:
            raise self._error

    def _serve(self, total: _Total) -> None:
        function, self._function = self._function, None
        try:
            if function is not None:
                function()
        except BaseException as error:
            self._error = error
        finally:
            self._gate.release()


class _Total:
    """Bytes read by all tickets of a reader, and how fast (`None`: no ticket was long enough to tell)."""

    __slots__ = ("_lock", "bytes_per_second", "nbytes")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.nbytes = 0
        self.bytes_per_second: float | None = None

    def note_speed(self, nbytes: int, seconds: float) -> None:
        if nbytes >= TELLING_BYTES and seconds > 0:
            with self._lock:
                known = self.bytes_per_second
                now = nbytes / seconds
                self.bytes_per_second = now if known is None else known + (now - known) / 4

    def add(self, nbytes: int) -> None:
        with self._lock:
            self.nbytes += nbytes


class ExtentReader:
    """Threads that read extents of segment files.

    Args:
        threads: how many reads may be under way at once. Storage needs several in flight to be fast.

    Example:
        with ExtentReader() as reader:
            ticket = reader.submit([Read(segment, offset, nbytes, as_memoryview(buffer))])
            ...
            ticket.wait()
    """

    def __init__(self, threads: int = 8) -> None:
        if threads < 1:
            raise InputError(f"reader threads must be at least 1, got {threads}")
        self.threads = threads
        self._total = _Total()
        self._lock = threading.Lock()
        self._closed = False
        self._start()

    def _start(self) -> None:
        self._pid = os.getpid()
        self._queue: SimpleQueue[Ticket | Task | None] = SimpleQueue()
        # The threads know the queue, not the reader, so that a forgotten reader is collected and ends them.
        self._workers = [
            threading.Thread(target=_work, args=(self._queue, self._total), name=f"contiguouskv-read-{i}", daemon=True)
            for i in range(self.threads)
        ]
        for worker in self._workers:
            worker.start()
        self._finalizer = weakref.finalize(self, _stop, self._queue, self.threads)

    @property
    def bytes_read(self) -> int:
        """Bytes read since the reader was made, page rounding included."""
        return self._total.nbytes

    @property
    def gap_bytes(self) -> int:
        """What storage delivers in the time that a read by itself costs: so much between two reads is read as well, if
        they may be joined. By the speed of the long reads so far."""
        speed = self._total.bytes_per_second
        return DEFAULT_GAP if speed is None else min(MAX_GAP, int(speed * SECONDS_PER_READ))

    def submit(
        self,
        reads: Sequence[Read],
        *,
        threads: int | None = None,
        then: Callable[[], None] | None = None,
        joins: bool = False,
    ) -> Ticket:
        """Queue `reads` behind everything that was submitted before.

        Args:
            reads: what to read.
            threads: how many threads share these reads; all by default. Where several tickets are queued together,
                one thread for each keeps the device as busy, and wakes fewer threads.

            then: called by the thread that ends the last read, before the ticket is done, if all went well. What it
                raises, the ticket raises.
            joins: read what is between reads that are close together (`gap_bytes`), so that there are fewer. It is
                worth more bytes where the time of the interpreter is what the model waits for.

        Raises:
            InputError: a buffer has another length than its read.
            StoreClosedError: the reader is closed.
        """
        parts: list[Read | _Part] = []
        for read in reads:
            if read.into.nbytes != read.nbytes:
                raise InputError(f"buffer of {read.into.nbytes} bytes for a read of {read.nbytes} bytes")
            if read.nbytes <= MAX_PART:
                parts.append(read)
            else:
                parts.extend(_cut(read))
        batched = any(part.segment.blob.extents_per_read > 1 for part in parts)
        gap = self.gap_bytes if joins else 0
        ticket = Ticket(_Batch.grouped(parts, gap) if batched else _Batch.joined(parts, gap), then)
        with self._lock:
            if self._closed:
                raise StoreClosedError("the reader is closed")
            if self._pid != os.getpid():
                self._start()  # Threads do not survive a fork.
            for _ in range(min(threads or self.threads, self.threads, ticket.parts)):
                self._queue.put(ticket)
        return ticket

    def run(self, function: Callable[[], None]) -> Task:
        """Have a reader thread call `function` (which may `submit`), behind everything that was submitted before.

        Raises:
            StoreClosedError: the reader is closed.
        """
        task = Task(function)
        with self._lock:
            if self._closed:
                raise StoreClosedError("the reader is closed")
            if self._pid != os.getpid():
                self._start()
            self._queue.put(task)
        return task

    def close(self) -> None:
        """Finish what was submitted, then stop and join the threads. May be called more than once."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._finalizer()
        if self._pid == os.getpid():
            for worker in self._workers:
                if worker is not threading.current_thread():
                    worker.join()

    def __enter__(self) -> ExtentReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _work(queue: SimpleQueue[Ticket | Task | None], total: _Total) -> None:
    while (ticket := queue.get()) is not None:
        ticket._serve(total)
        del ticket  # Or an idle thread would keep the buffers of its last request.


def _stop(queue: SimpleQueue[Ticket | Task | None], threads: int) -> None:
    for _ in range(threads):
        queue.put(None)


def _cut(read: Read) -> list[_Part]:
    """Pieces of at most 1 MiB: cut at page boundaries of the file, between checks where these are whole pages."""
    step, skew = MAX_PART, read.offset % PAGE
    if read.checks and not skew:
        length = read.checks[0][1]
        if 0 < length <= MAX_PART and length % PAGE == 0:
            step = MAX_PART // length * length
    # Piece i covers [i * step, (i + 1) * step) counted from the page in which the read begins.
    count = -(-(skew + read.nbytes) // step)
    whole = _Whole(read, count)
    begins = [max(0, i * step - skew) for i in range(count)] + [read.nbytes]
    checks: list[list[Check]] = [[] for _ in range(count)]
    for start, length, checksum in read.checks:
        piece = (start + skew) // step
        if start + length <= begins[piece + 1]:
            checks[piece].append((start - begins[piece], length, checksum))
        else:
            whole.checks.append((start, length, checksum))
    return [_Part(read, begins[i], begins[i + 1] - begins[i], checks[i], whole) for i in range(count)]


def _finish(part: Read | _Part) -> None:
    if part.checks:
        _verify(part.segment, part.offset, part.into, part.checks)
    if type(part) is _Part:
        part.whole.part_done()


def _verify(segment: Segment, offset: int, into: memoryview, checks: Sequence[Check]) -> None:
    for start, length, checksum in checks:
        if xxhash.xxh3_64_intdigest(into[start : start + length]) != checksum:
            raise SegmentCorruptError(
                f"{segment.name}: {segment.describe(offset + start)}: bytes do not match their checksum", segment
            )


def _explain(error: BaseException, part: Read | _Part | _Batch) -> BaseException:
    segment = part.segment
    if isinstance(error, EOFError):
        return segment.cut_short(part.offset, error)
    if not isinstance(error, OSError) or isinstance(error, StoreError):
        return error
    if error.errno == errno.EBADF:
        return StoreClosedError(f"{segment.name}: the segment was closed while it was being read")
    return SegmentReadError(f"{segment.name}: read failed: {error.strerror or error}", segment, error.errno)
