"""Host memory that an accelerator's driver knows: registered once, lent in pieces.

Pinning memory is said to take 0.3 to 0.6 ms for each MiB (`make gpu` measures it), and torch pins powers of two. So
memory for the host's tiers is mapped and registered when a store meets its first accelerator, as much as the store may
hold (`host_bytes`), and requests take pieces of it. It stays for as long as the process runs, as torch's own pinned
memory does: a store that is opened later uses it again.
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

# Where the driver refuses to register so much, half of it is tried, and so on down to this.
_SMALLEST_REGION = 16 * 2**20
# From this size on pieces are taken from the end of a region, so that long-lived blocks of slots and buffers that come
# and go do not cut each other's memory into pieces.
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
    """Pieces that nobody holds any more, and the events for the end of copies that may still be under way."""

    events: list[Any]
    pieces: list[tuple[_Region, int, int]]


class PinnedPool:
    """Registered memory of this process. Thread-safe.

    Args:
        register: makes a uint8 CPU tensor, page-aligned, known to the driver; `False`: it refuses.
        marks: events for the end of all copies that have been queued so far, in or out.
        available: bytes of memory that the machine can give.
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
        # A collector of garbage may close a store in the middle of anything that this thread does.
        self._lock = threading.RLock()
        self._regions: list[_Region] = []
        self._wanted = 0
        # Filled by finalizers, which take no lock: they may run in the middle of anything.
        self._dropped: deque[tuple[_Region, int, int]] = deque()
        self._returned: deque[_Returned] = deque()

    @property
    def nbytes(self) -> int:
        """Bytes that are registered."""
        return sum(len(region.memory) for region in self._regions)

    def reserve(self, nbytes: int) -> None:
        """One more store may hold `nbytes`: register what is missing, as far as the machine has it to spare."""
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
        """A store that reserved `nbytes` was closed. What is registered is there for the next one."""
        with self._lock:
            self._wanted -= nbytes

    def take(self, nbytes: int) -> torch.Tensor | None:
        """Page-aligned uint8 `(nbytes,)` with anything in it, until its last tensor is gone; `None`: none is free.

        It is lent again once copies from and to it, which may outlive the tensor, have ended.
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
        # A storage made from an array keeps it until its last tensor is gone: that array's end is the return.
        array = region.memory[begin : begin + nbytes].numpy()
        finalizer = weakref.finalize(array, self._dropped.append, (region, begin, begin + size))
        finalizer.atexit = False
        with torch.inference_mode(False):
            return torch.from_numpy(array)

    def _collect(self) -> None:
        """Find out what is free again. Called with the lock."""
        pieces = []
        while self._dropped:
            pieces.append(self._dropped.popleft())
        if pieces:
            self._returned.append(_Returned(self._marks(), pieces))
        while self._returned and all(event.query() for event in self._returned[0].events):
            for region, begin, end in self._returned.popleft().pieces:
                region.put(begin, end)


def register_with_cuda(memory: torch.Tensor) -> bool:
    """Have CUDA (or ROCm) pin and map a CPU tensor for all devices."""
    portable = 1
    cudart: Any = torch.cuda.cudart()
    if cudart.cudaHostRegister(memory.data_ptr(), memory.nbytes, portable) == cudart.cudaError.success:
        return True
    with suppress(RuntimeError):
        torch.zeros(1, device="cuda")  # The next launch is told of the refusal: let it be this one.
    return False


def available_bytes() -> int:
    """Memory that the machine can give without swapping; without a limit where the system does not say."""
    with suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 2**62
