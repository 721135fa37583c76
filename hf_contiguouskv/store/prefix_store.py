"""`PrefixStore`: prefixes on disk, found by their token ids."""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Real
from typing import Any

from ..errors import ConfigError, InputError, StoreError
from ..memory import EvictionPolicy, MemoryTiers
from ..model.fingerprint import model_fingerprint
from ..stats import StoreCounters
from ..wording import quoted
from .backend import SegmentBackend
from .background import Background
from .entries import SegmentSpan, StoredPrefix
from .finding import Found
from .folder import Pins, open_folder
from .format import KVGeometry
from .hashing import TokenIds, as_token_ids, chain_hashes, shared_beginning
from .index import StoreIndex
from .inner import StoreInner
from .key import KeySource, StoreKey
from .local_disk import LocalDisk
from .maintenance import index_segments
from .open_stores import OpenStores
from .opened import OpenSegments
from .parts import StoreParts
from .reader import ExtentReader
from .search import next_stored
from .segment import Segment
from .tenant import Tenant
from .totals import stored_models
from .upkeep import Upkeep
from .uses import PendingUses
from .writer import SegmentWriter

__all__ = ["PrefixStore", "SegmentSpan", "StoredPrefix"]

logger = logging.getLogger("hf_contiguouskv")

# A look-up waits at most so long for a prompt that is being written and that it could use.
_WAIT_FOR_WRITE_S = 30.0


