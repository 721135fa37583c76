"""Reads of one request: started ahead of compute, in order, each byte at most once; and waiting for them."""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby

import numpy as np
import torch

from ..memory import MemoryTiers
from ..memory.blocks import among
from ..stats import RequestStats
from ..store.attached_prefix import AttachedPrefix, Chunks
from ..store.reader import ExtentReader, Task, Ticket
from ..timeline import NO_TIMELINE, SpanRecorder
from .device_residency import DeviceResidency
from .host_residency import HostResidency
from .prefix_tables import PrefixTables
from .residency import LoadedChunks, Residency

_NONE = np.zeros(0, dtype=np.int64)
# Starts a read, and returns whether it did. Called with `False`, it starts the read only if memory has room for it.
Start = Callable[[bool], bool]


class Lookahead:
    """Starts reads in order while at most `limit` bytes are under way or unused. At least one read always is started.
    The bytes of a read that serves several layers count until the last of them has used its own.

    Args:
        limit: bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        # Layers, ascending; bytes; what starts the read.
        self._waiting: deque[tuple[Sequence[int], int, Start]] = deque()
        self._open: dict[int, int] = {}

    def add(self, layers: Sequence[int], nbytes: int, start: Start) -> None:
        """Queue a read of `nbytes` for `layers` (ascending)."""
        self._waiting.append((layers, nbytes, start))

    def pump(self) -> None:
        """Start the reads that fit."""
        while self._waiting:
            layers, nbytes, start = self._waiting[0]
            if self._open and sum(self._open.values()) + nbytes > self.limit:
                return
            if not start(False):
                return
            self._waiting.popleft()
            self._open[layers[-1]] = self._open.get(layers[-1], 0) + nbytes

    def need(self, layer: int) -> None:
        """Start the reads for `layer` now, whatever the limit is (layers may run in any order)."""
        if not self._waiting:
            return
        mine = [entry for entry in self._waiting if layer in entry[0]]
        for entry in mine:
            self._waiting.remove(entry)
            layers, nbytes, start = entry
            self._open[layers[-1]] = self._open.get(layers[-1], 0) + nbytes
            start(True)

    def used(self, layer: int) -> None:
        """The bytes of `layer` have been used: start the reads that fit now."""
        self._open.pop(layer, None)
        self.pump()


def wait_for(ticket: Ticket, stats: RequestStats, timeline: SpanRecorder, layer: int, kind: str = "read") -> None:
    """Wait for the reads of `ticket`. The time counts as `io_wait_s`, and goes into the timeline.

    Raises:
        SegmentCorruptError, SegmentReadError, StoreClosedError: see `Ticket.wait`.
    """
    started = time.perf_counter()
    waited = not ticket.done
    try:
        ticket.wait()
    finally:
        ended = time.perf_counter()
        if waited:
            stats.io_wait_s += ended - started
        timeline.add(kind, layer, ticket.started, ticket.ended)
        if waited:
            timeline.add("wait", layer, started, ended)


@dataclass
class _LayerReads:
    """Chunks that were asked for in one layer: those that are found or under way, and those that had no room."""

    device: torch.device
    parts: list[LoadedChunks] = field(default_factory=list)
    left: Chunks = field(default_factory=lambda: _NONE)

    def asked(self) -> list[Chunks]:
        return [part.chunks for part in self.parts] + ([self.left] if len(self.left) else [])


class _Asked:
    """Chunks that were asked for, by layer.

    Reader threads work on this, so it must not keep `PayloadReads` alive: a cache that is dropped without `close` gives
    its memory back when `PayloadReads` is collected.
    """

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
        """Brings chunks to `device`."""
        found = self._places.get(device)
        if found is None:
            prefix, memory, reader, tables = self._prefix, self._memory, self._reader, self._tables
            tier = memory.on(device)
            if tier is None:
                found = HostResidency(prefix, memory, reader, tables, self._verify)
            else:
                found = DeviceResidency(prefix, memory, tier, reader, tables, self._verify)
            self._places[device] = found
        return found

    def settle(self) -> None:
        """Do the work that was put off until the first token is out."""
        for place in list(self._places.values()):
            place.settle()

    def issue(
        self, layers: Sequence[int], chunks: Chunks, device: torch.device, speculative: bool, alone: bool
    ) -> None:
        """Start bringing those of `chunks` that have not been asked for."""
        for layer in layers:
            missing = self._not_asked(layer, chunks, device)
            if len(missing):
                place = self.residency(device)
                self._note(layer, place.find_or_read(layer, missing, speculative=speculative, alone=alone), speculative)

    def issue_together(
        self, layers: Sequence[int], chunks: Chunks, device: torch.device, speculative: bool = True
    ) -> None:
        """As `issue`, with one ticket for the reads of all layers."""
        if len(layers) == 1:
            self.issue(layers, chunks, device, speculative, alone=True)
            return
        asked = [(layer, self._not_asked(layer, chunks, device)) for layer in layers]
        asked = [(layer, missing) for layer, missing in asked if len(missing)]
        found = self.residency(device).find_or_read_together(asked, speculative=speculative)
        for (layer, _), parts in zip(asked, found, strict=True):
            self._note(layer, parts, speculative)

    def _not_asked(self, layer: int, chunks: Chunks, device: torch.device) -> Chunks:
        before = self.layers.setdefault(layer, _LayerReads(device)).asked()
        return chunks[~among(chunks, np.concatenate(before))] if before else chunks

    def _note(self, layer: int, found: tuple[list[LoadedChunks], Chunks], speculative: bool) -> None:
        reads, (parts, left) = self.layers[layer], found
        reads.parts += parts
        if len(left) and not speculative:
            reads.left = np.union1d(reads.left, left)


class PayloadReads:
    """The chunks of one prefix in one form, for one request: asked for ahead, taken layer by layer.

    Args:
        prefix: in the form in which it is read.
        reader, memory: of the store.
        stats: counts bytes and waits.
        verify: whether to compare checksums. Chunks that were not compared never stay in memory.
        timeline: records reads and waits.
    """

    def __init__(
        self,
        prefix: AttachedPrefix,
        reader: ExtentReader,
        memory: MemoryTiers,
        stats: RequestStats,
        verify: bool,
        timeline: SpanRecorder = NO_TIMELINE,
    ) -> None:
        self._timeline = timeline
        self._prefix = prefix
        self._reader = reader
        self._stats = stats
        self.tables = PrefixTables(prefix, memory)
        self._asked = _Asked(prefix, reader, memory, self.tables, verify)
        self._layers = self._asked.layers
        self._tasks: dict[int, Task] = {}
        # A cache that is dropped without `close` gives its memory back all the same.
        self._finalizer = weakref.finalize(self, memory.defer, partial(_give_up, self._tasks, self._asked, stats))
        self._finalizer.atexit = False

    def ask(self, layers: Sequence[int], chunks: Chunks, device: torch.device, speculative: bool = False) -> None:
        """Start bringing, in each of `layers`, those of `chunks` (int64, ascending) that have not been asked for.

        The model waits for the first layer, so its reads are issued at once (unless they are speculative). A reader
        thread works out those of the other layers while the model computes. Layers that lie side by side in the file
        are read together.
        """
        for layer in layers:
            self._settle(layer)
        self._asked.residency(device)
        if self._prefix.layers_per_group > 1:
            groups = [list(some) for _, some in groupby(layers, key=self._prefix.group_of)]
            if not speculative:
                self._asked.issue_together(groups[0], chunks, device, speculative)
            for group in groups if speculative else groups[1:]:
                self._later(group, partial(self._asked.issue_together, group, chunks, device, speculative))
            return
        now, later = (layers[:0], layers) if speculative else (layers[:1], layers[1:])
        if now:
            self._asked.issue(now, chunks, device, speculative, len(layers) == 1)
        if later:
            self._later(later, partial(self._asked.issue, later, chunks, device, speculative, False))

    def _later(self, layers: Sequence[int], issue: Callable[[], None]) -> None:
        """Have a reader thread issue the reads of `layers`."""
        self._tasks.update(dict.fromkeys(layers, self._reader.run(issue)))

    def start(self, layers: Sequence[int], chunks: Chunks, device: torch.device, must: bool) -> bool:
        """As `ask`, for layers that are read together, as a `Start`: chunks that memory has no room for are read by
        `take`."""
        if len(layers) == 1:
            self.ask(layers, chunks, device)
            return True
        for layer in layers:
            self._settle(layer)
        self._asked.residency(device)
        self._later(layers, partial(self._asked.issue_together, layers, chunks, device, False))
        return True

    def start_unless_resident(
        self, layers: Sequence[int], chunks: Chunks, device: torch.device, enough: int, must: bool
    ) -> bool:
        """As `start`, speculatively, and only those of `layers` of which memory holds fewer than `enough` chunks.

        The reads of all these layers are one ticket.
        """
        missing = [layer for layer in layers if self.tables.resident(layer) < enough]
        if missing:
            for layer in missing:
                self._settle(layer)
            self._asked.residency(device)
            self._later(missing, partial(self._asked.issue_together, missing, chunks, device))
        return True

    def _settle(self, layer: int) -> None:
        """Wait until a reader thread has issued the reads that were asked for in this layer before."""
        task = self._tasks.pop(layer, None)
        if task is not None:
            task.wait()

    def asked(self, layer: int) -> int:
        """How many chunks of this layer were asked for and not taken yet."""
        self._settle(layer)
        reads = self._layers.get(layer)
        return 0 if reads is None else sum(len(part.chunks) for part in reads.parts) + len(reads.left)

    def take(self, layer: int) -> Generator[LoadedChunks]:
        """The chunks that were asked for in this layer, part by part, each as soon as it has arrived.

        A part is valid until the next one is asked for. Chunks that memory had no room for come last, in pieces.
        """
        self._settle(layer)
        reads = self._layers.pop(layer, None)
        while reads is not None and (reads.parts or len(reads.left)):
            if not reads.parts:
                self._bring_left(layer, reads)
            part = reads.parts[0]
            try:
                if part.ticket is not None:
                    wait_for(part.ticket, self._stats, self._timeline, layer)
                yield part
            except BaseException:
                self._abandon(reads.parts)
                raise
            del reads.parts[0]
            part.release()
            if part.ticket is not None:
                self._stats.bytes_read += part.ticket.take_count()

    def _bring_left(self, layer: int, reads: _LayerReads) -> None:
        # Memory may have room by now.
        place = self._asked.residency(reads.device)
        reads.parts, reads.left = place.find_or_read(layer, reads.left)
        if not reads.parts:
            piece, reads.left = place.read_piece(layer, reads.left)
            reads.parts.append(piece)

    def peek(self, layer: int) -> Iterator[LoadedChunks]:
        """As `take`, but the chunks stay here for the `take` that follows.

        Chunks that memory has no room for are read again by `take`.
        """
        self._settle(layer)
        reads = self._layers.get(layer)
        if reads is None:
            return
        for part in reads.parts:
            if part.ticket is not None:
                wait_for(part.ticket, self._stats, self._timeline, layer)
            yield part
        left, reads.left = reads.left, _NONE
        while len(left):
            piece, left = self._asked.residency(reads.device).read_piece(layer, left)
            try:
                if piece.ticket is not None:  # `None`: all of the piece is in the host's tier.
                    wait_for(piece.ticket, self._stats, self._timeline, layer)
                yield piece
            finally:
                self._abandon([piece])

    def _abandon(self, parts: Sequence[LoadedChunks]) -> None:
        _abandon(parts, self._stats)

    def close(self) -> None:
        """Wait for reads under way, give all memory back, and count the bytes that were read for nothing."""
        size = self._prefix.extent_bytes
        for task in set(self._tasks.values()):
            with suppress(Exception):
                task.wait()  # The reads that it issues must be seen here.
        for reads in self._layers.values():
            self._stats.prefetch_wasted_bytes += sum(part.from_disk * size for part in reads.parts)
        _give_up(self._tasks, self._asked, self._stats)

    def settle(self) -> None:
        """The first token is out: do the work that was put off until then."""
        self._asked.settle()


def _abandon(parts: Sequence[LoadedChunks], stats: RequestStats) -> None:
    # Memory may be given back only when no reader thread writes to it any more.
    for part in parts:
        if part.ticket is not None:
            with suppress(Exception):  # Another error is on its way up, or the bytes are not needed any more.
                part.ticket.wait()
            stats.bytes_read += part.ticket.take_count()
        part.release()


def _give_up(tasks: dict[int, Task], asked: _Asked, stats: RequestStats) -> None:
    for task in set(tasks.values()):
        with suppress(Exception):  # These reads are not needed any more.
            task.wait()
    tasks.clear()
    while asked.layers:
        _abandon(asked.layers.popitem()[1].parts, stats)
    asked.settle()
