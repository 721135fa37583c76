"""Writing a bundle."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import InputError, SegmentCorruptError
from ..backend import checked_key
from ..chains import chains
from ..directory import Directory, require_trusted
from ..format import SegmentHeader
from ..local_disk import SUFFIX, FileBlob
from ..prefix_store import PrefixStore
from ..segment import Segment, SegmentOpener
from ..verification import segment_problems
from .card import card, card_data
from .lineage import Lineage
from .manifest import MANIFEST, MAX_SEGMENTS, SEGMENTS, BundledSegment, encode_manifest

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

    Segments go as a whole: what a parent holds past the place where a named prefix continues it goes along. Each is
    verified, as `import_bundle` would, and its copy is read back. Until the folder is complete it has no `bundle.json`;
    a folder that did not exist gets its name only then. Whatever the umask, the folder is for this user only (0700,
    files 0600): a bundle holds the token ids of the text.

    Args:
        store: where they are.
        keys: of the segments that the prefixes end with.
        folder: missing or empty.
        progress: called with `(bytes done, bytes in all)`.
        base_model: name of the model on the Hub, for the card.

    Raises:
        InputError: `folder` is not empty or lies in the store, no key or too many, or `base_model` is no name.
        SegmentCorruptError: a segment is damaged, or is not what it says; nothing was written.
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
    if len(ordered) > MAX_SEGMENTS:
        raise InputError(f"a bundle holds at most {MAX_SEGMENTS:,} segments, got {len(ordered):,}; make several")
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

    lineage = Lineage(store, {row.parent.hex() for row in ordered}, None, alone=True)
    with _in_the_making(target) as bundle:
        headers: list[SegmentHeader] = []
        written: list[BundledSegment] = []
        for row in ordered:
            segment = store.inner.opener(store.backend.open(row.key))
            try:
                entry, header = _export_segment(segment, row.key, store.inner.opener, lineage, bundle, copied)
                written.append(entry)
                headers.append(header)
            finally:
                segment.close()
        bundle.segments.sync()
        sizes = {segment.key: segment.bytes for segment in written}
        bundle.write(CARD, card(headers, sizes, data).encode())
        bundle.write(MANIFEST, encode_manifest(written))
    salted = tuple(header.key for header in headers if header.salted)
    return ExportReport(str(target), tuple(written), sum(sizes.values()), salted)


class _Bundle:
    """A folder that becomes a bundle, and what was made in it."""

    def __init__(self, folder: Directory) -> None:
        self.folder = folder
        self._files: list[tuple[Directory, str]] = []
        self.segments = folder.sub(SEGMENTS, create=True)
        os.fchmod(self.segments.fd, 0o700)

    def create(self, name: str) -> int:
        """Make a file among the segments; its descriptor."""
        fd = self.segments.create_file(name)
        self._files.append((self.segments, name))
        return fd

    def open(self, name: str) -> FileBlob:
        """The file `name` among the segments, to be read."""
        held = self.segments

        def folder() -> Directory:
            return Directory(os.dup(held.fd), held.name, trust_owner=held.trust_owner)

        return FileBlob(held.path_of(name), direct=False, folder=folder)

    def write(self, name: str, octets: bytes) -> None:
        """Make a file beside the segments, whole or not at all."""
        self.folder.write_file(name, octets)
        self._files.append((self.folder, name))

    def undo(self) -> None:
        """Delete what was made here, by its name, and nothing else."""
        with contextlib.suppress(OSError):
            for folder, name in self._files:
                folder.remove(name)
            self.folder.remove(SEGMENTS)


def _export_segment(
    segment: Segment, key: str, opener: SegmentOpener, lineage: Lineage, bundle: _Bundle, copied: Callable[[int], None]
) -> tuple[BundledSegment, SegmentHeader]:
    """Copy one segment and verify the copy; `copied` is called with the bytes of each block."""
    digest, name = hashlib.sha256(), f"{key}{SUFFIX}"
    with open(bundle.create(name), "r+b", buffering=0) as file:
        for start in range(0, segment.nbytes, _BLOCK):
            octets = segment.read_bytes(start, min(_BLOCK, segment.nbytes - start))
            digest.update(octets)
            rest = memoryview(octets)
            while rest:
                rest = rest[file.write(rest) :]
            copied(len(octets))
        os.fsync(file.fileno())
    # What lies in the store may change while it is read: what was written is what counts.
    with contextlib.closing(opener(bundle.open(name))) as copy:
        problems = segment_problems(copy, key, deep=True)
        if not problems:
            problems = [text for text in [lineage.problem(copy.header, copy.token_ids)] if text is not None]
        if problems:
            raise SegmentCorruptError(f"segment {key} is not sound ({problems[0]}), so it is not exported", segment)
        header = replace(copy.header)
        lineage.accept(header, copy.token_ids)
    written = BundledSegment(header.key, header.parent, header.prefix_tokens, segment.nbytes, digest.hexdigest())
    return written, header


@contextlib.contextmanager
def _in_the_making(target: Path) -> Iterator[_Bundle]:
    """A folder to fill, which is `target` afterwards; after an exception, nothing of it is left.

    Raises:
        InputError: there is something at `target` already.
    """
    if os.path.lexists(target):
        try:
            folder = Directory.open(target, trust_owner=True)
            names = folder.names()
        except OSError as error:
            raise InputError(
                f"{target} exists and is not an empty folder; a bundle needs a folder of its own"
            ) from error
        if names:
            raise InputError(f"{target} exists and is not an empty folder; a bundle needs a folder of its own")
        with contextlib.suppress(PermissionError):  # (Another user owns it; what is made in it is ours alone.)
            os.fchmod(folder.fd, 0o700)
        with _undone_after_errors(_Bundle(folder)) as bundle:
            yield bundle
        return
    # (The folder above may be shared, such as /tmp.)
    above = Directory.open(target.parent, create=True, follow=True, trust_owner=True)
    name = f"{target.name}.{secrets.token_hex(8)}.partial"
    folder = above.sub(name, create=True)
    require_trusted(os.fstat(folder.fd), folder.name)
    try:
        with _undone_after_errors(_Bundle(folder)) as bundle:
            yield bundle
            above.rename(name, above, target.name)
    except BaseException:
        with contextlib.suppress(OSError):
            above.remove(name)
        raise
    above.sync()


@contextlib.contextmanager
def _undone_after_errors(bundle: _Bundle) -> Iterator[_Bundle]:
    try:
        yield bundle
    except BaseException:
        bundle.undo()
        raise
