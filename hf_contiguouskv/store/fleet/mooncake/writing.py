"""Writing objects into a Mooncake Store.

A 0 from it says nothing: it is also the answer where the key exists, where another writer has begun, and for 30 s after
one died. So a writer asks afterwards what is there.
"""

from __future__ import annotations

import contextlib
import errno
import io
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ..engine import EngineUnavailableError
from .arena import Slot
from .asking import AT_ONCE, Asking
from .heads import PIECE, ObjectHead
from .native import NO_ROOM, TRANSFER_FAILED, checked, text_of

# A write that failed may still be read from its slot for so long.
_REST_S = 30.0
# A write may take so much longer than a read: this much for each megabyte.
_S_PER_MIB = 1.0
# What finds no room is written again so often, after so long: the refusal itself makes the master evict.
_RETRIES, _RETRY_S = 3, 0.5


class ObjectWriter:
    """Writes for one engine.

    Args:
        asking: asks the master.
        root: what all keys of the store begin with.
    """

    def __init__(self, asking: Asking, root: str) -> None:
        self._asking = asking
        self._client = asking.client
        self._root = root

    def write(self, objects: Mapping[str, bytes], group: str | None = None) -> None:
        """Write small objects under keys; those that exist stay, and no error says so.

        Args:
            objects: their bytes by key; none is empty.
            group: of objects that are kept and evicted together.

        Raises:
            EngineUnavailableError: the master, or an owner of memory, does not answer.
            OSError: there is no room (`ENOSPC`), or it was refused.
        """
        for some in _filling(objects, self._client.writes.nbytes):
            self._write(list(some), lambda slot, some=some: _laid(slot, some.values()), group)  # type: ignore[misc]

    def write_pieces(self, head: ObjectHead, content: Path | bytes) -> None:
        """Write the pieces of an object, and make sure that they are there.

        Args:
            head: of the object; it is not written.
            content: of the object, or of the file that holds it.

        Raises:
            EngineUnavailableError, OSError: as `write`; and `EIO` where a piece vanished or the file is shorter.
        """
        keys = head.piece_keys(self._root)
        with _opened(content) as read:
            for number, key in enumerate(keys):
                wanted = min(PIECE, head.nbytes - number * PIECE)

                def fill(slot: Slot, wanted: int = wanted) -> list[tuple[int, int]]:
                    if read(slot.octets[:wanted]) != wanted:
                        raise OSError(errno.EIO, "the file is shorter than it was")
                    return [(slot.address, wanted)]

                self._write([key], fill, head.nonce)
        if not all(self._asking.exist(keys)):
            raise OSError(errno.EIO, "what was written is not there: its machine may have gone, or its room was needed")

    def _write(self, keys: Sequence[str], fill: Callable[[Slot], list[tuple[int, int]]], group: str | None) -> None:
        slot = self._client.writes.take(self._asking.timeout_s)
        # (Until the call, nothing reads from it.)
        try:
            places = dict(zip(keys, fill(slot), strict=True))
        except BaseException:
            self._client.writes.give_back(slot)
            raise
        seconds = self._asking.timeout_s + _S_PER_MIB * sum(nbytes for _, nbytes in places.values()) / 2**20
        left = list(keys)
        for retry in range(_RETRIES + 1):
            if retry:
                time.sleep(_RETRY_S)
            codes = self._asking.ask(
                lambda store, left=left: _put(  # type: ignore[misc]
                    store, {key: places[key] for key in left}, self._client.config(group, len(left))
                ),
                breaker=self._asking.writing,
                seconds=seconds,
                release=lambda: self._client.writes.give_back(slot, _REST_S),
            )
            refused = [code for code in codes if code not in (0, NO_ROOM)]
            if refused:
                break
            left = [key for key, code in zip(left, codes, strict=True) if code == NO_ROOM]
            if not left:
                break
        self._client.writes.give_back(slot)
        if refused:
            raise OSError(errno.EIO, text_of(refused[0]))
        if left:
            raise OSError(errno.ENOSPC, text_of(NO_ROOM))


def _put(store: Any, places: Mapping[str, tuple[int, int]], config: object) -> list[int]:
    addresses, lengths = [at for at, _ in places.values()], [nbytes for _, nbytes in places.values()]
    codes: list[int] = checked(store.batch_put_from(list(places), addresses, lengths, config))
    if TRANSFER_FAILED in codes:
        raise EngineUnavailableError(text_of(TRANSFER_FAILED))
    return codes


def _laid(slot: Slot, contents: Iterable[bytes]) -> list[tuple[int, int]]:
    """Addresses and lengths of contents, laid into a slot one after the other."""
    found, at = [], 0
    for content in contents:
        slot.octets[at : at + len(content)] = content
        found.append((slot.address + at, len(content)))
        at += len(content)
    return found


def _filling(objects: Mapping[str, bytes], nbytes: int) -> Iterator[dict[str, bytes]]:
    """Objects, as many as one call writes and a slot holds."""
    some: dict[str, bytes] = {}
    total = 0
    for key, content in objects.items():
        if some and (len(some) == AT_ONCE or total + len(content) > nbytes):
            yield some
            some, total = {}, 0
        some[key] = content
        total += len(content)
    if some:
        yield some


@contextlib.contextmanager
def _opened(content: Path | bytes) -> Iterator[Callable[[memoryview], int]]:
    """What fills memory with the next bytes of a content, as far as there are any."""
    with open(content, "rb") if isinstance(content, Path) else io.BytesIO(content) as file:
        yield lambda into: _read_all(file, into)


def _read_all(file: BinaryIO, into: memoryview) -> int:
    done = 0
    while done < into.nbytes and (more := file.readinto(into[done:])):  # type: ignore[attr-defined]
        done += more
    return done
