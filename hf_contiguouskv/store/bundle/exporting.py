"""Writing a bundle."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...errors import InputError, SegmentCorruptError
from ..backend import checked_key
from ..chains import chains
from ..format import SegmentHeader
from ..local_disk import SUFFIX, FileBlob, sync_folder
from ..prefix_store import PrefixStore
from ..segment import Segment
from ..verification import segment_problems
from .card import card, card_data
from .manifest import MANIFEST, SEGMENTS, BundledSegment, encode_manifest, prefix_tokens

CARD = "README.md"
_BLOCK = 4 * 2**20


@dataclass(frozen=True)
class ExportReport:
    """What `export_bundle` wrote.

    Attributes:
        folder: the bundle.
        segments: in it, parents before children; also those that the named ones continue.
        bytes: of all of them.
        salted: keys of those that only a store with the same salt finds.
    """

    folder: str
    segments: tuple[BundledSegment, ...]
    bytes: int
    salted: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain values (ready for JSON)."""
        return asdict(self)


def export_bundle(
    store: PrefixStore,
    keys: Sequence[str],
    folder: str | os.PathLike[str],
    progress: Callable[[int, int], None] | None = None,
    base_model: str | None = None,
) -> ExportReport:
    """Write stored prefixes, and every segment that they continue, as one self-contained folder.

    Segments go as a whole: what a parent holds past the place where a named prefix continues it goes along. Each copy
    is read back and verified. Until the folder is complete it has no `bundle.json`; a folder that did not exist
    gets its name only then.

    Args:
        store: where they are.
        keys: of the segments that the prefixes end with.
        folder: missing or empty.
        progress: called with `(bytes done, bytes in all)`.
        base_model: name of the model on the Hub, for the card.

    Raises:
        InputError: `folder` is not empty or lies in the store, no key, or `base_model` is no name.
        SegmentCorruptError: a segment is damaged; nothing was written.
        StoreError: no such segment, or what it continues is lost.
        OSError: the folder cannot be written, for example because the disk is full.
    """
    if not keys:
        raise InputError("no prefix was named, so there is nothing to export")
    data = card_data(base_model)
    target = Path(os.path.abspath(folder))
    if Path(os.path.realpath(target)).is_relative_to(os.path.realpath(store.path)):
        raise InputError(f"{target} lies in the store itself; choose a folder outside of it")
    rows = {row.key: row for chain in chains(store, [checked_key(key) for key in keys]).values() for row in chain}
    ordered = sorted(rows.values(), key=lambda row: (row.first_chunk, row.created, row.key))
    done, total = 0, 0
    for row in ordered:  # What cannot be opened shows before anything is written.
        blob = store.backend.open(row.key)
        total += blob.nbytes
        blob.close()

    def copied(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    with _in_the_making(target) as place:
        (place / SEGMENTS).mkdir()
        headers: list[SegmentHeader] = []
        written: list[BundledSegment] = []
        for row in ordered:
            segment = Segment(store.backend.open(row.key))
            try:
                headers.append(segment.header)
                written.append(_export_segment(segment, place, copied))
            finally:
                segment.close()
        sync_folder(place / SEGMENTS)
        sizes = {segment.key: segment.bytes for segment in written}
        _write_file(place / CARD, card(headers, sizes, data).encode())
        _write_file(place / MANIFEST, encode_manifest(written))
        sync_folder(place)
    salted = tuple(header.key for header in headers if header.salted)
    return ExportReport(str(target), tuple(written), sum(sizes.values()), salted)


def _export_segment(segment: Segment, place: Path, copied: Callable[[int], None]) -> BundledSegment:
    """Copy one segment and verify the copy; `copied` is called with the bytes of each block."""
    path = place / SEGMENTS / f"{segment.key}{SUFFIX}"
    digest = hashlib.sha256()
    with open(path, "xb") as file:
        for start in range(0, segment.nbytes, _BLOCK):
            octets = segment.read_bytes(start, min(_BLOCK, segment.nbytes - start))
            digest.update(octets)
            file.write(octets)
            copied(len(octets))
        file.flush()
        os.fsync(file.fileno())
    copy = Segment(FileBlob(path))
    try:
        problems = segment_problems(copy, segment.key)
    finally:
        copy.close()
    if problems:
        raise SegmentCorruptError(f"segment {segment.key} is damaged ({problems[0]}), so it is not exported", segment)
    header = segment.header
    return BundledSegment(header.key, header.parent, prefix_tokens(header), segment.nbytes, digest.hexdigest())


def _write_file(path: Path, octets: bytes) -> None:
    """Make a small file: all of it, or none."""
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    with open(partial, "xb") as file:
        file.write(octets)
        file.flush()
        os.fsync(file.fileno())
    os.rename(partial, path)


@contextlib.contextmanager
def _in_the_making(target: Path) -> Iterator[Path]:
    """A folder to fill, which is `target` afterwards; after an exception, nothing of it is left.

    Raises:
        InputError: there is something at `target` already.
    """
    if not os.path.lexists(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        place = target.with_name(f"{target.name}.{secrets.token_hex(4)}.partial")
        place.mkdir()
        try:
            yield place
            os.rename(place, target)
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise
        sync_folder(target.parent)
        return
    if not target.is_dir() or os.listdir(target):
        raise InputError(f"{target} exists and is not an empty folder; a bundle needs a folder of its own")
    try:
        yield target
    except FileExistsError:
        raise  # Somebody else is writing here: nothing in it is ours to delete.
    except BaseException:
        shutil.rmtree(target / SEGMENTS, ignore_errors=True)
        for path in (*target.glob("*.partial"), target / CARD, target / MANIFEST):
            path.unlink(missing_ok=True)
        raise
