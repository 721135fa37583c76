"""Host memory that is registered once with an accelerator's driver and lent in pieces.

Pinning memory is said to take 0.3 to 0.6 ms per MiB (`make gpu` measures it), and torch pins powers of two. So when a
store first uses an accelerator, as much memory as its host tier may hold (`host_bytes`) is mapped and registered, and
requests take pieces of it. The memory stays registered until the process ends, as torch's own pinned memory does, and
stores opened later reuse it.
"""

from __future__ import annotations

import logging
import threading
import weakref
from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .aligned_memory import PAGE, aligned_buffer

logger = logging.getLogger("hf_contiguouskv")

# If the driver refuses a size, half of it is tried, down to this size.
_SMALLEST_REGION = 16 * 2**20
# Pieces of at least this size are taken from the end of a region, so that long-lived blocks of slots and short-lived
# buffers do not fragment each other's memory.
_BLOCK_BYTES = 4 * 2**20


@dataclass(eq=False)
class _Region:
    """One mapping. Holes are `(begin, end)`, ascending, never neighbours."""

    memory: torch.Tensor
    holes: list[tuple[int, int]] = field(default_factory=list)

    def take(self, nbytes: int) -> int | None:
        order = reversed(self.holes) if nbytes >= _BLOCK_BYTES else iter(self.holes)
        hole = next((one for one in order if one[1] - one[0] >= nbytes), None)
        if hole is None:
            return None
        begin, end = hole
        at = self.holes.index(hole)
        if nbytes >= _BLOCK_BYTES:
            taken, left = end - nbytes, (begin, end - nbytes)
        else:
            taken, left = begin, (begin + nbytes, end)
        self.holes[at : at + 1] = [left] if left[0] < left[1] else []
        return taken

    def put(self, begin: int, end: int) -> None:
        at = bisect_left(self.holes, (begin, end))
        first = last = at
        if at > 0 and self.holes[at - 1][1] == begin:
            first, begin = at - 1, self.holes[at - 1][0]
        if at < len(self.holes) and self.holes[at][0] == end:
            last, end = at + 1, self.holes[at][1]
        self.holes[first:last] = [(begin, end)]


@dataclass(eq=False)
class _Returned:
    """Pieces without a holder, and events for the end of copies that may still be running."""

    events: list[Any]
    pieces: list[tuple[_Region, int, int]]


class PinnedPool:
    """The registered memory of this process. Thread-safe.

    Args:
        register: registers a page-aligned uint8 CPU tensor with the driver; returns `False` if the driver refuses.
        marks: returns events for the end of all copies queued so far, in and out.
        available: returns the bytes of memory that the machine can spare.
    """

    def __init__(
        self,
        register: Callable[[torch.Tensor], bool],
        marks: Callable[[], list[Any]],
        available: Callable[[], int],
    ) -> None:
        self._register = register
        self._marks = marks
        self._available = available
        # Re-entrant: the garbage collector may close a store while this thread holds the lock.
        self._lock = threading.RLock()
        self._regions: list[_Region] = []
        self._wanted = 0
        # Finalizers fill this without a lock, because they may run at any point.
        self._dropped: deque[tuple[_Region, int, int]] = deque()
        self._returned: deque[_Returned] = deque()

    @property
    def nbytes(self) -> int:
        """Bytes that are registered."""
        return sum(len(region.memory) for region in self._regions)

    def reserve(self, nbytes: int) -> None:
        """Register what is missing for one more store that may hold `nbytes`, at most half of the available memory."""
        with self._lock:
            self._wanted += nbytes
            missing = min(self._wanted - self.nbytes, self._available() // 2)
            size = -(-missing // PAGE) * PAGE
            while size > 0:
                memory = aligned_buffer(size)
                if self._register(memory):
                    self._regions.append(_Region(memory, [(0, size)]))
                    return
                logger.warning("the driver did not register %d bytes of host memory; trying less", size)
                size = 0 if size <= _SMALLEST_REGION else max(_SMALLEST_REGION, size // 2 // PAGE * PAGE)

    def release(self, nbytes: int) -> None:
        """Release a closed store's reservation. The memory stays registered for the next store."""
        with self._lock:
            self._wanted -= nbytes

    def take(self, nbytes: int) -> torch.Tensor | None:
        """Page-aligned uninitialised uint8 `(nbytes,)`, lent until its last tensor is gone; `None` if none is free.

        Copies may outlive the tensor, so the piece is lent again only after all copies have ended.
        """
        size = max(PAGE, -(-nbytes // PAGE) * PAGE)
        with self._lock:
            self._collect()
            for region in self._regions:
                begin = region.take(size)
                if begin is not None:
                    break
            else:
                return None
        # The storage keeps this array alive until its last tensor is gone, so the array's finalizer returns the piece.
        array = region.memory[begin : begin + nbytes].numpy()
        finalizer = weakref.finalize(array, self._dropped.append, (region, begin, begin + size))
        finalizer.atexit = False
        with torch.inference_mode(False):
            return torch.from_numpy(array)

    def _collect(self) -> None:
        """Free the returned pieces whose copies have ended. Callers hold the lock."""
        pieces = []
        while self._dropped:
            pieces.append(self._dropped.popleft())
        if pieces:
            self._returned.append(_Returned(self._marks(), pieces))
        while self._returned and all(event.query() for event in self._returned[0].events):
            for region, begin, end in self._returned.popleft().pieces:
                region.put(begin, end)


def register_with_cuda(memory: torch.Tensor) -> bool:
    """Have CUDA (or ROCm) pin and map a CPU tensor for all devices; whether it did."""
    portable = 1
    cudart: Any = torch.cuda.cudart()
    if cudart.cudaHostRegister(memory.data_ptr(), memory.nbytes, portable) == cudart.cudaError.success:
        return True
    with suppress(RuntimeError):
        torch.zeros(1, device="cuda")  # CUDA reports the refusal at the next launch, so launch one here.
    return False


def available_bytes() -> int:
    """Bytes that the machine can give without swapping; 2**62 if the system does not report it."""
    with suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 2**62
