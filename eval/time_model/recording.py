"""One request, recorded: what the model's thread, the readers, the copies and the GPU have to do, in which order.

The request is the library's own, on pretended device memory (`pretend`), or as it is on a CPU. Reads are served where
they are asked for, so that a recording is the same every time; *when* each part would have happened is worked out
later, by `replay`, for a machine of given speeds.

A recording is three lists of events: before the first layer, of each layer, and after the last. An event is a list that
begins with its kind:

| event | what |
|---|---|
| `work`, amounts | of the one that does it, see `AMOUNTS` |
| `add`, layer, bytes / `pump` / `need`, layer / `used`, layer | calls of `loading.payload_reads.Lookahead` |
| `submit`, ticket, reads, bytes, threads, amounts | reads are queued; the amounts are the readers' |
| `task`, events | what a reader thread does next |
| `copy`, copy, bytes, ticket or none | a copy to the device is queued once a ticket is done, or now |
| `arrive`, copy | the compute stream waits for a copy |
| `wait`, ticket | the host waits for a ticket |
| `cross`, bytes, waits | a small copy on the compute stream, and whether the host waits for it |
| `out`, bytes | a copy to the host on a stream of its own |

Tickets and copies are pairs: the layer that they are for, and which of that layer's they are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from hf_contiguouskv.store import reader

from ..systems import layer_reader
from . import pretend

_WORK = ("moved", "f32", "f16", "i8")
AMOUNTS = ("calls", "operations", "kernels", *_WORK, *(f"host_{kind}" for kind in _WORK))
"""What work is counted in: calls of Python and C functions, operations of torch (views too); kernels, bytes they move
and floating-point operations by precision, on the device; the same of operations on host memory."""
_POSITION = {name: position for position, name in enumerate(AMOUNTS)}
_OURS = ("/eval/time_model/", "/unittest/mock.py", "/utils/_python_dispatch.py", "/_library/simple_registry.py")
Event = list[Any]
Label = tuple[int, int]


class _Muted:
    """While it is entered, nothing is counted."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def __enter__(self) -> None:
        self._recorder.muted += 1

    def __exit__(self, *exception: object) -> None:
        self._recorder.muted -= 1


