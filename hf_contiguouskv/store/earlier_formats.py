"""Segments of formats 1 and 2, of earlier releases: they are brought to the present format, then used.

These formats have the payload of the present ones, but name chunks in another way:

    hash[-1] = H("hf_contiguouskv/1", fingerprint, chunk_size, salt)
    hash[i]  = H(hash[i-1] + token ids of chunk i)

A name does not tell there whether it stands for a root or for a chunk. So nothing of such a segment is used as it lies:
its chain is proved, its K and V are compared with their checksums, all that approximates them is made again, and the
result is published as a new segment. Then the old file is deleted. A prompt does so for what it needs, when it is
looked up, because only the prompt's request knows its salt; `repack` does so for the rest.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import sqlite3
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from hashlib import blake2b

from ..errors import SegmentCorruptError, SegmentMissingError, StoreError
from .derived import write_again
from .finding import Finder
from .format import SegmentHeader, parse_earlier_header
from .hashing import HASH_BYTES, TokenIds, segment_hashes
from .output import SegmentOutput
from .parts import StoreParts
from .publishing import Publisher
from .segment import Segment

logger = logging.getLogger("hf_contiguouskv")

# Names of whole chunks and of roots in earlier formats, and the present names of the same chunks and roots.
_Names = dict[bytes, bytes]


def earlier_root(fingerprint: str, chunk_size: int, salt: bytes) -> bytes:
    """The hash before the first chunk, in formats 1 and 2."""
    digest = blake2b(digest_size=HASH_BYTES)
    for part in (b"hf_contiguouskv/1", fingerprint.encode(), str(chunk_size).encode(), salt):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def earlier_hashes(before: bytes, ids: TokenIds, chunk_size: int) -> list[bytes]:
    """Names in formats 1 and 2 of the chunks of `ids` (int64 `[n]`), a partial last one included, after `before`."""
    hashes = []
    for start in range(0, len(ids), chunk_size):
        before = blake2b(before + ids[start : start + chunk_size].tobytes(), digest_size=HASH_BYTES).digest()
        hashes.append(before)
    return hashes


@dataclass(frozen=True)
class _Waiting:
    """A segment of an earlier format; `names` are those of its chunks there, one after the other."""

    key: str
    header: SegmentHeader
    names: bytes

    @property
    def model(self) -> tuple[str, int]:
        return self.header.fingerprint, self.header.geometry.chunk_size

    def shared_chunks(self, names: _Names) -> int:
        """How many chunks a prompt shares with its prefix; 0: none that is in this segment.

        Args:
            names: of the chunks of the prompt, and among them what the segment continues.
        """
        starts = range(0, len(self.names), HASH_BYTES)
        known = (self.names[start : start + HASH_BYTES] in names for start in starts)
        own = sum(1 for _ in itertools.takewhile(bool, known))
        return self.header.first_chunk + own if own else 0


class EarlierSegments:
    """The segments of earlier formats that lie in a store. Threads may share it.

    Args:
        parts: of the store.
        finder: of the store.
        publisher: of the store.

    Attributes:
        brought: how many were brought, by this process or another.
    """

    def __init__(self, parts: StoreParts, finder: Finder, publisher: Publisher) -> None:
        self._parts, self._finder, self._publisher = parts, finder, publisher
        self.brought = 0
        self._waiting: dict[str, _Waiting] = {}
        self._lock = threading.Lock()

    def note(self, keys: Iterable[str]) -> None:
        """Remember segments of earlier formats. What cannot be read stays where it is."""
        if self._parts.key is not None:
            return  # (They were stored without a key.)
        for key in keys:
            try:
                with contextlib.closing(self._open(key)) as segment:
                    header = segment.header
                    hashes = earlier_hashes(header.parent_hash, segment.token_ids, header.geometry.chunk_size)
                    if hashes[-1].hex() != key:
                        raise SegmentCorruptError(f"{segment.name}: its token ids do not have this name", segment)
                    self._waiting[key] = _Waiting(key, header, b"".join(hashes))
            except (StoreError, OSError) as error:
                if self._parts.tenant.is_operator:
                    logger.warning("skipped: %s", error)
        if self._waiting and self._parts.tenant.is_operator:  # (Whose they are, a tenant cannot tell.)
            logger.warning(
                "%d segments in %s are of an earlier format: each is brought to the present one when a prompt needs "
                "it, or all of them by `contiguouskv repack STORE --all`",
                len(self._waiting),
                self._parts.folder.name,
            )

    def bring(self, fingerprint: str, ids: TokenIds, chunk_size: int, found: int) -> None:
        """Bring what begins a prompt to the present format, as far as it shares more whole chunks than are found.

        Args:
            fingerprint: of the model.
            ids: int64 `[n]`, of the prompt.
            chunk_size: of the cache that asks.
            found: tokens that are found without it.

        Where another thread brings it already, this waits. What fails is left where it is, and not tried again.
        """
        if (fingerprint, chunk_size) not in self.models:
            return
        root = earlier_root(fingerprint, chunk_size, self._parts.tenant.salt)
        earlier = earlier_hashes(root, ids[: len(ids) // chunk_size * chunk_size], chunk_size)
        present = self._finder.hashes(fingerprint, ids, chunk_size)
        names = dict(zip(earlier, present, strict=True)) | {root: self._finder.root(fingerprint, chunk_size)}
        with self._lock:
            self._bring_known(names, lambda one: one.shared_chunks(names) * chunk_size > found)

    def bring_all(self, progress: Callable[[int], object] = lambda nbytes: None) -> list[str]:
        """Bring all segments of this tenant to the present format, as far as what they continue is stored.

        Args:
            progress: called with the bytes of each segment that was done.

        Returns:
            the keys of the new segments.
        """
        done: list[str] = []
        with self._lock:
            for model in self.models:
                while some := self._bring_known(self._stored_names(*model), lambda one: True, progress):
                    done += some
        return done

    @property
    def models(self) -> set[tuple[str, int]]:
        """Fingerprint and chunk size of all that may still be brought."""
        return {one.model for one in list(self._waiting.values())}

    @property
    def waiting_bytes(self) -> int:
        """Bytes of all that may still be brought."""
        return sum(one.header.nbytes for one in list(self._waiting.values()))

    def _open(self, key: str) -> Segment:
        return Segment(self._parts.backend.open(key), parse=parse_earlier_header)

    def _bring_known(
        self, names: _Names, wanted: Callable[[_Waiting], bool], progress: Callable[[int], object] = lambda nbytes: None
    ) -> list[str]:
        """Bring the segments whose root and beginning have present names, parents before what continues them."""
        done: list[str] = []
        for one in sorted(self._waiting.values(), key=lambda one: one.header.first_chunk):
            root = names.get(bytes.fromhex(one.header.root))
            before = names.get(one.header.parent_hash)
            if root is None or before is None or not wanted(one):
                continue
            try:
                done.append(self._bring_one(one, root, before))
                self.brought += 1
            except SegmentMissingError:
                self.brought += 1  # Another process has brought it, or it was deleted.
            except (StoreError, OSError) as error:
                logger.warning("a segment of an earlier format is left as it is: %s", error)
            # (Last: who finds nothing waiting any more looks at the count.)
            del self._waiting[one.key]
            progress(one.header.nbytes)
        return done

    def _bring_one(self, one: _Waiting, root: bytes, before: bytes) -> str:
        """Publish a segment in the present format, and delete the old file.

        Args:
            one: the segment.
            root: the present hash before the first chunk of its prefix.
            before: the present name of the chunk before it; `root`, where it begins the prefix.

        Returns:
            its present key.
        """
        first, c = one.header.first_chunk == 0, one.header.geometry.chunk_size
        with contextlib.closing(self._open(one.key)) as segment:
            ids = segment.token_ids
            header = replace(
                one.header,
                geometry=one.header.geometry.with_index(one.header.geometry.indexed_layers, 8),
                root=root.hex(),
                parent="" if first else before.hex(),
                key=segment_hashes(before, ids, c, first=first)[-1].hex(),
                beginning=self._finder.beginning(ids, c) if first else "",
            )
            pinned = self._parts.pins.holds(one.key)
            output = SegmentOutput(header, ids, self._parts.backend.create(header.key, header.nbytes))
            try:
                write_again(segment, output)
                output.finish(header.compute_ms / 1000)
                self._publisher.publish(output.header, ids, output.blob, pinned)
            finally:
                output.blob.discard()
        if pinned:
            self._parts.pins.set(header.key, True)
            self._parts.pins.set(one.key, False)
        self._parts.backend.delete(one.key)
        return header.key

    def _stored_names(self, fingerprint: str, chunk_size: int) -> _Names:
        """The names of all whole chunks of a model that are stored in the present format."""
        root = self._finder.root(fingerprint, chunk_size)
        earlier = {root: earlier_root(fingerprint, chunk_size, self._parts.tenant.salt)}

        def query(db: sqlite3.Connection) -> None:
            for own, before, octets in db.execute(
                "SELECT chunks.hash, chunks.parent, chunks.tokens FROM chunks JOIN segments ON id = segment "
                "WHERE root = ? AND length(tokens) = ? ORDER BY first_chunk + position",
                (root, 8 * chunk_size),
            ):
                if before in earlier:
                    earlier[own] = blake2b(earlier[before] + octets, digest_size=HASH_BYTES).digest()

        self._parts.index.read(query)
        return {old: present for present, old in earlier.items()}
