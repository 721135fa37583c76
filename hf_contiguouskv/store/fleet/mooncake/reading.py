"""Reading ranges of objects of a Mooncake Store.

Of its ways to read, `get_into_ranges` alone returns only when nothing is written any more, checks bounds, and is right
about a key that comes twice. Its price is an owner that died: it tries each range of it for a second, or for the
time-out of a connection, one after the other. So each owner is asked for one byte first, a call that is given up keeps
its slot, and an owner that did not answer is left alone for a while.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..deadline import TIME_IS_OVER
from ..engine import DeadlineError, EngineUnavailableError
from .arena import Slot
from .asking import Asking, Place
from .calls import Call
from .native import LEASE_OVER, MISSING, TRANSFER_FAILED, checked, text_of

# Ranges of one call.
_RANGES = 512


@dataclass(frozen=True, slots=True)
class Part:
    """A range of an object of Mooncake Store, and the memory that is filled with it.

    Attributes:
        key: of the object.
        offset: of its first byte.
        into: writable; at least one byte, at most `heads.PIECE`.
    """

    key: str
    offset: int
    into: memoryview


class RangeReader:
    """Reads for one engine.

    Args:
        asking: asks the master.
    """

    def __init__(self, asking: Asking) -> None:
        self._asking = asking
        self._client = asking.client

    def read(self, parts: Sequence[Part], places: dict[str, Place]) -> list[int]:
        """Fill the memory of parts, from copies that only this process can change.

        Args:
            parts: of objects.
            places: of those that are there.

        Returns:
            of each part its length, or a negative answer of Mooncake Store; then its memory is as it was.

        Raises:
            EngineUnavailableError: an owner, or the master, does not answer, or not in time.
            DeadlineError: the deadline of the look-up has passed.
        """
        codes = [MISSING] * len(parts)
        there = [number for number, part in enumerate(parts) if part.key in places]
        owners: dict[str, Part] = {}
        for number in there:
            owners.setdefault(places[parts[number].key].owner, parts[number])
        self._try(owners)
        for batch in _batches(there, parts, self._client.reads.nbytes):
            some = [parts[number] for number in batch]
            for number, code in zip(batch, self._read(some, [places[part.key].owner for part in some]), strict=True):
                codes[number] = code
        return codes

    def read_whole(self, keys: Sequence[str], max_bytes: int) -> list[bytes | None]:
        """Objects, whole; `None` for those that are not there, cannot be read, or have more than `max_bytes`.

        Raises:
            EngineUnavailableError: as `read`.
        """
        places = self._asking.places(keys)
        fitting = {key: place for key, place in places.items() if 0 < place.nbytes <= max_bytes}
        buffers = {key: bytearray(place.nbytes) for key, place in fitting.items()}
        codes = self.read([Part(key, 0, memoryview(into)) for key, into in buffers.items()], fitting)
        read = {key: bytes(into) for (key, into), code in zip(buffers.items(), codes, strict=True) if code > 0}
        return [read.get(key) for key in keys]

    def _try(self, owners: dict[str, Part]) -> None:
        """Ask each owner for a byte, all at once.

        Raises:
            EngineUnavailableError: one does not answer, or did not lately.
        """
        entered: list[str] = []
        under_way: list[tuple[str, Slot, Call[list[int]]]] = []
        failed: EngineUnavailableError | None = None
        try:
            patience = self._asking.patience()
            for owner, part in owners.items():
                self._client.owner(owner).enter(patience.seconds)
                entered.append(owner)
                slot, call = self._start([Part(part.key, part.offset, part.into[:1])], canary=True)
                under_way.append((owner, slot, call))
            until = time.monotonic() + patience.seconds
            while under_way:
                owner, slot, call = under_way.pop()
                try:
                    why = self._came(slot, call, until - time.monotonic())
                except TimeoutError:
                    if patience.tells_nothing:
                        raise DeadlineError(f"{self._asking.name}: {TIME_IS_OVER}") from None
                    why = "no answer in time"
                entered.remove(owner)
                if why is None:
                    self._client.owner(owner).succeeded()
                else:
                    self._client.owner(owner).failed(why)
                    failed = EngineUnavailableError(f"the machine at {owner}, which holds it: {why}")
        finally:
            for owner in entered:
                self._client.owner(owner).gave_up()
            for _, _, call in under_way:
                call.give_up()
        if failed is not None:
            raise failed

    def _came(self, slot: Slot, call: Call[list[int]], seconds: float) -> str | None:
        """Why a byte did not come; `None` if its owner answered.

        Raises:
            TimeoutError: there was no answer in time.
        """
        (code,) = call.wait(max(0.0, seconds))
        self._client.canaries.give_back(slot)
        return text_of(code) if code == TRANSFER_FAILED else None

    def _read(self, parts: Sequence[Part], owners: Sequence[str]) -> list[int]:
        """One call: lengths or negative answers."""
        slot, call = self._start(parts)
        try:
            patience = self._asking.patience()
        except DeadlineError:
            call.give_up()
            raise
        try:
            codes = call.wait(patience.seconds)
        except TimeoutError:
            if patience.tells_nothing:
                raise DeadlineError(f"{self._asking.name}: {TIME_IS_OVER}") from None
            # (Which of them it was cannot be told.)
            for owner in set(owners):
                self._client.owner(owner).failed("no answer in time")
            raise EngineUnavailableError(f"no answer within {patience.seconds:g} s") from None
        try:
            at = 0
            for part, code in zip(parts, codes, strict=True):
                if code == part.into.nbytes:
                    part.into[:] = slot.octets[at : at + code]
                at += part.into.nbytes
        finally:
            self._client.reads.give_back(slot)
        for owner, code in zip(owners, codes, strict=True):
            if code == TRANSFER_FAILED:
                self._client.owner(owner).failed(text_of(code))
            if code in (TRANSFER_FAILED, LEASE_OVER):
                raise EngineUnavailableError(text_of(code))
        return [code if code < 0 or code == part.into.nbytes else -1 for part, code in zip(parts, codes, strict=True)]

    def _start(self, parts: Sequence[Part], *, canary: bool = False) -> tuple[Slot, Call[list[int]]]:
        """Begin to fill a slot with parts, one after the other. The slot is given back by who takes the result."""
        slots = self._client.canaries if canary else self._client.reads
        slot = slots.take(self._asking.patience().seconds)
        call = self._asking.start(lambda store: _get(store, slot.address, parts), lambda: slots.give_back(slot))
        return slot, call


def _get(store: Any, address: int, parts: Sequence[Part]) -> list[int]:
    keys: dict[str, list[int]] = {}
    offsets, at = [], 0
    for number, part in enumerate(parts):
        keys.setdefault(part.key, []).append(number)
        offsets.append(at)
        at += part.into.nbytes
    of_key = list(keys.values())
    (found,) = store.get_into_ranges(
        [address],
        [list(keys)],
        [[[offsets[number] for number in numbers] for numbers in of_key]],
        [[[parts[number].offset for number in numbers] for numbers in of_key]],
        [[[parts[number].into.nbytes for number in numbers] for numbers in of_key]],
    )
    codes = [0] * len(parts)
    for numbers, some in zip(of_key, found, strict=True):
        for number, code in zip(numbers, some, strict=True):
            codes[number] = code
    return checked(codes)


def _batches(numbers: Sequence[int], parts: Sequence[Part], nbytes: int) -> Iterator[list[int]]:
    """Numbers of parts that one call reads."""
    batch: list[int] = []
    total = 0
    for number in numbers:
        more = parts[number].into.nbytes
        if batch and (len(batch) == _RANGES or total + more > nbytes):
            yield batch
            batch, total = [], 0
        batch.append(number)
        total += more
    if batch:
        yield batch
