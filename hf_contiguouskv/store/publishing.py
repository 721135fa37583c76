"""Making segments and putting them into service, whole or not at all."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import time
from collections.abc import Callable, Hashable

from ..errors import InputError, StoreError
from .backend import BlobWriter
from .entries import SegmentSpan, StoredPrefix
from .eviction import superseded_by, too_large
from .finding import Finder
from .format import KVGeometry, SegmentHeader
from .hashing import TokenIds, chain_hashes, segment_hashes
from .memory_backend import MemoryBackend
from .parts import StoreParts
from .proof import continues, is_superseded, is_the_same
from .room import Room
from .rows import (
    SegmentRow,
    drop_segment,
    find_chunk,
    insert_segment,
    mark_used,
    segment_by_id,
    segment_by_key,
    set_use,
)
from .search import chain_to
from .segment import Segment
from .verification import row_problems
from .writer import SegmentWriter

logger = logging.getLogger("hf_contiguouskv")


class Publisher:
    """Begins segments, and publishes those that are complete.

    Args:
        parts: of the store.
        finder: of the store.
        room: chooses victims and removes them.

    Attributes:
        on_published: called with the key of each segment that was put into service, once the index knows it.
    """

    def __init__(self, parts: StoreParts, finder: Finder, room: Room) -> None:
        self._parts = parts
        self._finder = finder
        self._room = room
        self.on_published: Callable[[str], object] = _nobody

    def _header(self, fingerprint: str, geometry: KVGeometry, ids: TokenIds, first_chunk: int) -> SegmentHeader:
        c = geometry.chunk_size
        begin = first_chunk * c
        if not 0 <= begin < len(ids):
            raise InputError(f"first_chunk {first_chunk} leaves nothing to store of {len(ids)} tokens")
        root = self._finder.root(fingerprint, c)
        before = chain_hashes(root, ids[:begin], c, first=True)
        return SegmentHeader(
            geometry=geometry,
            fingerprint=fingerprint,
            root=root.hex(),
            parent=before[-1].hex() if before else "",
            key=segment_hashes(before[-1] if before else root, ids[begin:], c, first=not before)[-1].hex(),
            first_chunk=first_chunk,
            num_tokens=len(ids) - begin,
            salted=not self._parts.tenant.is_operator,
            beginning="" if before else self._finder.beginning(ids, c),
        )

    def begin(
        self,
        fingerprint: str,
        geometry: KVGeometry,
        ids: TokenIds,
        first_chunk: int,
        before: StoredPrefix | None = None,
    ) -> SegmentWriter:
        """Start storing a segment, as `StoreInner.begin_segment` says."""
        header = self._header(fingerprint, _continuing(before, geometry), ids, first_chunk)
        if header.parent and self._parts.index.read(lambda db: _chunk_before(db, header)) is None:
            raise StoreError(f"chunks before {first_chunk} are not stored; store the prefix from its beginning")
        if self._room.max_disk_bytes is not None and header.nbytes > self._room.max_disk_bytes:
            raise too_large(header.nbytes, self._room.max_disk_bytes)

        def publish(final: SegmentHeader, own: TokenIds, blob: BlobWriter) -> StoredPrefix:
            _, segment = self._publish(final, own, blob, False)
            return self._published(final, ids, before, segment)

        return SegmentWriter(header, _own(ids, header), self._parts.backend, self._parts.key, publish)

    def begin_in_memory(
        self,
        fingerprint: str,
        geometry: KVGeometry,
        ids: TokenIds,
        first_chunk: int,
        before: StoredPrefix | None,
    ) -> SegmentWriter:
        """Start a segment that only the caller finds, as `StoreInner.begin_memory_segment` says."""
        header = self._header(fingerprint, _continuing(before, geometry), ids, first_chunk)
        memory = MemoryBackend()

        def publish(final: SegmentHeader, own: TokenIds, blob: BlobWriter) -> StoredPrefix:
            blob.publish()
            return _continued(before, Segment(memory.open(final.key)), len(ids))

        return SegmentWriter(header, _own(ids, header), memory, None, publish)

    def _published(
        self, header: SegmentHeader, ids: TokenIds, before: StoredPrefix | None, segment: Segment | None
    ) -> StoredPrefix:
        """The prefix that ends with the segment that was just published, by this process or another."""
        # A chain of thousands (a long conversation) is not proved again for each segment that it grows by.
        if segment is not None and segment.first_chunk == 0:
            return _continued(None, segment, len(ids))
        if segment is not None and before is not None and segment.first_chunk <= header.first_chunk:
            with contextlib.suppress(StoreError):
                return _continued(before, segment, len(ids))
        found = self._finder.find(header.fingerprint, ids, header.geometry.chunk_size).stored
        if found is not None and found.tokens == len(ids):
            return found
        # Evicted again at once, or what it continues was; its bytes are still there for those who hold them open.
        if segment is not None and (segment.first_chunk == 0 or before is not None):
            return _continued(before, segment, len(ids))
        raise StoreError(f"segment {header.key}: the prefix that it continues was deleted meanwhile")

    def publish(self, header: SegmentHeader, ids: TokenIds, blob: BlobWriter, pinned: bool = False) -> bool:
        """Put a sealed blob into service, evicting what is worth least if room is needed.

        Args:
            header: of the segment.
            ids: int64 `[num_tokens]`, of this segment alone.
            blob: holds it.
            pinned: whether eviction leaves it alone.

        Returns:
            false when it was there already: theirs is kept, and `blob` is not needed.

        Raises:
            StoreFullError: there is no room.
            StoreError: what it continues is not stored.
            OSError: the storage failed.
        """
        published, _ = self._publish(header, ids, blob, pinned)
        return published

    def _publish(
        self, header: SegmentHeader, ids: TokenIds, blob: BlobWriter, pinned: bool
    ) -> tuple[bool, Segment | None]:
        in_place = False
        doomed: dict[str, Hashable] = {}
        evicted: set[str] = set()
        replaced = False

        def change(db: sqlite3.Connection) -> tuple[bool, Segment | None]:
            nonlocal in_place, evicted, replaced
            existing = segment_by_key(db, header.key)
            if not in_place and self._room.is_there(db, header.key, existing):
                there = self.stored_twin(db, header, ids)
                if there is not None:
                    # Computing it again is a use of it: without this, what has expired would never be found again.
                    mark_used(db, [(1, time.time(), key) for key in _chain_keys(db, header)])
                    return False, there
                existing = segment_by_key(db, header.key)
            if not self.is_held(db, header):
                raise StoreError(f"segment {header.key}: the prefix that it continues was deleted meanwhile")
            if existing is not None:
                drop_segment(db, header.key)
            victims = self._room.victims(db, header, blob.stored_bytes)
            if not in_place:  # (A damaged index is rebuilt, and this is called once more.)
                blob.publish()
                in_place = True
            # A pin outlives a segment that was lost.
            insert_segment(
                db, header, ids, blob.stored_bytes, time.time(), pinned or self._parts.pins.holds(header.key)
            )
            evicted, replaced = {row.key for row in victims}, existing is not None
            doomed.clear()
            for row in (*victims, *self._superseded(db, header, ids)):
                drop_segment(db, row.key)
                doomed[row.key] = self._parts.backend.identity(row.key)
            return True, self.open_now(header.key)

        self._parts.uses.flush()  # Victims are chosen by what the index says.
        try:
            published, segment = self._parts.index.write(change)
        except BaseException:
            if in_place:
                # It could not be indexed: nobody would find it, and it would take up room.
                with contextlib.suppress(OSError, StoreError):
                    self._parts.index.write(lambda db: self._room.delete_unindexed(db, header.key))
            raise
        removed = self._room.remove(doomed)
        if replaced:
            self._parts.opened.forget([header.key])  # What is kept of it in memory may not be what it holds now.
        if segment is not None:
            self._parts.opened.adopt(segment)
        if published:
            self._parts.counters.add("published")
            self._parts.counters.add("bytes_written", header.nbytes)
            self._parts.counters.add("evicted", len(evicted & removed))
            self.on_published(header.key)
        return published, segment

    def open_now(self, key: str) -> Segment | None:
        """The segment `key`, opened before anybody can delete it."""
        with contextlib.suppress(StoreError, OSError):
            return self._parts.opener(self._parts.backend.open(key))
        return None

    def stored_twin(self, db: sqlite3.Connection, header: SegmentHeader, ids: TokenIds) -> Segment | None:
        """The segment that is stored under this name already, if it is of use; otherwise the new one replaces it.

        It must be possible to open it, and it must prove to be the same: it may be a lie. And segments with
        the same end may begin at different chunks: one that continues nothing is of no use.
        """
        there = self.open_now(header.key)
        with contextlib.suppress(StoreError):
            if there is not None and is_the_same(there, header, ids):
                if there.first_chunk > header.first_chunk and not self.is_held(db, there.header):
                    return None
                self._repair_rows(db, there)
                return there
        return None

    def _repair_rows(self, db: sqlite3.Connection, segment: Segment) -> None:
        """Let the index say of a segment what it is: a request that computed it again should find it the next time."""
        row = segment_by_key(db, segment.key)
        if row is None or not row_problems(db, segment, row, bool(row.pinned)):
            return
        drop_segment(db, segment.key)
        insert_segment(db, segment.header, segment.token_ids, segment.blob.stored_bytes, row.created, bool(row.pinned))
        set_use(db, segment.key, row.created, row.last_used, row.uses)

    def is_held(self, db: sqlite3.Connection, header: SegmentHeader) -> bool:
        """Whether what a segment continues is stored: the index names where, and that segment's own bytes prove it."""
        if not header.parent:
            return True
        place = _chunk_before(db, header)
        if place is None:
            return False
        with contextlib.suppress(StoreError):
            return continues(header, self._parts.opened.get(segment_by_id(db, place[0])), place[1])
        return False

    def _superseded(self, db: sqlite3.Connection, header: SegmentHeader, ids: TokenIds) -> list[SegmentRow]:
        """Segments that the new one makes superfluous; what the index says of them is compared with their bytes."""
        found = []
        for row in superseded_by(db, header, ids):
            with contextlib.suppress(StoreError):
                if is_superseded(self._parts.opened.get(row), header, ids):
                    found.append(row)
        return found


