"""Segments of formats 1 and 2, which earlier releases stored: they are brought to the present format, then used.

Nothing of such a segment is used as it lies, since its names prove less (`earlier_names.py`). Its chain is proved, its
K and V are compared with their checksums, all that approximates them is made again, and the result is published as a
new segment. Then the old file is deleted. A look-up does so for what its prompt needs, and `bring_all` for the rest.

Only who has the salt of a segment can tell its new name. So a handle regards its tenant's segments alone.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import sqlite3
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from ..errors import EarlierFormatError, SegmentCorruptError, SegmentMissingError, StoreError
from ..model.kv_geometry import KVGeometry
from .derived import write_again
from .earlier_names import earlier_name, earlier_names, earlier_root
from .finding import Finder
from .format import PAGE, SegmentHeader, parse_earlier_header
from .hashing import HASH_BYTES, TokenIds, chunk_hash, segment_hashes
from .output import SegmentOutput
from .parts import StoreParts
from .publishing import Publisher
from .room import Room
from .rows import find_chunk, segment_by_id, segment_by_key, set_use
from .segment import Segment
from .verification import in_words, segment_problems

logger = logging.getLogger("hf_contiguouskv")

# Names of roots and whole chunks in earlier formats, and the present names of the same roots and chunks.
_Names = dict[bytes, bytes]


@dataclass(frozen=True)
class _Waiting:
    """A segment of an earlier format.

    Attributes:
        key: its name.
        model: fingerprint and chunk size.
        first_chunk: position of its first chunk in its prefix.
        before: name of the chunk before it, or the root.
        names: of its chunks, one after the other.
        nbytes: of its file.
    """

    key: str
    model: tuple[str, int]
    first_chunk: int
    before: bytes
    names: bytes
    nbytes: int

    @classmethod
    def of(cls, segment: Segment) -> _Waiting:
        """Raises SegmentCorruptError: its token ids do not have the name that its header tells."""
        header, c = segment.header, segment.geometry.chunk_size
        names = earlier_names(header.parent_hash, segment.token_ids, c)
        if names[-1].hex() != header.key:
            raise SegmentCorruptError(f"{segment.name}: its token ids do not have this name", segment)
        model = header.fingerprint, c
        return cls(header.key, model, header.first_chunk, header.parent_hash, b"".join(names), segment.nbytes)

    def each_name(self) -> Iterator[bytes]:
        """The names of its chunks."""
        return (self.names[start : start + HASH_BYTES] for start in range(0, len(self.names), HASH_BYTES))

    def shared_chunks(self, names: _Names) -> int:
        """How many whole chunks a prompt with these `names` shares with its prefix; 0: none that is in this segment."""
        own = sum(1 for _ in itertools.takewhile(names.__contains__, self.each_name()))
        return self.first_chunk + own if own and self.before in names else 0


class EarlierSegments:
    """The segments of earlier formats in a store, as far as they are this tenant's. Threads may share it.

    Args:
        parts: of the store.
        finder, publisher, room: of the store.

    Attributes:
        brought: how many were brought since the store was opened, by this process or another.
    """

    def __init__(self, parts: StoreParts, finder: Finder, publisher: Publisher, room: Room) -> None:
        self._parts, self._finder, self._publisher, self._room = parts, finder, publisher, room
        self.brought = 0
        # Replaced as a whole, or shrunk; looked at without the lock.
        self._waiting: dict[str, _Waiting] = {}
        self._lock = threading.Lock()

    def note(self, unindexed: set[str]) -> set[str]:
        """Look which segments are of an earlier format. They can be brought from now on, if they are this tenant's.

        Args:
            unindexed: keys of all segments that the index does not have.

        Returns:
            those that are of an earlier format.
        """
        found, waiting = set(), {}
        for key in sorted(unindexed):
            try:
                self._parts.opener(self._parts.backend.open(key)).close()
            except EarlierFormatError:
                found.add(key)
                one = self._noted(key)
                if one is not None:
                    waiting[key] = one
            except Exception:
                continue  # Whatever it was made to raise: `gc` says what is wrong with it.
        self._waiting = waiting
        return found

    def _noted(self, key: str) -> _Waiting | None:
        """A segment that may be brought: this tenant's, in a store without a key, as it was stored without one."""
        if self._parts.key is not None:
            return None
        try:
            with contextlib.closing(self._open(key)) as segment:
                one = _Waiting.of(segment)
                root = earlier_root(*one.model, self._parts.tenant.salt)
                return one if one.key == key and segment.header.root == root.hex() else None
        except Exception as error:
            # (Its own header may not be true, so a tenant is not told.)
            if self._parts.tenant.is_operator:
                logger.warning("skipped: %s", in_words(key, error))
        return None

    def warn(self) -> None:
        """Say that there are some, if there are."""
        if self._waiting:
            logger.warning(
                "%d segments in %s are of an earlier format: each is brought to the present one when a prompt needs "
                "it, or all of them by `contiguouskv repack STORE --earlier`",
                len(self._waiting),
                self._parts.folder.name,
            )

    @property
    def models(self) -> set[tuple[str, int]]:
        """Fingerprint and chunk size of all that may still be brought."""
        return {one.model for one in list(self._waiting.values())}

    @property
    def waiting_bytes(self) -> int:
        """Bytes of all that may still be brought."""
        return sum(one.nbytes for one in list(self._waiting.values()))

    def bring(self, fingerprint: str, ids: TokenIds, chunk_size: int, found: int) -> None:
        """Bring what begins a prompt to the present format, as far as it shares more whole chunks than are found.

        Where another thread brings it already, this waits. What cannot be brought stays where it is.

        Args:
            fingerprint: of the model.
            ids: int64 `[n]`, of the prompt.
            chunk_size: of the cache that asks.
            found: tokens that are found without it.
        """
        of_model = [one for one in list(self._waiting.values()) if one.model == (fingerprint, chunk_size)]
        if not of_model:
            return
        root = earlier_root(fingerprint, chunk_size, self._parts.tenant.salt)
        earlier = earlier_names(root, ids[: len(ids) // chunk_size * chunk_size], chunk_size)
        present = self._finder.hashes(fingerprint, ids, chunk_size)
        names = dict(zip(earlier, present, strict=True)) | {root: self._finder.root(fingerprint, chunk_size)}
        for one in sorted(of_model, key=lambda one: one.first_chunk):
            if one.shared_chunks(names) * chunk_size > found:
                self._bring(one, names)

    def bring_all(self, progress: Callable[[int], object] = lambda nbytes: None) -> list[str]:
        """Bring all segments of this tenant to the present format, as far as what they continue is stored.

        Args:
            progress: called with the bytes of each segment that was looked at.

        Returns:
            the keys of the new segments.
        """
        done: list[str] = []
        names: dict[tuple[str, int], _Names] = {model: self._stored_names(*model) for model in self.models}
        for one in sorted(self._waiting.values(), key=lambda one: one.first_chunk):
            key = self._bring(one, names[one.model])
            if key is not None:
                done.append(key)
            progress(one.nbytes)
        return done

    def _open(self, key: str) -> Segment:
        return Segment(self._parts.backend.open(key), parse=parse_earlier_header)

    def _bring(self, one: _Waiting, names: _Names) -> str | None:
        """Bring a segment, if the chunk before it is stored and there is room.

        Args:
            one: the segment.
            names: known names; those of its whole chunks are added.

        Returns:
            its present key; `None`: it was not brought, or by another thread or process.
        """
        before = names.get(one.before)
        with self._lock:  # (Of this segment alone: look-ups that need nothing of it do not wait.)
            if one.key not in self._waiting or before is None:
                return None
            key = None
            try:
                parent = self._parent_geometry(one, before)
                if one.first_chunk and parent is None:
                    return None  # It waits until what it continues is stored.
                key = self._bring_one(one, before, parent, names)
                if key is None:
                    return None
            except SegmentMissingError:
                pass  # Another process has brought it, or it was deleted.
            except Exception as error:
                logger.warning("a segment of an earlier format is left as it is: %s", in_words(one.key, error))
                del self._waiting[one.key]
                return None
            # (In this order: who finds nothing waiting any more looks at the count.)
            self.brought += 1
            del self._waiting[one.key]
            return key

    def _parent_geometry(self, one: _Waiting, before: bytes) -> KVGeometry | None:
        """Of the segment that holds the chunk before it, if that is stored."""
        root, at = self._finder.root(*one.model), one.first_chunk - 1

        def query(db: sqlite3.Connection) -> KVGeometry | None:
            place = find_chunk(db, before, root, at, whole=True) if one.first_chunk else None
            with contextlib.suppress(StoreError):
                return None if place is None else self._parts.opened.get(segment_by_id(db, place[0])).geometry
            return None

        found: KVGeometry | None = self._parts.index.read(query)
        return found

    def _bring_one(self, one: _Waiting, before: bytes, parent: KVGeometry | None, names: _Names) -> str | None:
        """Publish a segment in the present format, and delete the old file.

        Args:
            one: the segment.
            before: the present name of the chunk before it, or the root.
            parent: geometry of the segment that holds this chunk.
            names: those of its whole chunks are added.

        Returns:
            its present key; `None`: there is no room.
        """
        with contextlib.closing(self._open(one.key)) as segment:
            if _Waiting.of(segment) != one:
                raise SegmentCorruptError(f"{segment.name}: is not what it was when the store was opened", segment)
            header, ids, created = self._header(segment, one, before, parent), segment.token_ids, segment.blob.created
            pinned = self._parts.pins.holds(one.key)
            if not self._is_stored(header.key):
                if not self._has_room(header):
                    return None
                output = SegmentOutput(header, ids, self._parts.backend.create(header.key, header.nbytes))
                try:
                    write_again(segment, output)
                    output.finish(header.compute_ms / 1000)
                    if pinned:
                        self._parts.pins.set(header.key, True)
                    if self._publisher.publish(output.header, ids, output.blob, pinned):
                        self._parts.index.write(lambda db: _set_created(db, header.key, created))
                finally:
                    output.blob.discard()
        if pinned:
            self._set_pinned(header.key)
            self._parts.pins.set(one.key, False)
        self._parts.backend.delete(one.key)
        c = one.model[1]
        hashes = segment_hashes(before, ids, c, first=one.first_chunk == 0)
        names |= dict(zip(one.each_name(), hashes[: len(ids) // c], strict=False))
        return header.key

    def _header(self, segment: Segment, one: _Waiting, before: bytes, parent: KVGeometry | None) -> SegmentHeader:
        """The present header of a segment."""
        (fingerprint, c), ids = one.model, segment.token_ids
        first = one.first_chunk == 0
        geometry = segment.geometry.with_index(segment.geometry.indexed_layers, 8)
        return replace(
            segment.header,
            geometry=geometry if parent is None else geometry.continuing(parent),
            root=self._finder.root(fingerprint, c).hex(),
            parent="" if first else before.hex(),
            key=segment_hashes(before, ids, c, first=first)[-1].hex(),
            beginning=self._finder.beginning(ids, c) if first else "",
        )

    def _is_stored(self, key: str) -> bool:
        """Whether a segment with this key is stored in the present format, and every byte of it is right."""
        row = self._parts.index.read(lambda db: segment_by_key(db, key))
        twin = None if row is None else self._publisher.open_now(key)
        if twin is None:
            return False
        with contextlib.closing(twin):
            problems = segment_problems(twin, key)
            if problems:
                self._finder.discard(twin, problems[0])
            return not problems

    def _has_room(self, header: SegmentHeader) -> bool:
        """Whether a segment fits beside all that is stored: nothing is evicted for it."""
        bound, on_disk = self._room.max_disk_bytes, -(-header.nbytes // PAGE) * PAGE
        return bound is None or self._room.stored_bytes() + on_disk <= bound

    def _set_pinned(self, key: str) -> None:
        self._parts.pins.set(key, True)
        self._parts.index.write(lambda db: db.execute("UPDATE segments SET pinned = 1 WHERE key = ?", (key,)))

    def _stored_names(self, fingerprint: str, chunk_size: int) -> _Names:
        """The names of all whole chunks of a model that are stored in the present format, and of the root."""
        root = self._finder.root(fingerprint, chunk_size)
        earlier = {root: earlier_root(fingerprint, chunk_size, self._parts.tenant.salt)}

        def query(db: sqlite3.Connection) -> None:
            for own, before, octets in db.execute(
                "SELECT chunks.hash, chunks.parent, chunks.tokens FROM chunks JOIN segments ON id = segment "
                "WHERE root = ? AND length(tokens) = ? ORDER BY first_chunk + position",
                (root, 8 * chunk_size),
            ):
                # (What the index says is proved: the tokens have this name.)
                known = type(octets) is bytes and before in earlier
                if known and chunk_hash(before, octets, first=before == root) == own:
                    earlier[own] = earlier_name(earlier[before], octets)

        self._parts.index.read(query)
        return {old: present for present, old in earlier.items()}


def _set_created(db: sqlite3.Connection, key: str, created: float) -> None:
    row = segment_by_key(db, key)
    if row is not None:
        set_use(db, key, created, row.last_used, row.uses)
