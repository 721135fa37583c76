"""What to read when: reads that run ahead of compute, each byte asked for at most once per request.

Three kinds of reads, all through the store's one reader, first come first served:

- *demand*: chunks that a selection has just named, for every layer of the period (intra-period);
- *ahead*: what is needed whatever the queries are (all chunks at budget 1.0, sliding-window tails, keys for
  identification), issued in layer order while fewer than `lookahead_bytes` are under way or waiting for compute;
- *speculative*: the current selection, for the next period (inter-period). The next selection then asks only for what
  is missing.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import torch

from .device import Slab, SlabPool
from .prefix import AttachedPrefix, Run
from .stats import RequestStats
from .store.reader import ExtentReader, Task, Ticket


@dataclass
class Batch:
    """Chunks of one layer that were asked for together.

    Attributes:
        chunks: global chunk indices, ascending; slot `i` of `slab` holds `chunks[i]`. Layers that asked for the same
            chunks share the list.
        slab: where they land.
        ticket: tells when they have landed.
        speculative: asked for before they were selected.
    """

    chunks: list[int]
    slab: Slab
    ticket: Ticket
    speculative: bool


@dataclass
class _LayerReads:
    batches: list[Batch] = field(default_factory=list)
    asked: set[int] = field(default_factory=set)


class PayloadReads:
    """The payload reads of one request. `close` waits for what is under way and gives all buffers back."""

    def __init__(
        self, prefix: AttachedPrefix, reader: ExtentReader, pool: SlabPool, stats: RequestStats, verify: bool
    ) -> None:
        self._prefix = prefix
        self._reader = reader
        self._pool = pool
        self._stats = stats
        self._verify = verify
        self._layers: dict[int, _LayerReads] = {}
        self._tasks: dict[int, Task] = {}

    def ask(
        self, layers: Sequence[int], chunks: Sequence[int], device: torch.device, speculative: bool = False
    ) -> None:
        """Start reading, in each of `layers`, those of `chunks` (ascending) that nobody asked for yet.

        Somebody waits for the first layer (unless the reads are speculative), so its reads are issued at once. Those of
        the others are worked out by a reader thread, while the model computes.
        """
        for layer in layers:
            self._settle(layer)
        now, later = (layers[:0], layers) if speculative else (layers[:1], layers[1:])
        if now:
            self._issue(now, chunks, device, speculative)
        if later:
            task = self._reader.run(partial(self._issue, later, chunks, device, speculative))
            self._tasks.update(dict.fromkeys(later, task))

    def _settle(self, layer: int) -> None:
        """Wait until a reader thread has issued what was asked for in this layer before."""
        task = self._tasks.pop(layer, None)
        if task is not None:
            task.wait()

    def _issue(self, layers: Sequence[int], chunks: Sequence[int], device: torch.device, speculative: bool) -> None:
        plans: dict[tuple[int, ...], tuple[list[int], list[Run]]] = {}
        for layer in layers:
            reads = self._layers.setdefault(layer, _LayerReads())
            # Layers of a period have asked for the same lists before: what is missing is found once for all.
            before = tuple(id(batch.chunks) for batch in reads.batches)
            if before not in plans:
                missing = [chunk for chunk in chunks if chunk not in reads.asked] if before else list(chunks)
                plans[before] = missing, self._prefix.runs(missing)
            missing, runs = plans[before]
            if not missing:
                continue
            nbytes = len(missing) * self._prefix.geometry.extent_bytes
            slab = self._pool.acquire(nbytes, device)
            reads_of_layer = self._prefix.payload_reads(layer, runs, slab.view(nbytes), self._verify)
            # Of several layers each has a thread of its own; a single one is shared by all.
            ticket = self._reader.submit(reads_of_layer, threads=None if len(layers) == 1 else 1)
            reads.asked.update(missing)
            reads.batches.append(Batch(missing, slab, ticket, speculative))

    def take(self, layer: int) -> list[Batch]:
        """Wait for everything asked for in this layer. The caller gives it back with `give_back`."""
        self._settle(layer)
        reads = self._layers.pop(layer, _LayerReads())
        for position, batch in enumerate(reads.batches):
            try:
                wait(batch.ticket, self._stats)
            except BaseException:
                self._abandon(reads.batches[position:])
                raise
            self._stats.bytes_read += batch.ticket.bytes_read
        return reads.batches

    def peek(self, layer: int) -> list[Batch]:
        """Wait as `take` does, but leave the batches here for the `take` that follows."""
        self._settle(layer)
        reads = self._layers.get(layer, _LayerReads())
        for batch in reads.batches:
            wait(batch.ticket, self._stats)
        return reads.batches

    def give_back(self, batches: Sequence[Batch]) -> None:
        for batch in batches:
            self._pool.release(batch.slab)

    def _abandon(self, batches: Sequence[Batch]) -> None:
        # A slab may be reused only when no reader thread writes to it any more.
        for batch in batches:
            with suppress(Exception):  # Another error is on its way up, or nobody needs these bytes any more.
                batch.ticket.wait()
            self._stats.bytes_read += batch.ticket.bytes_read
        self.give_back(batches)

    def close(self) -> None:
        """Wait for what is under way, and give all buffers back; what was read for nothing is counted."""
        for layer in list(self._tasks):
            with suppress(Exception):  # Nobody needs these reads any more.
                self._settle(layer)
        for layer in list(self._layers):
            batches = self._layers.pop(layer).batches
            self._stats.prefetch_wasted_bytes += sum(
                len(batch.chunks) * self._prefix.geometry.extent_bytes for batch in batches
            )
            self._abandon(batches)


def wait(ticket: Ticket, stats: RequestStats) -> None:
    """Wait for a ticket; the time counts as `io_wait_s`."""
    if ticket.done:
        ticket.wait()  # Raises what went wrong.
        return
    started = time.perf_counter()
    try:
        ticket.wait()
    finally:
        stats.io_wait_s += time.perf_counter() - started


class Lookahead:
    """Starts reads in order, as long as fewer than `limit` bytes are under way or unused; at least one always is."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: deque[tuple[int, int, Callable[[], None]]] = deque()
        self._open: dict[int, int] = {}

    def add(self, key: int, nbytes: int, start: Callable[[], None]) -> None:
        """Queue a read of `nbytes`, known as `key` (a layer index)."""
        self._waiting.append((key, nbytes, start))

    def pump(self) -> None:
        """Start what fits."""
        while self._waiting:
            key, nbytes, start = self._waiting[0]
            if self._open and sum(self._open.values()) + nbytes > self._limit:
                return
            self._waiting.popleft()
            self._open[key] = self._open.get(key, 0) + nbytes
            start()

    def need(self, key: int) -> None:
        """Make sure that `key` has been started, whatever the limit says (layers may run in any order)."""
        for position, (waiting, nbytes, start) in enumerate(self._waiting):
            if waiting == key:
                del self._waiting[position]
                self._open[key] = self._open.get(key, 0) + nbytes
                start()
                return

    def used(self, key: int) -> None:
        """The bytes of `key` have been used: start what fits now."""
        self._open.pop(key, None)
        self.pump()
