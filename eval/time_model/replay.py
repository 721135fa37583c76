"""When each part of a recorded request would happen on a machine: a pipeline, event by event.

There is one thread of the model, one queue of kernels, one stream of copies in, one disk with reader threads, and one
interpreter lock. Reads ahead are started by the library's own `Lookahead`, with the bytes of the prefix in question.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial

from hf_contiguouskv.loading.payload_reads import Lookahead

from .machines import Gpu, Host, Machine
from .record import Record
from .recording import Event

READERS = 8
"""Reader threads of a store, as `ExtentReader` has them."""
_WAKE_S = 30e-6
# Copies that the host waits for and that are longer than this are not from pinned memory.
_SMALL = 2**15
_READERS_SHARE = 0.5


@dataclass
class Timing:
    """What a replay comes to, in seconds.

    Attributes:
        ttft: to the first token.
        parts: how long each thing would have taken by itself: `host` (the model's thread), `gpu` (kernels), `bus`
            (copies in), `disk` (reads), `readers` (the readers' Python).
        waits: how long the host stood still: for `disk`, or for `gpu` (synchronisation).
        layers: when each layer began, and when the last one ended.
        disk_bytes, bus_bytes: bytes.
        kernels, waits_for_gpu, reads: how many.
    """

    ttft: float = 0.0
    parts: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    waits: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    layers: list[float] = field(default_factory=list)
    disk_bytes: float = 0.0
    bus_bytes: float = 0.0
    kernels: float = 0.0
    syncs: int = 0
    reads: float = 0.0

    @property
    def largest(self) -> str:
        """The part that takes longest by itself."""
        return max(self.parts, key=lambda name: self.parts[name])


def replay(record: Record, machine: Machine, tokens: int, lookahead_bytes: int) -> Timing:
    """Run a recorded request on a machine.

    Args:
        record: of the request.
        machine: its speeds.
        tokens: length of the prefix.
        lookahead_bytes: of the configuration (`ReadOptions.lookahead_bytes`).
    """
    run = _Run(record, machine, tokens, lookahead_bytes)
    for layer, program in enumerate(record.sections, start=-1):
        run.timing.layers.append(run.now)
        run.do(run.programs[program], layer)
    run.timing.ttft = run.now
    return run.timing


class _Run:
    def __init__(self, record: Record, machine: Machine, tokens: int, lookahead_bytes: int) -> None:
        self.programs = record.at(tokens)
        self.timing = Timing()
        self.now = 0.0
        self._machine = machine
        self._record = record
        self._starts: dict[int, int] = defaultdict(int)
        self._gpu = self._bus = self._disk = self._lock = 0.0
        self._threads = [0.0] * READERS
        # When readers hold the interpreter's lock (or, on a CPU, a processor): from, until, seconds of it.
        self._held: list[tuple[float, float, float]] = []
        self._tickets: dict[tuple[int, int], float] = {}
        self._copies: dict[tuple[int, int], float] = {}
        self._ahead = Lookahead(self._limit(tokens, lookahead_bytes))

    def _limit(self, tokens: int, lookahead_bytes: int) -> int:
        """The limit is so many layers' keys, or `lookahead_bytes`, whichever is less (`ReadPlan.lookahead_bytes`)."""
        limits = self._record.limits
        if limits is None or limits[0] == limits[1]:
            return lookahead_bytes if limits is None else limits[0]
        return min(lookahead_bytes, round(limits[0] * tokens / self._record.lengths[0]))

    # -- the model's thread -------------------------------------------------------------------------------------------

    def do(self, events: list[Event], layer: int) -> None:
        """Go through events of a layer, from now on."""
        for event in events:
            kind = event[0]
            if kind == "work":
                self._work(event[1])
            elif kind == "add":
                start = partial(self._start, layer + event[1])
                self._ahead.add([layer + event[1]], round(event[2]), start)
            elif kind == "pump":
                self._ahead.pump()
            elif kind in ("need", "used"):
                getattr(self._ahead, kind)(layer + event[1])
            elif kind == "submit":
                self._submit(event, layer, self.now)
            elif kind == "task":
                self._task(event[1], layer)
            elif kind == "copy":
                self._copy(event, layer, self.now)
            elif kind == "wait":
                self._wait("disk", self._tickets.get(_label(event[1], layer), 0.0))
            elif kind == "arrive":
                self._gpu = max(self._gpu, self._copies.get(_label(event[1], layer), 0.0))
            elif kind == "cross":
                self._cross(*event[1:])

    def _start(self, layer: int, must: bool) -> bool:
        programs = self._record.started.get(layer, [])
        number = self._starts[layer]
        self._starts[layer] += 1
        if number < len(programs):
            self.do(self.programs[programs[number]], layer)
        return True

    def _work(self, amounts: dict[str, float]) -> None:
        began = self.now
        gpu = self._machine.gpu
        seconds = self._host_seconds(amounts)
        self.timing.parts["host"] += seconds
        self.now = self._stretched(seconds)
        kernels = amounts.get("kernels", 0.0)
        if gpu is None or not kernels:
            return
        device = kernels * gpu.kernel_s + _seconds(amounts, gpu, "") / gpu.share
        self.timing.parts["gpu"] += device
        self.timing.kernels += kernels
        self._gpu = max(max(self._gpu, began) + device, self.now)

    def _host_seconds(self, amounts: dict[str, float]) -> float:
        host, gpu = self._machine.host, self._machine.gpu
        seconds = amounts.get("calls", 0.0) * host.call_s + amounts.get("operations", 0.0) * host.operation_s
        if gpu is not None:
            seconds += amounts.get("kernels", 0.0) * gpu.launch_s
        return seconds + _seconds(amounts, host, "host_")

    def _stretched(self, seconds: float) -> float:
        """When work of so many seconds ends, while readers take the interpreter's lock from it now and then."""
        now = self.now
        self._held = [one for one in self._held if one[1] > now]
        while seconds > 0:
            share, until = 0.0, float("inf")
            for begin, end, taken in self._held:
                if end <= now:
                    continue
                if begin > now:
                    until = min(until, begin)
                else:
                    share, until = share + taken / (end - begin), min(until, end)
            rate = 1 - min(_READERS_SHARE, share / self._machine.host.threads if self._on_cpu else share)
            step = min(seconds, (until - now) * rate)
            seconds, now = seconds - step, now + step / rate
            if step <= 0:
                now = until
        return now

    @property
    def _on_cpu(self) -> bool:
        return self._machine.gpu is None

    def _wait(self, what: str, until: float) -> None:
        if until > self.now:
            self.timing.waits[what] += until - self.now
            self.now = until

    def _cross(self, nbytes: float, waits: bool) -> None:
        gpu = self._machine.gpu
        if gpu is None:
            return
        self.timing.bus_bytes += nbytes
        self.now += gpu.launch_s
        speed = gpu.pageable_s if waits and nbytes > _SMALL else gpu.bus_s
        self._gpu = max(self._gpu, self.now) + gpu.copy_s + nbytes / speed
        if waits:
            self.timing.syncs += 1
            self._wait("gpu", self._gpu)
            self.now += gpu.wait_s

    # -- readers, disk and bus ----------------------------------------------------------------------------------------

    def _task(self, events: list[Event], layer: int) -> None:
        """What a reader thread does: it holds the lock, but the model's thread goes on."""
        when = max(self.now, self._threads[0]) + _WAKE_S
        for event in events:
            if event[0] == "work":
                seconds = self._host_seconds(event[1])
                self.timing.parts["readers"] += seconds
                self._held.append((when, when + 2 * seconds, seconds))
                when += 2 * seconds
            elif event[0] == "submit":
                self._submit(event, layer, when)
            elif event[0] == "copy":
                self._copy(event, layer, when)
        heapq.heapreplace(self._threads, when)

    def _submit(self, event: Event, layer: int, when: float) -> None:
        _, label, reads, nbytes, threads, amounts = event
        disk = self._machine.disk
        python = self._host_seconds(amounts)
        reads = max(1.0, reads)
        begin = max(when + _WAKE_S, self._threads[0])
        # Three things limit reads: the disk, the lock, and how many are under way.
        transfer = max(nbytes / disk.bytes_s, reads / disk.reads_s)
        alone = disk.latency_s + nbytes / reads * (1 / disk.bytes_s + 1 / self._machine.hash_s)
        self._disk = max(self._disk, begin) + transfer
        self._lock = max(self._lock, begin) + python
        end = max(self._disk, self._lock, begin + reads / threads * alone)
        for _ in range(threads):
            heapq.heapreplace(self._threads, max(self._threads[0], end))
        # A processor computes checksums, too.
        taken = python + (nbytes / self._machine.hash_s if self._on_cpu else 0.0)
        self._held.append((begin, end, taken))
        self._tickets[_label(label, layer)] = end
        parts = self.timing.parts
        parts["disk"] += transfer
        parts["readers"] += python
        self.timing.disk_bytes += nbytes
        self.timing.reads += reads

    def _copy(self, event: Event, layer: int, when: float) -> None:
        _, label, nbytes, ticket = event
        gpu = self._machine.gpu
        assert gpu is not None, "what was recorded on a CPU has no copies"
        ready = when if ticket is None else self._tickets[_label(ticket, layer)]
        seconds = gpu.copy_s + nbytes / gpu.bus_s
        self._bus = max(self._bus, ready) + seconds
        self._copies[_label(label, layer)] = self._bus
        self.timing.parts["bus"] += seconds
        self.timing.bus_bytes += nbytes


def _seconds(amounts: dict[str, float], unit: Gpu | Host, prefix: str) -> float:
    """Moving bytes and computing, one after the other."""
    found = amounts.get(f"{prefix}moved", 0.0) / unit.memory_s
    for kind, speed in (("f32", unit.f32_s), ("f16", unit.f16_s), ("i8", unit.i8_s)):
        found += amounts.get(f"{prefix}{kind}", 0.0) / speed
    return found


def _label(relative: list[int], layer: int) -> tuple[int, int]:
    return layer + relative[0], relative[1]
