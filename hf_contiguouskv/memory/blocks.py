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
# Tensors are had in so many pieces of a tier's bound, none smaller than this.
_PIECES = 16
_SMALLEST_PIECE = 4 * 2**20


class Blocks(Protocol):
    """Memory for numbered slots of one size, taken from the system and returned to it in blocks of slots.

    Attributes:
        slot_bytes: size of a slot.
        slots_per_block: a block is the smallest piece that can be returned.
        max_blocks: how many there can be; slots are numbered from 0 to `max_blocks * slots_per_block`.
        slots_in_a_row: neighbouring slots are neighbours in memory within so many, counted from slot 0.
    """

    slot_bytes: int
    slots_per_block: int
    max_blocks: int
    slots_in_a_row: int

    def take(self, block: int) -> None:
        """Have the memory of a block."""
        ...

    def drop(self, blocks: Sequence[int]) -> None:
        """Return the memory of blocks; what was in them is gone."""
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
    """Ordinary host memory: one mapping as large as the bound, of which only what is used is really there.

    Slots of whole pages are blocks of their own, so that any of them can be returned.
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
        with torch.inference_mode(False):  # Written to outside of it as well.
            octets = torch.frombuffer(self._mapping, dtype=torch.uint8)
        self._rows = octets[: count * slot_bytes].view(count, slot_bytes)
        self._octets = as_memoryview(octets)

    def take(self, block: int) -> None:
        """See `Blocks`: touching it is enough."""

    def drop(self, blocks: Sequence[int]) -> None:
        """See `Blocks`."""
        size = self.slots_per_block * self.slot_bytes
        for first, last in runs(np.asarray(sorted(blocks), dtype=np.int64)):
            with contextlib.suppress(OSError):
                self._mapping.madvise(mmap.MADV_DONTNEED, first * size, (last - first) * size)

    def select(self, slots: Slots) -> torch.Tensor:
        """See `Blocks`."""
        if neighbours(slots):
            return self._rows[int(slots[0]) : int(slots[0]) + len(slots)]
        return self._rows.index_select(0, torch.from_numpy(slots))

    def write(self, slots: Slots, content: torch.Tensor) -> None:
        """See `Blocks`."""
        self._rows.index_copy_(0, torch.from_numpy(slots), content)

    def buffer(self, first: int, count: int) -> memoryview:
        """See `Blocks`."""
        return self._octets[first * self.slot_bytes : (first + count) * self.slot_bytes]


class TensorBlocks:
    """Blocks that are tensors: pinned host memory, or the memory of a device.

    Args:
        slot_bytes: size of a slot.
        max_bytes: bound on all of them together.
        allocate: makes a uint8 tensor of so many bytes there.
    """

    def __init__(self, slot_bytes: int, max_bytes: int, allocate: Callable[[int], torch.Tensor]) -> None:
        # Powers of two: pinned memory comes in nothing else.
        piece = min(max_bytes, 1 << (max(max_bytes // _PIECES, _SMALLEST_PIECE).bit_length() - 1))
        self.slot_bytes = slot_bytes
        self.slots_per_block = max(1, piece // slot_bytes)
        self.max_blocks = max_bytes // (self.slots_per_block * slot_bytes)
        self.slots_in_a_row = self.slots_per_block
        self._allocate = allocate
        self._tensors: dict[int, torch.Tensor] = {}

    def take(self, block: int) -> None:
        """See `Blocks`."""
        with torch.inference_mode(False):  # Requests outside of it, and other threads, write to it too.
            octets = self._allocate(self.slots_per_block * self.slot_bytes)
        self._tensors[block] = octets.view(self.slots_per_block, self.slot_bytes)

    def drop(self, blocks: Sequence[int]) -> None:
        """See `Blocks`."""
        for block in blocks:
            del self._tensors[block]

    def tensor(self, block: int) -> torch.Tensor:
        """The memory of a block, uint8 `(slots_per_block, slot_bytes)`."""
        return self._tensors[block]

    def _parts(self, slots: Slots) -> list[tuple[torch.Tensor, Slots, Slots]]:
        """Per block: its tensor, the positions in `slots` that lie there, and where."""
        block = slots // self.slots_per_block
        found = []
        for number in np.unique(block):
            positions = np.flatnonzero(block == number)
            inside = slots[positions] - int(number) * self.slots_per_block
            found.append((self._tensors[int(number)], positions, inside))
        return found

    def select(self, slots: Slots) -> torch.Tensor:
        """See `Blocks`."""
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
        """See `Blocks`."""
        for tensor, positions, inside in self._parts(slots):
            part = content if len(positions) == len(slots) else content.index_select(0, _index(positions, content))
            tensor.index_copy_(0, _index(inside, tensor), part)

    def buffer(self, first: int, count: int) -> memoryview:
        """See `Blocks`."""
        block, inside = divmod(first, self.slots_per_block)
        if inside + count > self.slots_per_block:
            raise ValueError(f"slots {first} to {first + count} lie in several blocks of {self.slots_per_block}")
        return as_memoryview(self._tensors[block][inside : inside + count])


def _index(positions: Slots, like: torch.Tensor) -> torch.Tensor:
    return send(torch.from_numpy(positions), like.device)


def neighbours(slots: Slots) -> bool:
    """Whether each slot is the one after the slot before it."""
    count = len(slots)
    if count < 2:
        return count == 1
    return int(slots[-1]) - int(slots[0]) == count - 1 and bool((np.diff(slots) == 1).all())


def distinct(numbers: npt.NDArray[Integer]) -> npt.NDArray[Integer]:
    """Each of `numbers` once, ascending; for hundreds of them several times as fast as `np.unique`."""
    if len(numbers) < 2:
        return numbers
    ordered = np.sort(numbers)
    first = np.empty(len(ordered), dtype=bool)
    first[0] = True
    np.not_equal(ordered[1:], ordered[:-1], out=first[1:])
    found: npt.NDArray[Integer] = ordered[first]
    return found


def among(numbers: Slots, some: Slots) -> npt.NDArray[np.bool_]:
    """Which of `numbers` are in `some`, bool `(n,)`; both small, none negative: a table is faster than `np.isin`."""
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
