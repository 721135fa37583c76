"""Memory for layers of prefixes: what requests are using, what stays after them, and pieces that wait for use."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

from hf_contiguouskv.memory.lending import workspace_capacity

from .layer_file import LayerShape

# Allocates uint8 `(nbytes,)`.
Allocate = Callable[[int], torch.Tensor]


@dataclass(eq=False)
class Piece:
    """Memory that holds one layer of a prefix, or will.

    Attributes:
        octets: uint8.
        busy: tells whether its last use is over (`event.query()`); `None`: it is.
    """

    octets: torch.Tensor
    busy: Any = None

    def buffer(self, shape: LayerShape, capacity: int) -> torch.Tensor:
        """Room for one layer, `(2, 1, kv_heads, capacity, head_dim)`."""
        nbytes = shape.rows * capacity * shape.token_bytes
        found = self.octets[:nbytes].view(shape.torch_dtype)
        return found.view(2, 1, shape.kv_heads, capacity, shape.head_dim)


class LayerMemory:
    """One tier: layers by key, the least recently used ones go first. Used by one thread.

    What a running request has taken does not count: it is what attention works with. When the request is over, a layer
    stays if it fits.

    Args:
        name: of the tier.
        max_bytes: of what stays, idle pieces included.
        allocate: of new pieces.

    Attributes:
        peak_bytes: the most that stayed at a time.
    """

    def __init__(self, name: str, max_bytes: int, allocate: Allocate) -> None:
        self.name = name
        self.max_bytes = max_bytes
        self.peak_bytes = 0
        self._allocate = allocate
        self._kept: OrderedDict[Hashable, Piece] = OrderedDict()
        self._idle: defaultdict[int, list[Piece]] = defaultdict(list)
        self._bytes = 0

    @property
    def kept_bytes(self) -> int:
        """What stays now, idle pieces included."""
        return self._bytes

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept

    def take(self, key: Hashable) -> Piece | None:
        """A layer that is here, for one request alone; it is given back with `give_back`."""
        found = self._kept.pop(key, None)
        if found is not None:
            self._bytes -= len(found.octets)
        return found

    def lend(self, nbytes: int, reuse_busy: bool = False) -> Piece:
        """A piece of `nbytes` at least: an idle one, one of the layer that was used least recently, or a new one.

        Args:
            nbytes: of the piece.
            reuse_busy: whether its last use may still be under way; the borrower waits for it then.
        """
        capacity = workspace_capacity(nbytes)
        idle = self._idle[capacity]
        for number, piece in enumerate(idle):
            if reuse_busy or piece.busy is None or piece.busy.query():
                self._bytes -= capacity
                return idle.pop(number)
        # Where memory is full, a layer of this size would have to go when the new one comes.
        if self._bytes + capacity > self.max_bytes:
            for key, piece in self._kept.items():
                if len(piece.octets) == capacity and (reuse_busy or piece.busy is None or piece.busy.query()):
                    del self._kept[key]
                    self._bytes -= capacity
                    return piece
        return Piece(self._allocate(capacity))

    def give_back(self, piece: Piece, key: Hashable | None = None) -> None:
        """A request does not need a piece any more.

        Args:
            piece: of this tier.
            key: of the layer that it holds, which stays as the one used last; `None`: the piece is idle.
        """
        nbytes = len(piece.octets)
        if key is not None and nbytes <= self.max_bytes:
            self._make_room(nbytes)
            replaced = self._kept.pop(key, None)  # Two requests at the same time have each brought it.
            self._bytes += nbytes - (0 if replaced is None else len(replaced.octets))
            self._kept[key] = piece
        elif self._bytes + nbytes <= self.max_bytes:
            self._idle[nbytes].append(piece)
            self._bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self._bytes)

    def _make_room(self, nbytes: int) -> None:
        while self._bytes + nbytes > self.max_bytes:
            size = next((capacity for capacity, pieces in self._idle.items() if pieces), None)
            gone = self._idle[size].pop() if size is not None else self._kept.popitem(last=False)[1]
            self._bytes -= len(gone.octets)

    def drop(self) -> None:
        """Let go of everything."""
        self._kept.clear()
        self._idle.clear()
        self._bytes = 0
