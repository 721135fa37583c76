"""Chunks on their way to an accelerator: gathered in one pinned buffer per layer, which crosses in one copy.

For one layer, in order: reads land in the host buffer, behind chunks that were in the host's tier. The reader thread
that ends the last read queues the copy on the side stream. When attention needs the layer, its stream waits for the
copy's event and gathers. Once the first token is out, the chunks that stay are put into the device's slots. The host
waits for the disk, never for the device.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from ..hardware.accelerator import send
from ..hardware.aligned_memory import as_memoryview
from ..memory import Buffer, MemoryTiers
from ..memory.blocks import neighbours
from ..memory.device_tier import DeviceTier
from ..store.attached_prefix import AttachedPrefix, Chunks
from ..store.reader import ExtentReader, Read, Ticket
from .prefix_tables import PrefixTables
from .residency import PIECE_BYTES, LoadedChunks

# Chunks that wait to be put into the tiers take up at most this share (1 / n) of the smaller limit.
ARRIVALS_SHARE = 4


class ChunksInDeviceSlots:
    """Chunks that are in the device's slots."""

    def __init__(self, chunks: Chunks, slots: Chunks, tier: DeviceTier, extent_bytes: int, speculative: bool) -> None:
        self.chunks = chunks
        self.speculative = speculative
        self.ticket: Ticket | None = None
        self.from_disk = self.from_host = 0
        self._slots = slots
        self._tier = tier
        self._size = extent_bytes

    def extents(self, take: Chunks | None) -> torch.Tensor:
        slots = self._slots if take is None else self._slots[take]
        return self._tier.where_it_fits(len(slots) * self._size, lambda: self._tier.blocks(self._size).select(slots))

    def release(self) -> None:
        # The next user of these slots writes behind the work that has been queued.
        self._tier.release(self._slots, self._size)


class CrossingChunks:
    """Chunks that cross from a host buffer to a device buffer.

    It has many attributes because it names two buffers, three events and what belongs to the chunks.

    Args:
        layer: layer index.
        chunks: int64 `(n,)`; the first `from_host` of them were in the host's tier, the others are read.
        host: pinned, with room for all chunks.
        target: on the device, with room for all chunks.
        arrivals: gets the chunks once attention's buffer is filled; `None`: they do not stay in the tiers, because
            their checksums are not compared.
    """

    def __init__(
        self,
        layer: int,
        chunks: Chunks,
        from_host: int,
        host: Buffer,
        target: Buffer,
        memory: MemoryTiers,
        tier: DeviceTier,
        tables: PrefixTables,
        extent_bytes: int,
        speculative: bool,
        arrivals: Arrivals | None,
    ) -> None:
        self.chunks = chunks
        self.from_host, self.from_disk = from_host, len(chunks) - from_host
        self.speculative = speculative
        self.ticket: Ticket | None = None
        self._layer = layer
        self._host = host
        self._target = target
        self._memory = memory
        self._tier = tier
        self._tables = tables
        self._size = extent_bytes
        self._arrivals = arrivals
        self._copied: object = None
        self._used: object = None
        self._waited = False
        self._lock = threading.Lock()

    def start_copy(self) -> None:
        """Queue the copy to the device, unless it is queued. The thread that ends the last read calls this, and so does
        the thread that needs the chunks."""
        with self._lock:
            if self._copied is None:
                nbytes = len(self.chunks) * self._size
                device, target = self._tier.device, self._target
                self._copied = device.copy_in(self._host.data[:nbytes], target.data[:nbytes], after=target.busy)
                self._host.busy = self._copied

    def extents(self, take: Chunks | None) -> torch.Tensor:
        self.start_copy()
        device = self._tier.device
        if not self._waited:
            device.wait(self._copied)
            device.uses(self._target.data)
            self._waited = True
        count = len(self.chunks)
        rows = self._target.data[: count * self._size].view(count, self._size)
        if take is None:
            return rows
        if neighbours(take):
            return rows[int(take[0]) : int(take[0]) + len(take)]
        return rows.index_select(0, send(torch.from_numpy(take), rows.device))

    def release(self) -> None:
        if not self._waited:
            self._target.busy = self._copied or self._target.busy
            self._give_back()
            return
        self._target.busy = self._used = self._tier.device.mark()
        if self._arrivals is None:
            self._give_back()
        else:
            self._arrivals.add(self)

    @property
    def nbytes(self) -> int:
        """Bytes of each of the two buffers."""
        return len(self.chunks) * self._size

    def arrive(self) -> None:
        """Put the chunks that stay into the tiers, on the current stream, and give the buffers back."""
        device = self._tier.device
        try:
            device.wait(self._used)
            device.uses(self._target.data)
            self._stay()
        finally:
            self._target.busy = device.mark()
            self._give_back()

    def _give_back(self) -> None:
        self._tier.give_back(self._target)
        self._memory.host.give_back(self._host)

    def _stay(self) -> None:
        """Put the chunks into the device's slots; if there are none, put those that were read into the host's."""
        order = np.argsort(self.chunks)
        slots = self._tier.take(self._size, len(order))
        if len(slots):
            try:
                self._put(order[: len(slots)], slots)
            except torch.OutOfMemoryError:
                pass  # The model needs the memory more, and the chunks have been used.
            finally:
                self._tier.release(slots, self._size)
        else:
            self._stay_on_host(order[order >= self.from_host])

    def _stay_on_host(self, order: Chunks) -> None:
        host = self._memory.host
        slots = host.take(self._size, len(order))
        if not len(slots):
            return
        try:
            order = order[: len(slots)]
            rows = self._host.data[: len(self.chunks) * self._size].view(-1, self._size)
            host.blocks(self._size).write(slots, rows.index_select(0, torch.from_numpy(order)))
            mass = self._tables.importance(self._layer, self.chunks[order])
            for table, part, places in self._tables.split(self._layer, self.chunks[order]):
                if table is not None:
                    found = None if mass is None else mass[part]
                    host.keep(table, places, slots[part], self._size, importance=found)
        finally:
            host.release(slots, self._size)

    def _put(self, order: Chunks, slots: Chunks) -> None:
        self._tier.blocks(self._size).write(slots, self.extents(order))
        loaded = order >= self.from_host
        mass = self._tables.importance(self._layer, self.chunks[order])
        for table, part, places in self._tables.split(self._layer, self.chunks[order]):
            if table is not None:
                for from_disk in (True, False):
                    some = loaded[part] == from_disk
                    found = None if mass is None else mass[part][some]
                    self._tier.keep(
                        table, places[some], slots[part][some], self._size, loaded=from_disk, importance=found
                    )


