"""Streams, events and pinned memory: the only module that deals with accelerators.

The rules of the device pipeline (docs/device-pipeline.md), for every accelerator that `torch.accelerator` supports:

- Reads land in pinned host buffers. Each layer's buffer crosses in one copy on a separate side stream.
- Every copy returns an event. The *stream* that uses the copied bytes waits for it; the host never waits.
- A host buffer is reused once the event of the last copy from it has happened; the host queries the event and does not
  wait. A device buffer can be reused at any time: the next copy waits on its stream for the event of the last use.
- Memory that one stream allocated and another uses is recorded with the allocator.
- Small tensors (positions, masks) also cross in pinned blocks, without a wait. Only a selection needs values back on
  the host, and fetches them.

A CPU needs none of this: reads land where attention uses them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Any, Protocol

import torch

from .aligned_memory import PAGE, aligned_buffer
from .pinned_memory import PinnedPool, available_bytes, register_with_cuda

# Sizes of the pinned blocks for small tensors, and how many of each are allocated when a device is opened.
SMALL_BYTES, SMALL_BLOCKS = tuple(2**power for power in range(3, 19)), 8


class Device(Protocol):
    """An accelerator, as the pipeline sees it. Events are opaque; only `event.query()` tells whether one has happened.

    "The current stream" is the stream on which the calling thread queues its computation.

    Attributes:
        name: shown in statistics and messages.
    """

    name: str

    def empty(self, nbytes: int, *, for_copies: bool = False) -> torch.Tensor:
        """uint8 `(nbytes,)` on the device, for the current stream or (`for_copies`) for a first write by `copy_in`."""
        ...

    def copy_in(self, source: torch.Tensor, target: torch.Tensor, after: Any = None) -> Any:
        """Queue a copy from pinned host memory on a side stream, after the event `after`; an event for its end."""
        ...

    def copy_out(self, source: torch.Tensor, target: torch.Tensor) -> Any:
        """Queue a copy to pinned host memory on a side stream, after the work queued so far on the current stream."""
        ...

    def send(self, values: torch.Tensor) -> torch.Tensor:
        """A copy of a small CPU tensor on the device, for the current stream. The host does not wait."""
        ...

    def fetch(self, values: torch.Tensor) -> torch.Tensor:
        """A copy on the CPU of values that the current stream computes. The host waits for them."""
        ...

    def free_bytes(self) -> int | None:
        """Free device memory in bytes; `None` if the device does not report it."""
        ...

    def let_go(self) -> None:
        """Return allocated but unused memory to the device."""
        ...

    def copies_so_far(self) -> list[Any]:
        """Events for the end of all copies, in and out, queued so far."""
        ...

    def aside(self) -> AbstractContextManager[None]:
        """A context in which this thread computes on a stream that no request waits for."""
        ...

    def finish(self, event: Any) -> None:
        """Block this thread until `event` has happened. Only threads that write to disk call this, never a model's."""
        ...

    def wait(self, event: Any) -> None:
        """Make later work on the current stream run after `event`. The host does not wait."""
        ...

    def mark(self) -> Any:
        """An event for the end of the work queued so far on the current stream."""
        ...

    def uses(self, tensor: torch.Tensor) -> None:
        """Record that the current stream uses memory that another stream may have allocated."""
        ...

    def stream(self) -> Any:
        """The current stream, as a key for comparison."""
        ...


class Accelerator:
    """A device of CUDA, ROCm, XPU or another backend with streams, through torch's device-neutral interface.

    It has a method for each operation of the protocol `Device`.
    """

    def __init__(self, device: torch.device) -> None:
        self.name = str(device)
        self._device = device
        # One stream per direction, so that a copy in does not queue behind a copy out.
        self._incoming = torch.Stream(device=device)
        self._outgoing = torch.Stream(device=device)
        self._aside = torch.Stream(device=device)
        # Allocate and free the small pinned blocks for `send` and `fetch`: torch caches them, so no request waits.
        blocks = [
            torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
            for nbytes in SMALL_BYTES
            for _ in range(SMALL_BLOCKS)
        ]
        del blocks

    @contextmanager
    def _on(self, stream: torch.Stream) -> Iterator[None]:
        """Make `stream` this thread's current stream.

        Not `with stream`: a Stream object remembers the previous stream, and several threads share this object.
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
        # Ordinary tensors even in inference mode: other threads, and requests outside inference mode, write to them.
        with torch.inference_mode(False):
            if not for_copies:
                return torch.empty(nbytes, dtype=torch.uint8, device=self._device)
            with self._on(self._incoming):  # This stream reuses its own memory in order.
                return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def copy_in(self, source: torch.Tensor, target: torch.Tensor, after: Any = None) -> Any:
        if after is not None:
            self._incoming.wait_event(after)
        with self._on(self._incoming):
            target.copy_(source, non_blocking=True)
        return self._incoming.record_event()

    def copy_out(self, source: torch.Tensor, target: torch.Tensor) -> Any:
        self._outgoing.wait_event(self.mark())
        with self._on(self._outgoing):
            target.copy_(source, non_blocking=True)
        source.record_stream(self._outgoing)
        return self._outgoing.record_event()

    def send(self, values: torch.Tensor) -> torch.Tensor:
        """Copy through pinned memory: from pageable memory the driver may wait for the stream before it copies."""
        with torch.inference_mode(False):
            pinned = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True).copy_(values)
            return pinned.to(self._device, non_blocking=True)

    def fetch(self, values: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(False):
            pinned = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
        pinned.copy_(values, non_blocking=True)
        self.mark().synchronize()
        return pinned

    def free_bytes(self) -> int | None:
        """Free memory in bytes, including memory that torch caches for later tensors."""
        module = getattr(torch, self._device.type, None)
        if module is None or not hasattr(module, "mem_get_info"):
            return None
        free, _ = module.mem_get_info(self._device)
        return int(free) + int(module.memory_reserved(self._device)) - int(module.memory_allocated(self._device))

    def let_go(self) -> None:
        empty_cache = getattr(getattr(torch, self._device.type, None), "empty_cache", None)
        if empty_cache is not None:
            empty_cache()

    def copies_so_far(self) -> list[Any]:
        return [self._incoming.record_event(), self._outgoing.record_event()]

    def aside(self) -> AbstractContextManager[None]:
        return self._on(self._aside)

    def finish(self, event: Any) -> None:
        event.synchronize()

    def wait(self, event: Any) -> None:
        torch.accelerator.current_stream(self._device).wait_event(event)

    def mark(self) -> Any:
        return torch.accelerator.current_stream(self._device).record_event()

    def uses(self, tensor: torch.Tensor) -> None:
        tensor.record_stream(torch.accelerator.current_stream(self._device))

    def stream(self) -> Any:
        return torch.accelerator.current_stream(self._device).stream_id


opened_devices: dict[torch.device, Device] = {}
_pools: list[PinnedPool] = []
# Re-entrant: the garbage collector may close a store while this thread holds the lock.
_lock = threading.RLock()


def device_of(device: torch.device) -> Device | None:
    """The accelerator `device`, opened once per process; `None` for a CPU."""
    if device.type == "cpu":
        return None
    with _lock:
        if device not in opened_devices:
            opened_devices[device] = Accelerator(device)
        return opened_devices[device]


def send(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small CPU tensor on `device`: the tensor itself, or a copy that the host does not wait for."""
    opened = device_of(device)
    return values if opened is None else opened.send(values)


