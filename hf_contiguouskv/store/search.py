"""Questions to the index: the longest stored beginning of some token ids, and what continues a segment."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable
from operator import itemgetter

import numpy as np

from .hashing import TokenIds
from .rows import COLUMNS, MAX_TOKEN_BYTES, SegmentRow, checked_name, find_chunk, require_place, segments_by_id
from .totals import IndexDamagedError, Roots, stored_models

# Segments from the beginning of a prefix on, and how many chunks up to the end (or the next segment) each one serves.
Chain = list[tuple[SegmentRow, int]]

# (As `find_chunk`, where nothing but whether there is one matters: bisection asks many times.)
_IS_HELD = """
SELECT 1 FROM chunks LEFT JOIN segments ON id = segment
WHERE hash = ? AND (id IS NULL OR root = ? AND first_chunk + position = ?) LIMIT 1
"""

# One query for all of a chain, which may be thousands of segments long. It ends whatever the rows say: each step leaves
# fewer chunks to go. Of several segments that hold the chunk before, the one with the most chunks before it goes on; it
# must belong to the same prefix, hold the chunk at the right place, and whole: what follows a chunk that is not full
# does not continue it.
_WALK = f"""
WITH RECURSIVE chain (step, segment, position, chunks) AS (
    SELECT 0, ?, ?, ?
    UNION ALL
    SELECT chain.step + 1, chunks.segment, chunks.position, chain.chunks - chain.position - 1
    FROM chain
    CROSS JOIN segments child ON child.id = chain.segment
    CROSS JOIN chunks ON chunks.hash = child.parent AND chunks.segment = (
        SELECT held.segment FROM chunks held LEFT JOIN segments holder ON holder.id = held.segment
        WHERE held.hash = child.parent AND (holder.id IS NULL OR holder.root = child.root
            AND holder.first_chunk + held.position + 1 = chain.chunks - chain.position - 1
            AND (held.position + 1) * holder.chunk_size <= holder.num_tokens)
        ORDER BY held.position DESC LIMIT 1
    )
    WHERE typeof(chain.position) = 'integer' AND chain.position >= 0 AND chain.chunks > chain.position + 1
)
SELECT chain.step, chain.segment, chain.position, chain.chunks, {COLUMNS}
FROM chain LEFT JOIN segments ON segments.id = chain.segment
"""

# Whether the segment `child` continues chunk `chunks` of the segment `parent`. (The pluses keep SQLite from looking at
# all segments with this root: few continue this chunk.)
CONTINUES = """
    child.first_chunk > 0 AND child.parent = chunks.hash AND chunks.segment = parent.id AND +child.root = +parent.root
    AND child.first_chunk = parent.first_chunk + chunks.position + 1
    AND (chunks.position + 1) * parent.chunk_size <= parent.num_tokens
