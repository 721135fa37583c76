"""A recording stand-in for accelerators: CPU tensors play device memory, and copies run as late as the rules allow.

What the host computes on a "device" happens at once, so the hazards are these: a copy that nobody waited for has not
happened yet (its target holds NaNs), and a buffer that is reused too early changes under a copy that is still queued.
Both give wrong answers. What would only go wrong with other timing is found in the log, by `device_log.races`.

Memory is that of torch's caching allocators: what is freed is given out again, per stream, unless another stream that
was recorded with it has not got past its use.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from unit.device_log import HOST, Entry, Touch, races

from hf_contiguouskv.hardware import accelerator as device
from hf_contiguouskv.hardware.aligned_memory import PAGE, as_memoryview
from hf_contiguouskv.loading import device_residency as staging
from hf_contiguouskv.loading import key_runs as keys
from hf_contiguouskv.memory import blocks, tiers
from hf_contiguouskv.store import reader

POISON = 0xFF  # NaN in every float type, -1 in every integer type.
# How the scheduler runs queued copies; a number is the seed of one that decides at random.
LATE, EARLY = "late", "early"
SCHEDULES = (LATE, EARLY, 1, 2, 3)


class FakeEvent:
    """Has happened once its stream has run everything up to it."""

    def __init__(self, machine: Machine, number: int, stream: _Stream) -> None:
        self.number = number
        self._machine = machine
        self._stream = stream
        self._position = stream.queued

    @property
    def happened(self) -> bool:
        return self._stream.ran >= self._position

    def query(self) -> bool:
        """As an accelerator's: never waits, and may say no for a while."""
        return self._machine.asked(self)

    def force(self) -> None:
        while not self.happened:
            self._stream.run_one()

    def synchronize(self) -> None:
        raise AssertionError("the host waited for an event")


