"""Memory that attention reads K and V from, kept from one request to the next.

A request fills tens of megabytes once and drops them. Fresh memory from the system costs a page fault and zeros for
every 4 KiB: about as long as filling it. So what one request's tensors were in serves the next one's.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable

import torch

_SMALLEST = 4096


def workspace_capacity(nbytes: int) -> int:
    """Sizes of the pieces: four per power of two, so that requests of nearly the same length share theirs."""
    step = max(_SMALLEST, 1 << max(0, (nbytes - 1).bit_length() - 3))
    return max(_SMALLEST, -(-nbytes // step) * step)


class Workspace:
    """Pieces of host memory, lent as tensors. Whoever calls `lend`, `add` and `drop` holds the tier's lock.

    A piece comes back by itself when no tensor uses its storage any more, in whichever thread that is: coming back
    takes no lock, and changes nothing that is counted, for pieces count while they are lent, too.

    Attributes:
        held_bytes: of all pieces, lent or not.
    """

    def __init__(self) -> None:
        self.held_bytes = 0
        self._free: dict[int, deque[torch.Tensor]] = {}
        # Sizes, the one that was lent last at the end.
        self._recent: dict[int, None] = {}

    @property
    def free_bytes(self) -> int:
        """Bytes of pieces that are not lent."""
        return sum(capacity * len(pieces) for capacity, pieces in self._free.items())

    def lend(self, capacity: int) -> torch.Tensor | None:
        """A piece that has come back, uint8 `(capacity,)` with anything in it; `None`: there is none of this size."""
        pieces = self._free.get(capacity)
        return self._lent(pieces.pop()) if pieces else None

    def add(self, piece: torch.Tensor) -> torch.Tensor:
        """Count a new piece, uint8 `(capacity,)`, and lend it."""
        self._free.setdefault(len(piece), deque())
        self.held_bytes += len(piece)
        return self._lent(piece)

    def _lent(self, piece: torch.Tensor) -> torch.Tensor:
        finalizer = None
        try:
            self._recent.pop(len(piece), None)
            self._recent[len(piece)] = None
            # A storage made from an array keeps it until its last tensor is gone: that array's end is the return.
            array = piece.numpy()
            with torch.inference_mode(False):  # A cache may be continued outside of it.
                lent = torch.from_numpy(array)
            finalizer = weakref.finalize(array, _come_back, weakref.ref(self), piece)
            finalizer.atexit = False
            return lent
        except BaseException:
            if finalizer is None or finalizer.detach() is not None:
                self.come_back(piece)
            raise

    def come_back(self, piece: torch.Tensor) -> None:
        """Nobody uses a piece any more."""
        pieces = self._free.get(len(piece))
        if pieces is not None:  # Not closed in the meantime.
            pieces.append(piece)

    def drop(self, nbytes: int) -> None:
        """Return to the system what is not lent, until it was `nbytes` (or nothing is left).

        Sizes that nobody has asked for lately go first.
        """
        for capacity in self._recent:
            pieces = self._free[capacity]
            while nbytes > 0 and pieces:
                pieces.popleft()
                self.held_bytes -= capacity
                nbytes -= capacity

    def close(self) -> None:
        """Keep nothing, and count nothing, from now on."""
        self._free.clear()
        self._recent.clear()
        self.held_bytes = 0


def _come_back(workspace: Callable[[], Workspace | None], piece: torch.Tensor) -> None:
    living = workspace()
    if living is not None:
        living.come_back(piece)
