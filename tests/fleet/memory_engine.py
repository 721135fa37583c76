"""An engine without folders, in memory: everything may be dropped from it at any moment."""

from __future__ import annotations

import errno
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from hf_contiguouskv.store.fleet.engine import EngineUnavailableError, Fetched, ObjectInfo, Range


class Objects(dict[str, tuple[bytes, str, float]]):
    """What several engines share: content, version and time of each object; and how often they were asked."""

    questions = 0


class MemoryEngine:
    """A volatile `KeyValueEngine`.

    Args:
        objects: that it shares with others.
    """

    is_volatile = True
    requests: Mapping[str, int] = MappingProxyType({})

    def __init__(self, objects: Objects) -> None:
        self.name = "memory://tests"
        self._objects = objects
        self._closed = False

    @property
    def objects(self) -> Objects:
        """What is there."""
        if self._closed:
            raise EngineUnavailableError("the store was closed")
        self._objects.questions += 1
        return self._objects

    def create(self, name: str, octets: bytes) -> bool:
        mine = (octets, secrets.token_hex(4), time.time())
        return self.objects.setdefault(name, mine) is mine

    def put(self, name: str, octets: bytes) -> None:
        self.put_each({name: octets}, replace=True)

    def put_many(self, names: Sequence[str]) -> None:
        self.put_each(dict.fromkeys(names, b""), replace=True)

    def put_each(self, objects: Mapping[str, bytes], *, replace: bool) -> None:
        there = self.objects
        for name, octets in objects.items():
            if replace or name not in there:
                there[name] = (octets, secrets.token_hex(4), time.time())

    def upload(self, name: str, path: Path) -> None:
        self.put(name, path.read_bytes())

    def get(self, name: str, max_bytes: int) -> bytes:
        (octets,) = self.get_each([name], 2**40)
        if octets is None:
            raise FileNotFoundError(errno.ENOENT, "it is not there", name)
        if len(octets) > max_bytes:
            raise OSError(errno.EFBIG, "it is too long", name)
        return octets

    def get_each(self, names: Sequence[str], max_bytes: int) -> list[bytes | None]:
        there = self.objects
        found = [there[name][0] if name in there else None for name in names]
        return [None if octets is None or len(octets) > max_bytes else octets for octets in found]

    def which_exist(self, names: Sequence[str]) -> list[bool]:
        there = self.objects
        return [name in there for name in names]

    def read_ranges(self, name: str, ranges: Sequence[Range], version: str | None = None) -> Fetched:
        there = self.objects.get(name)
        if there is None or version not in (None, there[1]):
            raise FileNotFoundError(errno.ENOENT, "it is not there", name)
        for offset, into in ranges:
            if offset + into.nbytes > len(there[0]):
                raise EOFError(name)
            into[:] = there[0][offset : offset + into.nbytes]
        return Fetched(sum(into.nbytes for _, into in ranges), there[1], len(there[0]))

    def walk(self, folder: str) -> Iterator[ObjectInfo]:
        for name, (octets, _, modified) in list(self.objects.items()):
            if name.startswith(f"{folder}/"):
                yield ObjectInfo(name, len(octets), modified)

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            self.objects.pop(name, None)

    def close(self) -> None:
        self._closed = True
