"""Streams, events and pinned memory: the one place that knows accelerators.

The rules of the device pipeline (docs/device-pipeline.md), for every accelerator that `torch.accelerator` knows:

- reads land in pinned host buffers; each layer's buffer crosses in one copy on a side stream of its own;
- every copy returns an event; whoever uses the copied bytes makes *their stream* wait for it, never the host;
- a host buffer is reused once the event of the last copy from it has happened (asked, not waited for); a device buffer
  at any time, by a copy that waits on its stream for the event of the last use;
- memory that one stream allocated and another uses is recorded with the allocator;
- small tensors (positions, masks) cross in pinned blocks as well, without a wait; what the host must know of the device
  it fetches, and only a selection needs that.

A CPU needs none of this: what was read is where attention wants it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Any, Protocol

import torch

from .aligned_memory import PAGE, aligned_buffer
from .pinned_memory import PinnedPool, available_bytes, register_with_cuda

# Sizes of the pinned blocks that small tensors cross in, and how many of each are allocated when a device is opened.
SMALL_BYTES, SMALL_BLOCKS = tuple(2**power for power in range(3, 19)), 8


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

    def send(self, values: torch.Tensor) -> torch.Tensor:
        """A copy of a small CPU tensor on the device, for the current stream. The host goes on."""
        ...

    def fetch(self, values: torch.Tensor) -> torch.Tensor:
        """A copy on the CPU of what the current stream has computed. The host waits for it: nothing else here does."""
        ...

    def free_bytes(self) -> int | None:
        """Memory of the device that nobody has taken; `None`: it does not say."""
        ...

    def let_go(self) -> None:
        """Return memory to the device that was taken from it and is not in use."""
        ...

    def copies_so_far(self) -> list[Any]:
        """Events for the end of all copies, in and out, that have been queued so far."""
        ...

    def aside(self) -> AbstractContextManager[None]:
        """Inside, this thread computes on a stream that no request waits for."""
        ...

    def finish(self, event: Any) -> None:
        """Block this thread until `event` has happened. For threads that write to disk; a model's never does."""
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
        self._aside = torch.Stream(device=device)
        # Small pinned blocks for `send` and `fetch`: torch keeps them when they are free, so no request waits for one.
        blocks = [
            torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
            for nbytes in SMALL_BYTES
            for _ in range(SMALL_BLOCKS)
        ]
        del blocks

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

    def send(self, values: torch.Tensor) -> torch.Tensor:
        """See `Device`. From pageable memory the driver may wait for the stream before it copies."""
        with torch.inference_mode(False):
            pinned = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True).copy_(values)
            return pinned.to(self._device, non_blocking=True)

    def fetch(self, values: torch.Tensor) -> torch.Tensor:
        """See `Device`."""
        with torch.inference_mode(False):
            pinned = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
        pinned.copy_(values, non_blocking=True)
        self.mark().synchronize()
        return pinned

    def free_bytes(self) -> int | None:
        """See `Device`. What torch keeps for later tensors counts as free."""
        module = getattr(torch, self._device.type, None)
        if module is None or not hasattr(module, "mem_get_info"):
            return None
        free, _ = module.mem_get_info(self._device)
        return int(free) + int(module.memory_reserved(self._device)) - int(module.memory_allocated(self._device))

    def let_go(self) -> None:
        """See `Device`."""
        empty_cache = getattr(getattr(torch, self._device.type, None), "empty_cache", None)
        if empty_cache is not None:
            empty_cache()

    def copies_so_far(self) -> list[Any]:
        """See `Device`."""
        return [self._incoming.record_event(), self._outgoing.record_event()]

    def aside(self) -> AbstractContextManager[None]:
        """See `Device`."""
        return self._on(self._aside)

    def finish(self, event: Any) -> None:
        """See `Device`."""
        event.synchronize()

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


opened_devices: dict[torch.device, Device] = {}
_pools: list[PinnedPool] = []
# A collector of garbage may close a store in the middle of anything that this thread does.
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
    """A small CPU tensor where `device` can use it at once: itself, or a copy that nobody waits for."""
    opened = device_of(device)
    return values if opened is None else opened.send(values)


def after_this(tensors: Iterable[torch.Tensor]) -> Callable[[], AbstractContextManager[None]]:
    """For a thread that is going to use these tensors aside: what it enters first. Its stream waits until they are
    computed, and their memory until it is through with them."""
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
    """Registered memory, where the driver can register ordinary memory."""
    if not torch.cuda.is_available():
        return None
    with _lock:
        if not _pools:
            _pools.append(PinnedPool(register_with_cuda, _marks, available_bytes))
        return _pools[0]


def reserve_pinned(nbytes: int) -> None:
    """A store that may hold `nbytes` in the host's memory uses an accelerator from now on."""
    pool = _pool()
    if pool is not None:
        pool.reserve(nbytes)


def release_pinned(nbytes: int) -> None:
    """That store was closed."""
    pool = _pool()
    if pool is not None:
        pool.release(nbytes)


def pinned_buffer(nbytes: int) -> torch.Tensor:
    """Page-aligned uint8 `(nbytes,)` in host memory that copies to an accelerator run from without the host.

    From what was reserved, if there is room; else torch pins it now. Where nobody can pin so much it is ordinary
    memory: copies are right all the same, but wait.
    """
    if not torch.accelerator.is_available():
        return aligned_buffer(nbytes)
    pool = _pool()
    found = None if pool is None else pool.take(nbytes)
    if found is not None:
        return found
    with torch.inference_mode(False), suppress(RuntimeError):
        # Pinned memory comes in whole pages, and in powers of two: a byte more may cost as much again.
        raw = torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
        if raw.data_ptr() % PAGE == 0:
            return raw
        raw = torch.empty(nbytes + PAGE, dtype=torch.uint8, device="cpu", pin_memory=True)
        start = -raw.data_ptr() % PAGE
        return raw[start : start + nbytes]
    return aligned_buffer(nbytes)


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
