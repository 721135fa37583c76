"""Statistics of one request and of one store: plain counters that a program can read."""

from __future__ import annotations

import threading
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
        chunks_used: chunks that attention uses, per full-attention layer and row; 16 (`chunk_size`) single tokens count
            as one.
        bytes_read: bytes of this prefix that came from storage, page rounding included.
        bytes_used: bytes of the prefix's K and V that attention uses; of a packed prefix, bytes of its packed values.
        bytes_identified: bytes of keys (or of their index) read from storage to choose chunks; part of `bytes_read`.
        io_wait_s: seconds that compute waited for reads.
        hits: chunks served, by the tier they came from.
        prefetch_hits: chunks that were read ahead of their selection and then used.
        prefetch_wasted_bytes: bytes that were read ahead and then not used.
        passed_over: forwards that automatic mode did not look up or store, by reason.
        reselections: how often chunks were chosen again while decoding (`reselect_every`). What that reads and uses is
            counted above.
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
    passed_over: dict[str, int] = field(default_factory=dict)
    reselections: int = 0

    @property
    def read_amplification(self) -> float:
        """`bytes_read / bytes_used`; 0.0 while nothing has been used."""
        return self.bytes_read / self.bytes_used if self.bytes_used else 0.0

    @property
    def payload_amplification(self) -> float:
        """Payload bytes read / bytes used, without bytes read for identification and wasted prefetches."""
        payload = self.bytes_read - self.bytes_identified - self.prefetch_wasted_bytes
        return payload / self.bytes_used if self.bytes_used else 0.0

    def as_dict(self) -> dict[str, Any]:
        """All counters and ratios as plain numbers, lists and dicts (ready for JSON)."""
        return asdict(self) | {
            "read_amplification": self.read_amplification,
            "payload_amplification": self.payload_amplification,
        }


MISS_REASONS = ("not_stored", "other_model", "corrupt", "expired")


def _no_misses() -> dict[str, int]:
    return dict.fromkeys(MISS_REASONS, 0)


REMOTE_COUNTS = (
    "asked",
    "asked_us",
    "found",
    "failures",
    "reads",
    "bytes_read",
    "read_us",
    "missing",
    "damaged",
    "published",
    "published_by_others",
    "withheld",
    "send_failures",
    "gets",
    "lists",
    "puts",
)


@dataclass
class StoreStats:
    """Contents of a store, and what this process did with it since it was opened.

    Attributes:
        segments: published segments.
        prefix_tokens: tokens whose KV they hold.
        segment_bytes: bytes that they take up in storage; `max_disk_bytes` bounds this.
        disk_bytes: bytes of the whole store: segments, index, quarantine, files being written, directories.
        quarantined_bytes: bytes of damaged segments that are kept for inspection (`gc` deletes them).
        host_bytes: bytes of host memory that this process now holds for the store: chunks, keys, buffers, tables.
        device_bytes: bytes of accelerator memory that this process now holds for the store.
        bytes_read: bytes read from segments, page rounding included.
        bytes_written: bytes of published segments.
        published: segments published.
        hits: requests' look-ups that found at least one token.
        misses: look-ups that found nothing, by reason: `not_stored`, `other_model` (stored for another model only),
            `corrupt` (damaged or lost; also counted if a request meets damage while reading), `expired`.
        passed_over: prompts that automatic mode could not serve from the store or could not store, by reason. Reasons
            are text for people and may change with any version.
        tokens_found: tokens that look-ups found.
        tokens_asked: tokens that were looked up.
        evicted: segments removed to stay within `max_disk_bytes`.
        expired: segments removed because they were unused for `ttl_s`.
        quarantined: damaged segments taken out of service.
        recovered: requests that met damage while reading and recomputed the lost tokens.
        write_failures: prefixes that could not be stored; their requests were answered from memory.
        direct_reads: whether reads bypass the operating system's page cache (`O_DIRECT`).
        remote: of a shared store, what this process asked of it: `asked` and `found` (look-ups, and those that brought
            more), `asked_us` (microseconds that look-ups took), `failures` (those that were not answered); `reads`,
            `bytes_read` and `read_us` (over the network); `missing` and `damaged` (segments that were gone, or wrong);
            `published`, `published_by_others` (another machine was faster), `withheld` (deleted for all machines after
            this one computed it) and `send_failures`; `gets`, `lists` and `puts` (requests that object storage charges
            for). Empty for a folder.
    """

    segments: int = 0
    prefix_tokens: int = 0
    segment_bytes: int = 0
    disk_bytes: int = 0
    quarantined_bytes: int = 0
    host_bytes: int = 0
    device_bytes: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    published: int = 0
    hits: int = 0
    misses: dict[str, int] = field(default_factory=_no_misses)
    passed_over: dict[str, int] = field(default_factory=dict)
    tokens_found: int = 0
    tokens_asked: int = 0
    evicted: int = 0
    expired: int = 0
    quarantined: int = 0
    recovered: int = 0
    write_failures: int = 0
    direct_reads: bool = False
    remote: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """All counters as plain numbers and dicts (ready for JSON)."""
        return asdict(self)


class StoreCounters:
    """The counters of `StoreStats` that only grow. Thread-safe.

    A counter has the name of its field in `StoreStats`; a count by reason is named "misses.<reason>",
    "passed_over.<reason>" (any text) or "remote.<what>".
    """

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._lock = threading.Lock()

    def add(self, name: str, number: int = 1) -> None:
        """Add `number` to the counter `name`."""
        with self._lock:
            self._counts[name] = self._counts.get(name, 0) + number

    def put_into(self, stats: StoreStats) -> None:
        """Copy the counters into the fields of `stats`."""
        with self._lock:
            counts = dict(self._counts)
        for name, number in counts.items():
            field_name, by_reason, reason = name.partition(".")
            if by_reason:
                getattr(stats, field_name)[reason] = number
            else:
                setattr(stats, field_name, number)
