"""What a store says about itself: plain records."""

from __future__ import annotations

from dataclasses import dataclass

from .index import SegmentRow
from .segment import Segment


@dataclass(frozen=True, slots=True)
class SegmentSpan:
    """Consecutive chunks of a stored prefix that lie in one segment.

    Attributes:
        segment: open handle of the file.
        first_chunk: position of the first of these chunks in the prefix.
        chunks: how many.
        offset: position of the first of these chunks in the segment.
    """

    segment: Segment
    first_chunk: int
    chunks: int
    offset: int


@dataclass(frozen=True, slots=True)
class StoredPrefix:
    """A prefix that the store holds.

    Attributes:
        tokens: its length; may end inside a chunk.
        spans: where its chunks lie, in order, from chunk 0 to the one that holds the last token.
    """

    tokens: int
    spans: tuple[SegmentSpan, ...]


@dataclass(frozen=True)
class PrefixInfo:
    """What `PrefixStore.entries` says about one segment, and the prefix that ends with it.

    Attributes:
        key: name of the segment, hex.
        tokens: length of the whole prefix that ends with this segment, parents included.
        chunks: chunks in this segment alone.
        bytes: size of its file.
        dtype: of K and V.
        layers: layers with a KV cache.
        fingerprint: of the model, hex.
        parent: chain hash of the chunk before, hex; "" when the segment begins its prefix.
        created: when it was published, seconds since the epoch.
        last_used: when it was last looked up, seconds since the epoch.
        uses: how often it was looked up.
        pinned: whether eviction leaves it alone.
    """

    key: str
    tokens: int
    chunks: int
    bytes: int
    dtype: str
    layers: int
    fingerprint: str
    parent: str
    created: float
    last_used: float
    uses: int
    pinned: bool

    @classmethod
    def from_row(cls, row: SegmentRow) -> PrefixInfo:
        """The record of a row of the index."""
        return cls(
            key=row.key,
            tokens=row.first_chunk * row.chunk_size + row.num_tokens,
            chunks=row.num_chunks,
            bytes=row.nbytes,
            dtype=row.dtype,
            layers=row.num_layers,
            fingerprint=row.fingerprint,
            parent=row.parent.hex() if row.first_chunk else "",
            created=row.created,
            last_used=row.last_used,
            uses=row.uses,
            pinned=bool(row.pinned),
        )


@dataclass(frozen=True)
class StoreProblem:
    """One thing that `verify` found wrong.

    Attributes:
        key: of the segment, or "" when it has none.
        file: path inside the store.
        problem: what is wrong, in words.
    """

    key: str
    file: str
    problem: str

    def __str__(self) -> str:
        return f"{self.file}: {self.problem}"


@dataclass(frozen=True)
class GcReport:
    """What `gc` did, or would do.

    Attributes:
        removed: leftovers that were deleted, paths inside the store.
        bytes_freed: their bytes.
        indexed: keys of segment files that were not in the index and now are.
        forgotten: keys in the index whose file is gone.
        unreachable: keys of segments whose parent is not stored; found again once it is.
        unreadable: segment files that cannot be indexed, with the reason; left in place.
        in_use: partial files that another process is writing.
    """

    removed: tuple[str, ...] = ()
    bytes_freed: int = 0
    indexed: tuple[str, ...] = ()
    forgotten: tuple[str, ...] = ()
    unreachable: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()
    in_use: tuple[str, ...] = ()
