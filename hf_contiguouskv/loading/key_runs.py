"""Keys that are read and kept as one: the index of a layer and its scales, and, if they are small, those of the next
layers.

A request needs the keys of all its layers, in their order. Asking for a tensor costs time of the interpreter (a buffer,
a read, a wait, a place in memory), so small neighbours are asked for together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ..hardware.aligned_memory import PAGE, as_memoryview
from ..memory import Buffer, Tier
from ..memory.entries import KeptKeys
from ..store.entries import SegmentSpan
from ..store.reader import Check, Read
from ..store.segment import Segment
from .arriving_tensor import ArrivingTensor


class Place(NamedTuple):
    """Where a tensor lies in the memory of its run, in bytes."""

    start: int
    nbytes: int


@dataclass(frozen=True, eq=False)
class KeyRun:
    """Tensors of one segment that are read and kept as one.

    Attributes:
        tensors: per layer, names of its tensors in the segment.
        places: per layer, where these lie in memory.
        ranges: what is read: the first and the last tensor of each range, and where in memory it begins.
        nbytes: of memory.
    """

    tensors: Mapping[int, tuple[str, ...]]
    places: Mapping[int, tuple[Place, ...]]
    ranges: tuple[tuple[str, str, int], ...]
    nbytes: int

    @property
    def first(self) -> int:
        """The first layer."""
        return next(iter(self.tensors))

    @property
    def name(self) -> str:
        """Name among the runs of a segment."""
        first, last, _ = self.ranges[0]
        return first if first == last else f"{first}-{last}"

    def reads(self, segment: Segment, memory: torch.Tensor, verify: bool) -> list[Read]:
        """The reads that bring it into `memory`, uint8 `(nbytes,)`."""
        octets = as_memoryview(memory)
        found = []
        for number, (first, last, start) in enumerate(self.ranges):
            offset, _ = segment.tensor_extent(first)
            begin, length = segment.tensor_extent(last)
            nbytes = begin + length - offset
            # There is one checksum for all of a tensor, so all of it is read, whatever part the prefix needs.
            checks = list(self._checks(segment, number, start)) if verify else ()
            found.append(Read(segment, offset, nbytes, octets[start : start + nbytes], checks))
        return found

    def _checks(self, segment: Segment, number: int, start: int) -> Iterator[Check]:
        for layer, names in self.tensors.items():
            place = self.places[layer][number]
            yield place.start - start, place.nbytes, segment.tensor_checksum(names[number])


def key_runs(segment: Segment, tensors: Mapping[int, tuple[str, ...]], together: int) -> dict[int, KeyRun]:
    """The runs of a segment, by layer.

    Args:
        segment: open.
        tensors: per layer (ascending), names of its tensors; as many for each.
        together: layers share a run if all of it is at most so many bytes, and their tensors are neighbours.
    """
    found: dict[int, KeyRun] = {}
    some: dict[int, tuple[str, ...]] = {}
    begin = 0
    for layer, names in tensors.items():
        offset, nbytes = segment.tensor_extent(names[0])
        if some and offset + nbytes - begin > together:
            found.update(dict.fromkeys(some, _run(segment, some)))
            some = {}
        if not some:
            begin = offset
        some[layer] = names
    if some:
        found.update(dict.fromkeys(some, _run(segment, some)))
    return found


def _run(segment: Segment, tensors: Mapping[int, tuple[str, ...]]) -> KeyRun:
    layers = list(tensors)
    places: dict[int, list[Place]] = {layer: [] for layer in layers}
    ranges: list[tuple[str, str, int]] = []
    end = 0
    for number in range(len(tensors[layers[0]])):
        start = -(-end // PAGE) * PAGE
        base = segment.tensor_extent(tensors[layers[0]][number])[0]
        for layer in layers:
            offset, nbytes = segment.tensor_extent(tensors[layer][number])
            places[layer].append(Place(start + offset - base, nbytes))
            end = start + offset - base + nbytes
        ranges.append((tensors[layers[0]][number], tensors[layers[-1]][number], start))
    return KeyRun(tensors, {layer: tuple(some) for layer, some in places.items()}, tuple(ranges), end)


@dataclass(eq=False)
class HeldRun:
    """A run that a request uses: on its way, then in memory of the tiers, until its last layer lets it go.

    Reader threads work on this, so it must not keep `KeyLoader` alive.

    Attributes:
        span: of the segment.
        run: what it is.
        layers: those that were asked for and have not let it go.
        pending: on its way.
        data: uint8 `(nbytes,)`, where it is used.
        kept: keys that stay in a tier.
        buffers: memory of keys that do not stay.
    """

    span: SegmentSpan
    run: KeyRun
    layers: set[int] = field(default_factory=set)
    pending: ArrivingTensor | None = None
    data: torch.Tensor | None = None
    kept: list[tuple[Tier, KeptKeys]] = field(default_factory=list)
    buffers: list[tuple[Tier, Buffer]] = field(default_factory=list)

    @property
    def begun(self) -> bool:
        """Whether it is in memory, or on its way."""
        return self.pending is not None or self.data is not None

    def tensors(self, layer: int) -> list[torch.Tensor]:
        """The tensors of a layer, each uint8 `(nbytes,)`. All of the run must have arrived."""
        assert self.data is not None
        return [self.data[start : start + nbytes] for start, nbytes in self.run.places[layer]]

    def let_go(self) -> None:
        """Give the memory back. Nothing may be on its way."""
        self.data = None
        while self.kept:
            tier, keys = self.kept.pop()
            tier.let_go(keys)
        while self.buffers:
            tier, buffer = self.buffers.pop()
            tier.give_back(buffer)

    def give_up(self) -> int:
        """Wait for what is on its way, then let go; the bytes that were read in vain."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.give_up()
        self.let_go()
        return 0 if pending is None else pending.bytes_read
