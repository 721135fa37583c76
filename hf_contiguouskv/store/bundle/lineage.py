"""Whether a segment from outside fits: it is named by its own tokens, and continues a prefix of the same model."""

from __future__ import annotations

import re
import sqlite3

from ...errors import StoreError
from ..format import SegmentHeader
from ..hashing import TokenIds, root_hash, segment_hashes
from ..prefix_store import PrefixStore
from ..rows import SegmentRow, find_chunk, segment_by_id
from ..segment import Segment

_FINGERPRINT = re.compile(r"[0-9a-f]{32}")


class Lineage:
    """What new segments may continue: those of a store, and those that were accepted before.

    Args:
        store: the one that they shall join.
    """

    def __init__(self, store: PrefixStore) -> None:
        self._store = store
        # By the hash of a chunk: its position in the prefix, and the segment that it is in.
        self._accepted: dict[bytes, tuple[int, SegmentHeader]] = {}

    def accept(self, header: SegmentHeader, ids: TokenIds) -> None:
        """Let later segments continue this one, whose bytes have been verified. `ids`: int64 `[num_tokens]`."""
        for position, name in enumerate(header.hashes(ids)):
            self._accepted[name] = (header.first_chunk + position, header)

    def problem(self, header: SegmentHeader, ids: TokenIds) -> str | None:
        """Why a segment does not fit, in words; `None` when it does. `ids`: int64 `[num_tokens]`."""
        if not _FINGERPRINT.fullmatch(header.fingerprint):
            return "the fingerprint of its model is none"
        if header.first_chunk == 0:
            return self._beginning_problem(header, ids)
        if header.beginning:
            return "it continues a prefix and claims to begin one"
        try:
            found = self._accepted.get(header.parent_hash) or self._stored(header.parent_hash)
        except StoreError as error:
            return f"what it continues cannot be read: {error}"
        if found is None:
            return (
                f"it continues chunk {header.parent}, which neither the store nor a sound segment of the bundle holds"
            )
        position, parent = found
        for name, theirs, own in (
            ("position", position + 1, header.first_chunk),
            ("model", parent.fingerprint, header.fingerprint),
            ("root", parent.root, header.root),
            ("salt", parent.salted, header.salted),
            ("geometry", parent.geometry, header.geometry),
        ):
            if theirs != own:
                return f"its {name} is not that of segment {parent.key}, which it continues"
        return None

    def is_findable(self, header: SegmentHeader) -> bool:
        """Whether the store, with the salt that it has, looks for this segment's prefix at all."""
        return header.root == self._store._finder.root(header.fingerprint, header.geometry.chunk_size).hex()

    def _beginning_problem(self, header: SegmentHeader, ids: TokenIds) -> str | None:
        c = header.geometry.chunk_size
        beginning = None
        if not header.salted:
            if header.root != root_hash(header.fingerprint, c).hex():
                return "its root is not that of its model"
            beginning = segment_hashes(root_hash("", c), ids[:c], c, first=True)[0].hex()
        elif self.is_findable(header):
            beginning = self._store._finder.beginning(ids, c)
        # (With a salt that is not ours, nothing can be said.)
        if beginning is not None and header.beginning != beginning:
            return "the name of its beginning is not that of its tokens"
        return None

    def _stored(self, chunk: bytes) -> tuple[int, SegmentHeader] | None:
        def query(db: sqlite3.Connection) -> tuple[SegmentRow, int] | None:
            place = find_chunk(db, chunk)
            return None if place is None else (segment_by_id(db, place[0]), place[1])

        found = self._store._read(query)
        if found is None:
            return None
        row, position = found
        # The index only claims it: the header of the segment has a checksum.
        segment = Segment(self._store.backend.open(row.key))
        try:
            return segment.first_chunk + position, segment.header
        finally:
            segment.close()
