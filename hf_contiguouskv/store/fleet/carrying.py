"""Carrying prefixes between a store in a folder and a shared one: `contiguouskv push` and `pull`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import StoreError
from ..local_disk import LocalDisk
from ..output import as_store_error
from ..parts import StoreParts
from ..publishing import Publisher
from ..rows import SegmentRow, segment_by_key
from ..transfer import copy_segment
from .backend import FleetBackend
from .catalog import Catalog, Head
from .computed import in_any_case, unknown
from .sending import send_segment

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class CarryReport:
    """What was carried.

    Attributes:
        carried: keys of segments that were carried.
        already_there: keys of those that were there.
        bytes: of what was carried.
        withheld: keys of those that were not, because they were deleted from the shared store.
    """

    carried: tuple[str, ...]
    already_there: tuple[str, ...]
    bytes: int
    withheld: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain lists and numbers (ready for JSON)."""
        return {
            "carried": list(self.carried),
            "already_there": list(self.already_there),
            "bytes": self.bytes,
            "withheld": list(self.withheld),
        }


def push(
    parts: StoreParts,
    rows: Sequence[SegmentRow],
    catalog: Catalog,
    progress: Progress | None,
    *,
    deleted_too: bool = False,
) -> CarryReport:
    """Send segments of a store in a folder to a shared one. What is there is left; so a second call goes on.

    When a store in a folder computed a segment is not known by the engine's clock. So what was deleted for all machines
    is withheld.

    Args:
        parts: of the store in a folder.
        rows: its segments; what one continues must be among them, or be there.
        catalog: of the shared store.
        progress: called with `(bytes done, bytes in all)`.
        deleted_too: also send what was deleted for all machines.

    Raises:
        StoreError: one cannot be read, or the shared store failed.
    """
    if not isinstance(parts.backend, LocalDisk):
        raise StoreError(f"{parts.backend.name}: only a store in a folder can be pushed")
    carried: list[str] = []
    there: list[str] = []
    withheld: list[str] = []
    computed = in_any_case if deleted_too else unknown
    nbytes = done = 0
    total = sum(row.nbytes for row in rows)
    for row in sorted(rows, key=lambda row: row.first_chunk):
        try:
            published = send_segment(parts, parts.backend, catalog, row.key, computed)
        except OSError as error:
            raise StoreError(f"{catalog.engine.name}: {error.strerror or error}") from error
        if published is not None and published.won:
            carried.append(row.key)
            nbytes += published.segment.nbytes
        elif published is not None and published.withheld:
            withheld.append(row.key)
        else:
            there.append(row.key)
        done += row.nbytes
        if progress is not None:
            progress(done, total)
    return CarryReport(tuple(carried), tuple(there), nbytes, tuple(withheld))


def pull(
    heads: Sequence[Head], source: FleetBackend, parts: StoreParts, publisher: Publisher, progress: Progress | None
) -> CarryReport:
    """Copy segments of a shared store into a store in a folder. What is there is left; so a second call goes on.

    Every byte is compared with its checksum, and what approximates keys and values is made again and compared.

    Args:
        heads: of the segments; what one continues must be among them, or be there.
        source: opens what lies in the shared store.
        parts: of the store in a folder.
        publisher: of the same.
        progress: called with `(bytes done, bytes in all)`.

    Raises:
        StoreError: one cannot be read or is damaged, or the folder cannot be written.
    """
    carried: list[str] = []
    there: list[str] = []
    nbytes = done = 0
    total = max(1, sum(head.segment.nbytes for head in heads))

    def copied(octets: bytearray) -> None:
        nonlocal done
        done += len(octets)
        if progress is not None:
            progress(min(done, total), total)

    for head in sorted(heads, key=lambda head: head.segment.first_chunk):
        key = head.segment.key
        if parts.index.read(lambda db, key=key: segment_by_key(db, key)) is not None:  # type: ignore[misc]
            there.append(key)
            done += head.segment.nbytes
            continue
        try:
            with contextlib.closing(parts.opener(source.open_uncached(head.segment))) as segment:
                header, writer = copy_segment(segment, parts.backend, parts.key, copied, compare=True)
                try:
                    added = publisher.publish(header, segment.token_ids, writer)
                finally:
                    writer.discard()
        except OSError as error:
            raise error if isinstance(error, StoreError) else as_store_error(error, key) from error
        (carried if added else there).append(key)
        nbytes += head.segment.nbytes
    return CarryReport(tuple(carried), tuple(there), nbytes)
