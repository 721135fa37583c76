"""Looking a prompt up in the shared store, and making what is found known to this machine's index."""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context

from ...errors import SegmentCorruptError
from ..parts import StoreParts
from ..rows import insert_segment, segment_by_key
from ..segment import Segment
from ..verification import in_words
from .backend import FleetBackend
from .catalog import Catalog
from .deadline import seconds_left
from .names import SharedSegment

logger = logging.getLogger("hf_contiguouskv")

# Headers are read from so many segments at once.
_AT_ONCE = 16
# What could not be used is not looked at again for so long; so many are remembered.
_AGAIN_S, _REMEMBERED = 60.0, 10_000


class Discovery:
    """Finds segments of the shared store that continue what this machine has of a prompt.

    Args:
        parts: of the store on this machine.
        backend: of the store.
        catalog: of the shared store.
    """

    def __init__(self, parts: StoreParts, backend: FleetBackend, catalog: Catalog) -> None:
        self._parts = parts
        self._backend = backend
        self._catalog = catalog
        self._failed: dict[tuple[str, str], float] = {}

    def seek(self, hashes: Sequence[bytes], chunk_size: int, have: int) -> bool:
        """Ask the shared store for more of a prompt; whether the index knows more now.

        At the deadline of the context, what was read until then is used.

        Args:
            hashes: of the whole chunks of the prompt.
            chunk_size: tokens per chunk.
            have: whole chunks that this machine has.

        Raises:
            OSError: the engine failed.
            StoreError: the index cannot be written.
        """
        new = self._catalog.find(hashes, chunk_size, have, self._is_of_use)
        if not new:
            return False
        for one in new:
            seen = self._backend.records.get(one.key)
            if seen is not None and seen.segment.upload != one.upload:
                self._backend.forget(one.key)
        self._backend.records.see(new, time.time())
        with ThreadPoolExecutor(min(_AT_ONCE, len(new)), thread_name_prefix="contiguouskv-discover") as threads:
            # (The deadline of the look-up is in the context, which a thread has of its own.)
            opening = [threads.submit(copy_context().run, self._open, one) for one in new]
        opened = [segment for future in opening if (segment := future.result()) is not None]
        added: int = self._parts.index.write(lambda db: self._insert(db, opened))
        for segment in opened:
            self._parts.opened.adopt(segment)
        return added > 0

    def _is_of_use(self, segment: SharedSegment) -> bool:
        """Whether a segment is worth looking at: it is not known here, nor was it of no use a moment ago."""
        failed = self._failed.get((segment.key, segment.upload))
        if failed is not None and time.monotonic() - failed < _AGAIN_S:
            return False
        if self._backend.records.is_refused(segment.key, segment.upload):
            return False
        return self._parts.index.read(lambda db: segment_by_key(db, segment.key)) is None

    def _open(self, found: SharedSegment) -> Segment | None:
        """The segment, with what the index must know of it read and checked; `None` if it cannot be used."""
        try:
            segment = self._parts.opener(self._backend.open(found.key))
            if segment.key != found.key or segment.header.hashes(segment.token_ids)[-1].hex() != found.key:
                raise SegmentCorruptError(f"{segment.name}: is not the segment that its name says", segment)
        except Exception as error:
            self._backend.forget(found.key)
            if seconds_left() <= 0:
                logger.debug("a segment of the shared store was not read in time: %s", in_words(found.key, error))
                return None
            # (A segment may have been made to stop us, by whatever a parser or an allocation can raise.)
            logger.warning("a segment of the shared store is not used: %s", in_words(found.key, error))
            if len(self._failed) >= _REMEMBERED:
                self._failed.clear()
            self._failed[found.key, found.upload] = time.monotonic()
            if isinstance(error, SegmentCorruptError):
                self._backend.on_damaged(found)
            return None
        return segment

    def _insert(self, db: sqlite3.Connection, segments: Sequence[Segment]) -> int:
        added = 0
        for segment in segments:
            if segment_by_key(db, segment.key) is None:
                blob = segment.blob
                pinned = self._parts.pins.holds(segment.key)
                insert_segment(db, segment.header, segment.token_ids, blob.stored_bytes, time.time(), pinned)
                added += 1
        return added
