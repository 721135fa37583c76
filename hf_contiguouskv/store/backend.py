"""The protocol between a store and the place where its segments lie.

A backend keeps immutable *blobs* under keys of 32 hexadecimal digits. It does not know what a blob holds (`format.py`
does) or which blob holds which tokens (`index.py` does). The local disk is one backend (`local_disk.py`), this
process's memory another (`memory_backend.py`). Object storage and distributed caches fit as well. Nothing above this
protocol knows files. The package `conformance` checks a backend against every promise made here.

Errors: `SegmentMissingError` for a missing key, `InputError` for a malformed key, `OSError` for everything that the
storage refuses (full, unreadable, read-only), `EOFError` for a blob that ends too early.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from ..errors import InputError
from ..wording import quoted

_KEY = re.compile(r"[0-9a-f]{32}")

# Where in a blob, and the writable memory that is filled from there.
Extent = tuple[int, memoryview]


@dataclass(frozen=True, slots=True)
class BlobInfo:
    """One published blob.

    Attributes:
        key: its name, 32 hexadecimal digits.
        nbytes: its length in bytes.
        stored_bytes: bytes that it takes up in the storage (on a disk: whole blocks).
        created: when it was published, seconds since the epoch.
    """

    key: str
    nbytes: int
    stored_bytes: int
    created: float


@dataclass(frozen=True, slots=True)
class Leftovers:
    """What writers that crashed have left behind.

    Attributes:
        removed: names of what was deleted, or would be.
        bytes_freed: bytes that it took up.
        in_use: names of what a running writer is still filling.
    """

    removed: tuple[str, ...] = ()
    bytes_freed: int = 0
    in_use: tuple[str, ...] = ()


class Blob(Protocol):
    """A published blob, open for reading. It stays readable when its key is deleted or replaced.

    A backend may close a blob that was not read for long and open it again for the next read. If the blob was deleted
    or replaced meanwhile, its reads raise `OSError` (`EIO`) from then on, and no blob has its `identity` any more.

    Attributes:
        name: where the blob lies, for messages.
        nbytes: its length in bytes.
        stored_bytes: bytes that it takes up in the storage.
        identity: differs from that of every other blob under the same key while this one is open.
        created: when it was published, seconds since the epoch.
        extents_per_read: extents that a reader thread should pass at once: 1 for a disk, which several threads keep
            busy; more for storage that takes batches.
    """

    name: str
    nbytes: int
    stored_bytes: int
    identity: Hashable
    created: float
    extents_per_read: int

    def read_into(self, extents: Sequence[Extent]) -> int:
        """Fill each buffer from its offset. Called by several threads at once.

        Returns:
            bytes requested from the storage, rounding included.

        Raises:
            EOFError: the blob ends before an extent does.
            OSError: the storage failed, or the blob was closed.
        """
        ...

    def is_backed(self, offset: int, nbytes: int) -> bool:
        """Whether this range exists and takes up storage: a sparse file may claim any length.

        Up to half of the range may be holes, because some file systems and copying programs turn zeros into holes.

        Returns:
            false if a part lies past the end, or more than half of it in holes; true if the storage cannot tell.

        Raises:
            OSError: the storage failed, or the blob was closed.
        """
        ...

    def close(self) -> None:
        """Close it, after all reads have ended. May be called more than once."""
        ...


class BlobWriter(Protocol):
    """A blob that is being written. No reader sees it before `publish`.

    Attributes:
        name: name for messages.
        nbytes: its length in bytes, fixed from the beginning.
        stored_bytes: bytes that it takes up in the storage; final after `seal`.
    """

    name: str
    nbytes: int
    stored_bytes: int

    def write(self, offset: int, octets: memoryview) -> None:
        """Write bytes at an offset. Ranges may come in any order and more than once."""
        ...

    def read(self, offset: int, nbytes: int) -> bytes:
        """Read back what was written; shorter than `nbytes` only at the end."""
        ...

    def seal(self) -> None:
        """Make the bytes durable. No write may follow."""
        ...

    def publish(self) -> None:
        """Publish it under its key, atomically and durably, after `seal`. It replaces a blob under the same key."""
        ...

    def discard(self) -> None:
        """Delete what was written; after `publish`, only close. May be called more than once."""
        ...


@runtime_checkable
class SegmentBackend(Protocol):
    """A place for blobs, shared by threads and, if the backend says so, by processes.

    Attributes:
        name: name for messages.
        lists_cheaply: whether `list_keys` may be called each time a store is opened.
    """

    name: str
    lists_cheaply: bool

    @property
    def direct(self) -> bool:
        """Whether reads bypass the operating system's page cache; true if there is no page cache."""
        ...

    def create(self, key: str, nbytes: int) -> BlobWriter:
        """Begin a blob of `nbytes`. Storage that knows its free space refuses a blob that does not fit."""
        ...

    def open(self, key: str) -> Blob:
        """Open the blob under `key`.

        Raises:
            SegmentMissingError: there is none.
        """
        ...

    def identity(self, key: str) -> Hashable:
        """`Blob.identity` of the blob under `key` now, or `None`. Called at every look-up, so it must be cheap."""
        ...

    def delete(self, key: str) -> bool:
        """Delete the blob under `key`. Open blobs stay readable. Returns whether there was one."""
        ...

    def list_keys(self) -> set[str]:
        """Keys of all published blobs. Blobs published or deleted during the call may or may not be listed."""
        ...

    def list_blobs(self) -> Iterable[BlobInfo]:
        """All published blobs, with sizes."""
        ...

    def quarantine(self, key: str, identity: Hashable) -> bool:
        """Take the blob with this identity out of service and keep it for inspection. Returns whether it existed."""
        ...

    def quarantined(self) -> Iterable[BlobInfo]:
        """All blobs in quarantine."""
        ...

    def drop_quarantined(self, key: str) -> int:
        """Delete the blobs in quarantine under `key`. Returns the bytes freed."""
        ...

    def collect(self, dry_run: bool = False) -> Leftovers:
        """Delete what dead writers have left behind, and nothing that a running writer needs."""
        ...

    def overhead_bytes(self) -> int:
        """Bytes taken up besides published blobs: quarantine, leftovers, directories."""
        ...

    def close(self) -> None:
        """Close everything that is open. May be called more than once."""
        ...


def checked_key(key: object) -> str:
    """`key`, after a check that it is 32 hexadecimal digits, so that it can never be a path.

    Raises:
        InputError: `key` is malformed.
    """
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        raise InputError(f"a segment key is 32 hexadecimal digits, got {quoted(key)}")
    return key
