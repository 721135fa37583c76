"""Streams, events and pinned memory: the one place that knows accelerators.

The rules of the device pipeline (docs/device-pipeline.md), for every accelerator that `torch.accelerator` knows:

- reads land in pinned host buffers; each layer's buffer crosses in one copy on a side stream of its own;
- every copy returns an event; whoever uses the copied bytes makes *their stream* wait for it, never the host;
- a host buffer is reused once the event of the last copy from it has happened (asked, not waited for); a device buffer
  at any time, by a copy that waits on its stream for the event of the last use;
- memory that one stream allocated and another uses is recorded with the allocator.

A CPU needs none of this: what was read is where attention wants it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from .store.pread import PAGE, aligned_buffer


class Device(Protocol):
    """An accelerator, as the pipeline sees it. Events are opaque, except that `event.query()` says if it happened.

    "The current stream" is the one that the calling thread's computation is queued on.

    Attributes:
        name: for statistics and messages.
    """

    name: str

    def empty(self, nbytes: int, *, for_copies: bool = False) -> torch.Tensor:
        """uint8 `(nbytes,)` on the device, for the current stream, or to be written by `copy_in` first."""
        ...

    def copy_in(self, source: torch.Tensor, target: torch.Tensor, after: Any = None) -> Any:
        """Queue a copy from pinned host memory on a side stream, behind the event `after`; an event for its end."""
        ...

    def copy_out(self, source: torch.Tensor, target: torch.Tensor) -> Any:
        """Queue a copy to pinned host memory on a side stream, behind what the current stream has queued so far."""
        ...

    def wait(self, event: Any) -> None:
        """What the current stream gets from now on runs after `event`. The host goes on."""
        ...

    def mark(self) -> Any:
        """An event for the end of what the current stream has queued so far."""
        ...

    def uses(self, tensor: torch.Tensor) -> None:
        """The current stream uses memory that another stream may have allocated."""
        ...

    def stream(self) -> Any:
        """Which stream is current, as a key for comparison."""
        ...


class Accelerator:
    """A device of CUDA, ROCm, XPU or another backend with streams, through torch's device-neutral interface."""

    def __init__(self, device: torch.device) -> None:
        self.name = str(device)
        self._device = device
        # One for each direction: a copy in does not queue behind a copy out.
        self._incoming = torch.Stream(device=device)
        self._outgoing = torch.Stream(device=device)

    @contextmanager
    def _on(self, stream: torch.Stream) -> Iterator[None]:
        """Make `stream` the current one of this thread.

        Not `with stream`: a Stream object remembers what was current before, and several threads share this one.
        """
        index = torch.accelerator.current_device_index()
        before = torch.accelerator.current_stream(self._device)
        torch.accelerator.set_stream(stream)
        try:
            yield
        finally:
            torch.accelerator.set_stream(before)
            torch.accelerator.set_device_index(index)

    def empty(self, nbytes: int, *, for_copies: bool = False) -> torch.Tensor:
        """See `Device`."""
        # Ordinary tensors even in inference mode: other threads, and requests outside of it, write to them.
        with torch.inference_mode(False):
            if not for_copies:
                return torch.empty(nbytes, dtype=torch.uint8, device=self._device)
            with self._on(self._incoming):  # From the memory that this stream reuses in its own order.
                return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def copy_in(self, source: torch.Tensor, target: torch.Tensor, after: Any = None) -> Any:
        """See `Device`."""
        if after is not None:
            self._incoming.wait_event(after)
        with self._on(self._incoming):
            target.copy_(source, non_blocking=True)
        return self._incoming.record_event()

    def copy_out(self, source: torch.Tensor, target: torch.Tensor) -> Any:
        """See `Device`."""
        self._outgoing.wait_event(self.mark())
        with self._on(self._outgoing):
            target.copy_(source, non_blocking=True)
        source.record_stream(self._outgoing)
        return self._outgoing.record_event()

    def wait(self, event: Any) -> None:
        """See `Device`."""
        torch.accelerator.current_stream(self._device).wait_event(event)

    def mark(self) -> Any:
        """See `Device`."""
        return torch.accelerator.current_stream(self._device).record_event()

    def uses(self, tensor: torch.Tensor) -> None:
        """See `Device`."""
        tensor.record_stream(torch.accelerator.current_stream(self._device))

    def stream(self) -> Any:
        """See `Device`."""
        return torch.accelerator.current_stream(self._device).stream_id


_opened: dict[torch.device, Device] = {}
_lock = threading.Lock()


def device_of(device: torch.device) -> Device | None:
    """The accelerator `device`, opened once per process; `None` for a CPU."""
    if device.type == "cpu":
        return None
    with _lock:
        if device not in _opened:
            _opened[device] = Accelerator(device)
        return _opened[device]


def pinned_buffer(nbytes: int) -> torch.Tensor:
    """Page-aligned uint8 `(nbytes,)` in host memory that copies to an accelerator run from without the host."""
    if not torch.accelerator.is_available():
        return aligned_buffer(nbytes)
    with torch.inference_mode(False):
        # Pinned memory comes in whole pages, and in powers of two: a byte more may cost as much again.
        raw = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        if raw.data_ptr() % PAGE == 0:
            return raw
        raw = torch.empty(nbytes + PAGE, dtype=torch.uint8, pin_memory=True)
        start = -raw.data_ptr() % PAGE
        return raw[start : start + nbytes]


class StreamOrder:
    """Keeps uses of one piece of device memory by several streams in order (one stream keeps its own)."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._writer: Any = None
        self._written: Any = None
        self._reads: dict[Any, Any] = {}

    def before_read(self) -> None:
        """The current stream is about to read."""
        if self._written is not None and self._writer != self._device.stream():
            self._device.wait(self._written)

    def after_read(self) -> None:
        """The current stream has queued its read."""
        self._reads[self._device.stream()] = self._device.mark()

    def before_write(self) -> None:
        """The current stream is about to write."""
        self.before_read()
        stream = self._device.stream()
        for reader, event in self._reads.items():
            if reader != stream:
                self._device.wait(event)

    def after_write(self) -> None:
        """The current stream has queued its write."""
        self._reads.clear()
        self._writer, self._written = self._device.stream(), self._device.mark()