class PrefixStore(Upkeep):
    """A folder of stored prefixes, plus this process's memory for them.

    Cheap to open; safe to share between caches, threads and processes. A context manager.

    Applications use the constructor, `shared`, `match`, `flush`, `close`, and what `Upkeep` adds (`entries`, `stats`,
    `pin`, `delete`, `verify`, `gc`, ...). The other methods, from `lookup` on, and the attributes `inner`, `memory` and
    `counters` are for the library's own rooms: they may change in any release. That is why the class has so many.

    Args:
        path: the folder. Missing: it is created, for this user only. It must be a store, or empty.
        max_disk_bytes: bound on what all segments take up, those that are there already included; what is worth least
            makes room (`eviction.worth`), in the background when the store is opened. `None`: no bound.
        ttl_s: seconds after which a segment that nobody used is not found any more, and goes at the next `gc`; pinned
            ones stay. `None`: never.
        host_bytes: hard limit on what this process keeps in host memory for all prefixes and requests, buffers of
            reads under way included; 0: disk only. Where attention runs on a CPU, this is the one tier there is, and
            up to an eighth of it is the memory that attention reads from, kept from one request to the next.
        device_bytes: the same for the memory of accelerators; several share it equally. `None`: a quarter of what is
            free on each when a model on it is first served. Where memory runs out, what is kept there gives way.
        eviction: which chunk goes first when memory is full: the name of one of `memory.POLICIES`, or a policy.
        salt: of a tenant, str or bytes. This object then finds, lists, counts, pins, deletes, exports and evicts only
            what was stored with the same salt, and `max_disk_bytes` bounds that alone. `None`: it finds what was stored
            without a salt, and looks after everything.
        create: whether a missing store may be created.
        direct: read past the operating system's page cache where the file system can.
        reader_threads: reads in flight at once.
        backend: where segments lie, if not in `path`; index and pins are in `path` all the same.
        key: a secret that those share who may put prefixes into the store: its bytes, a path or `"file:PATH"` of a file
            that holds it, or `"env:NAME"` of an environment variable. What was stored without it, or with another one,
            is not used. Without a key, anyone who can write to the store decides what is answered.
        trust_owner: accept a folder and files in it that other users of this machine own, or may write. They can read
            the prompts that are stored, and without a `key` choose what is answered.

    Raises:
        StoreFormatError: `path` is something else than a store, or of another format than this library's.
        UntrustedOwnerError: neither this user nor root owns the folder, or others may write it, and not `trust_owner`.
        StoreError: the folder cannot be read or made.
        ConfigError: a bound is negative or no number, or the salt is neither str nor bytes, or empty.

    Examples:
        ```python
        with PrefixStore("kv-store", max_disk_bytes=50 * 2**30) as store:
            print(store.match(model, input_ids), store.entries())
        ```
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        max_disk_bytes: int | None = None,
        ttl_s: float | None = None,
        host_bytes: int = 2 * 2**30,
        device_bytes: int | None = None,
        eviction: str | EvictionPolicy = "expected-use",
        salt: str | bytes | None = None,
        create: bool = True,
        direct: bool = True,
        reader_threads: int = 8,
        backend: SegmentBackend | None = None,
        key: KeySource | None = None,
        trust_owner: bool = False,
    ) -> None:
        bounds = {
            "max_disk_bytes": max_disk_bytes,
            "ttl_s": ttl_s,
            "host_bytes": host_bytes,
            "device_bytes": device_bytes,
        }
        for name, value in bounds.items():
            if value is not None:
                _require_bound(name, value)
        tenant, secret = Tenant(salt), StoreKey.of(key)
        opener = partial(Segment, key=secret)
        try:
            folder = open_folder(path, create=create, trust_owner=trust_owner)
            self.path = folder.path
            self.backend: SegmentBackend = LocalDisk(folder, direct=direct) if backend is None else backend
        except OSError as error:
            raise StoreError(f"{path}: the store cannot be opened: {error}") from error
        self.max_disk_bytes = max_disk_bytes
        self.memory = MemoryTiers(host_bytes, device_bytes, eviction)
        self.counters = StoreCounters()
        self._lock = threading.RLock()
        self._background = Background()
        self._reader: ExtentReader | None = None
        self._reader_threads = reader_threads
        pins = Pins(folder)

        def refill(db: sqlite3.Connection) -> None:
            index_segments(db, self.backend, opener, pins.keys(), tenant)

        parts = StoreParts(
            folder=folder,
            backend=self.backend,
            index=StoreIndex(folder, refill),
            opened=OpenSegments(self.backend, opener, self.memory.forget),
            opener=opener,
            pins=pins,
            tenant=tenant,
            key=secret,
            counters=self.counters,
            uses=PendingUses(lambda change: self.inner.write(change), ttl_s),
        )
        # (Last: `__del__` sees half-made stores too, and closes only those that have it.)
        self.inner = StoreInner(self.path, parts, max_disk_bytes=max_disk_bytes, ttl_s=ttl_s)
        self._put_in_order()
        # A path alone says nothing of a tenant, so it must not lead to a tenant's store.
        _open_stores.add(self, by_path=tenant.is_operator)

    @property
    def has_key(self) -> bool:
        """Whether only what was stored with its key is used."""
        return self.inner.key is not None

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self.inner.is_closed

    @property
    def is_usable(self) -> bool:
        """Whether it is open, and its folder is still at its path."""
        return not self.is_closed and self.inner.parts.folder.is_in_place()

    @classmethod
    def shared(cls, path: str | os.PathLike[str]) -> PrefixStore:
        """The store that this process has open at `path` (the first, or the first with a key), or a new one."""
        return _open_stores.at(path, lambda: cls(path))

    def match(self, model: Any, input_ids: Any) -> int:
        """How many leading tokens of `input_ids` are stored for this very model; waits for what is being written.

        Args:
            model: a transformers model; its weights and configuration count, not its name.
            input_ids: int64 `[n]` or `[1, n]`.

        Raises:
            InputError: more than one row, or not integers.
        """
        ids = as_token_ids(input_ids.cpu() if hasattr(input_ids, "cpu") else input_ids)
        fingerprint = model_fingerprint(model)
        self._wait_for_prompts(ids, 0)
        sizes = [size for model, size in self.inner.read(stored_models) if model == fingerprint]
        found = (self.inner.finder.find(fingerprint, ids, size).stored for size in sizes)
        return max((stored.tokens for stored in found if stored), default=0)

    def flush(self) -> bool:
        """Wait until everything that was given to `submit_background` has run; whether anything still had to."""
        return self._background.flush()

    def close(self) -> None:
        """Finish background work, stop the threads and close the files. May be called more than once."""
        if self.is_closed:
            return
        parts = self.inner.parts
        self._background.close()
        parts.uses.flush()
        with self._lock:
            self.inner.is_closed = True
            reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()  # Before the files: a read must not meet a descriptor that means another file by now.
        parts.opened.close()
        self.backend.close()
        parts.index.close()
        self.memory.close()
        parts.folder.close()

    def __enter__(self) -> PrefixStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "inner"):
            self.close()

    def __deepcopy__(self, memo: object) -> PrefixStore:
        # A copy of a cache reads from the same store.
        return self

    def __repr__(self) -> str:
        return f"PrefixStore({str(self.path)!r}{', closed' if self.is_closed else ''})"

    # -- for the library's own rooms ---------------------------------------------------------------------------------

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
        self.inner.require_open()
        try:
            found = self.inner.finder.find(fingerprint, ids, chunk_size, geometry)
            if wait and self._wait_for_prompts(ids, found.stored.tokens if found.stored else 0):
                found = self.inner.finder.find(fingerprint, ids, chunk_size, geometry)
            reason = None if found.stored else self.inner.finder.why_missing(found, fingerprint, ids, chunk_size)
        except StoreError as error:
            self.inner.require_open()
            logger.warning("nothing is found in %s: %s", self.path, error)
            found, reason = Found(None), "corrupt"
        if count:
            self._count(found.stored, len(ids), reason)
        return found.stored

    def next_stored(self, fingerprint: str, ids: TokenIds, chunk_size: int, first_chunk: int) -> int | None:
        """The first chunk of `ids` from `first_chunk` on that is stored although the one before it is not.

        Where a segment in the middle of a prefix was lost, only what lies before that chunk needs to be computed.
        """
        root = self.inner.finder.root(fingerprint, chunk_size)
        hashes = chain_hashes(root, as_token_ids(ids), chunk_size, first=True)
        try:
            found: int | None = self.inner.read(lambda db: next_stored(db, root, hashes, first_chunk))
        except StoreError:
            self.inner.require_open()
            return None
        return found

    def discard(self, segment: Segment, reason: str) -> None:
        """Take a segment whose bytes proved wrong out of service; what it is made of is kept aside until `gc`.

        Segments that continue it stay, and are found again once its chunks have been stored again. Never fails.
        """
        self.inner.finder.discard(segment, reason)

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
        self.inner.require_open()
        return self.inner.publisher.begin(fingerprint, geometry, as_token_ids(ids), first_chunk, before)

    def begin_memory_segment(
        self,
        fingerprint: str,
        geometry: KVGeometry,
        ids: TokenIds,
        first_chunk: int = 0,
        before: StoredPrefix | None = None,
    ) -> SegmentWriter:
        """As `begin_segment`, for what could not be stored: it is in memory, and only the caller finds it."""
        return self.inner.publisher.begin_in_memory(fingerprint, geometry, as_token_ids(ids), first_chunk, before)

    def write_failed(self, error: Exception) -> None:
        """Count and report that a prefix could not be stored."""
        self.counters.add("write_failures")
        logger.warning("a prefix could not be stored (its request is answered all the same): %s", error)

    def submit_background(self, function: Callable[[], object], prompts: Sequence[TokenIds] = ()) -> None:
        """Run `function`, which stores `prompts` (if any), on the background thread, after everything submitted before.

        An exception is logged as a warning and counted in `background_failures`. The interpreter waits for what was
        submitted before it exits.
        """
        self._background.submit(function, prompts)

    @property
    def background_failures(self) -> int:
        """How many background functions raised."""
        return self._background.failures

    @property
    def reader(self) -> ExtentReader:
        """The reader threads of this store; started at the first use."""
        with self._lock:
            self.inner.require_open()
            if self._reader is None:
                self._reader = ExtentReader(self._reader_threads)
            return self._reader

    def _count(self, stored: StoredPrefix | None, asked: int, reason: str | None) -> None:
        self.counters.add("tokens_asked", asked)
        if stored is None:
            self.counters.add(f"misses.{reason}")
        else:
            self.counters.add("hits")
            self.counters.add("tokens_found", stored.tokens)
            uses = self.inner.parts.uses
            if uses.mark(span.segment.key for span in stored.spans):
                self._background.submit(uses.flush)  # A look-up waits for no writer.

    def _wait_for_prompts(self, ids: TokenIds, found: int) -> bool:
        """Wait for prompts that are being written and share more than `found` tokens with `ids`; whether there were."""

        def helps(prompts: Sequence[TokenIds]) -> bool:
            return any(shared_beginning(prompt, ids) > found for prompt in prompts)

        return self._background.wait_for(helps, _WAIT_FOR_WRITE_S)


def _require_bound(name: str, value: object) -> None:
    # (A bool is a number to Python: `max_disk_bytes=True` would be a byte.)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ConfigError(f"{name} must be a number or None, got {quoted(value)}")
    if not float(value) >= 0:
        raise ConfigError(f"{name} must be 0 or more, got {value}")


_open_stores: OpenStores[PrefixStore] = OpenStores()
