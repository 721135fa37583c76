"""Memory that Mooncake Store reads from and writes into: this engine's own, never a caller's.

A call that is given up goes on in its thread, so its memory must not be used for anything else until it has returned.
What is registered can also be written by everything that reaches this machine's port, so bytes are compared with
checksums only after they were copied out of it.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import time
from dataclasses import dataclass

from ..engine import EngineUnavailableError


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """A part of the arena that belongs to one call.

    Attributes:
        address: of its first byte.
        octets: its memory.
    """

    address: int
    octets: memoryview


class Slots:
    """Slots of one size. Thread-safe.

    Args:
        slots: all of them.
        nbytes: of each.

    Attributes:
        nbytes: as passed.
    """

    def __init__(self, slots: list[Slot], nbytes: int) -> None:
        self.nbytes = nbytes
        self._free = list(slots)
        # Slots that may be used from a time on.
        self._resting: list[tuple[float, Slot]] = []
        self._changed = threading.Condition()

    def take(self, seconds: float) -> Slot:
        """A slot for the caller alone, which must be given back once no call uses it any more.

        Args:
            seconds: how long to wait for one.

        Raises:
            EngineUnavailableError: all belong to calls that have not returned.
        """
        until = time.monotonic() + seconds
        with self._changed:
            while True:
                now = time.monotonic()
                rested = [one for one in self._resting if one[0] <= now]
                self._resting = [one for one in self._resting if one[0] > now]
                self._free += [slot for _, slot in rested]
                if self._free:
                    return self._free.pop()
                if now >= until:
                    raise EngineUnavailableError("all its memory belongs to calls that have not returned")
                self._changed.wait(min([until, *(time_s for time_s, _ in self._resting)]) - now)

    def give_back(self, slot: Slot, rest_s: float = 0.0) -> None:
        """Let others use a slot.

        Args:
            slot: that no call uses any more.
            rest_s: seconds that it must lie still all the same: who reads from it may not have stopped yet.
        """
        with self._changed:
            if rest_s:
                self._resting.append((time.monotonic() + rest_s, slot))
            else:
                self._free.append(slot)
            self._changed.notify()


class Arena:
    """One piece of anonymous memory, cut into slots. The system gives it pages once they are used.

    Args:
        sizes: number and bytes of the slots of each kind.

    Attributes:
        address: of its first byte.
        nbytes: of all of it.
        kinds: slots of each kind, as in `sizes`.
    """

    def __init__(self, *sizes: tuple[int, int]) -> None:
        self.nbytes = sum(count * nbytes for count, nbytes in sizes)
        self._memory = mmap.mmap(-1, self.nbytes)
        # (A mapping that has such a view cannot be unmapped while anything refers to it.)
        self._view = ctypes.c_char.from_buffer(self._memory)
        self.address = ctypes.addressof(self._view)
        whole, at = memoryview(self._memory), 0
        self.kinds: list[Slots] = []
        for count, nbytes in sizes:
            slots = []
            for _ in range(count):
                slots.append(Slot(self.address + at, whole[at : at + nbytes]))
                at += nbytes
            self.kinds.append(Slots(slots, nbytes))
