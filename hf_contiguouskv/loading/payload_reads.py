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
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from ..memory import MemoryTiers
from ..memory.blocks import among
from ..stats import RequestStats
from ..store.attached_prefix import AttachedPrefix, Chunks
from ..store.reader import ExtentReader, Task, Ticket
from ..timeline import Timeline
from .host_residency import Batch, PrefixTables, Residency, residency_for

_NONE = np.zeros(0, dtype=np.int64)


@dataclass
class _LayerReads:
    """What was asked for in one layer: batches on their way, and chunks for which there was no room."""

    device: torch.device
    batches: list[Batch] = field(default_factory=list)
    left: Chunks = field(default_factory=lambda: _NONE)

    def asked(self) -> list[Chunks]:
        return [batch.chunks for batch in self.batches] + ([self.left] if len(self.left) else [])


class _Asked:
    """What was asked for, by layer. Reader threads work on it, so it must not keep `PayloadReads` alive: that is how a
    cache that is dropped gives its memory back."""

    def __init__(
        self,
        prefix: AttachedPrefix,
        reader: ExtentReader,
        memory: MemoryTiers,
        tables: PrefixTables,
        verify: bool,
    ) -> None:
        self.layers: dict[int, _LayerReads] = {}
        self._prefix = prefix
        self._reader = reader
        self._memory = memory
        self._tables = tables
        self._verify = verify
        self._places: dict[torch.device, Residency] = {}

    def residency(self, device: torch.device) -> Residency:
        """How chunks get to `device`."""
        found = self._places.get(device)
        if found is None:
            found = self._places[device] = residency_for(
                device, self._prefix, self._memory, self._reader, self._tables, self._verify
            )
        return found

    def settle(self) -> None:
        """See `residency.Residency`."""
        for place in list(self._places.values()):
            place.settle()

    def issue(
        self, layers: Sequence[int], chunks: Chunks, device: torch.device, speculative: bool, alone: bool
    ) -> None:
        """Start bringing those of `chunks` that nobody asked for yet."""
        for layer in layers:
            reads = self.layers.setdefault(layer, _LayerReads(device))
            before = reads.asked()
            missing = chunks[~among(chunks, np.concatenate(before))] if before else chunks
            if not len(missing):
                continue
            batches, left = self.residency(device).bring(layer, missing, speculative=speculative, alone=alone)
            reads.batches += batches
            if len(left) and not speculative:
                reads.left = np.union1d(reads.left, left)


class PayloadReads:
    """The payload of one request: asked for ahead, taken layer by layer. `close` gives everything back.

    Args:
        prefix: whose chunks.
        reader, memory: of the store.
        stats: counts bytes and waits.
        verify: compare checksums; what was not compared never stays in memory.
        timeline: records reads and waits, if there is one.
    """

    def __init__(
        self,
        prefix: AttachedPrefix,
        reader: ExtentReader,
        memory: MemoryTiers,
        stats: RequestStats,
        verify: bool,
        timeline: Timeline | None = None,
    ) -> None:
        self.timeline = timeline
        self._prefix = prefix
        self._reader = reader
        self._stats = stats
        self.tables = PrefixTables(prefix, memory)
        self._asked = _Asked(prefix, reader, memory, self.tables, verify)
        self._layers = self._asked.layers
        self._tasks: dict[int, Task] = {}
        # For caches that are dropped without `close`: what they have taken from memory is given back all the same.
        self._finalizer = weakref.finalize(self, memory.defer, partial(_give_up, self._tasks, self._asked, stats))
        self._finalizer.atexit = False

    def ask(self, layers: Sequence[int], chunks: Chunks, device: torch.device, speculative: bool = False) -> None:
        """Start bringing, in each of `layers`, those of `chunks` (int64, ascending) that nobody asked for yet.

        Somebody waits for the first layer (unless the reads are speculative), so its reads are issued at once. Those of
        the others are worked out by a reader thread, while the model computes.
        """
        for layer in layers:
            self._settle(layer)
        self._asked.residency(device)
        now, later = (layers[:0], layers) if speculative else (layers[:1], layers[1:])
        if now:
            self._asked.issue(now, chunks, device, speculative, len(layers) == 1)
        if later:
            task = self._reader.run(partial(self._asked.issue, later, chunks, device, speculative, False))
            self._tasks.update(dict.fromkeys(later, task))

    def ask_ahead(self, layer: int, chunks: Chunks, device: torch.device, must: bool) -> bool:
        """`ask` for one layer, as a `Start`: what memory has no room for is read when it is taken."""
        self.ask([layer], chunks, device)
        return True

    def _settle(self, layer: int) -> None:
        """Wait until a reader thread has issued what was asked for in this layer before."""
        task = self._tasks.pop(layer, None)
        if task is not None:
            task.wait()

    def asked(self, layer: int) -> int:
        """How many chunks of this layer were asked for and not taken yet."""
        self._settle(layer)
        reads = self._layers.get(layer)
        return 0 if reads is None else sum(len(batch.chunks) for batch in reads.batches) + len(reads.left)

    def take(self, layer: int) -> Generator[Batch]:
        """Everything asked for in this layer, batch by batch, each as soon as it is there.

        A batch is valid until the next one is asked for. What memory had no room for comes last, in pieces.
        """
        self._settle(layer)
        reads = self._layers.pop(layer, None)
        while reads is not None and (reads.batches or len(reads.left)):
            if not reads.batches:
                self._bring_left(layer, reads)
            batch = reads.batches[0]
            try:
                if batch.ticket is not None:
                    wait(batch.ticket, self._stats, self.timeline, layer)
                yield batch
            except BaseException:
                self._abandon(reads.batches)
                raise
            del reads.batches[0]
            batch.release()
            if batch.ticket is not None:
                self._stats.bytes_read += batch.ticket.bytes_read

    def _bring_left(self, layer: int, reads: _LayerReads) -> None:
        # What was used since may have made room.
        place = self._asked.residency(reads.device)
        reads.batches, reads.left = place.bring(layer, reads.left)
        if not reads.batches:
            piece, reads.left = place.bring_piece(layer, reads.left)
            reads.batches.append(piece)

    def peek(self, layer: int) -> Iterator[Batch]:
        """As `take`, but what memory has room for stays here for the `take` that follows; the rest is read again."""
        self._settle(layer)
        reads = self._layers.get(layer)
        if reads is None:
            return
        for batch in reads.batches:
            if batch.ticket is not None:
                wait(batch.ticket, self._stats, self.timeline, layer)
            yield batch
        left, reads.left = reads.left, _NONE
        while len(left):
            piece, left = self._asked.residency(reads.device).bring_piece(layer, left)
            try:
                if piece.ticket is not None:  # Else all of it is in the host's tier.
                    wait(piece.ticket, self._stats, self.timeline, layer)
                yield piece
            finally:
                self._abandon([piece])

    def _abandon(self, batches: Sequence[Batch]) -> None:
        _abandon(batches, self._stats)

    def close(self) -> None:
        """Wait for what is under way, and give all memory back; what was read for nothing is counted."""
        size = self._prefix.extent_bytes
        for task in set(self._tasks.values()):
            with suppress(Exception):
                task.wait()  # What it asks for must be seen here.
        for reads in self._layers.values():
            self._stats.prefetch_wasted_bytes += sum(batch.from_disk * size for batch in reads.batches)
        _give_up(self._tasks, self._asked, self._stats)

    def settle(self) -> None:
        """The first token is out: do what could wait for that."""
        self._asked.settle()


