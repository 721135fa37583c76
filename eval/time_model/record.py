"""Recordings of one request at two lengths of the prefix, as one that any length can be worked out from.

Whatever is counted grows in a straight line with the prefix (or not at all), so two lengths say all. Layers that do the
same share one list of events (`programs`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .recording import AMOUNTS, Event, Recorder


class CountError(Exception):
    """Recordings do not fit together, or there are none."""


@dataclass(frozen=True)
class Record:
    """What one request does, at any length of the prefix.

    Attributes:
        lengths: of the two prefixes that were recorded, in tokens.
        programs: lists of events (see `recording`). Layers in them are counted from the layer that does them, numbers
            are pairs, one for each length.
        sections: which program runs before the first layer, in each layer, and after the last.
        started: per layer, the programs that its reads ahead are, in the order in which they are started.
        limits: bytes that may be read ahead of compute, at each length; none: nothing is.
    """

    lengths: tuple[int, int]
    programs: list[list[Event]]
    sections: list[int]
    started: dict[int, list[int]]
    limits: tuple[int, int] | None

    @classmethod
    def of(cls, lengths: tuple[int, int], recorders: Sequence[Recorder]) -> Record:
        """From the recordings at both lengths.

        Raises:
            CountError: they differ in more than numbers.
        """
        first, second = recorders
        layers = sorted(first.layers)
        if sorted(second.layers) != layers or first.started.keys() != second.started.keys():
            raise CountError("the two lengths do not go through the same layers")
        found = _Programs()
        sections = [found.add(_both(first.layers[n], second.layers[n], n)) for n in layers]
        started = {}
        for layer in sorted(first.started):
            pairs = zip(first.started[layer], second.started[layer], strict=True)
            started[layer] = [found.add(_both(one, other, layer)) for one, other in pairs]
        limits = (first.limits[0], second.limits[0]) if first.limits and second.limits else None
        return cls(lengths, found.averaged(), sections, started, limits)

    def at(self, tokens: int) -> list[list[Event]]:
        """The programs with numbers for a prefix of `tokens` tokens."""
        short, long = self.lengths
        share = (tokens - short) / (long - short)

        def number(pair: Any) -> Any:
            return max(0.0, pair[0] + (pair[1] - pair[0]) * share) if isinstance(pair, list) else pair

        return [[_mapped(event, number) for event in program] for program in self.programs]

    def layers(self) -> int:
        """How many layers the model has."""
        return len(self.sections) - 2

    def as_json(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "lengths": list(self.lengths),
            "limits": None if self.limits is None else list(self.limits),
            "sections": self.sections,
            "started": {str(layer): programs for layer, programs in self.started.items()},
            "programs": self.programs,
        }

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Record:
        """The inverse of `as_json`."""
        limits = found["limits"]
        return cls(
            (found["lengths"][0], found["lengths"][1]),
            found["programs"],
            found["sections"],
            {int(layer): programs for layer, programs in found["started"].items()},
            None if limits is None else (limits[0], limits[1]),
        )


def _both(one: list[Event], other: list[Event], layer: int) -> list[Event]:
    """Events of two lengths as one list, with layers counted from `layer`."""
    one, other = _tidy(one), _tidy(other)
    kinds = [[event[0] for event in events] for events in (one, other)]
    if kinds[0] != kinds[1]:
        raise CountError(f"layer {layer} does not do the same at both lengths:\n{kinds[0]}\n{kinds[1]}")
    return [_event(left, right, layer) for left, right in zip(one, other, strict=True)]


def _tidy(events: list[Event]) -> list[Event]:
    """Without what is empty, and with neighbouring work as one."""
    found: list[Event] = []
    for event in events:
        if event[0] == "task" and not any(inner[0] == "submit" for inner in event[1]):
            continue  # Bookkeeping of a reader thread; nobody waits for it.
        if event[0] == "work" and found and found[-1][0] == "work":
            found[-1] = ["work", [a + b for a, b in zip(found[-1][1], event[1], strict=True)]]
        else:
            found.append(event)
    return found


def _event(one: Event, other: Event, layer: int) -> Event:
    kind = one[0]

    def amounts(a: list[float], b: list[float]) -> dict[str, list[float]]:
        return {name: [x, y] for name, x, y in zip(AMOUNTS, a, b, strict=True) if x or y}

    def label(found: Any) -> Any:
        return None if found is None else [found[0] - layer, found[1]]

    if kind == "work":
        return ["work", amounts(one[1], other[1])]
    if kind == "task":
        return ["task", _both(one[1], other[1], layer)]
    if kind in ("need", "used"):
        return [kind, one[1] - layer]
    if kind == "add":
        return ["add", one[1] - layer, [one[2], other[2]]]
    if kind == "submit":
        return ["submit", label(one[1]), [one[2], other[2]], [one[3], other[3]], one[4], amounts(one[5], other[5])]
    if kind == "copy":
        return ["copy", label(one[1]), [one[2], other[2]], label(one[3])]
    if kind in ("wait", "arrive"):
        return [kind, label(one[1])]
    if kind == "cross":
        return ["cross", [one[1], other[1]], one[2]]
    return [kind, *([a, b] for a, b in zip(one[1:], other[1:], strict=True))]


class _Programs:
    """Lists of events that do the same, once."""

    def __init__(self) -> None:
        self._alike: list[list[list[Event]]] = []
        self._known: dict[str, int] = {}

    def add(self, program: list[Event]) -> int:
        key = repr([_mapped(event, lambda value: None if isinstance(value, list) else value) for event in program])
        kernels = repr([event[1].get("kernels") for event in program if event[0] == "work"])
        number = self._known.setdefault(key + kernels, len(self._known))
        if number == len(self._alike):
            self._alike.append([])
        self._alike[number].append(program)
        return number

    def averaged(self) -> list[list[Event]]:
        return [_average(alike) for alike in self._alike]


def _average(alike: list[list[Event]]) -> list[Event]:
    """One list of events for several that differ in numbers only."""

    def numbers(events: list[Event]) -> list[list[float]]:
        found: list[list[float]] = []

        def note(value: Any) -> Any:
            if isinstance(value, list):
                found.append(value)
            return value

        for event in events:
            _mapped(event, note)
        return found

    collected = [numbers(events) for events in alike]
    means = iter(
        [[round(sum(pair[i] for pair in same) / len(same)) for i in (0, 1)] for same in zip(*collected, strict=True)]
    )
    return [_mapped(event, lambda value: next(means) if isinstance(value, list) else value) for event in alike[0]]


def _mapped(event: Event, change: Callable[[Any], Any]) -> Event:
    """An event with its pairs of numbers, or its numbers, replaced; labels stay."""
    kind = event[0]
    if kind == "work":
        return ["work", {name: change(value) for name, value in event[1].items()}]
    if kind == "task":
        return ["task", [_mapped(inner, change) for inner in event[1]]]
    if kind == "add":
        return ["add", event[1], change(event[2])]
    if kind == "submit":
        amounts = {name: change(value) for name, value in event[5].items()}
        return ["submit", event[1], change(event[2]), change(event[3]), event[4], amounts]
    if kind == "copy":
        return ["copy", event[1], change(event[2]), event[3]]
    if kind == "cross":
        return ["cross", change(event[1]), event[2]]
    if kind == "out":
        return ["out", change(event[1])]
    return event
