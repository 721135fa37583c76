"""The history of a segment's chunks, in memory or not: how often and how much each was used."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Places = npt.NDArray[np.int64]

# Requests after which a use counts half as much in `heat`.
HALF_LIFE = 200
# `heat` of older requests is scaled down when newer ones would overflow.
_RESCALE_AT = 256


class Clock:
    """Counts requests, and gives the weight of a current request in `heat`.

    New uses are scaled up instead of old ones down (forward decay), so stored values need no update as time passes.
    """

    def __init__(self) -> None:
        self.now = 1
        self._epoch = 0

    @property
    def weight(self) -> float:
        """Weight of a use now, relative to a use at the last `rescale`."""
        return float(2.0 ** ((self.now - self._epoch) / HALF_LIFE))

    def tick(self) -> bool:
        """Count one finished request; whether all heat must now be multiplied by `rescale()`."""
        self.now += 1
        return self.now - self._epoch >= _RESCALE_AT * HALF_LIFE

    def rescale(self) -> float:
        """Begin a new epoch; returns the factor for all heat counted before."""
        factor = 1.0 / self.weight
        self._epoch = self.now
        return factor


@dataclass(frozen=True)
class Uses:
    """The history by which a policy judges `n` entries. All arrays are `(n,)`.

    Attributes:
        importance: `I_j`, attention mass summed over requests, whether the entry was in memory or not. Keys have the
            importance of an average chunk of their segment, because they lead to all chunks.
        loads: `F_j`, times loaded into memory.
        requests: requests that used the entry.
        last: number of the last request that used it.
        heat: uses, each weighing half as much as a use `HALF_LIFE` requests later.
        prefix_heat: the same for requests to the entry's segment.
        prefix_requests: number of requests to the entry's segment.
        ahead: whether these entries are keys, which are read ahead of need and in one piece.
    """

    importance: Floats
    loads: Floats
    requests: Floats
    last: Floats
    heat: Floats
    prefix_heat: float
    prefix_requests: int
    ahead: bool = False


class SegmentTable:
    """Where the chunks of one segment are in each tier, and the history of their use.

    It has many attributes because each is one array over the same places.

    Chunk `j` of layer `l` has the place `l * chunks + j` in every array.

    Args:
        number: the number by which tiers refer to this table; 1 or more.
        identity: of the segment's bytes.
        layers, chunks: of the segment.
        slot_bytes: size of a chunk in one layer.
    """

    def __init__(self, number: int, identity: Hashable, layers: int, chunks: int, slot_bytes: int) -> None:
        size = layers * chunks
        self.number = number
        self.identity = identity
        self.layers = layers
        self.chunks = chunks
        self.slot_bytes = slot_bytes
        # By tier name: the slot that holds the chunk, -1 for none.
        self.slots: dict[str, Places] = {}
        self.importance = np.zeros(size, dtype=np.float32)
        self.loads = np.zeros(size, dtype=np.int32)
        self.requests = np.zeros(size, dtype=np.int32)
        self.last = np.zeros(size, dtype=np.int32)
        self.heat = np.zeros(size, dtype=np.float64)  # Weights grow to 2**256 before they are scaled down.
        # Of the segment: requests that used it, and the attention mass of its average chunk.
        self.uses = 0
        self.prefix_heat = 0.0
        self.mean_mass = 0.0
        self.last_request = 0
        # How often its keys were loaded: two tensors per layer.
        self.key_loads = np.zeros(2 * layers, dtype=np.int32)
        # Bytes of this table that the host tier counts.
        self.counted = 0
        # Chunks and keys of this table that are in a tier.
        self.resident = 0

    @property
    def nbytes(self) -> int:
        """Memory that the table itself takes up."""
        own = self.importance.nbytes + self.loads.nbytes + self.requests.nbytes + self.last.nbytes + self.heat.nbytes
        return own + sum(slots.nbytes for slots in self.slots.values()) + self.key_loads.nbytes

    def slots_in(self, tier: str) -> Places:
        """Slots of all places in a tier, int64 `(layers * chunks,)`."""
        found = self.slots.get(tier)
        if found is None:
            found = self.slots[tier] = np.full(self.layers * self.chunks, -1, dtype=np.int64)
        return found

    def uses_of(self, places: Places) -> Uses:
        """History of the chunks at `places`."""
        return Uses(
            self.importance[places].astype(np.float64),
            self.loads[places].astype(np.float64),
            self.requests[places].astype(np.float64),
            self.last[places].astype(np.float64),
            self.heat[places].astype(np.float64),
            self.prefix_heat,
            self.uses,
        )

    def uses_on_arrival(self, places: Places, clock: Clock, importance: Places | Floats | None) -> Uses:
        """History of the chunks at `places` as it will be when the request that just loaded them is over.

        `importance` is the attention mass that the request measured, `(n,)`; `None` if unknown.
        """
        before = self.uses_of(places)
        return Uses(
            before.importance if importance is None else before.importance + importance,
            before.loads,
            before.requests + 1,
            np.full(len(places), float(clock.now)),
            before.heat + clock.weight,
            before.prefix_heat + clock.weight,
            before.prefix_requests + 1,
        )

    def uses_of_keys(self, which: Sequence[int], arriving: Clock | None = None) -> Uses:
        """History of keys, which every request to the segment needs.

        Args:
            which: twice the layer, plus 1 for the layer's second tensor.
            arriving: if given, the history as it will be when the request that just loaded them is over.
        """
        one = np.ones(len(which))
        more = 0 if arriving is None else 1
        heat = self.prefix_heat + (0.0 if arriving is None else arriving.weight)
        return Uses(
            one * self.mean_mass,
            self.key_loads[list(which)].astype(np.float64),
            one * (self.uses + more),
            one * (self.last_request if arriving is None else arriving.now),
            one * heat,
            heat,
            self.uses + more,
            ahead=True,
        )

    def begin_request(self, clock: Clock) -> None:
        """Count a request to this segment, once it is over."""
        self.uses += 1
        self.prefix_heat += clock.weight
        self.last_request = clock.now

    def count(self, places: Places, clock: Clock) -> None:
        """Count one use of the chunks at `places` (each place once) by the request that ends now."""
        self.requests[places] += 1
        self.last[places] = clock.now
        self.heat[places] += clock.weight

    def add_importance(self, layers: list[int], first: int, mass: npt.NDArray[np.float32]) -> None:
        """`I_j += A_j` for chunks `first, first + 1, ...` in each of `layers`."""
        grid = self.importance.reshape(self.layers, self.chunks)
        grid[layers, first : first + len(mass)] += mass

    def note_mass(self) -> None:
        """Update the mean attention mass of the chunks."""
        self.mean_mass = float(self.importance.mean(dtype=np.float64))

    def rescale(self, factor: float) -> None:
        """Multiply all heat (see `Clock`)."""
        self.heat *= factor
        self.prefix_heat *= factor
