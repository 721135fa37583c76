"""Sending what this machine has computed to the shared store, in the background."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import threading
import time
from collections.abc import Callable

from ...errors import SegmentCorruptError, SegmentMissingError
from ..background import Background
from ..hashing import chain_hashes
from ..local_disk import LocalDisk
from ..parts import StoreParts
from ..rows import SegmentRow, segment_by_key
from ..search import chain_of
from ..segment import Segment
from ..verification import segment_problems
from .backend import FleetBackend
from .catalog import Catalog, Description, Published
from .computed import Computed, Since, ticks, unknown
from .engine import EngineUnavailableError
from .names import SharedSegment

logger = logging.getLogger("hf_contiguouskv")

# What could not be sent is tried again after so long, at the next look-up.
_TRY_AGAIN_S = 30.0


class Sender:
    """Sends segments, one after another, on a thread of its own. What could not be sent is tried again later.

    Args:
        parts: of the store on this machine.
        backend: of the store.
        catalog: of the shared store.
        count: adds to a counter of the statistics.
    """

    def __init__(
        self, parts: StoreParts, backend: FleetBackend, catalog: Catalog, count: Callable[[str, int], None]
    ) -> None:
        self._parts = parts
        self._backend = backend
        self._catalog = catalog
        self._count = count
        self._background = Background()
        self._lock = threading.Lock()
        # When each was stored here, if this process stored it.
        self._waiting: dict[str, Computed] = {}
        self._tried_s = time.monotonic()

    def submit(self, key: str) -> None:
        """Send a segment that was just published, after those that were submitted before."""
        with self._lock:
            self._waiting[key] = Since(ticks(), self._catalog.now)
        self._background.submit(self._send_waiting)

    def submit_unsent(self) -> None:
        """Send what this machine has and never sent, an earlier process included."""

        def find() -> None:
            here, sent = self._backend.local.list_keys(), self._backend.records.sent()
            if sent is None:
                return  # (Whatever was deleted from the shared store would be sent again.)
            self._backend.records.forget_sent(sent - here)
            with self._lock:
                self._waiting = dict.fromkeys(sorted(here - sent), unknown) | self._waiting
            self._send_waiting()

        self._background.submit(find)

    def nudge(self) -> None:
        """Try once more what could not be sent, if the last try was a while ago."""
        with self._lock:
            due = bool(self._waiting) and time.monotonic() - self._tried_s > _TRY_AGAIN_S
            if due:
                self._tried_s = time.monotonic()
        if due:
            self._background.submit(self._send_waiting)

    def run(self, function: Callable[[], object]) -> None:
        """Run something else that takes long on the thread that sends."""
        self._background.submit(function)

    def flush(self) -> bool:
        """Try once more what could not be sent, and wait until all was tried; whether anything still had to."""
        if self.waiting:
            self._background.submit(self._send_waiting)
        return self._background.flush()

    @property
    def waiting(self) -> int:
        """Segments that were not sent yet."""
        with self._lock:
            return len(self._waiting)

    def close(self) -> None:
        """Try what is left once more, then stop."""
        self.flush()
        self._background.close()

    def _send_waiting(self) -> None:
        with self._lock:
            self._tried_s = time.monotonic()
            keys, computed = list(self._waiting), dict(self._waiting)
        # (A segment must not be found before the one that it continues, or a look-up ends there.)
        keys = self._parents_first(keys)
        with self._lock:
            for key in keys:
                self._waiting.pop(key, None)
        for number, key in enumerate(keys):
            try:
                self._send(key, computed[key])
            except (EngineUnavailableError, PermissionError) as error:
                with self._lock:
                    self._waiting = {key: computed[key] for key in keys[number:]} | self._waiting
                report = logger.warning if isinstance(error, PermissionError) else logger.debug
                report("%d segments are sent to %s later: %s", len(keys) - number, self._catalog.engine.name, error)
                self._count("remote.send_failures", 1)
                return
            except Exception as error:
                # One that cannot be sent must not keep the others from it.
                logger.warning("segment %s could not be sent to %s: %s", key, self._catalog.engine.name, error)
                self._count("remote.send_failures", 1)

    def _parents_first(self, keys: list[str]) -> list[str]:
        rows = self._parts.index.read(lambda db: [(key, segment_by_key(db, key)) for key in keys])
        place = {key: row.first_chunk if row is not None else 0 for key, row in rows}
        return sorted(keys, key=place.__getitem__)

    def _send(self, key: str, computed: Computed) -> None:
        try:
            done = send_segment(self._parts, self._backend.local, self._catalog, key, computed)
        except SegmentMissingError as error:
            logger.debug("segment %s is not sent: %s", key, error)  # It, or what it continues, was evicted meanwhile.
            return
        self._backend.records.note_sent(key)
        if done is None:
            return
        if done.withheld:
            logger.info("segment %s is not sent: it was deleted from %s", key, self._catalog.engine.name)
            self._count("remote.withheld", 1)
            return
        self._count("remote.published" if done.won else "remote.published_by_others", 1)


def send_segment(
    parts: StoreParts, disk: LocalDisk, catalog: Catalog, key: str, computed: Computed = unknown
) -> Published | None:
    """Publish a segment of this machine in a shared store, unless it is there.

    Args:
        parts: of the store on this machine.
        disk: where it lies.
        catalog: of the shared store.
        key: of the segment.
        computed: when it was computed.

    Returns:
        what came of it; `None` for a part of one chunk, which is quicker computed than asked for.

    Raises:
        SegmentMissingError: it, or what it continues, is not on this machine.
        StoreError: it cannot be read.
        OSError: the engine failed.
    """
    with contextlib.closing(parts.opener(disk.open(key))) as segment:
        shared = SharedSegment(key, "", segment.first_chunk, segment.num_tokens, segment.nbytes)
        if shared.end_chunk(segment.geometry.chunk_size) == segment.first_chunk:
            return None
        problems = segment_problems(segment, key)
        if problems:
            raise SegmentCorruptError(f"it is damaged, and stays here: {problems[0]}", segment)
        hashes, before = _prefix_hashes(parts, segment)
        return catalog.publish(shared, about(segment, before), hashes, disk.path_of(key), computed)


def _prefix_hashes(parts: StoreParts, segment: Segment) -> tuple[list[bytes], str]:
    """The hashes of all whole chunks of the prefix that ends with a segment of this machine, and the key of the segment
    that it continues."""

    def query(db: sqlite3.Connection) -> list[tuple[SegmentRow, int]]:
        row = segment_by_key(db, segment.key)
        if row is None:
            raise SegmentMissingError(f"segment {segment.key} is not in the index any more")
        chain = chain_of(db, row)
        if isinstance(chain, int):
            raise SegmentMissingError(f"segment {segment.key}: chunk {chain} before it is not stored here")
        return chain

    size = segment.geometry.chunk_size
    found: list[bytes] = []
    before = bytes.fromhex(segment.header.root)
    chain = parts.index.read(query)
    for row, chunks in chain:
        piece = parts.opened.get(row).token_ids[: chunks * size]
        found += chain_hashes(found[-1] if found else before, piece, size, first=not found)
    return found, chain[-2][0].key if len(chain) > 1 else ""


def about(segment: Segment, continues: str) -> Description:
    """What the head of a segment says of it.

    Args:
        segment: open.
        continues: key of the segment that holds the chunk before it; empty where there is none.
    """
    header, geometry = segment.header, segment.geometry
    return Description(
        fingerprint=header.fingerprint,
        root=header.root,
        parent=header.parent,
        continues=continues,
        chunk_size=geometry.chunk_size,
        dtype=geometry.dtype_name,
        layers=geometry.num_layers,
    )