def after_this(tensors: Iterable[torch.Tensor]) -> Callable[[], AbstractContextManager[None]]:
    """A context manager for another thread that will use these tensors on a side stream. The side stream waits until
    they are computed, and their memory is not reused before the side stream has finished with them."""
    known = list(tensors)
    devices = {tensor.device: device_of(tensor.device) for tensor in known}
    marks = [(device, device.mark()) for device in devices.values() if device is not None]

    @contextmanager
    def follow() -> Iterator[None]:
        with ExitStack() as streams:
            for device, event in marks:
                streams.enter_context(device.aside())
                device.wait(event)
            for tensor in known:
                used_on = devices[tensor.device]
                if used_on is not None:
                    used_on.uses(tensor)
            yield

    return follow


def _marks() -> list[Any]:
    return [event for device in tuple(opened_devices.values()) for event in device.copies_so_far()]


def _pool() -> PinnedPool | None:
    """The pool of registered memory; `None` where the driver cannot register ordinary memory."""
    if not torch.cuda.is_available():
        return None
    with _lock:
        if not _pools:
            _pools.append(PinnedPool(register_with_cuda, _marks, available_bytes))
        return _pools[0]


def reserve_pinned(nbytes: int) -> None:
    """Reserve pinned memory for a store that may hold `nbytes` on the host and starts to use an accelerator."""
    pool = _pool()
    if pool is not None:
        pool.reserve(nbytes)


def release_pinned(nbytes: int) -> None:
    """Release the reservation of a store that was closed."""
    pool = _pool()
    if pool is not None:
        pool.release(nbytes)


def pinned_buffer(nbytes: int) -> torch.Tensor:
    """Page-aligned uint8 `(nbytes,)` in host memory from which copies to an accelerator run asynchronously.

    It comes from the reserved memory if there is room; else torch pins it now. If pinning fails it is ordinary memory:
    copies are still correct, but the host waits for them.
    """
    if not torch.accelerator.is_available():
        return aligned_buffer(nbytes)
    pool = _pool()
    found = None if pool is None else pool.take(nbytes)
    if found is not None:
        return found
    with torch.inference_mode(False), suppress(RuntimeError):
        # Torch rounds pinned memory up to a power of two, so one byte more may double it.
        raw = torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
        if raw.data_ptr() % PAGE == 0:
            return raw
        raw = torch.empty(nbytes + PAGE, dtype=torch.uint8, device="cpu", pin_memory=True)
        start = -raw.data_ptr() % PAGE
        return raw[start : start + nbytes]
    return aligned_buffer(nbytes)


class StreamOrder:
    """Orders the uses of one piece of device memory by several streams (each stream orders its own uses)."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._writer: Any = None
        self._written: Any = None
        self._reads: dict[Any, Any] = {}

    def before_read(self) -> None:
        """Call before the current stream queues a read."""
        if self._written is not None and self._writer != self._device.stream():
            self._device.wait(self._written)

    def after_read(self) -> None:
        """Call after the current stream has queued its read."""
        self._reads[self._device.stream()] = self._device.mark()

    def before_write(self) -> None:
        """Call before the current stream queues a write."""
        self.before_read()
        stream = self._device.stream()
        for reader, event in self._reads.items():
            if reader != stream:
                self._device.wait(event)

    def after_write(self) -> None:
        """Call after the current stream has queued its write."""
        self._reads.clear()
        self._writer, self._written = self._device.stream(), self._device.mark()