class _StreamEvent:
    """An event of the stub: it has always happened."""

    def __init__(self, recorder: Recorder, label: Label | None = None) -> None:
        self.recorder = recorder
        self.label = label

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class Recorder:
    """Notes what happens in one request. A `pretend.Ledger`.

    Args:
        queue: of what readers have to serve.
        stored_per_layer: how many layers of the store belong to one of the model.
    """

    def __init__(self, queue: Queue, stored_per_layer: int = 1) -> None:
        self._queue = queue
        self._stored_per_layer = stored_per_layer
        self.muted = 0
        self.layers: dict[int, list[Event]] = defaultdict(list)
        self.started: dict[int, list[list[Event]]] = defaultdict(list)
        self.limits: list[int] = []
        self.layer = -1
        self.cache: Any = None
        self._target: int | None = None
        self._events = self.layers[-1]
        self._readers = 0
        self._ticket: Label | None = None
        self._tickets: dict[int, tuple[Any, Label]] = {}
        self._numbers: dict[tuple[str, int], int] = defaultdict(int)
        self._ahead = 0
        self._served: list[Event] = []
        self._own = _Muted(self)

    # -- pretend.Ledger -----------------------------------------------------------------------------------------------

    def own_time(self) -> _Muted:
        return self._own

    def operation(self, kernels: int, moved: int, flops: float, kind: str, on_device: bool) -> None:
        self.count("operations", 1)
        if on_device:
            self.count("kernels", kernels)
        self.count("moved" if on_device else "host_moved", moved)
        if kind:
            self.count(kind if on_device else f"host_{kind}", flops)

    def crossed(self, nbytes: int, *, out: bool, waits: bool) -> None:
        self.count("operations", 1)
        self.add(["cross", nbytes, waits])

    # -- events -------------------------------------------------------------------------------------------------------

    def count(self, what: str, number: float) -> None:
        """Add to what the thread does (one of `AMOUNTS`)."""
        if not self._events or self._events[-1][0] != "work":
            self._events.append(["work", [0] * len(AMOUNTS)])
        self._events[-1][1][_POSITION[what]] += number

    def add(self, event: Event) -> None:
        """Something happens now."""
        self._events.append(event)

    def reached(self, layer: int) -> None:
        """The model is at `layer` now."""
        self.layer = layer
        self._events = self.layers[layer]

    def _label(self, kind: str) -> Label:
        layer = self.layer if self._target is None else self._target
        number = self._numbers[kind, layer]
        self._numbers[kind, layer] += 1
        return layer, number

    @contextmanager
    def _elsewhere(self, events: list[Event]) -> Iterator[None]:
        before, self._events = self._events, events
        try:
            yield
        finally:
            self._events = before

    def called(self, frame: Any, event: str, argument: Any) -> None:
        """For `sys.setprofile`."""
        if self.muted or event not in ("call", "c_call"):
            return
        name = frame.f_code.co_filename
        if not any(part in name for part in _OURS):
            self.count("calls", 1)

    # -- what the library calls ---------------------------------------------------------------------------------------

    def serve(self, item: Any, totals: Any) -> None:
        """In place of a reader thread."""
        if isinstance(item, reader.Task):
            events: list[Event] = []
            with self._elsewhere(events):
                item.serve(totals)
            self.add(["task", events])
            return
        if item.done:
            return
        before, self._ticket = self._ticket, self._tickets[id(item)][1]
        events = []
        with self._elsewhere(events):
            item.serve(totals)
        self._ticket = before
        for event in self._events:
            if event[0] == "submit" and event[1] == self._tickets[id(item)][1]:
                event[5] = _total(events)
        for event in events:
            if event[0] != "work":
                self.add(event)

    def submitted(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def submit(this: Any, reads: Any, *, threads: int | None = None, **options: Any) -> Any:
            label = self._label("ticket")
            with self._own:
                nbytes = sum(read.nbytes for read in reads)
            event: Event = ["submit", label, 0, nbytes, threads or this.threads, [0] * len(AMOUNTS)]
            ticket = original(this, reads, threads=threads, **options)
            event[2] = ticket.parts
            event[4] = min(event[4], max(1, ticket.parts))
            self._tickets[id(ticket)] = ticket, label
            self.add(event)
            self._serve_queue()
            event[3] = ticket.bytes_read
            return ticket

        return submit

    def layer_read(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """For `LayerFile.read`. What its threads do is served here, see `served`."""

        def read(this: Any, layer: int, part: int, *args: Any, **kwargs: Any) -> Any:
            before, self._target = self._target, layer
            label = self._label("ticket")
            event: Event = ["submit", label, 0, this.shape.part_bytes(part), layer_reader.THREADS, [0] * len(AMOUNTS)]
            self.add(event)
            before_ticket, self._ticket = self._ticket, label
            self._served = []
            try:
                arrival = original(this, layer, part, *args, **kwargs)
            finally:
                self._target, self._ticket = before, before_ticket
            event[2] = arrival.pieces
            event[4] = min(event[4], arrival.pieces)
            event[5] = _total(self._served)
            self._tickets[id(arrival)] = arrival, label
            for served in self._served:
                if served[0] != "work":
                    self.add(served)
            return arrival

        return read

    def serve_layers(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """For `ReaderThreads.run` of systems that load layers: there are no threads."""

        def run(this: Any, functions: Any) -> None:
            with self._elsewhere(self._served):
                for function in functions:
                    function()

        return run

    def queued(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def run(this: Any, function: Any) -> Any:
            task = original(this, function)
            self._serve_queue()
            return task

        return run

    def _serve_queue(self) -> None:
        for item, totals in self._queue.taken():
            self.serve(item, totals)

    def waited(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def wait(this: Any) -> Any:
            if id(this) in self._tickets:
                self.add(["wait", self._tickets[id(this)][1]])
            return original(this)

        return wait

    def targeting(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """For methods whose first argument is the layer that they work for."""

        def method(this: Any, layer: int, *args: Any, **kwargs: Any) -> Any:
            before, self._target = self._target, layer // self._stored_per_layer
            try:
                return original(this, layer, *args, **kwargs)
            finally:
                self._target = before

        return method

    def ahead(self, kind: str, original: Callable[..., Any]) -> Callable[..., Any]:
        """For the methods of `Lookahead`."""

        def method(this: Any, *args: Any) -> None:
            if kind == "add":
                layers, nbytes, start = args
                (layer,) = layers  # (Layers are read together on CPUs alone, or where they lie in groups.)
                self.add(["add", layer, nbytes])
                args = (layers, nbytes, self._starting(layer, start))
                if not self.limits:
                    self.limits.append(this.limit)
            elif not self._ahead:
                self.add([kind, *args])
            self._ahead += 1
            try:
                original(this, *args)
            finally:
                self._ahead -= 1

        return method

    def _starting(self, key: int, start: Callable[[bool], bool]) -> Callable[[bool], bool]:
        def begin(must: bool) -> bool:
            events: list[Event] = []
            with self._elsewhere(events):
                found = start(must)
            if found:
                self.started[key].append(events)
            return found

        return begin

    # -- the stub of a device -----------------------------------------------------------------------------------------

    name = "recorded"

    def empty(self, nbytes: int, *, for_copies: bool = False) -> torch.Tensor:
        with torch.inference_mode(False):
            return torch.empty(nbytes, dtype=torch.uint8, device=pretend.DEVICE)

    def copy_in(self, source: torch.Tensor, target: Any, after: Any = None) -> _StreamEvent:
        with self._own, _disable_current_modes():
            label = self._label("copy")
            target.numbers.copy_(source)
            self.add(["copy", label, source.numel() * source.element_size(), self._ticket])
            return _StreamEvent(self, label)

    def copy_out(self, source: Any, target: torch.Tensor) -> _StreamEvent:
        with self._own, _disable_current_modes():
            target.copy_(source.numbers)
            self.add(["out", source.numel() * source.element_size()])
            return _StreamEvent(self)

    def send(self, values: torch.Tensor) -> torch.Tensor:
        with self._own, _disable_current_modes():
            self.count("operations", 2)
            self.add(["cross", values.numel() * values.element_size(), False])
            return pretend.on_device(values.clone())

    def fetch(self, values: Any) -> torch.Tensor:
        with self._own, _disable_current_modes():
            self.count("operations", 2)
            self.add(["cross", values.numel() * values.element_size(), True])
            found: torch.Tensor = values.numbers.clone()
            return found

    def wait(self, event: Any) -> None:
        if event is not None and event.label is not None and event.recorder is self:
            self.add(["arrive", event.label])

    def mark(self) -> _StreamEvent:
        return _StreamEvent(self)

    def uses(self, tensor: torch.Tensor) -> None:
        """See `hf_contiguouskv.hardware.accelerator.Device`."""

    def stream(self) -> int:
        return 0

    def free_bytes(self) -> int | None:
        return None

    def let_go(self) -> None:
        """See `hf_contiguouskv.hardware.accelerator.Device`."""


class Queue:
    """In place of the readers' queues: what is put into it is served by the thread that put it there."""

    def __init__(self) -> None:
        self._items: list[tuple[Any, Any]] = []

    def put(self, item: Any, totals: Any) -> None:
        """Have `item` served, once; `totals` are those of its reader."""
        if all(one is not item for one, _ in self._items):
            self._items.append((item, totals))

    def taken(self) -> list[tuple[Any, Any]]:
        """Everything that was put, with its totals. The queue is empty afterwards."""
        items, self._items = self._items, []
        return items


class InlineThreads:
    """In place of `store.reader.ReaderThreads`: there are none."""

    forked = False

    def __init__(self, queue: Queue, totals: Any) -> None:
        self._queue = queue
        self._totals = totals

    def put(self, item: Any) -> None:
        self._queue.put(item, self._totals)

    def stop(self) -> None:
        """See `ReaderThreads`."""

    def join(self) -> None:
        """See `ReaderThreads`."""


def _total(events: list[Event]) -> list[float]:
    found = [0.0] * len(AMOUNTS)
    for event in events:
        if event[0] == "work":
            found = [one + more for one, more in zip(found, event[1], strict=True)]
    return found
