"""`PrefixStore`: prefixes on disk, found by their token ids."""

from __future__ import annotations

import atexit
import logging
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import ConfigError, InputError, PrefixInUseError, SegmentCorruptError, StoreError
from ..memory import HostTier
from ..stats import StoreStats
from . import maintenance
from .background import Background
from .entries import GcReport, PrefixInfo, SegmentSpan, StoredPrefix, StoreProblem
from .fingerprint import model_fingerprint
from .folder import open_folder, put_in_place, segment_file
from .format import KVGeometry, SegmentHeader
from .hashing import TokenIds, as_token_ids, chain_hashes, root_hash, segment_hashes
from .index import (
    SegmentRow,
    StoreIndex,
    all_segments,
    drop_segment,
    find_chunk,
    insert_segment,
    mark_used,
    segment_by_key,
)
from .opened import OpenSegments
from .reader import ExtentReader
from .search import Chain, chain_to, choose_victims, continuations, longest_match, too_large
from .segment import Segment
from .writer import SegmentWriter

__all__ = ["PrefixStore", "SegmentSpan", "StoredPrefix"]

logger = logging.getLogger("hf_contiguouskv")

_MARKS_BEFORE_FLUSH = 256

_shared: weakref.WeakValueDictionary[str, PrefixStore] = weakref.WeakValueDictionary()
_shared_lock = threading.RLock()
_open_stores: weakref.WeakSet[PrefixStore] = weakref.WeakSet()


