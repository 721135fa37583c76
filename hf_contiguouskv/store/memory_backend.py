"""A backend in this process's memory: for segments that could not be written, and to test what is above a backend."""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable, Iterable, Sequence
from itertools import count

from ..errors import SegmentMissingError
from ..hardware.aligned_memory import aligned_buffer, as_memoryview
from .backend import BlobInfo, Extent, Leftovers, checked_key

_numbers = count(1)


class MemoryBlob:
    """A `backend.Blob` in memory."""

    extents_per_read = 16
    in_memory = True

    def __init__(self, key: str, content: memoryview, identity: int, created: float) -> None:
        self.key = key
        self.name = f"memory:{key}"
        self.nbytes = self.stored_bytes = content.nbytes
        self.identity: Hashable = identity
        self.created = created
        self._content = content
        self._closed = False

    def read_into(self, extents: Sequence[Extent]) -> int:
        if self._closed:
            raise OSError(f"{self.name} is closed")
        total = 0
        for offset, into in extents:
            part = self._content[offset : offset + into.nbytes]
            if part.nbytes < into.nbytes:
                raise EOFError(f"{self.name} has {self.nbytes} bytes, wanted {offset} to {offset + into.nbytes}")
            into[:] = part
            total += part.nbytes
        return total

    def is_backed(self, offset: int, nbytes: int) -> bool:
        return 0 <= offset <= offset + nbytes <= self.nbytes

    def close(self) -> None:
        self._closed = True


class MemoryBlobWriter:
    """A `backend.BlobWriter` that writes to memory."""

    def __init__(self, backend: MemoryBackend, key: str, nbytes: int) -> None:
        self.key = key
        self.name = f"memory:{key} (being written)"
        self.nbytes = self.stored_bytes = nbytes
        self._backend = backend
        self._buffer: memoryview | None = as_memoryview(aligned_buffer(nbytes))

    def _open(self) -> memoryview:
        if self._buffer is None:
            raise OSError(f"{self.name} is closed")
        return self._buffer

    def write(self, offset: int, octets: memoryview) -> None:
        self._open()[offset : offset + octets.nbytes] = octets.cast("B")

    def read(self, offset: int, nbytes: int) -> bytes:
        return bytes(self._open()[offset : offset + nbytes])

    def seal(self) -> None:
        self._open()

    def publish(self) -> None:
        content = self._open().toreadonly()
        self._buffer = None
        self._backend.put(self.key, content)

    def discard(self) -> None:
        self._buffer = None


class MemoryBackend:
    """Blobs in memory; they go with this object and with the last reader that has one open."""

    name = "memory"
    direct = True
    lists_cheaply = True

    def __init__(self) -> None:
        self._blobs: dict[str, tuple[memoryview, int, float]] = {}
        self._aside: dict[str, tuple[memoryview, int, float]] = {}
        self._lock = threading.Lock()

    def put(self, key: str, content: memoryview) -> None:
        """Publish `content` under `key`."""
        with self._lock:
            self._blobs[key] = (content, next(_numbers), time.time())

    def create(self, key: str, nbytes: int) -> MemoryBlobWriter:
        return MemoryBlobWriter(self, checked_key(key), nbytes)

    def open(self, key: str) -> MemoryBlob:
        found = self._blobs.get(checked_key(key))
        if found is None:
            raise SegmentMissingError(f"memory:{key}: there is no such segment")
        return MemoryBlob(key, *found)

    def identity(self, key: str) -> Hashable:
        found = self._blobs.get(checked_key(key))
        return None if found is None else found[1]

    def delete(self, key: str) -> bool:
        with self._lock:
            return self._blobs.pop(checked_key(key), None) is not None

    def list_keys(self) -> set[str]:
        return set(self._blobs)

    def list_blobs(self) -> Iterable[BlobInfo]:
        return _infos(self._blobs)

    def quarantine(self, key: str, identity: Hashable) -> bool:
        with self._lock:
            found = self._blobs.get(checked_key(key))
            if found is None or found[1] != identity:
                return False
            self._aside[key] = self._blobs.pop(key)
            return True

    def quarantined(self) -> Iterable[BlobInfo]:
        return _infos(self._aside)

    def drop_quarantined(self, key: str) -> int:
        with self._lock:
            found = self._aside.pop(checked_key(key), None)
        return 0 if found is None else found[0].nbytes

    def collect(self, dry_run: bool = False) -> Leftovers:
        """Nothing: an unfinished blob goes with its writer."""
        return Leftovers()

    def overhead_bytes(self) -> int:
        return sum(info.stored_bytes for info in self.quarantined())

    def close(self) -> None:
        """The blobs stay, another store may open them."""


def _infos(blobs: dict[str, tuple[memoryview, int, float]]) -> list[BlobInfo]:
    return [
        BlobInfo(key, content.nbytes, content.nbytes, created) for key, (content, _, created) in list(blobs.items())
    ]
