"""What the library itself asks of an open store."""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from ..errors import InputError, StoreClosedError, StoreError
from ..memory import MemoryTiers
from ..stats import StoreCounters
from .background import Background
from .earlier_segments import EarlierSegments
from .entries import StoredPrefix
from .finding import Finder, Found
from .fleet.deadline import Deadline
from .fleet.fleet import Fleet
from .format import KVGeometry
from .hashing import TokenIds, as_token_ids, chain_hashes, shared_beginning
from .parts import StoreParts
from .publishing import Publisher
from .reader import ExtentReader
from .room import Room
from .search import next_stored
from .segment import Segment
from .speeds import note_speeds, noted_speeds
from .writer import SegmentWriter

Result = TypeVar("Result")

logger = logging.getLogger("hf_contiguouskv")

# A look-up waits at most so long for a prompt that is being written and that it could use.
_WAIT_FOR_WRITE_S = 30.0


class StoreInner:
    """The inside of one `PrefixStore`, for this library alone; it may change in any release.

    Args:
        path: of the store, for messages.
        parts: what it is made of.
        max_disk_bytes: bound on what the tenant's segments take up; `None`: no bound.
        ttl_s: seconds after which an unused segment expires; `None`: never.
        memory: what this process keeps of it in memory.
        reader_threads: reads in flight at once.

    Attributes:
        memory: as passed.
        parts: what the store is made of; `index`, `tenant`, `key`, `opener` are among them.
        finder: finds and proves the longest stored beginning of a prompt.
        room: evicts and expires segments.
        publisher: begins segments and puts them into service.
        earlier: segments of earlier formats, until they are brought to the present one.
        fleet: the shared store behind this one, if there is one.
        is_closed: whether the store was closed.
    """

    def __init__(
        self,
        path: Path,
        parts: StoreParts,
        memory: MemoryTiers,
        *,
        max_disk_bytes: int | None,
        ttl_s: float | None,
        reader_threads: int,
    ) -> None:
        self._path = path
        self.parts = parts
        self.memory = memory
        self._background = Background()
        self._reader: ExtentReader | None = None
        self._reader_threads = reader_threads
        self._lock = threading.RLock()
        self.index, self.tenant, self.key, self.opener = parts.index, parts.tenant, parts.key, parts.opener
        self.finder = Finder(parts, ttl_s)
        self.room = Room(parts, max_disk_bytes=max_disk_bytes, ttl_s=ttl_s)
        self.publisher = Publisher(parts, self.finder, self.room)
        self.earlier = EarlierSegments(parts, self.finder, self.publisher, self.room)
        # (Set once the store is whole, by what opens a store of a fleet.)
        self.fleet: Fleet | None = None
        self.is_closed = False

    @property
    def counters(self) -> StoreCounters:
        """What this object did since it was opened."""
        return self.parts.counters

    def require_open(self) -> None:
        """Refuse to go on when the store was closed.

        Raises:
            StoreClosedError: it was.
        """
        if self.is_closed:
            raise StoreClosedError(f"{self._path}: the store is closed")

    def read(self, query: Callable[[sqlite3.Connection], Result]) -> Result:
        """Run `query`, which only reads, on one state of the index.

        Raises:
            StoreClosedError: the store was closed.
            StoreError: the index cannot be read.
        """
        self.require_open()
        return self.index.read(query)

    def write(self, change: Callable[[sqlite3.Connection], Result]) -> Result:
        """Run `change` as one transaction of the index that excludes all other writers.

        Raises:
            StoreClosedError: the store was closed.
            StoreError: the index cannot be written.
        """
        self.require_open()
        return self.index.write(change)

    # -- finding -----------------------------------------------------------------------------------------------------

    def lookup(
        self,
        fingerprint: str,
        ids: TokenIds,
        chunk_size: int,
        *,
        geometry: KVGeometry | None = None,
        count: bool = True,
        wait: bool = False,
    ) -> StoredPrefix | None:
        """The longest stored prefix of `ids`.

        Args:
            fingerprint: of the model.
            ids: int64 `[n]`.
            chunk_size: of the cache that asks; prefixes stored with another one do not match.
            geometry: of the model's KV; a segment that says that it is this model's but has another is refused.
            count: whether this is a request's own look-up: it counts in `stats`, and as a use of what it finds.
            wait: wait for a prompt that is being written in the background and shares more than what is found.

        Returns:
            where it lies, or `None` when not even one token is stored. An index that cannot be read finds nothing.
        """
        if chunk_size < 1:
            raise InputError(f"chunk_size must be at least 1, got {chunk_size}")
        ids = as_token_ids(ids)
        self.require_open()
        deadline = Deadline() if self.fleet is None else self.fleet.deadline()
        try:
            with deadline.applied():
                found = self._found(fingerprint, ids, chunk_size, geometry, deadline if wait else None)
            reason = None if found.stored else self.finder.why_missing(found, fingerprint, ids, chunk_size)
        except StoreError as error:
            self.require_open()
            logger.warning("nothing is found in %s: %s", self._path, error)
            found, reason = Found(None), "corrupt"
        if count:
            self._count(found.stored, len(ids), reason)
        return found.stored

    def _found(
        self, fingerprint: str, ids: TokenIds, chunk_size: int, geometry: KVGeometry | None, waits: Deadline | None
    ) -> Found:
        """What is on this machine and in the shared store.

        Args:
            fingerprint, ids, chunk_size, geometry: as in `lookup`.
            waits: the deadline of this look-up, if it waits for prompts that are being written; `None`: it does not.
        """
        brought = self.earlier.brought
        found = self.finder.find(fingerprint, ids, chunk_size, geometry)
        self.earlier.bring(fingerprint, ids, chunk_size, found.stored.tokens if found.stored else 0)
        if self.earlier.brought > brought:
            found = self.finder.find(fingerprint, ids, chunk_size, geometry)
        if waits is not None:
            with waits.paused():
                waited = self.wait_for_prompts(ids, found.stored.tokens if found.stored else 0)
            if waited:
                found = self.finder.find(fingerprint, ids, chunk_size, geometry)
        if self.fleet is not None and self.fleet.seek(
            self.finder.hashes(fingerprint, ids, chunk_size), chunk_size, found.stored.tokens if found.stored else 0
        ):
            found = self.finder.find(fingerprint, ids, chunk_size, geometry)
        return found

    def next_stored(self, fingerprint: str, ids: TokenIds, chunk_size: int, first_chunk: int) -> int | None:
        """The first chunk of `ids` from `first_chunk` on that is stored although the one before it is not.

        Where a segment in the middle of a prefix was lost, only what lies before that chunk needs to be computed.
        """
        root = self.finder.root(fingerprint, chunk_size)
        hashes = chain_hashes(root, as_token_ids(ids), chunk_size, first=True)
        try:
            found: int | None = self.read(lambda db: next_stored(db, root, hashes, first_chunk))
        except StoreError:
            self.require_open()
            return None
        return found

    def discard(self, segment: Segment, reason: str) -> None:
        """Take a segment whose bytes proved wrong out of service; what it is made of is kept aside until `gc`.

        Segments that continue it stay, and are found again once its chunks have been stored again. Never fails.
        """
        self.finder.discard(segment, reason)

    def begin_segment(
        self,
        fingerprint: str,
        geometry: KVGeometry,
        ids: TokenIds,
        first_chunk: int = 0,
        before: StoredPrefix | None = None,
    ) -> SegmentWriter:
        """Start storing chunks `first_chunk` to the end of a prefix.

        Args:
            fingerprint: of the model.
            geometry: of its KV cache.
            ids: int64 `[n]`, all tokens of the prefix.
            first_chunk: chunks before this one are stored already.
            before: where they are, if that is known.

        Raises:
            InputError: no chunk is left to store.
            StoreError: the chunks before `first_chunk` are not stored.
            StoreFullError: it cannot fit in `max_disk_bytes`, or the disk is full.
        """
        self.require_open()
        return self.publisher.begin(fingerprint, geometry, as_token_ids(ids), first_chunk, before)

    def begin_memory_segment(
        self,
        fingerprint: str,
        geometry: KVGeometry,
        ids: TokenIds,
        first_chunk: int = 0,
        before: StoredPrefix | None = None,
    ) -> SegmentWriter:
        """As `begin_segment`, for what could not be stored: it is in memory, and only the caller finds it."""
        return self.publisher.begin_in_memory(fingerprint, geometry, as_token_ids(ids), first_chunk, before)

    def write_failed(self, error: Exception) -> None:
        """Count and report that a prefix could not be stored."""
        self.parts.counters.add("write_failures")
        logger.warning("a prefix could not be stored (its request is answered all the same): %s", error)

    def submit_background(self, function: Callable[[], object], prompts: Sequence[TokenIds] = ()) -> None:
        """Run `function`, which stores `prompts` (if any), on the background thread, after everything submitted before.

        An exception is logged as a warning and counted in `background_failures`. The interpreter waits for what was
        submitted before it exits.
        """
        self._background.submit(function, prompts)

    def flush(self) -> bool:
        """Wait until everything that was given to `submit_background` has run; whether anything still had to."""
        waited = self._background.flush()
        return (self.fleet is not None and self.fleet.flush()) or waited

    @property
    def background_failures(self) -> int:
        """How many background functions raised."""
        return self._background.failures

    @property
    def reader(self) -> ExtentReader:
        """The reader threads of this store; started at the first use."""
        with self._lock:
            self.require_open()
            if self._reader is not None:
                return self._reader
        noted = noted_speeds(self.parts.index, "disk")  # (Others may make the index wait.)
        with self._lock:
            self.require_open()
            if self._reader is None:
                self._reader = ExtentReader(self._reader_threads)
                if noted is not None:
                    self._reader.totals.known = noted[0]
            return self._reader

    @property
    def disk_bytes_per_s(self) -> float | None:
        """How fast the disk is, by what was read so far, in this process or an earlier one; `None`: not known."""
        return self.reader.totals.bytes_per_second

    @property
    def bytes_read(self) -> int:
        """Bytes that its reader threads have read, page rounding included."""
        return self._reader.bytes_read if self._reader else 0

    def close(self) -> None:
        """Finish background work, stop the threads and close the files. May be called more than once."""
        if self.is_closed:
            return
        self._background.close()
        if self.fleet is not None:
            self.fleet.finish()
        self.parts.uses.flush()
        with self._lock:
            self.is_closed = True
            reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()  # Before the files: a read must not meet a descriptor that means another file by now.
            speed = reader.totals.measured
            if speed is not None:
                note_speeds(self.parts.index, "disk", speed)
        if self.fleet is not None:
            self.fleet.close()
        self.parts.opened.close()
        self.parts.backend.close()
        self.parts.index.close()
        self.memory.close()
        self.parts.folder.close()

    def _count(self, stored: StoredPrefix | None, asked: int, reason: str | None) -> None:
        self.parts.counters.add("tokens_asked", asked)
        if stored is None:
            self.parts.counters.add(f"misses.{reason}")
        else:
            self.parts.counters.add("hits")
            self.parts.counters.add("tokens_found", stored.tokens)
            uses = self.parts.uses
            if self.fleet is not None:
                self.fleet.note_use([span.segment.key for span in stored.spans])
            if uses.mark(span.segment.key for span in stored.spans):
                self._background.submit(uses.flush)  # A look-up waits for no writer.

    def wait_for_prompts(self, ids: TokenIds, found: int) -> bool:
        """Wait for prompts that are being written and share more than `found` tokens with `ids`; whether there were."""

        def helps(prompts: Sequence[TokenIds]) -> bool:
            return any(shared_beginning(prompt, ids) > found for prompt in prompts)

        return self._background.wait_for(helps, _WAIT_FOR_WRITE_S)
