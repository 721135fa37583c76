"""Reads parts of layers in large ranges, on several threads, and checks them as they arrive."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from hf_contiguouskv.hardware.aligned_memory import as_memoryview
from hf_contiguouskv.store.files import FileBlob
from hf_contiguouskv.timeline import SpanRecorder

from .layer_file import DamagedFileError, LayerShape, RangeSums, ranges_of, read_header, row_pieces
from .throttle import TokenBucket

# Ranges that are read at the same time. On two cores two, four and eight differ by less than their quartiles: 127, 125
# and 128 ms for 2K tokens, 278, 285 and 294 ms for 8K.
THREADS = 4


class Arrival:
    """Work of reader threads that a request waits for: it counts down.

    Attributes:
        pieces: of the work.
        bytes_read: bytes requested from the disk so far.
    """

    def __init__(self, pieces: int) -> None:
        self.pieces = self._left = pieces
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._error: BaseException | None = None
        self.bytes_read = 0
        if not pieces:
            self._done.set()

    def piece_done(self, nbytes: int, error: BaseException | None = None) -> bool:
        """A piece was read, or could not be; whether it was the last one."""
        with self._lock:
            self._left -= 1
            self.bytes_read += nbytes
            self._error = self._error or error
            return self._left == 0

    def end(self, error: BaseException | None = None) -> None:
        """Nothing more happens."""
        self._error = self._error or error
        self._done.set()

    @property
    def failed(self) -> bool:
        """Whether a piece could not be read."""
        return self._error is not None

    @property
    def done(self) -> bool:
        """Whether all pieces are there, or failed."""
        return self._done.is_set()

    def wait(self) -> float:
        """Seconds that the calling thread had to wait.

        Raises:
            DamagedFileError: a checksum does not match.
            OSError: the disk failed.
        """
        began = time.perf_counter()
        waited = 0.0
        if not self._done.is_set():
            self._done.wait()
            waited = time.perf_counter() - began
        if self._error is not None:
            raise self._error
        return waited

    def settle(self) -> None:
        """Wait until no thread writes to the memory any more, whatever came of it."""
        self._done.wait()


class ReaderThreads:
    """Threads that run functions, first come first served. They start with the first one."""

    def __init__(self, threads: int = THREADS) -> None:
        self._threads = threads
        self._queue: deque[Callable[[], None]] = deque()
        self._ready = threading.Condition()
        self._running: list[threading.Thread] = []
        self._closed = False
        self._held: list[Callable[[], None]] | None = None

    @contextmanager
    def together(self) -> Iterator[None]:
        """Functions that the block queues start when it ends.

        Threads that read into new memory fault its pages, and meanwhile the kernel lets the process map no more. A
        request that borrows all of its memory before the first read took 10 ms instead of 20 to make its cache.
        """
        self._held = []
        try:
            yield
        finally:
            held, self._held = self._held, None
            if held:
                self.run(held)

    def run(self, functions: Sequence[Callable[[], None]]) -> None:
        """Queue functions. They must not raise. Called by the thread of requests only."""
        if self._held is not None:
            self._held += functions
            return
        with self._ready:
            self._queue.extend(functions)
            self._ready.notify(len(functions))
        wanted = min(self._threads, len(self._running) + len(functions))
        while len(self._running) < wanted:
            thread = threading.Thread(target=self._work, name="layer reader", daemon=True)
            self._running.append(thread)
            thread.start()

    def _work(self) -> None:
        while True:
            with self._ready:
                while not self._queue and not self._closed:
                    self._ready.wait()
                if not self._queue:
                    return
                function = self._queue.popleft()
            function()

    def close(self) -> None:
        """Finish what is queued, and end."""
        with self._ready:
            self._closed = True
            self._ready.notify_all()
        for thread in self._running:
            thread.join()
        self._running.clear()


class LayerFile:
    """A file of layers, open for reading.

    Args:
        path: of the file.
        threads: that read.
        bucket: that reads pass through; `None`: as fast as the disk.

    Raises:
        DamagedFileError: its header is not as it was written.
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path, threads: ReaderThreads, bucket: TokenBucket | None = None) -> None:
        header = read_header(path)
        self.path = path
        self.shape: LayerShape = header.shape
        self._header = header
        self._blob = FileBlob(path)
        self._threads = threads
        self._bucket = bucket

    def rows_of(self, buffer: torch.Tensor, part: int, first: int | None = None) -> list[memoryview]:
        """The memory of a part of a layer, row by row, padding included.

        Args:
            buffer: `(2, 1, kv_heads, capacity, head_dim)` in host memory, whose rows are whole pages.
            part: number of the part.
            first: token of the buffer where the part begins; default: where it belongs.
        """
        shape = self.shape
        begin = shape.firsts[part] if first is None else first
        end = begin + shape.padded(shape.parts[part])
        return [as_memoryview(row[begin:end]) for row in buffer.flatten(0, 2)]

    def read(
        self,
        layer: int,
        part: int,
        rows: Sequence[memoryview],
        timeline: SpanRecorder,
        then: Callable[[], None] | None = None,
    ) -> Arrival:
        """Start reading a part of a layer into `rows` (see `rows_of`), and checking it.

        `then` is called by the thread that ends the last read, before the arrival is done, if all went well. What it
        raises, the arrival raises.
        """
        nbytes = self.shape.part_bytes(part)
        begin = self._header.begin + self.shape.offset(layer, part)
        ranges = list(ranges_of(nbytes))
        arrival, sums = Arrival(len(ranges)), RangeSums(nbytes)

        def reading(number: int, low: int, high: int) -> Callable[[], None]:
            def read() -> None:
                started = time.perf_counter()
                got = 0
                error: Exception | None = None
                try:
                    if not arrival.failed:
                        pieces = row_pieces(rows, low, high)
                        extents = [(begin + place, view) for place, view in pieces]
                        if self._bucket is None:
                            got = self._blob.read_into(extents)
                        else:
                            with self._bucket.reading(high - low):
                                got = self._blob.read_into(extents)
                        sums.note(number, [view for _, view in pieces])
                except EOFError:
                    error = DamagedFileError(f"{self.path}: it ends too early")
                except OSError as found:
                    error = found
                timeline.add("read", layer, started, time.perf_counter())
                if arrival.piece_done(got, error):
                    error = self._checked(layer, part, sums)
                    if error is None and then is not None and not arrival.failed:
                        try:
                            then()
                        except Exception as found:
                            error = found
                    arrival.end(error)

            return read

        self._threads.run([reading(*one) for one in ranges])
        return arrival

    def _checked(self, layer: int, part: int, sums: RangeSums) -> DamagedFileError | None:
        if sums.hexdigest() == self._header.checksums[layer][part]:
            return None
        return DamagedFileError(f"{self.path}: the checksum of layer {layer} does not match")

    def close(self) -> None:
        """Close it, when all reads have ended."""
        self._blob.close()
