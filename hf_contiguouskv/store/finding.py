"""Finding the longest stored beginning of a prompt, and proving that it is what was asked for.

The index only *claims* that some segments hold some tokens. Before a segment is used, its own header (which has a
checksum) must agree: it belongs to this model and tenant, it continues the very chunks before it, and its name, a hash
over all its tokens, is the one that these tokens have. So whatever happens to the index, a look-up can miss but not
return another prefix's bytes.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Hashable
from dataclasses import dataclass
from functools import partial

from ..errors import (
    SegmentCorruptError,
    SegmentKeyError,
    SegmentMissingError,
    SegmentReadError,
    StoreError,
    StoreFormatError,
    UntrustedOwnerError,
)
from ..model.kv_geometry import KVGeometry
from .entries import SegmentSpan, StoredPrefix
from .hashing import ChainMemory, TokenIds, chunk_hash, root_hash, segment_hashes
from .parts import StoreParts
from .rows import SegmentRow, drop_segment
from .search import Chain, is_stored_for_another_model, longest_match
from .segment import Segment

logger = logging.getLogger("hf_contiguouskv")

# An index that contradicts the segments is rebuilt in the middle of a look-up, but not at every look-up.
_REBUILD_AGAIN_S = 600.0


@dataclass(frozen=True)
class Found:
    """What a look-up found.

    Attributes:
        stored: the longest stored beginning, or `None` when not even one token is stored.
        shortened_by: why it is not longer although the index knew more: "corrupt" or "expired"; `None` if it did not.
    """

    stored: StoredPrefix | None
    shortened_by: str | None = None


@dataclass(frozen=True)
class _Prompt:
    """Token ids with their hashes: what a chain of segments is compared with."""

    fingerprint: str
    root: bytes
    salted: bool
    ids: TokenIds
    chunk_size: int
    hashes: list[bytes]
    geometry: KVGeometry | None

    def fits(self, segment: Segment) -> bool:
        """Whether its KV has the shape and dtype that the model's has (its writer may have lied)."""
        return self.geometry is None or self.geometry.same_kv(segment.geometry)

    def is_contradicted_by(self, segment: Segment) -> bool:
        """Whether a header contradicts itself: the root hash covers fingerprint, chunk size and salt."""
        header = segment.header
        same = (header.fingerprint, header.salted) == (self.fingerprint, self.salted)
        same = same and header.geometry.chunk_size == self.chunk_size
        return header.root == self.root.hex() and not same

    def hash_before(self, chunk: int) -> bytes:
        return self.hashes[chunk - 1] if chunk else self.root

    def hash_after(self, tokens: int) -> bytes:
        """The name that a segment has which ends after `tokens` tokens."""
        chunk, rest = divmod(tokens, self.chunk_size)
        before = self.hash_before(chunk)
        return chunk_hash(before, self.ids[tokens - rest : tokens].tobytes(), first=chunk == 0) if rest else before

    def holds(self, segment: Segment, position: int, chunks: int, tokens: int) -> bool:
        """Whether `segment` holds chunks `position` to `position + chunks` of this prompt, up to `tokens` tokens."""
        header, c = segment.header, self.chunk_size
        first, offset = header.first_chunk, position - header.first_chunk
        if not 0 <= offset <= offset + chunks <= header.num_chunks or header.geometry.chunk_size != c:
            return False
        if header.fingerprint != self.fingerprint or header.root != self.root.hex():
            return False
        if header.parent_hash != self.hash_before(first):
            return False
        begin, end = first * c, first * c + header.num_tokens
        used = min(tokens, (position + chunks) * c)
        if used > end or (used == end and header.key != self.hash_after(end).hex()):
            return False
        # (Also where the name is right: it is only what the header says.)
        theirs = segment.token_ids[: used - begin]
        return len(theirs) == used - begin and bool((theirs == self.ids[begin:used]).all())


