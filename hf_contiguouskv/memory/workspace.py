"""Memory from which attention reads K and V, kept from one request to the next.

A request fills tens of megabytes once and drops them. Fresh memory costs a page fault and zeroing for every 4 KiB,
about as much time as filling it. So the memory of one request's tensors is reused for the next request.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable

import torch

_SMALLEST = 4096


def workspace_capacity(nbytes: int) -> int:
    """Capacity of a piece: four sizes per power of two, so that requests of similar length can share pieces."""
    step = max(_SMALLEST, 1 << max(0, (nbytes - 1).bit_length() - 3))
    return max(_SMALLEST, -(-nbytes // step) * step)


class Workspace:
    """Pieces of host memory, lent as tensors. Callers of `lend`, `add` and `drop` hold the tier's lock.

    A piece returns when the last tensor on its storage is gone, in any thread. Returning takes no lock and changes no
    count, because lent pieces count too.

    Attributes:
        held_bytes: bytes of all pieces, lent or not.
    """

    def __init__(self) -> None:
        self.held_bytes = 0
        self._free: dict[int, deque[torch.Tensor]] = {}
        # Sizes in the order in which they were last lent, the latest at the end.
        self._recent: dict[int, None] = {}

    @property
    def free_bytes(self) -> int:
        """Bytes of pieces that are not lent."""
        return sum(capacity * len(pieces) for capacity, pieces in self._free.items())

    def lend(self, capacity: int) -> torch.Tensor | None:
        """A returned piece, uint8 `(capacity,)`, uninitialised; `None` if there is none of this size."""
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
            # The storage keeps this array alive until its last tensor is gone, so the array's finalizer returns the
            # piece.
            array = piece.numpy()
            with torch.inference_mode(False):  # A cache may be continued outside inference mode.
                lent = torch.from_numpy(array)
            finalizer = weakref.finalize(array, _come_back, weakref.ref(self), piece)
            finalizer.atexit = False
            return lent
        except BaseException:
            if finalizer is None or finalizer.detach() is not None:
                self.come_back(piece)
            raise

    def come_back(self, piece: torch.Tensor) -> None:
        """Take back a piece that no tensor uses."""
        pieces = self._free.get(len(piece))
        if pieces is not None:  # The workspace has not been closed.
            pieces.append(piece)

    def drop(self, nbytes: int) -> None:
        """Return up to `nbytes` of pieces that are not lent to the system, least recently lent sizes first."""
        for capacity in self._recent:
            pieces = self._free[capacity]
            while nbytes > 0 and pieces:
                pieces.popleft()
                self.held_bytes -= capacity
                nbytes -= capacity

    def close(self) -> None:
        """Drop all pieces; from now on keep and count none."""
        self._free.clear()
        self._recent.clear()
        self.held_bytes = 0


def _come_back(workspace: Callable[[], Workspace | None], piece: torch.Tensor) -> None:
    living = workspace()
    if living is not None:
        living.come_back(piece)
