"""What a tier lends besides slots: buffers for reads and copies, and workspace for attention's K and V.

A request fills tens of megabytes of K and V once and drops them. Whether the C library keeps that memory for the next
request differs from process to process. So the workspace keeps it. Measured by `scripts/allocators.py` with exact
requests over 8,128 + 32 tokens of SmolLM2-135M (bfloat16, AMD EPYC Zen 4, medians of six processes; the samples are in
`docs/results/allocators.json`): with the workspace no page fault, 362 ms with cold chunks and 341 warm; without it
25,000 faults per request, 440 and 388 ms.

Without idle buffers: 375 ms cold and 350 warm; at 25%, 321 and 234 instead of 280 and 210. The quartiles overlap. Idle
buffers are kept for accelerators too, where host memory is pinned; that is not measured.
"""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import TypeVar

import torch

from .entries import Buffer, buffer_capacity

T = TypeVar("T")
# Buffers kept for the next read take at most this fraction (1/8) of the limit.
_IDLE_SHARE = 8
# Workspace for attention, in use or not, takes at most this fraction (1/8) of the limit.
_WORKSPACE_SHARE = 8
_SMALLEST = 4096


def workspace_capacity(nbytes: int) -> int:
    """Capacity of a piece: four sizes per power of two, so that requests of similar length can share pieces."""
    step = max(_SMALLEST, 1 << max(0, (nbytes - 1).bit_length() - 3))
    return max(_SMALLEST, -(-nbytes // step) * step)


class Workspace:
    """Pieces of host memory, lent as tensors. Callers of `lend`, `add` and `drop` hold the tier's lock.

    A piece returns when the last tensor on its storage is gone, in any thread. Returning takes no lock and changes no
    count, because lent pieces count too.

    Attributes:
        held_bytes: bytes of all pieces, lent or not.
    """

    def __init__(self) -> None:
        self.held_bytes = 0
        self._free: dict[int, deque[torch.Tensor]] = {}
        # Sizes in the order in which they were last lent, the latest at the end.
        self._recent: dict[int, None] = {}

    @property
    def free_bytes(self) -> int:
        """Bytes of pieces that are not lent."""
        return sum(capacity * len(pieces) for capacity, pieces in self._free.items())

    def lend(self, capacity: int) -> torch.Tensor | None:
        """A returned piece, uint8 `(capacity,)`, uninitialised; `None` if there is none of this size."""
        pieces = self._free.get(capacity)
        return self._lent(pieces.pop()) if pieces else None

    def add(self, piece: torch.Tensor) -> torch.Tensor:
        """Count a new piece, uint8 `(capacity,)`, and lend it."""
        self._free.setdefault(len(piece), deque())
        self.held_bytes += len(piece)
        return self._lent(piece)

    def _lent(self, piece: torch.Tensor) -> torch.Tensor:
        finalizer = None
        try:
            self._recent.pop(len(piece), None)
            self._recent[len(piece)] = None
            # The storage keeps this array alive until its last tensor is gone, so the array's finalizer returns the
            # piece.
            array = piece.numpy()
            with torch.inference_mode(False):  # A cache may be continued outside inference mode.
                lent = torch.from_numpy(array)
            finalizer = weakref.finalize(array, _come_back, weakref.ref(self), piece)
            finalizer.atexit = False
            return lent
        except BaseException:
            if finalizer is None or finalizer.detach() is not None:
                self.come_back(piece)
            raise

    def come_back(self, piece: torch.Tensor) -> None:
        """Take back a piece that no tensor uses."""
        pieces = self._free.get(len(piece))
        if pieces is not None:  # The workspace has not been closed.
            pieces.append(piece)

    def drop(self, nbytes: int) -> None:
        """Return up to `nbytes` of pieces that are not lent to the system, least recently lent sizes first."""
        for capacity in self._recent:
            pieces = self._free[capacity]
            while nbytes > 0 and pieces:
                pieces.popleft()
                self.held_bytes -= capacity
                nbytes -= capacity

    def close(self) -> None:
        """Drop all pieces; from now on keep and count none."""
        self._free.clear()
        self._recent.clear()
        self.held_bytes = 0


def _come_back(workspace: Callable[[], Workspace | None], piece: torch.Tensor) -> None:
    living = workspace()
    if living is not None:
        living.come_back(piece)


class Lender(ABC):
    """The part of a `Tier` that lends memory under its limit. The tier counts what else it holds, and makes room.

    Args:
        max_bytes: hard limit on everything that the tier holds.
        make_buffer: allocates a uint8 tensor of the given number of bytes.
        lock: the tier's lock.
    """

    def __init__(self, max_bytes: int, make_buffer: Callable[[int], torch.Tensor], lock: threading.RLock) -> None:
        self.max_bytes = max_bytes
        self.on_device = False
        self._make_buffer = make_buffer
        self._lock = lock
        self._closed = False
        self._idle: dict[int, list[Buffer]] = {}
        self._idle_bytes = 0
        self._buffer_bytes = 0
        self._workspace = Workspace()

    @abstractmethod
    def make_room(self, nbytes: int) -> bool:
        """Evict until `nbytes` more fit; whether they fit."""

    @abstractmethod
    def give_way(self, nbytes: int) -> None:
        """Return `nbytes` of memory that is not in use to the system, or all of it if there is less."""

    @abstractmethod
    def _fits(self, nbytes: int) -> bool:
        """Whether `nbytes` more are within the limit."""

    @abstractmethod
    def _note_peak(self) -> None:
        """Update the peak after the tier has grown."""

    def lease(self, nbytes: int, *, must: bool = True, exact: bool = False, evict: bool = True) -> Buffer | None:
        """A buffer of at least `nbytes`, counted towards the limit if there is room.

        Args:
            nbytes: size of the buffer.
            must: where there is no room, return an uncounted buffer instead of `None`. Such buffers are few and small.
            exact: allocate exactly `nbytes` (for buffers that will be kept).
            evict: whether entries may be evicted for it.
        """
        capacity = nbytes if exact else buffer_capacity(nbytes)
        with self._lock:
            for buffer in self._idle.get(capacity, ()):
                # A stream can wait for a buffer on its device. A thread that reads into host memory cannot wait.
                if buffer.busy is None or self.on_device or buffer.busy.query():
                    self._idle[capacity].remove(buffer)
                    self._idle_bytes -= capacity
                    self._buffer_bytes += capacity
                    return buffer
            fits = self.make_room(capacity) if evict else self._fits(capacity)
            counted = capacity if fits else 0
            if not counted and not must:
                return None
            self._buffer_bytes += counted
            self._note_peak()
        try:
            with torch.inference_mode(False):  # Other threads, and requests outside inference mode, write to it too.
                return Buffer(self.where_it_fits(capacity, lambda: self._make_buffer(capacity)), counted)
        except BaseException as error:
            with self._lock:
                self._buffer_bytes -= counted
            if isinstance(error, torch.OutOfMemoryError) and not must:
                return None  # The limit exceeds the memory that exists.
            raise

    def where_it_fits(self, nbytes: int, action: Callable[[], T]) -> T:
        """Call `action`, which allocates `nbytes` of this memory. If memory runs out, free unused entries and retry.

        Raises:
            OutOfMemoryError: memory does not suffice even after everything unused has been freed.
        """
        for wanted in (nbytes, self.max_bytes):
            try:
                return action()
            except torch.OutOfMemoryError:
                self.give_way(wanted)
        return action()

    def give_back(self, buffer: Buffer) -> None:
        """Return a leased buffer that is no longer read or written."""
        if not buffer.counted or self._closed:
            return
        with self._lock:
            self._buffer_bytes -= buffer.counted
            if self._idle_bytes + buffer.counted <= self.max_bytes // _IDLE_SHARE and self._fits(buffer.counted):
                self._idle.setdefault(buffer.counted, []).append(buffer)
                self._idle_bytes += buffer.counted

    def workspace(self, nbytes: int) -> torch.Tensor | None:
        """Uninitialised memory for attention's K and V, uint8 `(nbytes,)`, lent for as long as a tensor uses it.

        `None` if workspace would exceed its share of the limit; the caller then allocates ordinary memory.
        """
        capacity, share = workspace_capacity(nbytes), self.max_bytes // _WORKSPACE_SHARE
        with self._lock:
            if self._closed:
                return None
            lent = self._workspace.lend(capacity)
            if lent is None:
                held = self._workspace.held_bytes
                if held - self._workspace.free_bytes + capacity > share:
                    return None  # Evict nothing in vain.
                self._workspace.drop(held + capacity - share)
                if not self.make_room(capacity):
                    return None
                lent = self._workspace.add(self._make_buffer(capacity))
                self._note_peak()
        return lent[:nbytes]

    def drop_workspace(self) -> None:
        """Free workspace that is not in use."""
        with self._lock:
            self._workspace.drop(self._workspace.held_bytes)

    def drop_idle(self) -> None:
        """Free the buffers that are kept for the next read."""
        with self._lock:
            self._idle.clear()
            self._idle_bytes = 0
