"""What one request, and one store, did: plain counters that a program can read."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


def _no_hits() -> dict[str, int]:
    return {"device": 0, "host": 0, "disk": 0}


@dataclass
class RequestStats:
    """Counters of one cache since its prefix was attached (`reset` starts a new request).

    Attributes:
        prefix_tokens: tokens of the attached prefix.
        tokens_from_store: prefix tokens that were found in the store.
        tokens_prefilled: prefix tokens that the model had to compute.
        chunks_total: chunks of the prefix (a partial last chunk counts as one).
        chunks_used: chunks that attention uses, per full-attention layer (the largest row of a batch).
        bytes_read: bytes of this prefix that came from storage, page rounding included.
        bytes_used: bytes of K and V of the prefix that attention uses.
        bytes_identified: bytes of keys (or of their index) read from storage to choose chunks; part of `bytes_read`.
        io_wait_s: seconds in which compute stood still, waiting for reads.
        hits: chunks served, by the tier they came from.
        prefetch_hits: chunks that were read ahead of their selection and then used.
        prefetch_wasted_bytes: bytes that were read ahead and then not used.
    """

    prefix_tokens: int = 0
    tokens_from_store: int = 0
    tokens_prefilled: int = 0
    chunks_total: int = 0
    chunks_used: list[int] = field(default_factory=list)
    bytes_read: int = 0
    bytes_used: int = 0
    bytes_identified: int = 0
    io_wait_s: float = 0.0
    hits: dict[str, int] = field(default_factory=_no_hits)
    prefetch_hits: int = 0
    prefetch_wasted_bytes: int = 0

    @property
    def read_amplification(self) -> float:
        """`bytes_read / bytes_used`; 0.0 while nothing has been used."""
        return self.bytes_read / self.bytes_used if self.bytes_used else 0.0

    @property
    def payload_amplification(self) -> float:
        """Bytes of payload read on purpose / bytes used: identification and wasted prefetches left out."""
        payload = self.bytes_read - self.bytes_identified - self.prefetch_wasted_bytes
        return payload / self.bytes_used if self.bytes_used else 0.0

    def as_dict(self) -> dict[str, Any]:
        """All counters and ratios as plain numbers, lists and dicts (ready for JSON)."""
        return asdict(self) | {
            "read_amplification": self.read_amplification,
            "payload_amplification": self.payload_amplification,
        }


@dataclass
class StoreStats:
    """What a store holds and what it did since it was opened.

    Attributes:
        segments: segment files that are published.
        prefix_tokens: tokens of KV that they hold.
        disk_bytes: bytes of all segment files.
        host_bytes: bytes that this process keeps in memory for the store.
        bytes_read: bytes read from segment files since the store was opened, page rounding included.
        bytes_written: bytes of published segments written since the store was opened.
        published: segments published since the store was opened.
        evicted: segments removed to stay within `max_disk_bytes` since the store was opened.
        direct_reads: whether reads bypass the operating system's page cache (`O_DIRECT`).
    """

    segments: int = 0
    prefix_tokens: int = 0
    disk_bytes: int = 0
    host_bytes: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    published: int = 0
    evicted: int = 0
    direct_reads: bool = False

    def as_dict(self) -> dict[str, Any]:
        """All counters as plain numbers (ready for JSON)."""
        return asdict(self)
