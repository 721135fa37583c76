"""What a store says about itself: plain records."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .rows import SegmentRow
from .segment import Segment


@dataclass(frozen=True, slots=True)
class SegmentSpan:
    """Consecutive chunks of a stored prefix that lie in one segment.

    Attributes:
        segment: open handle.
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
        bytes: what it takes up where it lies.
        dtype: of K and V.
        layers: layers with a KV cache.
        fingerprint: of the model, hex.
        parent: chain hash of the chunk before, hex; "" when the segment begins its prefix.
        created: when it was published, seconds since the epoch.
        last_used: when it was last looked up, seconds since the epoch.
        uses: how often it was looked up.
        pinned: whether eviction leaves it alone.
        compute_s: how long the model took to compute it, seconds; 0 is unknown.
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
    compute_s: float = 0.0

    @classmethod
    def from_row(cls, row: SegmentRow, uses: int = 0, last_used: float = 0.0) -> PrefixInfo:
        """The record of a row of the index, with uses that the index does not know of yet."""
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
            last_used=max(row.last_used, last_used),
            uses=row.uses + uses,
            pinned=bool(row.pinned),
            compute_s=row.compute_ms / 1000,
        )


@dataclass(frozen=True)
class StoreProblem:
    """One thing that `verify` found wrong.

    Attributes:
        key: of the segment, or "" when it has none.
        where: the blob, the index, or a file of the store.
        problem: what is wrong, in words.
    """

    key: str
    where: str
    problem: str

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}"


@dataclass(frozen=True)
class GcReport:
    """What `gc` did, or would do.

    Attributes:
        removed: leftovers of crashes that were deleted.
        quarantine: keys of damaged segments that were kept to be looked at, and were deleted.
        expired: keys of segments that nobody used for `ttl_s`.
        bytes_freed: bytes of all of these.
        indexed: keys of segments that were not in the index and now are.
        forgotten: keys in the index whose segment is gone.
        repaired: keys of segments of which the index said something wrong.
        unreachable: keys of segments whose parent is not stored; found again once it is.
        unreadable: segments that cannot be indexed, with the reason; left in place.
        in_use: partial files that another process is writing.
    """

    removed: tuple[str, ...] = ()
    quarantine: tuple[str, ...] = ()
    expired: tuple[str, ...] = ()
    bytes_freed: int = 0
    indexed: tuple[str, ...] = ()
    forgotten: tuple[str, ...] = ()
    repaired: tuple[str, ...] = ()
    unreachable: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()
    in_use: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain lists and numbers (ready for JSON)."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
