"""Making segments and putting them into service, whole or not at all."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import time
from collections.abc import Callable, Hashable
from functools import partial

from ..errors import InputError, StoreError, StoreFullError
from ..stats import StoreCounters
from .backend import BlobWriter, SegmentBackend
from .entries import SegmentSpan, StoredPrefix
from .eviction import (
    choose_excess,
    choose_victims,
    expired_segments,
    is_expired,
    stored_bytes,
    superseded_by,
    too_large,
)
from .finding import Finder
from .folder import Pins
from .format import KVGeometry, SegmentHeader
from .hashing import TokenIds, chain_hashes, segment_hashes
from .index import StoreIndex
from .key import StoreKey
from .memory_backend import MemoryBackend
from .opened import OpenSegments
from .proof import continues, is_superseded, is_the_same
from .rows import (
    SegmentRow,
    drop_segment,
    end_future_uses,
    find_chunk,
    insert_segment,
    mark_used,
    segment_by_id,
    segment_by_key,
    set_use,
    stored_chunk_rows,
)
from .search import chain_to
from .segment import Segment, SegmentOpener
from .tenant import Tenant
from .verification import row_problems
from .writer import SegmentWriter

logger = logging.getLogger("hf_contiguouskv")

# So many segments are removed in one transaction: meanwhile nobody else can write.
_REMOVED_AT_ONCE = 1000


class Publisher:
    """Begins segments, and publishes those that are complete.

    Args:
        index, backend, opened, opener, finder, counters: of the store.
        key: of the store, if it has one.
        tenant: whose segments it makes, counts and evicts.
        max_disk_bytes: bound on what all segments take up; `None`: no bound.
        ttl_s: see `PrefixStore`.
        pins: which segments are pinned, stored or not.
        before_eviction: called before victims are chosen, so that the index knows of all uses.
    """

    def __init__(
        self,
        index: StoreIndex,
        backend: SegmentBackend,
        opened: OpenSegments,
        opener: SegmentOpener,
        finder: Finder,
        counters: StoreCounters,
        *,
        key: StoreKey | None,
        tenant: Tenant,
        max_disk_bytes: int | None,
        ttl_s: float | None,
        pins: Pins,
        before_eviction: Callable[[], None],
    ) -> None:
        self._index = index
        self._backend = backend
        self._opened = opened
        self._opener = opener
        self._key = key
        self._finder = finder
        self._counters = counters
        self._tenant = tenant
        self._max_disk_bytes = max_disk_bytes
        self._ttl_s = ttl_s
        self._pins = pins
        self._before_eviction = before_eviction

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
            salted=not self._tenant.is_operator,
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
        """See `PrefixStore.begin_segment`."""
        header = self._header(fingerprint, geometry, ids, first_chunk)
        if header.parent and self._index.read(lambda db: _chunk_before(db, header)) is None:
            raise StoreError(f"chunks before {first_chunk} are not stored; store the prefix from its beginning")
        if self._max_disk_bytes is not None and header.nbytes > self._max_disk_bytes:
            raise too_large(header.nbytes, self._max_disk_bytes)

        def publish(final: SegmentHeader, own: TokenIds, blob: BlobWriter) -> StoredPrefix:
            _, segment = self._publish(final, own, blob, False)
            return self._published(final, ids, before, segment)

        return SegmentWriter(header, _own(ids, header), self._backend, self._key, publish)

    def begin_in_memory(
        self,
        fingerprint: str,
        geometry: KVGeometry,
        ids: TokenIds,
        first_chunk: int,
        before: StoredPrefix | None,
    ) -> SegmentWriter:
        """See `PrefixStore.begin_memory_segment`."""
        header = self._header(fingerprint, geometry, ids, first_chunk)
        memory = MemoryBackend()

        def publish(final: SegmentHeader, own: TokenIds, blob: BlobWriter) -> StoredPrefix:
            blob.publish()
            return _continued(before, Segment(memory.open(final.key)), len(ids))

        return SegmentWriter(header, _own(ids, header), memory, None, publish)

    def _published(
        self, header: SegmentHeader, ids: TokenIds, before: StoredPrefix | None, segment: Segment | None
    ) -> StoredPrefix:
        """The prefix that ends with the segment that was just published, by us or by somebody else."""
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
        evicted, replaced = 0, False

        def change(db: sqlite3.Connection) -> tuple[bool, Segment | None]:
            nonlocal in_place, evicted, replaced
            existing = segment_by_key(db, header.key)
            if not in_place and self._is_there(db, header.key, existing):
                there = self._same_there(db, header, ids)
                if there is not None:
                    # Whoever computed it again uses it: without this, what has expired would never be found again.
                    mark_used(db, [(1, time.time(), key) for key in _chain_keys(db, header)])
                    return False, there
                existing = segment_by_key(db, header.key)
            if not self._is_held(db, header):
                raise StoreError(f"segment {header.key}: the prefix that it continues was deleted meanwhile")
            if existing is not None:
                drop_segment(db, header.key)
            victims = self._victims(db, header, blob.stored_bytes)
            if not in_place:  # (A damaged index is rebuilt, and this is called once more.)
                blob.publish()
                in_place = True
            # A pin outlives a segment that was lost.
            insert_segment(db, header, ids, blob.stored_bytes, time.time(), pinned or self._pins.holds(header.key))
            evicted, replaced = len(victims), existing is not None
            doomed.clear()
            for row in (*victims, *self._superseded(db, header, ids)):
                drop_segment(db, row.key)
                doomed[row.key] = self._backend.identity(row.key)
            return True, self._opened_now(header.key)

        self._before_eviction()
        try:
            published, segment = self._index.write(change)
        except BaseException:
            if in_place:
                # It could not be indexed: nobody would find it, and it would take up room.
                with contextlib.suppress(OSError, StoreError):
                    self._index.write(lambda db: self._delete_unindexed(db, header.key))
            raise
        self._remove(doomed)
        if replaced:
            self._opened.forget([header.key])  # What is kept of it in memory may not be what it holds now.
        if segment is not None:
            self._opened.adopt(segment)
        if published:
            self._counters.add("published")
            self._counters.add("bytes_written", header.nbytes)
            self._counters.add("evicted", evicted)
        return published, segment

    def _delete_unindexed(self, db: sqlite3.Connection, key: str) -> None:
        # Inside a transaction: another process may have found it in place, and indexed it.
        if segment_by_key(db, key) is None:
            self._backend.delete(key)

    def _opened_now(self, key: str) -> Segment | None:
        """The segment `key`, opened before anybody can delete it."""
        with contextlib.suppress(StoreError, OSError):
            return self._opener(self._backend.open(key))
        return None

    def _same_there(self, db: sqlite3.Connection, header: SegmentHeader, ids: TokenIds) -> Segment | None:
        """The segment that is stored under this name already, if it is of use; otherwise the new one replaces it.

        It must be possible to open it, and it must prove to be the same: whoever made it may lie. And segments with
        the same end may begin at different chunks: one that continues nothing is of no use.
        """
        there = self._opened_now(header.key)
        with contextlib.suppress(StoreError):
            if there is not None and is_the_same(there, header, ids):
                if there.first_chunk > header.first_chunk and not self._is_held(db, there.header):
                    return None
                self._repair_rows(db, there)
                return there
        return None

    def _repair_rows(self, db: sqlite3.Connection, segment: Segment) -> None:
        """Let the index say of a segment what it is: whoever has computed it again should find it the next time."""
        row = segment_by_key(db, segment.key)
        if row is None or not row_problems(db, segment, row, bool(row.pinned)):
            return
        drop_segment(db, segment.key)
        insert_segment(db, segment.header, segment.token_ids, segment.blob.stored_bytes, row.created, bool(row.pinned))
        set_use(db, segment.key, row.created, row.last_used, row.uses)

    def _is_held(self, db: sqlite3.Connection, header: SegmentHeader) -> bool:
        """Whether what a segment continues is stored: the index names where, and that segment's own bytes prove it."""
        if not header.parent:
            return True
        place = _chunk_before(db, header)
        if place is None:
            return False
        with contextlib.suppress(StoreError):
            return continues(header, self._opened.get(segment_by_id(db, place[0])), place[1])
        return False

    def _superseded(self, db: sqlite3.Connection, header: SegmentHeader, ids: TokenIds) -> list[SegmentRow]:
        """Segments that the new one makes superfluous; what the index says of them is compared with their bytes."""
        found = []
        for row in superseded_by(db, header, ids):
            with contextlib.suppress(StoreError):
                if is_superseded(self._opened.get(row), header, ids):
                    found.append(row)
        return found

    def _remove(self, doomed: dict[str, Hashable]) -> None:
        """Delete blobs that the index has forgotten: only now, when that is certain to last."""

        def change(db: sqlite3.Connection) -> None:
            for key, identity in doomed.items():
                # Somebody may have stored it anew, or indexed it again, meanwhile.
                if self._backend.identity(key) == identity:
                    self._delete_unindexed(db, key)

        self._opened.forget(doomed)
        try:
            if doomed:
                self._index.write(change)
        except (StoreError, OSError) as error:
            logger.warning("%d segments could not be evicted in order: %s", len(doomed), error)
            self._remove_out_of_order(doomed)

    def _remove_out_of_order(self, doomed: dict[str, Hashable]) -> None:
        """Delete what can be deleted; what cannot takes up room, so it is indexed again."""

        def change(db: sqlite3.Connection) -> None:
            for key, identity in doomed.items():
                if self._backend.identity(key) == identity:
                    self._is_there(db, key, segment_by_key(db, key))

        for key, identity in doomed.items():
            with contextlib.suppress(OSError):
                if self._backend.identity(key) == identity:
                    self._backend.delete(key)
        with contextlib.suppress(OSError):
            self._index.try_write(change)

    def _is_there(self, db: sqlite3.Connection, key: str, row: SegmentRow | None) -> bool:
        """Whether the segment is stored already; if only the index does not know it (well), it learns."""
        if self._backend.identity(key) is None:
            return False
        if row is not None and len(stored_chunk_rows(db, row.id)) == row.num_chunks:
            return True
        try:
            with contextlib.closing(self._opener(self._backend.open(key))) as segment:
                if segment.key != key:
                    return False
                drop_segment(db, key)
                blob, pinned = segment.blob, self._pins.holds(key)
                insert_segment(db, segment.header, segment.token_ids, blob.stored_bytes, blob.created, pinned)
        except (StoreError, OSError):
            return False  # Whatever lies there cannot be used, or is not what its name says.
        return True

    def _victims(self, db: sqlite3.Connection, header: SegmentHeader, nbytes: int) -> list[SegmentRow]:
        if self._max_disk_bytes is None:
            return []
        roots = self._tenant.roots(db)
        needed = stored_bytes(db, roots) + nbytes
        self._drop_quarantined(needed, self._max_disk_bytes)
        if needed <= self._max_disk_bytes:
            return []
        end_future_uses(db)
        return choose_victims(db, header, nbytes, self._max_disk_bytes, self._pins.keys(), roots)

    def _drop_quarantined(self, needed: int, max_disk_bytes: int) -> None:
        """Delete damaged segments, which are kept to be looked at only as long as nobody needs the room."""
        if not self._tenant.is_operator:
            return  # (They may be anybody's.)
        aside = list(self._backend.quarantined())
        if needed + sum(info.stored_bytes for info in aside) > max_disk_bytes:
            for info in aside:
                self._backend.drop_quarantined(info.key)

    def is_within_bound(self) -> bool:
        """Whether what is stored, and what is in quarantine, is within `max_disk_bytes`; cheap.

        (Of a backend that lists slowly, only what is stored.)
        """
        if self._max_disk_bytes is None:
            return True
        total: int = self._index.read(lambda db: stored_bytes(db, self._tenant.roots(db)))
        if self._backend.lists_cheaply and self._tenant.is_operator:
            total += sum(info.stored_bytes for info in self._backend.quarantined())
        return total <= self._max_disk_bytes

    def evict_excess(self) -> None:
        """Make what is stored fit in `max_disk_bytes`, by the rules of publishing: where the bound is a new one.

        Where pinned segments exceed it, they stay, and a warning is logged.

        Raises:
            StoreError: the index cannot be written.
            OSError: the storage failed.
        """
        bound = self._max_disk_bytes
        if bound is None:
            return

        def choose(db: sqlite3.Connection) -> tuple[list[SegmentRow], int]:
            roots = self._tenant.roots(db)
            self._drop_quarantined(stored_bytes(db, roots), bound)
            return choose_excess(db, bound, self._pins.keys(), roots, at_most=_REMOVED_AT_ONCE)

        def change(db: sqlite3.Connection) -> tuple[dict[str, Hashable], int]:
            end_future_uses(db)
            victims, excess = choose(db)
            for row in victims:
                drop_segment(db, row.key)
            return {row.key: self._backend.identity(row.key) for row in victims}, excess

        self._before_eviction()
        excess = 1
        while excess > 0:
            try:
                doomed, excess = self._index.write(change)
            except StoreFullError:
                # Even forgetting takes a little room, and there is none: the segments go first, which makes some.
                for row in self._index.read(choose)[0]:
                    self._backend.delete(row.key)
                doomed, excess = self._index.write(change)
            if not doomed:
                break
            self._remove(doomed)
            self._counters.add("evicted", len(doomed))
        if excess > 0:
            logger.warning(
                "pinned prefixes of %s, and what they continue, take up %d bytes more than max_disk_bytes=%d; unpin or "
                "delete some of them, or raise the bound",
                self._backend.name,
                excess,
                bound,
            )

    def expire(self, dry_run: bool) -> list[SegmentRow]:
        """Delete what nobody used for `ttl_s`; what was (or would be) deleted."""
        if self._ttl_s is None:
            return []
        unused_since = time.time() - self._ttl_s
        self._before_eviction()

        def choose(db: sqlite3.Connection) -> list[SegmentRow]:
            return expired_segments(db, unused_since, self._pins.keys(), self._tenant.roots(db))

        if dry_run:
            return self._index.read(choose)

        def delete(db: sqlite3.Connection, some: list[SegmentRow]) -> list[SegmentRow]:
            pinned, gone = self._pins.keys(), []
            for row in some:
                # (Somebody may have used it meanwhile, or continued it.)
                if is_expired(db, row.key, unused_since, pinned):
                    drop_segment(db, row.key)
                    self._backend.delete(row.key)
                    gone.append(row)
            return gone

        self._index.write(end_future_uses)
        rows, expired = self._index.read(choose), []
        for start in range(0, len(rows), _REMOVED_AT_ONCE):
            expired += self._index.write(partial(delete, some=rows[start : start + _REMOVED_AT_ONCE]))
        self._opened.forget([row.key for row in expired])
        self._counters.add("expired", len(expired))
        return expired


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