class Arrivals:
    """Chunks that attention has used and that are going to stay. They are sorted, booked and copied to their slots once
    the first token is out, so that the token does not wait for it.

    Until then their buffers count towards the limits and take up at most a share of them. Thread-safe.
    """

    def __init__(self, memory: MemoryTiers, tier: DeviceTier) -> None:
        limits = [one.max_bytes for one in (memory.host, tier) if one.max_bytes]
        self._limit = min(limits, default=0) // ARRIVALS_SHARE
        self._waiting: deque[CrossingChunks] = deque()
        self._nbytes = 0
        self._lock = threading.Lock()

    def add(self, used: CrossingChunks) -> None:
        """Attention's buffer was filled from `used`."""
        with self._lock:
            self._waiting.append(used)
            self._nbytes += used.nbytes
        self.settle(self._limit)

    def settle(self, left: int = 0) -> bool:
        """Put chunks into the tiers until at most `left` bytes wait; whether any were waiting."""
        found = False
        while True:
            with self._lock:
                if self._nbytes <= left or not self._waiting:
                    return found
                used = self._waiting.popleft()
                self._nbytes -= used.nbytes
            found = True
            used.arrive()


class DeviceResidency:
    """`Residency` on an accelerator: chunks cross to it in one copy per layer."""

    def __init__(
        self,
        prefix: AttachedPrefix,
        memory: MemoryTiers,
        tier: DeviceTier,
        reader: ExtentReader,
        tables: PrefixTables,
        verify: bool,
    ) -> None:
        self._prefix = prefix
        self._memory = memory
        self._tier = tier
        self._reader = reader
        self._tables = tables
        self._verify = verify
        self.arrivals = Arrivals(memory, tier)

    def find_or_read(
        self, layer: int, chunks: Chunks, *, speculative: bool = False, alone: bool = True
    ) -> tuple[list[LoadedChunks], Chunks]:
        parts, missing = self._on_device(layer, chunks, speculative)
        if len(missing):
            try:
                crossing = self.start_crossing(layer, missing, speculative, alone, must=False)
            except BaseException:
                for part in parts:
                    part.release()
                raise
            if crossing is None and self.arrivals.settle():
                crossing = self.start_crossing(layer, missing, speculative, alone, must=False)
            if crossing is None:
                return parts, missing
            parts.append(crossing)
        return parts, missing[:0]

    def read_piece(self, layer: int, chunks: Chunks) -> tuple[LoadedChunks, Chunks]:
        self.arrivals.settle()
        count = max(1, PIECE_BYTES // self._prefix.extent_bytes)
        piece = self.start_crossing(layer, chunks[:count], False, True, must=True)
        assert piece is not None
        return piece, chunks[count:]

    def settle(self) -> None:
        self.arrivals.settle()

    def find_or_read_together(
        self, asked: Sequence[tuple[int, Chunks]], *, speculative: bool
    ) -> list[tuple[list[LoadedChunks], Chunks]]:
        found: list[tuple[list[LoadedChunks], Chunks]] = []
        loading: list[CrossingChunks] = []
        reads: list[Read] = []
        try:
            for layer, chunks in asked:
                parts, missing = self._on_device(layer, chunks, speculative)
                found.append((parts, missing))
                gathered = self._gather(layer, missing, speculative, must=False) if len(missing) else None
                if gathered is None and len(missing) and self.arrivals.settle():
                    gathered = self._gather(layer, missing, speculative, must=False)
                if gathered is None:
                    continue
                crossing, some = gathered
                parts.append(crossing)
                found[-1] = parts, missing[:0]
                if some:
                    loading.append(crossing)
                    reads += some
                else:
                    crossing.start_copy()
            if reads:
                ticket = self._reader.submit(
                    self._prefix.in_file_order(reads), then=partial(_start_copies, loading), joins=True
                )
                for crossing in loading:
                    crossing.ticket = ticket
        except BaseException:
            for parts, _ in found:
                for part in parts:
                    part.release()
            raise
        return found

    def _on_device(self, layer: int, chunks: Chunks, speculative: bool) -> tuple[list[LoadedChunks], Chunks]:
        """Those of `chunks` that the device has, and the others."""
        slots = self._tables.find(self._tier, layer, chunks)
        there = slots >= 0
        if not there.any():
            return [], chunks
        size = self._prefix.extent_bytes
        return [ChunksInDeviceSlots(chunks[there], slots[there], self._tier, size, speculative)], chunks[~there]

    def start_crossing(
        self, layer: int, chunks: Chunks, speculative: bool, alone: bool, must: bool
    ) -> CrossingChunks | None:
        """Start gathering chunks in a host buffer and copying them to the device.

        `None`: the tiers have no room for the buffers. With `must`, they are allocated beside the limits.
        """
        gathered = self._gather(layer, chunks, speculative, must)
        if gathered is None:
            return None
        crossing, reads = gathered
        try:
            if reads:
                crossing.ticket = self._reader.submit(
                    reads, threads=None if alone else 1, then=crossing.start_copy, joins=True
                )
            else:
                crossing.start_copy()
        except BaseException:
            crossing.release()
            raise
        return crossing

    def _gather(
        self, layer: int, chunks: Chunks, speculative: bool, must: bool
    ) -> tuple[CrossingChunks, list[Read]] | None:
        """Take both buffers, and copy what the host's tier has into the first; also the reads of the rest.

        `None` and `must` are as in `start_crossing`.
        """
        size, host = self._prefix.extent_bytes, self._memory.host
        source = host.lease(len(chunks) * size, must=must)
        if source is None:
            return None
        try:
            target = self._tier.lease(len(chunks) * size, must=must)
        except BaseException:
            host.give_back(source)
            raise
        if target is None:
            host.give_back(source)
            return None
        slots = self._tables.find(host, layer, chunks)
        packed, rest = np.flatnonzero(slots >= 0), np.flatnonzero(slots < 0)
        crossing = CrossingChunks(
            layer,
            chunks[np.concatenate([packed, rest])],
            len(packed),
            source,
            target,
            self._memory,
            self._tier,
            self._tables,
            size,
            speculative,
            self.arrivals if self._verify else None,
        )
        try:
            if len(packed):
                rows = source.data[: len(packed) * size].view(len(packed), size)
                try:
                    rows.copy_(host.blocks(size).select(slots[packed]))
                finally:
                    host.release(slots[packed], size)
            if not len(rest):
                return crossing, []
            octets = as_memoryview(source.data)

            def into(first: int, count: int) -> memoryview:
                return octets[first * size : (first + count) * size]

            order = np.arange(len(packed), len(chunks))
            return crossing, self._prefix.reads(layer, chunks[rest], order, into, self._verify)
        except BaseException:
            crossing.release()
            raise


def _start_copies(loading: Sequence[CrossingChunks]) -> None:
    for crossing in loading:
        crossing.start_copy()
