"""What a store needs of the place that its segments lie in: one small protocol.

A backend keeps immutable *blobs* under keys of 32 hexadecimal digits. What is in a blob is none of its business (that
is `format.py`), and which blob holds which tokens neither (that is `index.py`). The local disk is one
(`local_disk.py`), this process's memory another (`memory_backend.py`); object storage and distributed caches fit as
well. Nothing above this protocol knows of files. `conformance.py` checks a backend against the promises made here.

Errors: `SegmentMissingError` for a key that is not there, `InputError` for a key that is none, `OSError` for everything
that the storage itself refuses (full, unreadable, read-only). A blob that ends too early raises `EOFError`.
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
        nbytes: its length.
        stored_bytes: what it takes up where it lies (on a disk: whole blocks).
        created: when it was published, seconds since the epoch.
    """

    key: str
    nbytes: int
    stored_bytes: int
    created: float


@dataclass(frozen=True, slots=True)
class Leftovers:
    """What crashes have left behind.

    Attributes:
        removed: names of what was deleted (or would be).
        bytes_freed: what that took up.
        in_use: names of what a living writer is still filling.
    """

    removed: tuple[str, ...] = ()
    bytes_freed: int = 0
    in_use: tuple[str, ...] = ()


class Blob(Protocol):
    """A published blob, open for reading. It stays readable when its key is deleted or replaced.

    A backend that holds few things open at once may let go of one that was not read for long. Where that cannot be
    opened again because it was deleted or replaced meanwhile, its reads raise `OSError` (`EIO`) from then on, and its
    `identity` is no blob's any more.

    Attributes:
        name: for messages; says where the blob lies.
        nbytes: its length.
        stored_bytes: what it takes up where it lies.
        identity: while it is open, no other blob under its key has the same.
        created: when it was published, seconds since the epoch.
        extents_per_read: how many extents a reader thread should hand over at once. 1 where many threads with one
            extent each are what keeps the storage busy (a disk); more where the storage takes batches.
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
            bytes that the storage was asked for, rounding included.

        Raises:
            EOFError: the blob ends before an extent does.
            OSError: the storage failed, or the blob was closed.
        """
        ...

    def is_backed(self, offset: int, nbytes: int) -> bool:
        """Whether these bytes are there and mostly take up storage: a file may say that it has any length.

        (Some file systems and copying programs make a hole of any longer run of zeros.)

        Returns:
            false where a part lies past the end, or more than a half in holes; true too where the storage cannot tell.

        Raises:
            OSError: as `read_into`.
        """
        ...

    def close(self) -> None:
        """Let go of it; reads that are under way must have ended. May be called more than once."""
        ...


class BlobWriter(Protocol):
    """A blob that is being made: nobody else sees it before `publish` returns.

    Attributes:
        name: for messages.
        nbytes: its length, fixed from the beginning.
        stored_bytes: what it takes up; final after `seal`.
    """

    name: str
    nbytes: int
    stored_bytes: int

    def write(self, offset: int, octets: memoryview) -> None:
        """Put bytes anywhere inside; in any order, also twice."""
        ...

    def read(self, offset: int, nbytes: int) -> bytes:
        """Read back what was written; fewer bytes only at the end."""
        ...

    def seal(self) -> None:
        """Make what was written durable. Nothing is written afterwards."""
        ...

    def publish(self) -> None:
        """Put it under its key, whole or not at all, and durably; it replaces what was there. Needs `seal`."""
        ...

    def discard(self) -> None:
        """Give it up and free what it took; after `publish`: only close. May be called more than once."""
        ...


@runtime_checkable
class SegmentBackend(Protocol):
    """A place for blobs, shared by threads and, if it says so, by processes.

    Attributes:
        name: for messages.
        lists_cheaply: whether `list_keys` may be called each time a store is opened.
    """

    name: str
    lists_cheaply: bool

    @property
    def direct(self) -> bool:
        """Whether reads bypass the operating system's page cache (where there is none: true)."""
        ...

    def create(self, key: str, nbytes: int) -> BlobWriter:
        """Begin a blob of `nbytes`; where the storage can tell, it is refused here if it will not fit."""
        ...

    def open(self, key: str) -> Blob:
        """Open the blob under `key`.

        Raises:
            SegmentMissingError: there is none.
        """
        ...

    def identity(self, key: str) -> Hashable:
        """The `Blob.identity` of what is under `key` now, or `None`: cheap, asked at every look-up."""
        ...

    def delete(self, key: str) -> bool:
        """Remove the blob under `key`; whether there was one. Those who have it open read on."""
        ...

    def list_keys(self) -> set[str]:
        """The keys of all published blobs; of those that come and go meanwhile, some."""
        ...

    def list_blobs(self) -> Iterable[BlobInfo]:
        """The same, with sizes."""
        ...

    def quarantine(self, key: str, identity: Hashable) -> bool:
        """Take the blob with this very identity out of service but keep it to look at; whether it was there."""
        ...

    def quarantined(self) -> Iterable[BlobInfo]:
        """What `quarantine` has put aside."""
        ...

    def drop_quarantined(self, key: str) -> int:
        """Delete what `quarantine` has put aside under `key`; the bytes that this frees."""
        ...

    def collect(self, dry_run: bool = False) -> Leftovers:
        """Remove what writers that died have left behind; nothing that a living one needs."""
        ...

    def overhead_bytes(self) -> int:
        """What is taken up besides published blobs: quarantine, leftovers, directories."""
        ...

    def close(self) -> None:
        """Close everything that is open. May be called more than once."""
        ...


def checked_key(key: object) -> str:
    """`key`, if it is a key: never a path, never anything that could become one.

    Raises:
        InputError: it is none.
    """
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        raise InputError(f"a segment key is 32 hexadecimal digits, got {quoted(key)}")
    return key
