"""What segments must prove to each other. Names are claims: a file says what it is called, the index what is where.

A look-up proves on its prompt that a chain of segments is the prompt's (`finding.py`). Where a segment is stored, there
is no prompt, so its own token ids are hashed.
"""

from __future__ import annotations

import numpy as np

from .format import SegmentHeader
from .hashing import TokenIds
from .segment import Segment


def is_the_same(segment: Segment, header: SegmentHeader, ids: TokenIds) -> bool:
    """Whether an open segment holds the chunks that a new one with the same name ends with, or all of them.

    Args:
        segment: the one that is there. It may begin at another chunk.
        header: of the new one.
        ids: int64 `[num_tokens]`, the token ids of the new one.

    Raises:
        SegmentCorruptError, SegmentReadError: its token ids cannot be read.
    """
    theirs = segment.header
    if theirs.key != header.key or theirs.prefix_tokens != header.prefix_tokens or not _related(theirs, header):
        return False
    own = segment.token_ids
    shared = min(len(own), len(ids))
    return bool(np.array_equal(own[-shared:], ids[-shared:])) and theirs.hashes(own)[-1].hex() == theirs.key


def continues(header: SegmentHeader, parent: Segment, position: int) -> bool:
    """Whether a segment continues the chunk at `position` of another one: a whole chunk, just before its own first one.

    Raises:
        SegmentCorruptError, SegmentReadError: the token ids of `parent` cannot be read.
    """
    theirs, c = parent.header, header.geometry.chunk_size
    if not _related(theirs, header) or theirs.first_chunk + position + 1 != header.first_chunk:
        return False
    if not 0 <= position < theirs.num_tokens // c:
        return False
    return theirs.hashes(parent.token_ids[: (position + 1) * c])[-1] == header.parent_hash


def is_superseded(segment: Segment, header: SegmentHeader, ids: TokenIds) -> bool:
    """Whether an open segment is one chunk that is not full, with which the first chunk of a new segment begins.

    Args:
        segment: the old one.
        header: of the new one.
        ids: int64 `[num_tokens]`, the token ids of the new one.

    Raises:
        SegmentCorruptError, SegmentReadError: the token ids of `segment` cannot be read.
    """
    theirs = segment.header
    if not _related(theirs, header) or (theirs.parent, theirs.first_chunk) != (header.parent, header.first_chunk):
        return False
    count = theirs.num_tokens
    shorter = count < min(header.geometry.chunk_size, len(ids))
    return shorter and bool(np.array_equal(segment.token_ids, ids[:count]))


def _related(left: SegmentHeader, right: SegmentHeader) -> bool:
    """Whether two segments are of one model and tenant, and their KV has one shape and dtype."""
    return (left.fingerprint, left.root, left.salted) == (
        right.fingerprint,
        right.root,
        right.salted,
    ) and left.geometry.same_kv(right.geometry)
