"""Comparing every byte of segments with its checksum, and the index with the segments."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from ..errors import EarlierFormatError, StoreError
from ..wording import shown
from .backend import SegmentBackend
from .derived import derived_problems
from .entries import StoreProblem
from .index import StoreIndex
from .rows import SegmentRow, chunk_rows, has_chunks, keys_of_all
from .segment import Segment, SegmentOpener
from .small_forms import small_forms

_SCAN_BYTES = 4 * 2**20


def verify_segments(
    backend: SegmentBackend,
    index: StoreIndex,
    rows: Sequence[SegmentRow],
    pinned: set[str],
    *,
    whole_store: bool,
    progress: Callable[[int, int], None] | None,
    opener: SegmentOpener = Segment,
    deep: bool = False,
) -> list[StoreProblem]:
    """Everything that is wrong with the segments of `rows`; with `whole_store`, with the rest of the store as well.

    `opener`: opens what is in a blob. `deep`: see `segment_problems`.
    """
    problems: list[StoreProblem] = []
    total, done = sum(row.nbytes for row in rows), 0
    for row in rows:
        try:
            segment = opener(backend.open(row.key))
        except Exception as error:
            problems.append(StoreProblem(row.key, f"segment {row.key}", in_words(row.key, error)))
        else:
            try:
                read = partial(tell, progress, total, done)
                found = segment_problems(segment, row.key, read, deep)
                problems += [StoreProblem(row.key, segment.name, text) for text in found]
                if not found:
                    wrong = index.read(lambda db, s=segment, r=row: row_problems(db, s, r, r.key in pinned))  # type: ignore[misc]
                    problems += [StoreProblem(row.key, "index", text) for text in wrong]
            finally:
                segment.close()
        done += row.nbytes
        tell(progress, total, done, 0)
    if whole_store:
        for key in sorted(backend.list_keys() - index.read(keys_of_all)):
            # (What is of an earlier format is verified when it is brought to the present one.)
            if not _is_of_earlier_format(backend, opener, key):
                problems.append(StoreProblem(key, f"segment {key}", "not in the index; `gc` adds it"))
    return problems


def _is_of_earlier_format(backend: SegmentBackend, opener: SegmentOpener, key: str) -> bool:
    try:
        opener(backend.open(key)).close()
    except EarlierFormatError:
        return True
    except Exception:
        pass  # (Whatever it was made to raise: `gc` says what is wrong with it.)
    return False


def tell(progress: Callable[[int, int], None] | None, total: int, before: int, read: int) -> None:
    """Report `(bytes done, bytes in all)`, if anything is to be told."""
    if progress is not None:
        progress(min(before + read, total), total)


def segment_problems(
    segment: Segment, key: str, read: Callable[[int], None] | None = None, deep: bool = False
) -> list[str]:
    """What is wrong with the bytes of a segment that should be the one named `key`, in words.

    Args:
        segment: open.
        key: its name.
        read: called with the bytes of it that have been read so far.
        deep: make what approximates or repeats the payload again from it, and compare that too.
    """
    if segment.key != key:
        return [f"holds segment {segment.key}, expected {key}"]
    try:
        problems = list(_damage(segment, read or (lambda nbytes: None)))
        # (Of a damaged payload everything would be wrong.)
        return problems or (list(derived_problems(segment)) if deep else [])
    except (StoreError, MemoryError, ValueError, OverflowError) as error:
        return [in_words(key, error)]


def in_words(key: str, error: Exception) -> str:
    """What one segment raised, in words that name it: it may have been made to raise anything."""
    if isinstance(error, (StoreError, OSError)):
        return str(error)
    return f"segment {key}: {type(error).__name__}: {shown(error)}"


def _damage(segment: Segment, read: Callable[[int], None]) -> Iterator[str]:
    header = segment.header
    small = {one.kind: one.form for one in small_forms(header.geometry)}
    for name in header.places:
        kind = name.split(".")[0]
        if kind == "payload":
            continue  # Its extents are compared one by one below, which tells where the damage is.
        try:
            tensor = segment.read_tensor(name)
        except StoreError as error:
            yield str(error)
            continue
        if kind == "padding" and bool(tensor.any()):
            yield f"{name} holds something"
        if name == "token_ids" and header.hashes(tensor.numpy())[-1].hex() != header.key:
            yield "token ids do not match the key"
        if kind in small:
            # All of them are right, so a difference is one of their own checksums.
            layer = int(name.partition(".")[2])
            sums = [segment.checksum(row) for row in tensor.numpy()]
            if sums != segment.run_checksums(layer, 0, segment.num_chunks, small[kind]):
                yield f"{name}: its bytes are right, but not the checksums of its chunks"
    for group in range(header.geometry.num_groups):
        yield from _damaged_extents(segment, group, read)


def _damaged_extents(segment: Segment, group: int, read: Callable[[int], None]) -> Iterator[str]:
    geometry = segment.geometry
    size, layers = geometry.extent_bytes, geometry.group_layers(group)
    offset, nbytes = segment.tensor_extent(f"payload.{group}")
    step = max(1, _SCAN_BYTES // size) * size
    whole, damaged = segment.checksums.begin(), False
    for start in range(0, nbytes, step):
        octets = memoryview(segment.read_bytes(offset + start, min(step, nbytes - start)))
        whole.update(octets)
        if not segment.numbers.are_finite(offset + start, octets):
            yield f"payload.{group} holds numbers that are not finite, or too large"
            return
        read(offset + start)
        for inside in range(0, octets.nbytes, size):
            chunk, place = divmod((start + inside) // size, layers)
            layer = group * geometry.layers_per_group + place
            checksum = segment.checksum(octets[inside : inside + size])
            if checksum != segment.run_checksums(layer, chunk, 1)[0]:
                damaged = True
                yield f"layer {layer}, chunk {segment.first_chunk + chunk}: checksum does not match"
    if not damaged and whole.intdigest() != segment.tensor_checksum(f"payload.{group}"):
        yield f"payload.{group}: every chunk is right, but not the checksum of all of them"


def row_problems(db: sqlite3.Connection, segment: Segment, row: SegmentRow, pinned: bool) -> list[str]:
    """Where the index says something else than a sound segment does."""
    header, geometry = segment.header, segment.geometry
    right = {
        "fingerprint": header.fingerprint,
        "beginning": header.beginning,
        "parent": header.parent_hash,
        "root": bytes.fromhex(header.root),
        "first_chunk": header.first_chunk,
        "num_tokens": header.num_tokens,
        "chunk_size": geometry.chunk_size,
        "num_layers": geometry.num_layers,
        "dtype": geometry.dtype_name,
        "compute_ms": header.compute_ms,
        "nbytes": segment.blob.stored_bytes,
        "pinned": int(pinned),
    }
    wrong = [name for name, value in right.items() if getattr(row, name) != value]
    problems = []
    if wrong:
        problems.append(f"its row of segment {row.key} is wrong in {', '.join(wrong)}; `gc` repairs it")
    if not has_chunks(db, row.id, chunk_rows(header, segment.token_ids)):
        problems.append(f"its chunks of segment {row.key} differ from the segment; `gc` repairs them")
    return problems