def _abandon(batches: Sequence[Batch], stats: RequestStats) -> None:
    # Memory may be given back only when no reader thread writes to it any more.
    for batch in batches:
        if batch.ticket is not None:
            with suppress(Exception):  # Another error is on its way up, or nobody needs these bytes any more.
                batch.ticket.wait()
            stats.bytes_read += batch.ticket.bytes_read
        batch.release()


def _give_up(tasks: dict[int, Task], asked: _Asked, stats: RequestStats) -> None:
    for task in set(tasks.values()):
        with suppress(Exception):  # Nobody needs these reads any more.
            task.wait()
    tasks.clear()
    while asked.layers:
        _abandon(asked.layers.popitem()[1].batches, stats)
    asked.settle()


def wait(
    ticket: Ticket, stats: RequestStats, timeline: Timeline | None = None, layer: int = 0, kind: str = "read"
) -> None:
    """Wait for a ticket; the time counts as `io_wait_s`."""
    started = time.perf_counter()
    waited = not ticket.done
    try:
        ticket.wait()  # Raises what went wrong.
    finally:
        ended = time.perf_counter()
        if waited:
            stats.io_wait_s += ended - started
        if timeline is not None:
            timeline.add(kind, layer, ticket.started, ticket.ended)
            if waited:
                timeline.add("wait", layer, started, ended)


# Starts a read; with `False`, only if there is room for it in memory. Returns whether it was started.
Start = Callable[[bool], bool]


class Lookahead:
    """Starts reads in order, as long as fewer than `limit` bytes are under way or unused; at least one always is."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: deque[tuple[int, int, Start]] = deque()
        self._open: dict[int, int] = {}

    def add(self, key: int, nbytes: int, start: Start) -> None:
        """Queue a read of `nbytes`, known as `key` (a layer index)."""
        self._waiting.append((key, nbytes, start))

    def pump(self) -> None:
        """Start what fits."""
        while self._waiting:
            key, nbytes, start = self._waiting[0]
            if self._open and sum(self._open.values()) + nbytes > self._limit:
                return
            if not start(False):
                return
            self._waiting.popleft()
            self._open[key] = self._open.get(key, 0) + nbytes

    def need(self, key: int) -> None:
        """Make sure that `key` has been started, whatever the limit says (layers may run in any order)."""
        mine = [entry for entry in self._waiting if entry[0] == key]
        for entry in mine:
            self._waiting.remove(entry)
            _, nbytes, start = entry
            self._open[key] = self._open.get(key, 0) + nbytes
            start(True)

    def used(self, key: int) -> None:
        """The bytes of `key` have been used: start what fits now."""
        self._open.pop(key, None)
        self.pump()