"""

_HAS_CHILD = f"""
SELECT child.id FROM segments parent
CROSS JOIN chunks ON chunks.segment = parent.id
CROSS JOIN chunks start ON start.parent = chunks.hash AND start.position = 0
CROSS JOIN segments child ON child.id = start.segment
WHERE parent.id = ? AND {CONTINUES} ORDER BY chunks.position DESC
"""

_HOLDERS = f"""
SELECT parent.id FROM segments child
CROSS JOIN chunks ON chunks.hash = child.parent CROSS JOIN segments parent ON parent.id = chunks.segment
WHERE child.id = ? AND {CONTINUES}
"""

# (UNION drops what was found before: a circle ends.)
_BELOW = f"""
WITH RECURSIVE below (id) AS (
    SELECT ?
    UNION
    SELECT child.id FROM below
    CROSS JOIN segments parent ON parent.id = below.id CROSS JOIN chunks ON chunks.segment = parent.id
    CROSS JOIN chunks start ON start.parent = chunks.hash AND start.position = 0
    CROSS JOIN segments child ON child.id = start.segment
    WHERE {CONTINUES}
)
SELECT child.first_chunk, child.id FROM below CROSS JOIN segments child ON child.id = below.id
"""
_HOLDERS_OF_SOME = _HOLDERS.replace("SELECT parent.id", "SELECT child.id, parent.id").partition("child.id = ?")
_AT_ONCE = 500


def longest_match(
    db: sqlite3.Connection, root: bytes, hashes: list[bytes], ids: TokenIds, chunk_size: int
) -> tuple[int, Chain] | int | None:
    """The longest stored beginning of `ids`, to the token.

    Args:
        db: the index.
        root: the hash before the first chunk.
        hashes: of whole chunks of `ids` that may match; not necessarily all.
        ids: int64 `[n]`.
        chunk_size: tokens per chunk.

    Returns:
        `(tokens, chain)`, or `None` when nothing matches. A number: the chain is broken before that chunk (a parent
        was lost); ask again with no more hashes than that.
    """
    # A chunk is stored only after all chunks before it, so the matching ones can be found by bisection.
    low, high = 0, len(hashes)
    while low < high:
        middle = (low + high + 1) // 2
        if db.execute(_IS_HELD, (hashes[middle - 1], root, middle - 1)).fetchone() is not None:
            low = middle
        else:
            high = middle - 1
    last = hashes[low - 1] if low else root
    rest = ids[low * chunk_size : (low + 1) * chunk_size].tobytes()
    tail = _closest_child(db, root, last, low, rest) if rest else None
    if tail is not None:
        segment, position, tokens = tail
        chain = _walk(db, segment, position, low + 1)
        return chain if isinstance(chain, int) else (low * chunk_size + tokens, chain)
    if low == 0:
        return None
    chain = chain_to(db, root, last, low)
    return chain if isinstance(chain, int) else (low * chunk_size, chain)


def chain_to(db: sqlite3.Connection, root: bytes, last: bytes, chunks: int) -> Chain | int:
    """The segments of a prefix of `chunks` chunks with the hash `root` before the first and `last` of the last one.

    A number as in `longest_match`.
    """
    place = find_chunk(db, last, root, chunks - 1)
    return chunks - 1 if place is None else _walk(db, *place, chunks)


def chain_of(db: sqlite3.Connection, row: SegmentRow) -> Chain | int:
    """The segments of the prefix that ends with a stored segment; a number as in `longest_match`."""
    return _walk(db, row.id, row.num_chunks - 1, row.first_chunk + row.num_chunks)


def _walk(db: sqlite3.Connection, segment: int, position: int, chunks: int) -> Chain | int:
    steps = []
    for step, number, place, left, *values in db.execute(_WALK, (segment, position, chunks)):
        require_place(number, place)
        steps.append((step, place, left, SegmentRow.checked(None if values[0] is None else tuple(values))))
    chain: Chain = []
    left = chunks
    # (Sorted here: SQLite would collect rows that nobody has checked. They come in this order, but it does not say so.)
    for _, place, left, row in sorted(steps, key=itemgetter(0)):
        if left <= place or place >= row.num_chunks:
            raise IndexDamagedError(f"segment {row.key} holds more chunks than the prefix that it is part of")
        chain.append((row, place + 1))
        left -= place + 1
    return left - 1 if left else chain[::-1]


def next_stored(db: sqlite3.Connection, root: bytes, hashes: list[bytes], first: int) -> int | None:
    """The first chunk from `first` on that is stored although the one before it is not, if there is any.

    That happens when a segment in the middle of a prefix was lost: what continues it needs only the missing part.
    """
    stored = (chunk for chunk in range(first, len(hashes)) if find_chunk(db, hashes[chunk], root, chunk) is not None)
    return next(stored, None)


def is_stored_for_another_model(
    db: sqlite3.Connection, root: Callable[[str, int], bytes], fingerprint: str, chunk_size: int, beginning: bytes
) -> bool:
    """Whether another model's prefix begins with the same tokens.

    Args:
        db: the index.
        root: gives the root hash of a model's prefixes, by its fingerprint and the chunk size.
        fingerprint: of the model that asks.
        chunk_size: of the prefixes.
        beginning: token ids of the first chunk, int64.
    """
    if len(beginning) > MAX_TOKEN_BYTES:
        return False  # (As `_closest_child`.)
    others = {model for model, size in stored_models(db) if size == chunk_size and model != fingerprint}
    query = "SELECT 1 FROM chunks WHERE parent = ? AND tokens = ? LIMIT 1"
    return any(db.execute(query, (root(model, chunk_size), beginning)).fetchone() for model in others)


def _closest_child(
    db: sqlite3.Connection, root: bytes, parent: bytes, at: int, tokens: bytes
) -> tuple[int, int, int] | None:
    """Among the chunks that follow `parent`, the one that shares the most leading token ids with `tokens`.

    Args:
        db: the index.
        root: the hash before the first chunk of the prefix.
        parent: the hash of the chunk before.
        at: position of the chunk in the prefix.
        tokens: ids, int64.

    Returns:
        `(segment id, position in it, shared tokens)`, or `None` when not even one token is shared.
    """
    best: tuple[int, int, int] | None = None
    if len(tokens) > MAX_TOKEN_BYTES:
        return None  # No chunk is as long, nor does SQLite look for what is longer than a row may be.
    # In sorted order nothing shares more with `tokens` than its two neighbours: the number of children does not matter.
    for condition in ("tokens >= ? ORDER BY tokens", "tokens < ? ORDER BY tokens DESC"):
        row = db.execute(
            "SELECT segment, position, tokens FROM chunks LEFT JOIN segments ON id = segment WHERE chunks.parent = ? "
            f"AND (id IS NULL OR root = ? AND first_chunk + position = ?) AND {condition} LIMIT 1",
            (parent, root, at, tokens),
        ).fetchone()
        if row is not None:
            require_place(*row[:2])
            if type(row[2]) is not bytes:
                raise IndexDamagedError("token ids of a chunk are no bytes")
            shared = _shared_tokens(row[2], tokens)
            if shared > (best[2] if best else 0):
                best = (row[0], row[1], shared)
    return best


def _shared_tokens(left: bytes, right: bytes) -> int:
    length = min(len(left), len(right)) // 8
    # (A stored chunk is never empty, and whole numbers of 8 bytes: what is left over here is damage, and not counted.)
    ours, theirs = np.frombuffer(left, dtype="<i8", count=length), np.frombuffer(right, dtype="<i8", count=length)
    different = np.flatnonzero(ours != theirs)
    return int(different[0]) if different.size else length


def children_of(db: sqlite3.Connection, number: int) -> Iterable[int]:
    """Ids of the segments that continue a chunk of segment `number`, those that continue its last one first."""
    return (child for (child,) in db.execute(_HAS_CHILD, (number,)))


def parents_of(db: sqlite3.Connection, number: int) -> list[int]:
    """Ids of the segments that hold the chunk which segment `number` continues; more than one may."""
    return [parent for (parent,) in db.execute(_HOLDERS, (number,))]


def unreachable_keys(db: sqlite3.Connection, roots: Roots = None) -> list[str]:
    """Keys of segments of `roots` that continue what is not stored, oldest first."""
    lost = f"""
    SELECT lost.created, lost.id, lost.key FROM segments lost WHERE lost.first_chunk > 0 AND NOT EXISTS (
        SELECT 1 FROM segments child
        CROSS JOIN chunks ON chunks.hash = child.parent CROSS JOIN segments parent ON parent.id = chunks.segment
        WHERE child.id = lost.id AND {CONTINUES}
    )"""
    if roots is None:
        found: Iterable[tuple[float, int, object]] = db.execute(lost)
    else:
        found = (row for root in roots for row in db.execute(f"{lost} AND lost.root = ?", (root,)))
    return [key for _, _, key in sorted({(created, number, checked_name(key)) for created, number, key in found})]


def continuations(db: sqlite3.Connection, row: SegmentRow) -> list[SegmentRow]:
    """`row` and all segments that could not be reached without it, parents before children."""
    # A chunk may lie in several segments: a child is lost when all that hold its parent chunk are. A parent begins
    # before its children, so it is known by then whether it is lost. What thousands continue thousands may hold, by an
    # index that lies: such pairs are looked at, but not kept, except for those within some segments.
    below = sorted(place for place in db.execute(_BELOW, (row.id,)) if place[1] != row.id)
    lost = {row.id: None}
    for start in range(0, len(below), _AT_ONCE):
        some: dict[int, set[int]] = {number: set() for _, number in below[start : start + _AT_ONCE]}
        kept: set[int] = set()
        before, _, after = _HOLDERS_OF_SOME
        query = f"{before}child.id IN ({', '.join('?' * len(some))}){after}"
        for child, parent in db.execute(query, list(some)):
            if parent in some:
                some[child].add(parent)
            elif parent not in lost:
                kept.add(child)
        for child, parents in some.items():
            if child not in kept and parents <= lost.keys():
                lost[child] = None
    return segments_by_id(db, list(lost))