class Finder:
    """Looks prompts up in the index and opens what it names.

    Args:
        parts: of the store.
        ttl_s: a segment that was not used for this many seconds is not found; `None`: all are.
    """

    def __init__(self, parts: StoreParts, ttl_s: float | None) -> None:
        self._parts = parts
        self._salt = parts.tenant.salt
        self._ttl_s = ttl_s
        self._chains = ChainMemory()
        self._rebuilt_s = -_REBUILD_AGAIN_S

    def root(self, fingerprint: str, chunk_size: int) -> bytes:
        """The hash before the first chunk."""
        return root_hash(fingerprint, chunk_size, self._salt)

    def beginning(self, ids: TokenIds, chunk_size: int) -> str:
        """The name of the first chunk for no model in particular, hex."""
        return segment_hashes(self.root("", chunk_size), ids[:chunk_size], chunk_size, first=True)[0].hex()

    def hashes(self, fingerprint: str, ids: TokenIds, chunk_size: int) -> list[bytes]:
        """The chain hashes of the whole chunks of a prompt."""
        return self._chains.hashes(self.root(fingerprint, chunk_size), ids, chunk_size)

    def forget_prompts(self) -> None:
        """Forget the hashes of recent prompts: measurements of look-ups of new prompts call this."""
        self._chains = ChainMemory()

    def find(self, fingerprint: str, ids: TokenIds, chunk_size: int, geometry: KVGeometry | None = None) -> Found:
        """The longest stored beginning of `ids` (int64 `[n]`), whose KV has the shape and dtype of `geometry`.

        Raises:
            StoreError: the index cannot be read.
        """
        root = self.root(fingerprint, chunk_size)
        hashes = self._chains.hashes(root, ids, chunk_size)
        prompt = _Prompt(fingerprint, root, bool(self._salt), ids, chunk_size, hashes, geometry)
        limit, whole, reason, doubts = len(ids), len(prompt.hashes), None, 0
        while True:
            query = partial(
                longest_match,
                root=root,
                hashes=prompt.hashes[: min(whole, limit // chunk_size)],
                ids=ids[:limit],
                chunk_size=chunk_size,
            )
            found = self._parts.index.read(query)
            if found is None:
                return Found(None, reason)
            if isinstance(found, int):
                # The chunk `found` is missing, though some behind it are there. What lies before it may be whole, and
                # another prefix may share its first tokens.
                if found >= whole:
                    limit = found * chunk_size
                whole, reason = min(whole, found), reason or "corrupt"
                continue
            tokens, chain = found
            spans, problem = self._open(prompt, tokens, chain)
            if problem is None:
                return Found(StoredPrefix(tokens, spans), reason)
            if problem == "doubtful" and doubts < 2:
                doubts += 1
                self._doubt(chain, doubts)
                continue
            # What lies before the segment that cannot be used may still be whole.
            limit = sum(span.chunks for span in spans) * chunk_size
            reason = reason or ("corrupt" if problem == "doubtful" else problem)

    def _open(self, prompt: _Prompt, tokens: int, chain: Chain) -> tuple[tuple[SegmentSpan, ...], str | None]:
        """Open the segments of a chain up to the first one that cannot be used, and why it cannot."""
        spans: list[SegmentSpan] = []
        position = 0
        # What a pinned segment continues stays as well.
        safe = max((number for number, (row, _) in enumerate(chain) if row.pinned), default=-1)
        for number, (row, chunks) in enumerate(chain):
            problem = None if number <= safe else self._expired(row)
            segment = None
            if problem is None:
                segment, problem = self._segment(row)
            if segment is None:
                return tuple(spans), problem
            try:
                if prompt.is_contradicted_by(segment):
                    self.discard(segment, "its chain hashes are not those of the model that it names")
                    return tuple(spans), "corrupt"
                if not prompt.holds(segment, position, chunks, tokens):
                    return tuple(spans), "doubtful"
                if not prompt.fits(segment):
                    self.discard(segment, "its KV does not have the shape and dtype of this model's")
                    return tuple(spans), "corrupt"
            except (SegmentCorruptError, SegmentReadError) as error:
                if isinstance(error, SegmentCorruptError) or error.damage:
                    self.discard(segment, str(error))
                return tuple(spans), "corrupt"
            spans.append(SegmentSpan(segment, position, chunks, position - segment.first_chunk))
            position += chunks
        return tuple(spans), None

    def _expired(self, row: SegmentRow) -> str | None:
        if self._ttl_s is None:
            return None
        used = max(row.last_used, self._parts.uses.last_use(row.key))
        return "expired" if used < time.time() - self._ttl_s else None

    def _segment(self, row: SegmentRow) -> tuple[Segment | None, str | None]:
        """The open segment of `row`, or why there is none."""
        try:
            return self._parts.opened.get(row), None
        except (StoreFormatError, SegmentKeyError, UntrustedOwnerError) as error:
            # Not damage, and not ours to take away; what is computed now takes its place.
            logger.warning("skipped: %s", error)
            return None, "corrupt"
        except SegmentReadError as error:
            if not error.damage:
                # It may be sound, and others may read it: it stays, and this request does without it.
                logger.warning("a stored segment cannot be read now: %s", error)
                return None, "corrupt"
            self._lose(row.key, error, error.identity)
            return None, "corrupt"
        except SegmentCorruptError as error:
            # (The identity from before: a sound one may have taken its place meanwhile.)
            self._lose(row.key, error, error.identity)
            return None, "corrupt"
        except SegmentMissingError as error:
            self._lose(row.key, error, None)
            return None, "corrupt"

    def _lose(self, key: str, error: Exception, identity: Hashable) -> None:
        logger.warning("a stored segment is lost and will be computed again: %s", error)
        self._take_out(key, identity)

    def discard(self, segment: Segment, reason: str) -> None:
        """Take a segment whose bytes proved wrong out of service; what it is made of is kept aside.

        Segments that continue it stay, and are found again once its chunks have been stored again.
        """
        logger.warning("%s is taken out of service: %s", segment.name, reason)
        self._take_out(segment.key, segment.identity)

    def _take_out(self, key: str, identity: Hashable) -> None:
        # Nothing here may fail the request, and nothing depends on it: the next look-up would find out again.
        self._parts.opened.forget([key])
        try:
            if identity is not None and self._parts.backend.quarantine(key, identity):
                self._parts.counters.add("quarantined")
            self._parts.index.try_write(lambda db: self._drop_if_gone(db, key))
        except (StoreError, OSError) as error:
            logger.warning("segment %s could not be taken out of service: %s", key, error)

    def _drop_if_gone(self, db: sqlite3.Connection, key: str) -> None:
        # Asked inside the transaction: another process may be storing it again.
        if self._parts.backend.identity(key) is None:
            drop_segment(db, key)

    def _doubt(self, chain: Chain, times: int) -> None:
        """Index and segments contradict each other: look again, for a segment may just have been replaced; rebuild."""
        self._parts.opened.forget([row.key for row, _ in chain])
        if times == 2 and time.monotonic() - self._rebuilt_s > _REBUILD_AGAIN_S:
            self._rebuilt_s = time.monotonic()
            logger.warning("%s contradicts the segments: it is rebuilt from them", self._parts.index.path)
            try:
                self._parts.index.rebuild()
            except StoreError as error:
                logger.warning("%s could not be rebuilt: %s", self._parts.index.path, error)

    def why_missing(self, found: Found, fingerprint: str, ids: TokenIds, chunk_size: int) -> str:
        """Why nothing was found: "corrupt", "expired", "other_model" or "not_stored"."""
        if found.shortened_by is not None:
            return found.shortened_by
        if len(ids) == 0:
            return "not_stored"
        beginning = ids[:chunk_size].tobytes()
        other = self._parts.index.read(
            lambda db: is_stored_for_another_model(db, self.root, fingerprint, chunk_size, beginning)
        )
        return "other_model" if other else "not_stored"
