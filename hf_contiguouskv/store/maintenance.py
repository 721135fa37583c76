"""Looking after a store folder: index files, verify them, clean up after crashes."""

from __future__ import annotations

import fcntl
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import xxhash

from ..errors import StoreError
from .entries import GcReport, StoreProblem
from .folder import MARKER, segment_files
from .format import PAGE
from .hashing import segment_hashes
from .index import SegmentRow, StoreIndex, all_segments, drop_segment, insert_segment, parent_ids
from .pread import aligned_buffer, as_memoryview
from .segment import Segment

logger = logging.getLogger("hf_contiguouskv")

# Where the file system has no locks, only age tells a leftover from a file that is being written.
_YOUNG_S = 3600.0
_SCAN_BYTES = 4 * 2**20


def index_files(db: sqlite3.Connection, folder: Path) -> None:
    """Insert every readable segment file into an empty index; a file that cannot be read is named in a warning."""
    for file in segment_files(folder):
        try:
            _index_file(db, folder, file)
        except (StoreError, OSError) as error:
            logger.warning("not indexed: %s", error)


def _index_file(db: sqlite3.Connection, folder: Path, file: str) -> str:
    segment = Segment(folder / file, direct=False)
    try:
        created = os.fstat(segment.fd_buffered).st_mtime
        insert_segment(db, segment.header, segment.token_ids, segment.file_bytes, file, created)
        return segment.key
    finally:
        segment.close()


def verify_segments(
    folder: Path, rows: Sequence[SegmentRow], *, whole_store: bool, progress: Callable[[int, int], None] | None
) -> list[StoreProblem]:
    """Compare all bytes of `rows` with their checksums; with `whole_store`, look for files outside the index too."""
    problems: list[StoreProblem] = []
    total, done = sum(row.nbytes for row in rows), 0
    for row in rows:
        try:
            segment = Segment(folder / row.file, direct=False)
        except (StoreError, OSError) as error:
            problems.append(StoreProblem(row.key, row.file, str(error)))
        else:
            try:
                problems.extend(StoreProblem(row.key, row.file, text) for text in _verify_segment(segment, row))
            finally:
                segment.close()
        done += row.nbytes
        if progress is not None:
            progress(done, total)
    if whole_store:
        known = {row.file for row in rows}
        for file in segment_files(folder):
            if file not in known:
                problems.append(StoreProblem("", file, "not in the index; `gc` adds it"))
    return problems


def _verify_segment(segment: Segment, row: SegmentRow) -> list[str]:
    header, geometry = segment.header, segment.geometry
    if header.key != row.key or header.fingerprint != row.fingerprint:
        return [f"holds segment {header.key}, expected {row.key}"]
    problems = []
    for name in header.checked_tensors:
        if name.startswith("payload."):
            continue  # Its extents are compared one by one below, which tells where the damage is.
        try:
            segment.read_tensor(name)
        except StoreError as error:
            problems.append(str(error))
    if segment_hashes(header.parent_hash, _token_ids(segment), geometry.chunk_size)[-1].hex() != header.key:
        problems.append("token ids do not match the key")
    for group in range(geometry.num_groups):
        offset, nbytes = segment.tensor_extent(f"payload.{group}")
        step = max(1, _SCAN_BYTES // geometry.extent_bytes) * geometry.extent_bytes
        layers = geometry.group_layers(group)
        for start in range(0, nbytes, step):
            octets = memoryview(segment.read_bytes(offset + start, min(step, nbytes - start)))
            for inside in range(0, octets.nbytes, geometry.extent_bytes):
                chunk, place = divmod((start + inside) // geometry.extent_bytes, layers)
                layer = group * geometry.layers_per_group + place
                checksum = xxhash.xxh3_64_intdigest(octets[inside : inside + geometry.extent_bytes])
                if checksum != segment.payload_checksum(layer, chunk):
                    problems.append(f"layer {layer}, chunk {segment.first_chunk + chunk}: checksum does not match")
    return problems


def _token_ids(segment: Segment) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    offset, nbytes = segment.tensor_extent("token_ids")
    return np.frombuffer(segment.read_bytes(offset, nbytes), dtype="<i8")


def collect_garbage(folder: Path, index: StoreIndex, *, dry_run: bool) -> GcReport:
    """See `PrefixStore.gc`."""
    removed: list[str] = []
    in_use: list[str] = []
    freed = 0
    # `index.sqlite.damaged-*` has been replaced by an index that was built from the files.
    for path in sorted([*folder.glob("partial/*.partial"), *folder.glob("index.sqlite.damaged-*")]):
        name = str(path.relative_to(folder))
        nbytes = _remove_leftover(path, dry_run=dry_run)
        if nbytes is None:
            in_use.append(name)
        else:
            removed.append(name)
            freed += nbytes
    indexed: list[str] = []
    forgotten: list[str] = []
    unreadable: list[str] = []

    def reconcile(db: sqlite3.Connection) -> list[str]:
        for found in (indexed, forgotten, unreadable):
            found.clear()
        known = {row.file: row.key for row in all_segments(db)}
        files = set(segment_files(folder))
        for file in sorted(known.keys() - files):
            forgotten.append(known[file])
            drop_segment(db, known[file])
        for file in sorted(files - known.keys()):
            try:
                indexed.append(_index_file(db, folder, file))
            except (StoreError, OSError) as error:
                unreadable.append(str(error))
            except sqlite3.IntegrityError:
                unreadable.append(f"{file}: a copy of a segment that is indexed under another name")
        linked = {child for child, _ in parent_ids(db)}
        lost = [row.key for row in all_segments(db) if row.first_chunk and row.id not in linked]
        if dry_run:
            raise _DryRunEnd(lost)
        return lost

    try:
        unreachable = index.write(reconcile)
    except _DryRunEnd as outcome:
        unreachable = outcome.unreachable
    return GcReport(
        removed=tuple(removed),
        bytes_freed=freed,
        indexed=tuple(indexed),
        forgotten=tuple(forgotten),
        unreachable=tuple(unreachable),
        unreadable=tuple(unreadable),
        in_use=tuple(in_use),
    )


class _DryRunEnd(Exception):  # noqa: N818 (it reports no error)
    """Rolls a transaction back."""

    def __init__(self, unreachable: list[str]) -> None:
        self.unreachable = unreachable


def _remove_leftover(path: Path, *, dry_run: bool) -> int | None:
    """Delete a file that no process is writing; its bytes, or `None` when it is in use."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return 0
    try:
        status = os.fstat(fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        except OSError:
            if time.time() - status.st_mtime < _YOUNG_S:
                return None
        if not dry_run:
            path.unlink(missing_ok=True)
        return status.st_blocks * 512
    finally:
        os.close(fd)


def can_read_directly(folder: Path) -> bool:
    """Whether the file system of `folder` serves reads that bypass the page cache."""
    if not hasattr(os, "O_DIRECT"):
        return False
    buffer = as_memoryview(aligned_buffer(PAGE))
    try:
        fd = os.open(folder / MARKER, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        try:
            return os.preadv(fd, (buffer,), 0) > 0
        finally:
            os.close(fd)
    except OSError:
        return False
