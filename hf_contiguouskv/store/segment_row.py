"""One segment as the index knows it: what its row may say."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from .hashing import HASH_BYTES
from .totals import IndexDamagedError, is_fingerprint, is_number

_KEY = re.compile(r"[0-9a-f]{32}")
# What the format allows: see `format.py` and `model/kv_geometry.py`. Many rows may share the pages that hold a long
# value, so a small file could give any amount of text.
_MAX_DTYPE = 32
# (The year 36812: whatever is later was never the time.)
_TIMES_BELOW = 2.0**40

COLUMNS = (
    "segments.id, key, fingerprint, beginning, segments.parent, first_chunk, num_chunks, num_tokens, chunk_size, "
    "num_layers, dtype, nbytes, compute_ms, created, last_used, uses, pinned, root"
)
"""What a query must select for `SegmentRow.checked`."""


@dataclass(frozen=True, slots=True)
class SegmentRow:
    """One segment as the index knows it.

    `parent` is the chain hash before its first chunk (the root's for roots), `nbytes` what it takes up where it lies,
    `root` the hash before the first chunk of its prefix; the others are fields of its header.
    """

    id: int
    key: str
    fingerprint: str
    beginning: str
    parent: bytes
    first_chunk: int
    num_chunks: int
    num_tokens: int
    chunk_size: int
    num_layers: int
    dtype: str
    nbytes: int
    compute_ms: int
    created: float
    last_used: float
    uses: int
    pinned: int
    root: bytes = bytes(HASH_BYTES)

    @classmethod
    def checked(cls, values: tuple[Any, ...] | None) -> SegmentRow:
        """A row as the database gave it. Any byte of the file may be wrong, so nothing is taken for granted.

        Raises:
            IndexDamagedError: it makes no sense.
        """
        if values is None:
            raise IndexDamagedError("a chunk refers to a segment that is not there")
        row = cls(*values)
        # (Spelt out: a chain of thousands of rows is checked at every look-up.)
        sane = (
            is_number(row.id)
            and is_number(row.first_chunk)
            and is_number(row.num_chunks)
            and is_number(row.num_tokens)
            and is_number(row.chunk_size)
            and is_number(row.num_layers)
            and is_number(row.nbytes)
            and is_number(row.compute_ms)
            and is_number(row.uses)
            and is_key(row.key)
            and is_fingerprint(row.fingerprint)
            and type(row.beginning) is type(row.dtype) is str
            and len(row.beginning) in (0, 32)
            and len(row.dtype) <= _MAX_DTYPE
            and _is_hash(row.parent)
            and _is_hash(row.root)
            and _is_time(row.created)
            and _is_time(row.last_used)
            and row.pinned in (0, 1)
            and row.chunk_size > 0
            and row.num_tokens > 0
            and row.num_chunks == -(-row.num_tokens // row.chunk_size)
        )
        if not sane:
            raise IndexDamagedError(f"the row of segment {str(row.key)[:64]!r} makes no sense")
        return row


def distinct(rows: Iterable[SegmentRow]) -> Iterator[SegmentRow]:
    """`rows`, each of which a query must give once: pages that are used twice give rows without an end.

    Raises:
        IndexDamagedError: one comes again.
    """
    seen: set[int] = set()
    for row in rows:
        if row.id in seen:
            raise IndexDamagedError(f"segment {row.key} is listed twice")
        seen.add(row.id)
        yield row


def is_key(value: object) -> bool:
    """Whether this is a name that a segment can have: 32 hex digits."""
    return type(value) is str and _KEY.fullmatch(value) is not None


def _is_hash(value: object) -> bool:
    return type(value) is bytes and len(value) == HASH_BYTES


def _is_time(value: object) -> bool:
    return (type(value) is float or type(value) is int) and 0 <= value < _TIMES_BELOW


def checked_name(key: object) -> str:
    """The key of a segment as the database gave it.

    Raises:
        IndexDamagedError: it makes no sense.
    """
    if type(key) is not str or not is_key(key):
        raise IndexDamagedError("the key of a segment makes no sense")
    return key
