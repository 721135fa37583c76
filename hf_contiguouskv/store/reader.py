"""Reading many extents at once: a few named threads that hand them to the backend.

A request submits all reads of one layer as one `Ticket` and waits for it when it needs them. Reads are served in the
order in which they were submitted. The work per read is kept small on purpose: a request has hundreds of reads of a
few KiB, and the interpreter lock is shared with the model.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from types import TracebackType

from ..errors import InputError, StoreClosedError
from ..hardware.aligned_memory import aligned_buffer, as_memoryview
from .files import MAX_PART
from .read_totals import TELLING_BYTES, TELLING_READ, ReadTotals
from .reads import Check, Part, Read, ReadBatch, Ticket, cut, gap_worth_reading

__all__ = ["Check", "ExtentReader", "Read", "ReadTotals", "Ticket", "aligned_buffer", "as_memoryview"]


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

    def serve(self, total: ReadTotals) -> None:
        """Do it; called by a reader thread."""
        function, self._function = self._function, None
        try:
            if function is not None:
                function()
        except BaseException as error:
            self._error = error
        finally:
            self._gate.release()


class ReaderThreads:
    """The threads of a reader and the queue that they serve.

    The threads know the queue, not this object, so that a forgotten reader is collected and ends them.

    Args:
        count: of threads.
        totals: counts what they read.
    """

    def __init__(self, count: int, totals: ReadTotals) -> None:
        self._pid = os.getpid()
        self._queue: SimpleQueue[Ticket | Task | None] = SimpleQueue()
        self._workers = [
            threading.Thread(target=serve_queue, args=(self._queue, totals), name=f"contiguouskv-read-{i}", daemon=True)
            for i in range(count)
        ]
        for worker in self._workers:
            worker.start()
        self._finalizer = weakref.finalize(self, _stop, self._queue, count)

    @property
    def forked(self) -> bool:
        """Whether this process is a fork of the one that the threads run in."""
        return self._pid != os.getpid()

    def put(self, item: Ticket | Task) -> None:
        """Have a thread serve `item`, behind everything that was put before."""
        self._queue.put(item)

    def stop(self) -> None:
        """Let the threads end once they have served everything."""
        self._finalizer()

    def join(self) -> None:
        """Wait until the threads have ended."""
        if not self.forked:
            for worker in self._workers:
                if worker is not threading.current_thread():
                    worker.join()


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
        self.totals = ReadTotals()
        self._lock = threading.Lock()
        self._closed = False
        self._threads = ReaderThreads(threads, self.totals)

    @property
    def bytes_read(self) -> int:
        """Bytes read since the reader was made, page rounding included."""
        return self.totals.nbytes

    @property
    def gap_bytes(self) -> int:
        """What storage delivers in the time that a read by itself costs: so much between two reads is read as well, if
        they may be joined. By the speed of the long reads so far."""
        return gap_worth_reading(self.totals.bytes_per_second)

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
        parts: list[Read | Part] = []
        nbytes = 0
        for read in reads:
            nbytes += read.nbytes
            if read.into.nbytes != read.nbytes:
                raise InputError(f"buffer of {read.into.nbytes} bytes for a read of {read.nbytes} bytes")
            if read.nbytes <= MAX_PART:
                parts.append(read)
            else:
                parts.extend(cut(read))
        batched = any(part.segment.blob.extents_per_read > 1 for part in parts)
        gap = self.gap_bytes if joins else 0
        joined = ReadBatch.grouped(parts, gap) if batched else ReadBatch.joined(parts, gap)
        # (What other backends bring, over a network perhaps, says nothing of the disk.)
        tells = not batched and nbytes >= max(TELLING_BYTES, len(joined) * TELLING_READ)
        ticket = Ticket(joined, then, tells)
        with self._lock:
            if self._closed:
                raise StoreClosedError("the store was closed while a cache still reads from it: close its caches first")
            self._start_again_in_a_fork()
            for _ in range(min(threads or self.threads, self.threads, ticket.parts)):
                self._threads.put(ticket)
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
            self._start_again_in_a_fork()
            self._threads.put(task)
        return task

    def _start_again_in_a_fork(self) -> None:
        # Threads do not survive a fork, and what was under way never ends in it.
        if self._threads.forked:
            self.totals = self.totals.continued()
            self._threads = ReaderThreads(self.threads, self.totals)

    def close(self) -> None:
        """Finish what was submitted, then stop and join the threads. May be called more than once."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._threads.stop()
        self._threads.join()

    def __enter__(self) -> ExtentReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def serve_queue(queue: SimpleQueue[Ticket | Task | None], totals: ReadTotals) -> None:
    """What a reader thread does."""
    while (ticket := queue.get()) is not None:
        ticket.serve(totals)
        del ticket  # Or an idle thread would keep the buffers of its last request.


def _stop(queue: SimpleQueue[Ticket | Task | None], threads: int) -> None:
    for _ in range(threads):
        queue.put(None)
