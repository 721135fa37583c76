"""Buffers and copies between host and device: the one place that knows CUDA.

Reads land in page-aligned *slabs* of host memory, which are reused. On a CPU the slab is already where attention
wants it; on an accelerator a slab is pinned and copied on a side stream, and the compute stream waits for that copy
only, never the host.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch

from .store.pread import PAGE, aligned_buffer, as_memoryview


@dataclass
class Slab:
    """Host memory for reads: `data` is uint8 `(capacity,)`, page aligned. `busy` is set while a copy from it runs."""

    data: torch.Tensor
    pinned: bool
    busy: Any = None

    def view(self, nbytes: int) -> memoryview:
        """The first `nbytes` as a writable buffer."""
        return as_memoryview(self.data[:nbytes])


class SlabPool:
    """Reusable slabs in powers of two. Idle slabs above `max_idle_bytes` are freed. Thread-safe."""

    def __init__(self, max_idle_bytes: int = 256 * 2**20) -> None:
        self.max_idle_bytes = max_idle_bytes
        self._idle: dict[tuple[int, bool], list[Slab]] = {}
        self._idle_bytes = 0
        self._lock = threading.Lock()

    def acquire(self, nbytes: int, device: torch.device) -> Slab:
        """A slab of at least `nbytes`; pinned if `device` is an accelerator."""
        pinned = device.type != "cpu"
        capacity = max(PAGE, 1 << (nbytes - 1).bit_length())
        if capacity > 2**22:  # Powers of two would waste too much of a large one.
            capacity = -(-nbytes // 2**20) * 2**20
        with self._lock:
            waiting = self._idle.get((capacity, pinned), [])
            for position, slab in enumerate(waiting):
                if slab.busy is None or slab.busy.query():
                    del waiting[position]
                    self._idle_bytes -= capacity
                    slab.busy = None
                    return slab
        if not pinned:
            return Slab(aligned_buffer(capacity), pinned)
        raw = torch.empty(capacity + PAGE, dtype=torch.uint8, pin_memory=True)
        start = -raw.data_ptr() % PAGE
        return Slab(raw[start : start + capacity], pinned)

    def release(self, slab: Slab) -> None:
        """Give a slab back; it may still be the source of a running copy (`slab.busy`)."""
        capacity = slab.data.numel()
        with self._lock:
            if self._idle_bytes + capacity <= self.max_idle_bytes:
                self._idle.setdefault((capacity, slab.pinned), []).append(slab)
                self._idle_bytes += capacity


# Slabs hold nothing between requests, so all stores and caches of the process share them.
SLABS = SlabPool()

_streams: dict[torch.device, Any] = {}


def upload(host: torch.Tensor, device: torch.device, slab: Slab | None = None) -> torch.Tensor:
    """`host` on `device`: itself on a CPU, else a copy on a side stream that the current stream waits for.

    Args:
        host: any tensor in host memory; asynchronous only if its memory is pinned (a slab's is).
        slab: where `host` lives; it is marked busy until the copy is done.
    """
    if device.type == "cpu":
        return host
    stream = _streams.get(device)
    if stream is None:
        stream = _streams[device] = torch.Stream(device=device)
    current = torch.accelerator.current_stream(device)
    with stream:
        copy = host.to(device, non_blocking=True)
        copied = stream.record_event()
    current.wait_event(copied)
    # The copy was allocated on the side stream but is used on the current one: tell the allocator.
    copy.record_stream(current)
    if slab is not None:
        slab.busy = copied
    return copy
