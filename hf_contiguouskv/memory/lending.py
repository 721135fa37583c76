"""What a tier lends besides slots: buffers for reads and copies, and workspace for attention's K and V."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeVar

import torch

from .entries import Buffer, buffer_capacity
from .workspace import Workspace, workspace_capacity

T = TypeVar("T")
# Buffers kept for the next read take at most this fraction (1/8) of the limit.
_IDLE_SHARE = 8
# Workspace for attention, in use or not, takes at most this fraction (1/8) of the limit.
_WORKSPACE_SHARE = 8


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
