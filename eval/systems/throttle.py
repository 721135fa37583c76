"""Reads as slow as those of a slower disk: one token bucket for all threads of a system."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from hf_contiguouskv.store.backend import Blob, BlobInfo, BlobWriter, Extent, Leftovers, SegmentBackend


class TokenBucket:
    """Bytes per second, shared by all threads. Reads follow each other as on a disk; none can be saved up.

    Args:
        bytes_per_s: bytes per second.
        clock: seconds, which only grow.
        sleep: waits for seconds.

    Raises:
        ValueError: `bytes_per_s` is not positive.
    """

    def __init__(
        self,
        bytes_per_s: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if not bytes_per_s > 0:
            raise ValueError(f"a read speed must be positive, got {bytes_per_s} bytes per second")
        self.bytes_per_s = bytes_per_s
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        # When the disk will have served everything that it was asked for.
        self._free_at = clock()

    def reserve(self, nbytes: int) -> float:
        """Ask for `nbytes` now; when they will have been read, on `clock`."""
        with self._lock:
            self._free_at = max(self._free_at, self._clock()) + nbytes / self.bytes_per_s
            return self._free_at

    def wait_until(self, when: float) -> None:
        """Wait until a time that `reserve` has named."""
        left = when - self._clock()
        if left > 0:
            self._sleep(left)

    @contextmanager
    def reading(self, nbytes: int) -> Iterator[None]:
        """A context in which `nbytes` are read; it ends when a disk of this speed would have delivered them."""
        when = self.reserve(nbytes)
        yield
        self.wait_until(when)


def bucket_of(read_gbps: float | None) -> TokenBucket | None:
    """A bucket of so many GB (10**9 bytes) per second; `None` for none.

    Raises:
        ValueError: it is not positive.
    """
    return None if read_gbps is None else TokenBucket(read_gbps * 1e9)


class ThrottledBlob:
    """A blob whose reads pass through a bucket. Implements `Blob`."""

    def __init__(self, blob: Blob, bucket: TokenBucket) -> None:
        self._blob = blob
        self._bucket = bucket
        self.name = blob.name
        self.nbytes = blob.nbytes
        self.stored_bytes = blob.stored_bytes
        self.created = blob.created
        self.extents_per_read = blob.extents_per_read

    @property
    def identity(self) -> Hashable:
        """See `Blob`."""
        return self._blob.identity

    def read_into(self, extents: Sequence[Extent]) -> int:
        with self._bucket.reading(sum(into.nbytes for _, into in extents)):
            return self._blob.read_into(extents)

    def is_backed(self, offset: int, nbytes: int) -> bool:
        return self._blob.is_backed(offset, nbytes)

    def close(self) -> None:
        self._blob.close()


class ThrottledBackend:
    """A backend whose reads pass through a bucket; all else is as it is. Implements `SegmentBackend`.

    Args:
        backend: where blobs lie.
        bucket: of all its blobs.
    """

    def __init__(self, backend: SegmentBackend, bucket: TokenBucket) -> None:
        self._backend = backend
        self._bucket = bucket
        self.name = backend.name
        self.lists_cheaply = backend.lists_cheaply

    @property
    def direct(self) -> bool:
        """See `SegmentBackend`."""
        return self._backend.direct

    def open(self, key: str) -> ThrottledBlob:
        return ThrottledBlob(self._backend.open(key), self._bucket)

    def create(self, key: str, nbytes: int) -> BlobWriter:
        return self._backend.create(key, nbytes)

    def identity(self, key: str) -> Hashable:
        return self._backend.identity(key)

    def delete(self, key: str) -> bool:
        return self._backend.delete(key)

    def list_keys(self) -> set[str]:
        return self._backend.list_keys()

    def list_blobs(self) -> Iterable[BlobInfo]:
        return self._backend.list_blobs()

    def quarantine(self, key: str, identity: Hashable) -> bool:
        return self._backend.quarantine(key, identity)

    def quarantined(self) -> Iterable[BlobInfo]:
        return self._backend.quarantined()

    def drop_quarantined(self, key: str) -> int:
        return self._backend.drop_quarantined(key)

    def collect(self, dry_run: bool = False) -> Leftovers:
        return self._backend.collect(dry_run)

    def overhead_bytes(self) -> int:
        return self._backend.overhead_bytes()

    def close(self) -> None:
        self._backend.close()
