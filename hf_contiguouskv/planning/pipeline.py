"""When the layers of a request would be done: one thread of the host, one disk, one bus, one accelerator.

A layer may ask for bytes before its queries are known, and for more when it has chosen. Reads arrive in the order in
which they were asked for. What was read crosses to an accelerator in the same order. The host waits for reads. An
accelerator waits for what crosses, and computes while the host prepares what follows; the host waits for it only where
a layer chooses. Without an accelerator the host computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..store.reads import SECONDS_PER_READ
from .machine import Machine
from .volumes import Volume


@dataclass(frozen=True)
class Ask:
    """Bytes that a layer asks for, itself or on behalf of a later one.

    Attributes:
        target: the layer that waits for them.
        volume: how many.
    """

    target: int
    volume: Volume


@dataclass(frozen=True)
class LayerStep:
    """One layer of a request.

    Attributes:
        host_s: seconds of Python and torch.
        device_s: seconds of computing, when everything is there.
        first: what it reads before its queries are known; `None`: nothing.
        choose_s: seconds of computing from then until it has chosen.
        asks: what it asks for when it has chosen; what is for itself, it waits for.
        afterwards: what it asks for when that has arrived.
    """

    host_s: float
    device_s: float
    first: Volume | None = None
    choose_s: float = 0.0
    asks: tuple[Ask, ...] = ()
    afterwards: tuple[Ask, ...] = ()

    @property
    def volumes(self) -> list[Volume]:
        """All that it asks for."""
        own = [] if self.first is None else [self.first]
        return own + [ask.volume for ask in (*self.asks, *self.afterwards)]


@dataclass(frozen=True)
class RequestSteps:
    """One request.

    Attributes:
        layers: in order.
        before_s: seconds before the first layer, and for the output.
        ahead: layers whose `first` is asked for before it is their turn; `None`: all, from the beginning.
        in_flight: reads that are under way at a time; `None`: as many as the machine has readers.
        pinned: whether what was read lies in pinned memory before it crosses to an accelerator.
        asking_s: seconds of Python for each read.
        used_bytes: bytes of K and V that attention uses of what is read.
    """

    layers: Sequence[LayerStep]
    before_s: float
    ahead: int | None = 0
    in_flight: int | None = None
    pinned: bool = True
    asking_s: float = SECONDS_PER_READ
    used_bytes: float = 0.0

    @property
    def read_bytes(self) -> float:
        """Bytes that the request reads."""
        return sum(volume.nbytes for layer in self.layers for volume in layer.volumes)


@dataclass(frozen=True)
class Timing:
    """What a request comes to, in seconds.

    Attributes:
        ttft_s: to the first token.
        waited_s: of these, the model waited for bytes.
    """

    ttft_s: float
    waited_s: float


class _Arrivals:
    """The disk and the bus: when what is asked for arrives."""

    def __init__(self, machine: Machine, in_flight: int | None, pinned: bool) -> None:
        self._storage = machine.storage
        self._in_flight = in_flight or machine.readers
        self._bus_s = machine.bus_s if pinned else machine.pageable_s or machine.bus_s
        self._disk = self._bus = 0.0

    def when(self, volume: Volume, asked: float) -> tuple[float, float]:
        """When `volume`, asked for at `asked`, is in host memory, and where it is used, in seconds."""
        storage = self._storage
        long = volume.nbytes / storage.bytes_s
        # A read by itself takes its latency and its bytes; so many are under way at a time.
        short = ((volume.reads - 1) * storage.latency_s + long) / self._in_flight
        self._disk = max(self._disk, asked + storage.latency_s) + max(long, short)
        if self._bus_s is None:
            return self._disk, self._disk
        self._bus = max(self._bus, self._disk) + volume.nbytes / self._bus_s
        return self._disk, self._bus


def timing(request: RequestSteps, machine: Machine) -> Timing:
    """Run the pipeline of a request on a machine."""
    run = _Run(request, machine)
    for number in range(len(request.layers)):
        run.layer(number)
    return Timing(max(run.host, run.device), run.waited)


class _Run:
    """A request under way. `host` and `device` are the times at which each is free, in seconds."""

    def __init__(self, request: RequestSteps, machine: Machine) -> None:
        self._request = request
        self._together = not machine.has_accelerator
        self._arrivals = _Arrivals(machine, request.in_flight, request.pinned)
        count = len(request.layers)
        self._first: list[tuple[float, float]] = [(0.0, 0.0)] * count
        self._rest: list[tuple[float, float]] = [(0.0, 0.0)] * count
        self._asked = 0
        self.host = self.device = self.waited = 0.0

    def layer(self, number: int) -> None:
        """Run the next layer."""
        step, ahead = self._request.layers[number], self._request.ahead
        if number == 0:
            self._ask_first(ahead)
            self.host += self._request.before_s  # Reads begin at once.
        self._ask_first(number)
        self._wait(self._first[number])
        if step.choose_s:
            self._compute(step.choose_s)
            self.host = max(self.host, self.device)
        self._ask(step.asks)
        if ahead:  # What was just chosen goes first.
            self._ask_first(number + 1 + ahead)
        self._wait(self._rest[number])
        self._ask(step.afterwards)
        began = self.host
        self.host += step.host_s
        if self._together:
            self._compute(step.device_s)
        else:
            self.device = max(max(self.device, began) + step.device_s, self.host)

    def _compute(self, seconds: float) -> None:
        if self._together:
            self.host += seconds
        else:
            self.device = max(self.device, self.host) + seconds

    def _ask_first(self, last: int | None) -> None:
        """Ask for the `first` of all layers up to this one that were not asked for yet; `None`: of all layers."""
        layers = self._request.layers
        end = len(layers) if last is None else min(len(layers), last + 1)
        for place in range(self._asked, end):
            volume = layers[place].first
            if volume is not None:
                self._first[place] = self._arrival(volume)
        self._asked = max(self._asked, end)

    def _ask(self, asks: Sequence[Ask]) -> None:
        for one in asks:
            before, now = self._rest[one.target], self._arrival(one.volume)
            self._rest[one.target] = max(before[0], now[0]), max(before[1], now[1])

    def _arrival(self, volume: Volume) -> tuple[float, float]:
        self.host += volume.reads * self._request.asking_s
        return self._arrivals.when(volume, self.host)

    def _wait(self, arrival: tuple[float, float]) -> None:
        self.waited += max(0.0, arrival[0] - self.host)
        self.host = max(self.host, arrival[0])
        self.device = max(self.device, arrival[1])