class _Stream:
    """Copies in order, not run yet."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.queued = self.ran = 0
        self._waiting: deque[tuple[list[FakeEvent], Callable[[], None]]] = deque()

    def put(self, after: list[FakeEvent], function: Callable[[], None]) -> None:
        self._waiting.append((after, function))
        self.queued += 1

    def run_one(self) -> None:
        after, function = self._waiting.popleft()
        for event in after:
            event.force()
        function()
        self.ran += 1


@dataclass(eq=False)
class _Block:
    """Memory that is given out again and again."""

    number: int
    octets: np.ndarray
    owner: str
    stream: str
    recorded: set[str] = field(default_factory=set)
    pending: list[FakeEvent] = field(default_factory=list)


class Machine:
    """Fake devices, their streams and memory, the scheduler and the log.

    Args:
        schedule: `LATE` (a copy runs when something waits for it), `EARLY` (when it is queued), or a seed.
    """

    def __init__(self, schedule: str | int = LATE) -> None:
        self.log: list[Entry] = []
        self.schedule = schedule
        self.devices: dict[torch.device, FakeDevice] = {}
        self._random = random.Random(schedule) if isinstance(schedule, int) else None
        self._lock = threading.RLock()
        self._events = itertools.count()
        self._streams: dict[str, _Stream] = {}
        self._blocks: dict[int, _Block] = {}
        self._free: dict[tuple[str, str, int], list[_Block]] = defaultdict(list)
        self._freed: deque[_Block] = deque()
        self._current = threading.local()

    # -- what tests ask -----------------------------------------------------------------------------------------------

    def copies(self, kind: str = "copy in") -> list[Entry]:
        """The copies so far."""
        return [entry for entry in self.log if entry.kind == kind]

    def check(self) -> None:
        """Raise if anything in the log was not kept in order."""
        with self._lock:
            found = races(list(self.log))
        assert not found, "\n".join(found[:5])

    def run_all(self) -> None:
        """Time passes: every copy that was queued has run."""
        with self._lock:
            for stream in self._streams.values():
                while stream.ran < stream.queued:
                    stream.run_one()

    @contextlib.contextmanager
    def on_stream(self, name: str) -> Iterator[None]:
        """This thread computes on another stream (of every device)."""
        before = self.current
        self._current.name = name
        try:
            yield
        finally:
            self._current.name = before

    @property
    def current(self) -> str:
        """The stream that this thread computes on."""
        return getattr(self._current, "name", "default")

    # -- what the fakes use -------------------------------------------------------------------------------------------

    def device_of(self, device: torch.device) -> FakeDevice:
        """In place of `hf_contiguouskv.hardware.accelerator.device_of`: every CPU is an accelerator."""
        with self._lock:
            if device not in self.devices:
                self.devices[device] = FakeDevice(self, str(device))
            return self.devices[device]

    def pinned(self, nbytes: int) -> torch.Tensor:
        """In place of `hf_contiguouskv.hardware.accelerator.pinned_buffer`."""
        return self.allocate(nbytes, HOST, HOST)

    def into_host(self, tensor: torch.Tensor) -> memoryview:
        """In place of `as_memoryview`: the host is going to write here."""
        view = as_memoryview(tensor)
        found = self.touch(tensor, write=True)
        if found is not None:
            self.add("host", HOST, [found], detail="reads from disk land")
        return view

    def add(
        self,
        kind: str,
        agent: str,
        touches: Sequence[Touch] = (),
        after: Sequence[FakeEvent] = (),
        event: FakeEvent | None = None,
        detail: str = "",
    ) -> None:
        with self._lock:
            numbers = tuple(one.number for one in after)
            self.log.append(
                Entry(kind, agent, tuple(touches), numbers, None if event is None else event.number, detail)
            )

    def stream(self, name: str) -> _Stream:
        with self._lock:
            return self._streams.setdefault(name, _Stream(name))

    def mark(self, stream: str, detail: str = "") -> FakeEvent:
        with self._lock:
            event = FakeEvent(self, next(self._events), self.stream(stream))
            self.add("mark", stream, event=event, detail=detail)
            return event

    def asked(self, event: FakeEvent) -> bool:
        with self._lock:
            self.time_passes()
            happened = event.happened and (self._random is None or self._random.random() < 0.8)
            if happened:
                self.add("seen", HOST, after=[event])
            return happened

    def queue(
        self, kind: str, stream: str, reads: Touch, writes: Touch, after: list[FakeEvent], copy: Callable[[], None]
    ) -> FakeEvent:
        """Queue a copy; an event for its end."""
        with self._lock:
            self.stream(stream).put(after, copy)
            event = FakeEvent(self, next(self._events), self.stream(stream))
            self.add(kind, stream, [reads, writes], after, event, f"of {reads.high - reads.low} bytes")
            self.time_passes()
            return event

    def time_passes(self) -> None:
        """The scheduler runs what it likes."""
        if self.schedule == EARLY:
            self.run_all()
        elif self._random is not None:
            for stream in self._streams.values():
                while stream.ran < stream.queued and self._random.random() < 0.4:
                    stream.run_one()

    # -- memory -------------------------------------------------------------------------------------------------------

    def allocate(self, nbytes: int, owner: str, stream: str) -> torch.Tensor:
        """Poisoned uint8 `(nbytes,)` that counts as memory of `owner` from `stream`'s pool."""
        size = max(PAGE, -(-nbytes // PAGE) * PAGE)
        with self._lock:
            self._collect()
            block = self._reusable(owner, stream, size)
            if block is None:
                raw = np.empty(size + PAGE, dtype=np.uint8)
                start = -raw.ctypes.data % PAGE
                block = _Block(len(self._blocks), raw[start : start + size], owner, stream)
                self._blocks[block.octets.ctypes.data] = block
            block.octets[:] = POISON
            self.add("alloc", stream, [Touch(block.number, 0, size, True)], detail=f"of {nbytes} bytes")
            view = block.octets[:nbytes]  # What the tensor keeps alive: when it goes, the memory is free.
            weakref.finalize(view, self._freed.append, block).atexit = False
            tensor = torch.from_numpy(view)
            # A tensor made in inference mode is one that others must not write to; so it is with torch.empty.
            assert tensor.is_inference() == torch.is_inference_mode_enabled()
            return tensor

    def _collect(self) -> None:
        while self._freed:
            block = self._freed.popleft()
            block.pending += [self.mark(stream, "freed") for stream in sorted(block.recorded - {block.stream})]
            block.recorded.clear()
            self._free[block.owner, block.stream, len(block.octets)].append(block)

    def _reusable(self, owner: str, stream: str, size: int) -> _Block | None:
        pool = self._free[owner, stream, size]
        for block in reversed(pool):
            if all(event.happened for event in block.pending):
                pool.remove(block)
                if block.pending:
                    self.add("seen", HOST, after=block.pending)
                    block.pending = []
                return block
        return None

    def block_of(self, tensor: torch.Tensor) -> _Block | None:
        """The block that a tensor lies in, if it is tracked."""
        if tensor.numel() == 0 or tensor.device.type != "cpu":
            return None
        return self._blocks.get(tensor.untyped_storage().data_ptr())

    def touch(self, tensor: torch.Tensor, write: bool) -> Touch | None:
        block = self.block_of(tensor)
        if block is None:
            return None
        size, low = tensor.element_size(), tensor.storage_offset()
        high = low + 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return Touch(block.number, low * size, high * size, write)

    def octets(self, tensor: torch.Tensor) -> np.ndarray:
        """The memory itself; keeps nothing alive that the allocator knows of."""
        block, touch = self.block_of(tensor), self.touch(tensor, False)
        assert block is not None
        assert touch is not None
        return block.octets[touch.low : touch.high]

    def seen_by_torch(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> str | None:
        """An operation of torch: note what tracked memory it reads and writes, on which stream; whose that is."""
        touches: dict[str, list[Touch]] = {}
        for position, argument in enumerate(function._schema.arguments):
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            if argument.alias_info is not None and not argument.alias_info.is_write:
                continue  # A view of it.
            for tensor in value if isinstance(value, list | tuple) else (value,):
                block = self.block_of(tensor) if isinstance(tensor, torch.Tensor) else None
                if block is not None:
                    found = self.touch(tensor, argument.alias_info is not None)
                    assert found is not None
                    touches.setdefault(block.owner, []).append(found)
        if len(touches) > 1:
            self.add("mixed", HOST, detail=f"{function} with memory of {sorted(touches)}")
        for owner, some in touches.items():
            if owner == HOST:
                self.add("host", HOST, some, detail=str(function))
            else:
                self.add("compute", f"{owner}/{self.current}", some, detail=str(function))
        return next(iter(touches), None)

    def adopted(self, result: Any, owner: str) -> Any:
        """Bytes that a device computed from its memory lie in memory from its allocator."""
        fresh = isinstance(result, torch.Tensor) and result.dtype == torch.uint8 and self.block_of(result) is None
        if not fresh or not result.numel() or not result.is_contiguous():
            return result
        own = self.allocate(result.numel(), owner, f"{owner}/{self.current}").view(result.shape)
        self.octets(own)[:] = result.reshape(-1).numpy()
        return own


class FakeDevice:
    """`hf_contiguouskv.hardware.accelerator.Device`; see the module's docstring."""

    def __init__(self, machine: Machine, name: str) -> None:
        self.name = name
        # Which memory has run out: that for copies (True), or all other (False).
        self.full: bool | None = None
        # The most that the device has, and how often more was asked for.
        self.most: int | None = None
        self.refused = 0
        # What the device says that nobody has taken.
        self.free: int | None = None
        self._machine = machine

    @property
    def _compute(self) -> str:
        return f"{self.name}/{self._machine.current}"

    def empty(self, nbytes: int, *, for_copies: bool = False) -> torch.Tensor:
        if for_copies == self.full or (self.most is not None and nbytes > self.most):
            self.refused += 1
            raise torch.OutOfMemoryError("out of memory")
        return self._machine.allocate(nbytes, self.name, f"{self.name}/in" if for_copies else self._compute)

    def copy_in(self, source: torch.Tensor, target: torch.Tensor, after: FakeEvent | None = None) -> FakeEvent:
        return self._copy("copy in", f"{self.name}/in", source, target, [] if after is None else [after])

    def copy_out(self, source: torch.Tensor, target: torch.Tensor) -> FakeEvent:
        done = self._copy("copy out", f"{self.name}/out", source, target, [self.mark()])
        block = self._machine.block_of(source)
        assert block is not None
        block.recorded.add(f"{self.name}/out")
        return done

    def _copy(
        self, kind: str, stream: str, source: torch.Tensor, target: torch.Tensor, after: list[FakeEvent]
    ) -> FakeEvent:
        machine = self._machine
        assert source.numel() == target.numel()
        target[:0].copy_(source[:0])  # Fails where the real copy would: shapes, dtypes, inference tensors.
        kinds = [HOST, self.name] if kind == "copy in" else [self.name, HOST]
        for tensor, wanted in zip((source, target), kinds, strict=True):
            block = machine.block_of(tensor)
            if block is None or block.owner != wanted:
                machine.add("unpinned", HOST, detail=f"{kind} with memory of {block and block.owner}, not {wanted}")
                raise AssertionError(f"{kind}: expected memory of {wanted}")
        reads, writes = machine.touch(source, False), machine.touch(target, True)
        assert reads is not None
        assert writes is not None
        read, written = machine.octets(source), machine.octets(target)
        # Pinned memory is kept by its allocator until copies are through with it; a device's is not.
        pinned = source if kind == "copy in" else target

        def copy() -> None:
            assert pinned is not None
            written[:] = read

        done = machine.queue(kind, stream, reads, writes, after, copy)
        owner = machine.block_of(pinned)
        assert owner is not None
        owner.pending.append(done)
        return done

    def send(self, values: torch.Tensor) -> torch.Tensor:
        self._machine.add("send", self._compute, detail=f"of {values.nbytes} bytes")
        return values.clone()

    def fetch(self, values: torch.Tensor) -> torch.Tensor:
        found = values.clone()
        self._machine.add("fetch", self._compute, event=None, detail=f"of {values.nbytes} bytes")
        return found

    def free_bytes(self) -> int | None:
        return self.free

    def let_go(self) -> None:
        pass

    def aside(self) -> contextlib.AbstractContextManager[None]:
        return self._machine.on_stream("aside")

    def finish(self, event: FakeEvent) -> None:
        with self._machine._lock:
            event.force()
            self._machine.add("seen", HOST, after=[event])

    def wait(self, event: FakeEvent) -> None:
        with self._machine._lock:
            event.force()  # What is computed from now on sees it.
            self._machine.add("wait", self._compute, after=[event])
            self._machine.time_passes()

    def mark(self) -> FakeEvent:
        return self._machine.mark(self._compute)

    def uses(self, tensor: torch.Tensor) -> None:
        block = self._machine.block_of(tensor)
        if block is not None:  # (What a model computes is not tracked.)
            block.recorded.add(self._compute)

    def stream(self) -> str:
        return self._machine.current

    def synchronize(self) -> None:
        raise AssertionError("the host waited for a device")


class Watch(TorchDispatchMode):
    """Tells the machine of every operation of this thread."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self._machine = machine

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not function.__name__.startswith(("new_", "empty", "detach", "alias")):
            owner = self._machine.seen_by_torch(function, args, kwargs or {})
            if owner not in (None, HOST):
                return self._machine.adopted(function(*args, **(kwargs or {})), owner)
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def accelerated(schedule: str | int = LATE, *, piece: int | None = None) -> Iterator[Machine]:
    """Stores that are opened within find accelerators; afterwards, everything must have been kept in order.

    Args:
        schedule: see `Machine`.
        piece: bytes in which tiers get their memory, so that a small tier behaves as a large one does.
    """
    machine = Machine(schedule)
    with pytest.MonkeyPatch.context() as patch:
        install(patch, machine)
        if piece is not None:
            patch.setattr(blocks, "_SMALLEST_PIECE", piece)
        with Watch(machine):
            yield machine
    machine.check()


def install(patch: pytest.MonkeyPatch, machine: Machine) -> None:
    """From now on, every CPU device is one of the machine's accelerators, for stores that are opened from now on."""
    for module in (tiers, device):
        patch.setattr(module, "device_of", machine.device_of)
        patch.setattr(module, "pinned_buffer", machine.pinned)
    for module in (staging, keys):
        patch.setattr(module, "as_memoryview", machine.into_host)
    serve_queue = reader.serve_queue

    def watched(*args: Any) -> None:
        with Watch(machine):
            serve_queue(*args)

    patch.setattr(reader, "serve_queue", watched)
