"""Sums over what was counted."""

from __future__ import annotations

from dataclasses import dataclass

from .record import Record
from .recording import Event


@dataclass
class Totals:
    """Of some events.

    Attributes:
        calls: of Python and C functions, by the model's thread.
        operations: of torch, views included.
        kernels: launched.
        waits: of the host for the device.
        copies: of buffers to the device.
        reads: asked of storage.
        read_bytes: bytes of these.
    """

    calls: float = 0.0
    operations: float = 0.0
    kernels: float = 0.0
    waits: float = 0.0
    copies: float = 0.0
    reads: float = 0.0
    read_bytes: float = 0.0

    def add(self, events: list[Event], by_reader: bool = False) -> None:
        """Count these, too."""
        for event in events:
            if event[0] == "work" and not by_reader:
                self.calls += event[1].get("calls", 0.0)
                self.operations += event[1].get("operations", 0.0)
                self.kernels += event[1].get("kernels", 0.0)
            elif event[0] == "cross":
                self.waits += bool(event[2])
            elif event[0] == "copy":
                self.copies += 1
            elif event[0] == "submit":
                self.reads += event[2]
                self.read_bytes += event[3]
            elif event[0] == "task":
                self.add(event[1], by_reader=True)


def per_layer(record: Record, tokens: int) -> Totals:
    """Means over the layers, with what is started ahead for them."""
    programs, found = record.at(tokens), Totals()
    for program in record.sections[1:-1]:
        found.add(programs[program])
    for started in record.started.values():
        for program in started:
            found.add(programs[program])
    layers = record.layers()
    return Totals(**{name: value / layers for name, value in vars(found).items()})


def before(record: Record, tokens: int) -> Totals:
    """Before the first layer."""
    found = Totals()
    found.add(record.at(tokens)[record.sections[0]])
    return found


def whole(record: Record, tokens: int) -> Totals:
    """Of the request."""
    programs, found = record.at(tokens), Totals()
    for program in record.sections:
        found.add(programs[program])
    for started in record.started.values():
        for program in started:
            found.add(programs[program])
    return found