class PrefixStore:
    """A folder of stored prefixes, plus this process's memory for them.

    Cheap to open; safe to share between caches, threads and processes. A context manager.

    Args:
        path: the folder. Missing: it is created, for this user only. It must be a store, or empty.
        max_disk_bytes: bound on the bytes of all segment files; the least recently used make room. `None`: no bound.
        host_bytes: bound on what this process keeps in host memory.
        device_bytes: bound on what this process keeps in device memory.
        salt: tenants with different salts do not see each other's prefixes.
        create: whether a missing store may be created.
        direct: read past the operating system's page cache where the file system can.
        reader_threads: reads in flight at once.

    Raises:
        StoreFormatError: `path` is something else than a store, or newer than this library.
        ConfigError: a bound is negative.

    Example:
        with PrefixStore("kv-store", max_disk_bytes=50 * 2**30) as store:
            print(store.match(model, input_ids), store.entries())
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        max_disk_bytes: int | None = None,
        host_bytes: int = 2 * 2**30,
        device_bytes: int = 2**30,
        salt: str | bytes = b"",
        create: bool = True,
        direct: bool = True,
        reader_threads: int = 8,
    ) -> None:
        bounds = {"max_disk_bytes": max_disk_bytes, "host_bytes": host_bytes, "device_bytes": device_bytes}
        for name, value in bounds.items():
            if value is not None and value < 0:
                raise ConfigError(f"{name} must be 0 or more, got {value}")
        self._closed = True  # Until everything below has worked: `__del__` sees half-made stores too.
        self.path = open_folder(path, create=create)
        self.max_disk_bytes = max_disk_bytes
        self.device_bytes = device_bytes
        self.direct = direct
        self.host = HostTier(host_bytes)
        self._salt = salt.encode() if isinstance(salt, str) else bytes(salt)
        self._lock = threading.RLock()
        self._background = Background()
        self._reader: ExtentReader | None = None
        self._reader_threads = reader_threads
        self._opened = OpenSegments(self.path, direct=direct)
        self._uses: dict[str, tuple[int, float]] = {}
        self._counters = StoreStats()
        folder = self.path
        self._index = StoreIndex(folder / "index.sqlite", lambda db: maintenance.index_files(db, folder))
        self._closed = False
        _open_stores.add(self)
        with _shared_lock:
            earlier = _shared.get(os.path.realpath(self.path))
            if earlier is None or earlier._closed:
                _shared[os.path.realpath(self.path)] = self

    @classmethod
    def shared(cls, path: str | os.PathLike[str]) -> PrefixStore:
        """The store that this process has open at `path` (the first, with its settings), or a new one."""
        with _shared_lock:
            store = _shared.get(os.path.realpath(path))
            return cls(path) if store is None or store._closed else store

    # -- finding ------------------------------------------------------------------------------------------------

    def match(self, model: Any, input_ids: Any) -> int:
        """How many leading tokens of `input_ids` are stored for this very model.

        Args:
            model: a transformers model; its weights and configuration count, not its name.
            input_ids: int64 `[n]` or `[1, n]`.

        Raises:
            InputError: more than one row, or not integers.
        """
        ids = as_token_ids(input_ids.cpu() if hasattr(input_ids, "cpu") else input_ids)
        fingerprint = model_fingerprint(model)
        sizes = self._read(
            lambda db: db.execute(
                "SELECT DISTINCT chunk_size FROM segments WHERE fingerprint = ?", (fingerprint,)
            ).fetchall()
        )
        found = (self._find(fingerprint, ids, size) for (size,) in sizes)
        return max((stored.tokens for stored in found if stored), default=0)

    def lookup(self, fingerprint: str, ids: TokenIds, chunk_size: int) -> StoredPrefix | None:
        """The longest stored prefix of `ids`, and count it as used.

        Args:
            fingerprint: of the model.
            ids: int64 `[n]`.
            chunk_size: of the cache that asks; prefixes stored with another one do not match.

        Returns:
            where it lies, or `None` when not even one token is stored.
        """
        stored = self._find(fingerprint, as_token_ids(ids), chunk_size)
        if stored is not None:
            self._mark(stored)
        return stored

    def _find(self, fingerprint: str, ids: TokenIds, chunk_size: int) -> StoredPrefix | None:
        if chunk_size < 1:
            raise InputError(f"chunk_size must be at least 1, got {chunk_size}")
        root = root_hash(fingerprint, chunk_size, self._salt)
        hashes = chain_hashes(root, ids, chunk_size)
        while True:
            found = self._read(partial(longest_match, root=root, hashes=hashes, ids=ids, chunk_size=chunk_size))
            if found is None:
                return None
            if isinstance(found, int):
                hashes = hashes[:found]  # A parent is missing: what lies before it may still be whole.
                continue
            tokens, rows = found
            spans = self._spans(rows)
            if spans is not None:
                return StoredPrefix(tokens, spans)
            # A file is gone, so the index has changed: look again.

    def _spans(self, chain: Chain) -> tuple[SegmentSpan, ...] | None:
        """Open the segments of a chain; `None` when one of them is lost."""
        spans = []
        position = 0
        for row, chunks in chain:
            segment = self._segment(row)
            if segment is None:
                return None
            spans.append(SegmentSpan(segment, position, chunks, position - row.first_chunk))
            position += chunks
        return tuple(spans)

    def _segment(self, row: SegmentRow) -> Segment | None:
        """The open file of `row`; `None`, after forgetting it, when it is missing or damaged."""
        try:
            return self._opened.get(row)
        except (FileNotFoundError, SegmentCorruptError) as error:
            logger.warning("a stored segment is lost and will be computed again: %s", error)
            self._opened.forget([row.key])
            self._write(lambda db: drop_segment(db, row.key))
            return None

    def discard(self, segment: Segment, reason: str) -> None:
        """Take a segment whose bytes proved wrong out of service; its file is kept under `damaged/`.

        Segments that continue it stay, and are found again once its chunks have been stored anew.
        """
        logger.warning("%s is taken out of service: %s", segment.path, reason)
        aside = self.path / "damaged"
        aside.mkdir(mode=0o700, exist_ok=True)

        def move(db: sqlite3.Connection) -> None:
            drop_segment(db, segment.key)
            try:
                if os.stat(segment.path).st_ino == segment.inode:
                    os.replace(segment.path, aside / segment.path.name)
            except FileNotFoundError:
                pass

        self._opened.forget([segment.key])
        self._write(move)

    # -- storing ------------------------------------------------------------------------------------------------

    def begin_segment(
        self, fingerprint: str, geometry: KVGeometry, ids: TokenIds, first_chunk: int = 0
    ) -> SegmentWriter:
        """Start storing chunks `first_chunk` to the end of a prefix.

        Args:
            fingerprint: of the model.
            geometry: of its KV cache.
            ids: int64 `[n]`, all tokens of the prefix.
            first_chunk: chunks before this one are stored already.

        Raises:
            InputError: no chunk is left to store.
            StoreError: the chunks before `first_chunk` are not stored.
            StoreFullError: it cannot fit in `max_disk_bytes`, or the disk is full.
        """
        ids = as_token_ids(ids)
        chunk_size = geometry.chunk_size
        begin = first_chunk * chunk_size
        if not 0 <= begin < len(ids):
            raise InputError(f"first_chunk {first_chunk} leaves nothing to store of {len(ids)} tokens")
        root = root_hash(fingerprint, chunk_size, self._salt)
        before = chain_hashes(root, ids[:begin], chunk_size)
        parent = before[-1] if before else root
        own = ids[begin:].copy()
        header = SegmentHeader(
            geometry=geometry,
            fingerprint=fingerprint,
            root=root.hex(),
            parent=parent.hex() if before else "",
            key=segment_hashes(parent, own, chunk_size)[-1].hex(),
            first_chunk=first_chunk,
            num_tokens=len(own),
            salted=bool(self._salt),
        )
        if before and self._read(lambda db: find_chunk(db, parent)) is None:
            raise StoreError(f"chunks before {first_chunk} are not stored; store the prefix from its beginning")
        nbytes = len(header.encoded) + header.data_bytes
        if self.max_disk_bytes is not None and nbytes > self.max_disk_bytes:
            raise too_large(nbytes, self.max_disk_bytes)
        return SegmentWriter(header, own, self.path / "partial", self._publish, drop_cached=self.direct)

    def _publish(self, header: SegmentHeader, ids: TokenIds, partial_file: Path, nbytes: int) -> StoredPrefix:
        file = segment_file(header.key)
        final = self.path / file
        evicted: list[SegmentRow] = []

        def publish(db: sqlite3.Connection) -> bool:
            evicted.clear()
            existing = segment_by_key(db, header.key)
            if existing is not None:
                if (self.path / existing.file).exists():
                    return False
                drop_segment(db, header.key)
            if header.parent and find_chunk(db, header.parent_hash) is None:
                raise StoreError(f"segment {header.key}: the prefix that it continues was deleted meanwhile")
            if self.max_disk_bytes is not None:
                evicted.extend(choose_victims(db, header, nbytes, self.max_disk_bytes))
                for row in evicted:
                    drop_segment(db, row.key)
                    (self.path / row.file).unlink(missing_ok=True)
            put_in_place(partial_file, final)
            insert_segment(db, header, ids, nbytes, file, time.time())
            return True

        self._flush_uses()
        published = self._write(publish)
        if not published:
            partial_file.unlink(missing_ok=True)
        self._opened.forget([row.key for row in evicted])
        with self._lock:
            self._counters.published += published
            self._counters.bytes_written += nbytes if published else 0
            self._counters.evicted += len(evicted)
        rows = self._read(lambda db: chain_to(db, bytes.fromhex(header.key), header.first_chunk + header.num_chunks))
        spans = self._spans(rows) if isinstance(rows, list) else None
        if spans is None:
            raise StoreError(f"segment {header.key}: the prefix that it continues was deleted meanwhile")
        return StoredPrefix(header.first_chunk * header.geometry.chunk_size + header.num_tokens, spans)

    # -- looking after ------------------------------------------------------------------------------------------

    def entries(self) -> list[PrefixInfo]:
        """All stored segments, oldest first."""
        self._flush_uses()
        return [PrefixInfo.from_row(row) for row in self._read(all_segments)]

    def delete(self, key: str, recursive: bool = False) -> list[str]:
        """Delete the segment named `key`. Caches that have it open keep working.

        Args:
            key: of the segment.
            recursive: delete the longer prefixes that continue it as well.

        Returns:
            the keys of all segments that were deleted.

        Raises:
            PrefixInUseError: longer prefixes continue it, and not `recursive`.
            StoreError: there is no such segment.
        """

        def delete(db: sqlite3.Connection) -> list[str]:
            doomed = continuations(db, _known(db, key))
            if len(doomed) > 1 and not recursive:
                names = ", ".join(row.key for row in doomed[1:])
                raise PrefixInUseError(f"{key} is continued by {names}; delete these first, or all of them at once")
            for row in doomed:
                drop_segment(db, row.key)
                (self.path / row.file).unlink(missing_ok=True)
            return [row.key for row in doomed]

        deleted: list[str] = self._write(delete)
        self._opened.forget(deleted)
        return deleted

    def pin(self, key: str) -> None:
        """Keep the segment named `key` when others are evicted.

        Raises:
            StoreError: there is no such segment.
        """
        self._set_pinned(key, True)

    def unpin(self, key: str) -> None:
        """Undo `pin`.

        Raises:
            StoreError: there is no such segment.
        """
        self._set_pinned(key, False)

    def _set_pinned(self, key: str, pinned: bool) -> None:
        def change(db: sqlite3.Connection) -> None:
            db.execute("UPDATE segments SET pinned = ? WHERE id = ?", (int(pinned), _known(db, key).id))

        self._write(change)

    def verify(self, key: str | None = None, progress: Callable[[int, int], None] | None = None) -> list[StoreProblem]:
        """Compare every byte of all segments, or of one, with its checksum, and the index with the files.

        Args:
            key: of one segment; `None` is all.
            progress: called with `(bytes done, bytes in all)`.

        Returns:
            what is wrong; empty when all is well. Nothing is changed.
        """
        rows = self._read(lambda db: [_known(db, key)] if key else all_segments(db))
        return maintenance.verify_segments(self.path, rows, whole_store=key is None, progress=progress)

    def gc(self, dry_run: bool = False) -> GcReport:
        """Clean up after crashes: remove leftovers, index files that are not indexed, forget those that are gone.

        Args:
            dry_run: only say what would be done.
        """
        report = maintenance.collect_garbage(self.path, self._index, dry_run=dry_run)
        self._opened.forget(report.forgotten)
        return report

    def rebuild_index(self) -> None:
        """Build the index anew from the segment files; pins and counters are kept."""
        self._index.rebuild()

    @property
    def stats(self) -> StoreStats:
        """What the store holds, and what this object did since it was opened."""
        count, tokens, nbytes = self._read(
            lambda db: db.execute("SELECT count(*), total(num_tokens), total(nbytes) FROM segments").fetchone()
        )
        with self._lock:
            return StoreStats(
                segments=count,
                prefix_tokens=int(tokens),
                disk_bytes=int(nbytes),
                host_bytes=self.host.bytes_used,
                bytes_read=self._reader.bytes_read if self._reader else 0,
                bytes_written=self._counters.bytes_written,
                published=self._counters.published,
                evicted=self._counters.evicted,
                direct_reads=self.direct and maintenance.can_read_directly(self.path),
            )

    # -- shared services ----------------------------------------------------------------------------------------

    @property
    def reader(self) -> ExtentReader:
        """The reader threads of this store; started at the first use."""
        with self._lock:
            if self._closed:
                raise StoreError(f"{self.path}: the store is closed")
            if self._reader is None:
                self._reader = ExtentReader(self._reader_threads)
            return self._reader

    def submit_background(self, function: Callable[[], object]) -> None:
        """Run `function` on the background thread, after everything submitted before.

        An exception is logged as a warning and counted in `background_failures`. The interpreter waits for what was
        submitted before it exits.
        """
        self._background.submit(function)

    def flush(self) -> bool:
        """Wait until everything that was given to `submit_background` has run; whether anything still had to."""
        return self._background.flush()

    @property
    def background_failures(self) -> int:
        """How many background functions raised."""
        return self._background.failures

    def _mark(self, stored: StoredPrefix) -> None:
        now = time.time()
        with self._lock:
            for span in stored.spans:
                count, _ = self._uses.get(span.segment.key, (0, 0.0))
                self._uses[span.segment.key] = (count + 1, now)
            due = len(self._uses) >= _MARKS_BEFORE_FLUSH
        if due:
            self._flush_uses()

    def _flush_uses(self) -> None:
        with self._lock:
            uses, self._uses = self._uses, {}
        if uses:
            self._write(lambda db: mark_used(db, [(count, when, key) for key, (count, when) in uses.items()]))

    def _read(self, query: Callable[[sqlite3.Connection], Any]) -> Any:
        if self._closed:
            raise StoreError(f"{self.path}: the store is closed")
        return self._index.read(query)

    def _write(self, change: Callable[[sqlite3.Connection], Any]) -> Any:
        if self._closed:
            raise StoreError(f"{self.path}: the store is closed")
        return self._index.write(change)

    def close(self) -> None:
        """Finish background work, stop the threads and close the files. May be called more than once."""
        if self._closed:
            return
        self._background.close()
        try:
            self._flush_uses()
        except StoreError as error:
            logger.warning("counters of use are lost: %s", error)
        with self._lock:
            self._closed = True
            reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()  # Before the files: a read must not meet a descriptor that means another file by now.
        self._opened.close()
        self._index.close()
        self.host.clear()

    def __enter__(self) -> PrefixStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self.close()

    def __deepcopy__(self, memo: object) -> PrefixStore:
        # A copy of a cache reads from the same store.
        return self

    def __repr__(self) -> str:
        return f"PrefixStore({str(self.path)!r}{', closed' if self._closed else ''})"


def _known(db: sqlite3.Connection, key: str) -> SegmentRow:
    row = segment_by_key(db, key)
    if row is None:
        raise StoreError(f"no stored prefix has the key {key!r}; `entries()` lists those that there are")
    return row


@atexit.register
def _close_open_stores() -> None:
    # Counters of use wait in memory; reader threads should not be cut off inside a read.
    for store in list(_open_stores):
        store.close()