def _nobody(key: str) -> None:
    """Nobody is told."""


def _chain_keys(db: sqlite3.Connection, header: SegmentHeader) -> set[str]:
    """Keys of the segments of the prefix that ends with this one, as far as they are stored."""
    chunks = header.first_chunk + header.num_chunks
    chain = chain_to(db, bytes.fromhex(header.root), bytes.fromhex(header.key), chunks)
    return {header.key} if isinstance(chain, int) else {row.key for row, _ in chain}


def _chunk_before(db: sqlite3.Connection, header: SegmentHeader) -> tuple[int, int] | None:
    """Where the index says that the chunk is which a segment continues: segment id, and position in it."""
    return find_chunk(db, header.parent_hash, bytes.fromhex(header.root), header.first_chunk - 1, whole=True)


def _own(ids: TokenIds, header: SegmentHeader) -> TokenIds:
    return ids[len(ids) - header.num_tokens :].copy()


def _continuing(before: StoredPrefix | None, geometry: KVGeometry) -> KVGeometry:
    return geometry if before is None else geometry.continuing(before.spans[-1].segment.geometry)


def _continued(before: StoredPrefix | None, segment: Segment, tokens: int) -> StoredPrefix:
    """`before`, as far as it reaches, and then all of `segment`."""
    first = segment.first_chunk
    spans = []
    for span in before.spans if before is not None else ():
        if span.first_chunk < first:
            spans.append(
                SegmentSpan(span.segment, span.first_chunk, min(span.chunks, first - span.first_chunk), span.offset)
            )
    if sum(span.chunks for span in spans) != first:
        raise StoreError(f"segment {segment.key}: the {first} chunks that it continues are not at hand")
    return StoredPrefix(tokens, (*spans, SegmentSpan(segment, first, segment.num_chunks, 0)))
