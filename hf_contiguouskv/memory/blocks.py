"""The kinds of memory that slots can lie in: pageable host memory, or whole tensors (pinned, or on a device)."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from ..hardware.accelerator import send
from ..hardware.aligned_memory import PAGE, as_memoryview

Slots = npt.NDArray[np.int64]
Integer = TypeVar("Integer", np.int32, np.int64)

_HUGE = 2 * 2**20
# Aim for 16 tensors per tier (rounding down to a power of two makes up to 31), none smaller than 4 MiB.
_PIECES = 16
_SMALLEST_PIECE = 4 * 2**20


class Blocks(Protocol):
    """Memory for numbered slots of one size, taken from the system and returned to it in blocks of slots.

    Attributes:
        slot_bytes: size of a slot.
        slots_per_block: a block is the smallest piece that can be returned.
        max_blocks: limit on blocks; slots are numbered from 0 to `max_blocks * slots_per_block`.
        slots_in_a_row: length of the runs, counted from slot 0, in which neighbouring slots are contiguous in memory.
    """

    slot_bytes: int
    slots_per_block: int
    max_blocks: int
    slots_in_a_row: int

    def take(self, block: int) -> None:
        """Allocate the memory of a block."""
        ...

    def drop(self, blocks: Sequence[int]) -> None:
        """Return the memory of blocks; their contents are lost."""
        ...

    def select(self, slots: Slots) -> torch.Tensor:
        """Slots as uint8 `(n, slot_bytes)`: a view where they are neighbours, else a copy."""
        ...

    def write(self, slots: Slots, content: torch.Tensor) -> None:
        """Copy uint8 `(n, slot_bytes)` into slots."""
        ...

    def buffer(self, first: int, count: int) -> memoryview:
        """Neighbouring slots as writable bytes (host memory only)."""
        ...


class PageableBlocks:
    """Ordinary host memory: one mapping as large as the bound, of which only used pages take up memory.

    A slot that consists of whole pages is a block of its own, so that any slot can be returned. That is why this is
    not `TensorBlocks`: a tensor goes back only as a whole, 128 MiB of a limit of 2 GiB. Tensors are no quicker: 392
    instead of 362 ms for exact requests with cold chunks, 331 instead of 341 warm (`lending` names the command).
    """

    def __init__(self, slot_bytes: int, max_bytes: int) -> None:
        self.slot_bytes = slot_bytes
        self.slots_per_block = math.lcm(slot_bytes, PAGE) // slot_bytes
        self.max_blocks = max_bytes // (slot_bytes * self.slots_per_block)
        nbytes = max(PAGE, self.max_blocks * self.slots_per_block * slot_bytes)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        self._mapping = mmap.mmap(-1, nbytes, flags=flags)
        if nbytes >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # Only a hint.
                self._mapping.madvise(mmap.MADV_HUGEPAGE)
        count = self.max_blocks * self.slots_per_block
        self.slots_in_a_row = max(1, count)
        with torch.inference_mode(False):  # Code outside inference mode writes to this tensor too.
            octets = torch.frombuffer(self._mapping, dtype=torch.uint8)
        self._rows = octets[: count * slot_bytes].view(count, slot_bytes)
        self._octets = as_memoryview(octets)

    def take(self, block: int) -> None:
        """Do nothing: the system allocates a page when it is first written."""

    def drop(self, blocks: Sequence[int]) -> None:
        size = self.slots_per_block * self.slot_bytes
        for first, last in runs(np.asarray(sorted(blocks), dtype=np.int64)):
            with contextlib.suppress(OSError):
                self._mapping.madvise(mmap.MADV_DONTNEED, first * size, (last - first) * size)

    def select(self, slots: Slots) -> torch.Tensor:
        if neighbours(slots):
            return self._rows[int(slots[0]) : int(slots[0]) + len(slots)]
        return self._rows.index_select(0, torch.from_numpy(slots))

    def write(self, slots: Slots, content: torch.Tensor) -> None:
        self._rows.index_copy_(0, torch.from_numpy(slots), content)

    def buffer(self, first: int, count: int) -> memoryview:
        return self._octets[first * self.slot_bytes : (first + count) * self.slot_bytes]


class TensorBlocks:
    """Blocks that are tensors: pinned host memory, or the memory of a device.

    Args:
        slot_bytes: size of a slot.
        max_bytes: bound on all blocks together.
        allocate: allocates a uint8 tensor of the given number of bytes.
    """

    def __init__(self, slot_bytes: int, max_bytes: int, allocate: Callable[[int], torch.Tensor]) -> None:
        # Powers of two, because torch pins memory only in powers of two.
        piece = min(max_bytes, 1 << (max(max_bytes // _PIECES, _SMALLEST_PIECE).bit_length() - 1))
        self.slot_bytes = slot_bytes
        self.slots_per_block = max(1, piece // slot_bytes)
        self.max_blocks = max_bytes // (self.slots_per_block * slot_bytes)
        self.slots_in_a_row = self.slots_per_block
        self._allocate = allocate
        self._tensors: dict[int, torch.Tensor] = {}

    def take(self, block: int) -> None:
        with torch.inference_mode(False):  # Other threads, and requests outside inference mode, write to it too.
            octets = self._allocate(self.slots_per_block * self.slot_bytes)
        self._tensors[block] = octets.view(self.slots_per_block, self.slot_bytes)

    def drop(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            del self._tensors[block]

    def tensor(self, block: int) -> torch.Tensor:
        """The memory of a block, uint8 `(slots_per_block, slot_bytes)`."""
        return self._tensors[block]

    def _parts(self, slots: Slots) -> list[tuple[torch.Tensor, Slots, Slots]]:
        """Per block: its tensor, the positions in `slots` that lie in it, and their indices inside the block."""
        block = slots // self.slots_per_block
        found = []
        for number in np.unique(block):
            positions = np.flatnonzero(block == number)
            inside = slots[positions] - int(number) * self.slots_per_block
            found.append((self._tensors[int(number)], positions, inside))
        return found

    def select(self, slots: Slots) -> torch.Tensor:
        parts = self._parts(slots)
        if len(parts) == 1:
            tensor, _, inside = parts[0]
            if neighbours(inside):
                return tensor[int(inside[0]) : int(inside[0]) + len(inside)]
            return tensor.index_select(0, _index(inside, tensor))
        out = self._allocate(len(slots) * self.slot_bytes).view(len(slots), self.slot_bytes)
        for tensor, positions, inside in parts:
            out.index_copy_(0, _index(positions, out), tensor.index_select(0, _index(inside, tensor)))
        return out

    def write(self, slots: Slots, content: torch.Tensor) -> None:
        for tensor, positions, inside in self._parts(slots):
            part = content if len(positions) == len(slots) else content.index_select(0, _index(positions, content))
            tensor.index_copy_(0, _index(inside, tensor), part)

    def buffer(self, first: int, count: int) -> memoryview:
        block, inside = divmod(first, self.slots_per_block)
        if inside + count > self.slots_per_block:
            raise ValueError(f"slots {first} to {first + count} lie in several blocks of {self.slots_per_block}")
        return as_memoryview(self._tensors[block][inside : inside + count])


def _index(positions: Slots, like: torch.Tensor) -> torch.Tensor:
    return send(torch.from_numpy(positions), like.device)


def neighbours(slots: Slots) -> bool:
    """Whether the slots are consecutive and ascending."""
    count = len(slots)
    if count < 2:
        return count == 1
    return int(slots[-1]) - int(slots[0]) == count - 1 and bool((np.diff(slots) == 1).all())


def distinct(numbers: npt.NDArray[Integer]) -> npt.NDArray[Integer]:
    """Each of `numbers` once, ascending; for hundreds of numbers several times as fast as `np.unique`."""
    if len(numbers) < 2:
        return numbers
    ordered = np.sort(numbers)
    first = np.empty(len(ordered), dtype=bool)
    first[0] = True
    np.not_equal(ordered[1:], ordered[:-1], out=first[1:])
    found: npt.NDArray[Integer] = ordered[first]
    return found


def among(numbers: Slots, some: Slots) -> npt.NDArray[np.bool_]:
    """Which of `numbers` are in `some`, bool `(n,)`. All numbers are small and not negative, so a table beats
    `np.isin`."""
    if not len(numbers) or not len(some):
        return np.zeros(len(numbers), dtype=bool)
    known = np.zeros(max(int(numbers.max()), int(some.max())) + 1, dtype=bool)
    known[some] = True
    found: npt.NDArray[np.bool_] = known[numbers]
    return found


def runs(numbers: Slots) -> list[tuple[int, int]]:
    """Ascending numbers as half-open ranges `(first, last + 1)` of neighbours."""
    if not len(numbers):
        return []
    cuts = np.flatnonzero(np.diff(numbers) != 1) + 1
    return [(int(part[0]), int(part[-1]) + 1) for part in np.split(numbers, cuts)]
