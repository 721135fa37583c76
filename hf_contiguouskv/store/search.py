"""Questions to the index: the longest stored beginning of some token ids, and what continues a segment."""

from __future__ import annotations

import sqlite3

from .hashing import TokenIds
from .rows import IndexDamagedError, SegmentRow, closest_child, find_chunk, known_chunks, parent_ids, segment_by_id

# Segments from the beginning of a prefix on, and how many chunks up to the end (or the next segment) each one serves.
Chain = list[tuple[SegmentRow, int]]


def longest_match(
    db: sqlite3.Connection, root: bytes, hashes: list[bytes], ids: TokenIds, chunk_size: int
) -> tuple[int, Chain] | int | None:
    """The longest stored beginning of `ids`, to the token.

    Args:
        root: the hash before the first chunk.
        hashes: of whole chunks of `ids` that may match; not necessarily all.
        ids: int64 `[n]`.
        chunk_size: tokens per chunk.

    Returns:
        `(tokens, chain)`, or `None` when nothing matches. A number: the chain is broken before that chunk (a parent
        was lost); ask again with no more hashes than that.
    """
    # Whoever stores a chunk has stored all chunks before it, so the matching ones can be found by bisection.
    low, high = 0, len(hashes)
    while low < high:
        middle = (low + high + 1) // 2
        if find_chunk(db, hashes[middle - 1]) is not None:
            low = middle
        else:
            high = middle - 1
    last = hashes[low - 1] if low else root
    rest = ids[low * chunk_size : (low + 1) * chunk_size].tobytes()
    tail = closest_child(db, last, rest) if rest else None
    if tail is not None:
        segment, position, tokens = tail
        found = _walk(db, segment, position, low + 1)
        return found if isinstance(found, int) else (low * chunk_size + tokens, found)
    if low == 0:
        return None
    found = chain_to(db, last, low)
    return found if isinstance(found, int) else (low * chunk_size, found)


def chain_to(db: sqlite3.Connection, last: bytes, chunks: int) -> Chain | int:
    """The segments of a prefix of `chunks` chunks whose last hash is `last`; a number as in `longest_match`."""
    place = find_chunk(db, last)
    return chunks - 1 if place is None else _walk(db, *place, chunks)


def _walk(db: sqlite3.Connection, segment: int, position: int, chunks: int) -> Chain | int:
    chain: Chain = []
    while True:
        row = segment_by_id(db, segment)
        chain.append((row, position + 1))
        chunks -= position + 1
        if chunks < 0 or position >= row.num_chunks:
            raise IndexDamagedError(f"segment {row.key} holds more chunks than the prefix that it is part of")
        if chunks == 0:
            return chain[::-1]
        place = find_chunk(db, row.parent)
        if place is None:
            return chunks - 1
        segment, position = place


def next_stored(db: sqlite3.Connection, hashes: list[bytes], first: int) -> int | None:
    """The first chunk from `first` on that is stored although the one before it is not, if there is any.

    That happens when a segment in the middle of a prefix was lost: what continues it needs only the missing part.
    """
    stored = known_chunks(db, hashes[first:])
    return next((chunk for chunk in range(first, len(hashes)) if hashes[chunk] in stored), None)


def continuations(db: sqlite3.Connection, row: SegmentRow) -> list[SegmentRow]:
    """`row` and all segments that could not be reached without it, parents before children."""
    parents: dict[int, set[int]] = {}
    for child, parent in parent_ids(db):
        parents.setdefault(child, set()).add(parent)
    lost = [row.id]
    grown = True
    while grown:
        # A chunk may lie in several segments: a child is lost when all that hold its parent chunk are.
        more = [child for child, held_by in parents.items() if child not in lost and held_by <= set(lost)]
        lost += more
        grown = bool(more)
    return [segment_by_id(db, number) for number in lost]
