"""Reading a bundle, which is untrusted, into a store."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...errors import StoreError
from ..eviction import too_large
from ..format import SegmentHeader
from ..hashing import TokenIds
from ..local_disk import FileBlob
from ..output import as_store_error
from ..prefix_store import PrefixStore
from ..rows import is_reachable
from ..segment import Segment
from ..verification import segment_problems
from .lineage import Lineage
from .manifest import MANIFEST, BundledSegment, BundleError, prefix_tokens, read_manifest, require_ordinary

_BLOCK = 4 * 2**20

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class RefusedSegment:
    """A segment that was not imported, and why."""

    key: str
    reason: str


@dataclass(frozen=True)
class ImportReport:
    """What `import_bundle` did.

    Attributes:
        added: keys of segments that the store has now, parents before children.
        already_there: keys of segments that it had before.
        refused: what is wrong with the others. Unless asked for otherwise, nothing is added then.
        other_salt: keys of those added that this store does not find, because they were stored with another salt.
        bytes: of those added.
    """

    added: tuple[str, ...] = ()
    already_there: tuple[str, ...] = ()
    refused: tuple[RefusedSegment, ...] = ()
    other_salt: tuple[str, ...] = ()
    bytes: int = 0

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain values (ready for JSON)."""
        return asdict(self)


def import_bundle(
    store: PrefixStore,
    folder: str | os.PathLike[str],
    progress: Progress | None = None,
    *,
    skip_refused: bool = False,
) -> ImportReport:
    """Put the segments of a bundle into a store, after every byte of every new one has been verified.

    All are checked before the first is added. Each is then published whole, parents before children; what was added
    before an error (or before the process was killed) is sound, and importing again continues from there.

    Checksums show that nothing was damaged on the way, not that the bundle was computed honestly: import only from
    those whose answers you would trust as well.

    Args:
        store: where they go.
        folder: the bundle.
        progress: called with `(bytes done, bytes in all)`; every new byte counts twice, checked and copied.
        skip_refused: add the sound ones although others were refused.

    Returns:
        what was added and what was refused. Where anything was refused, nothing was added (but see `skip_refused`).

    Raises:
        StoreFormatError: `folder` is not a bundle, or a newer one.
        BundleError: its list makes no sense, or a file changed while it was imported.
        StoreFullError: there is no room.
        StoreError: the store failed.
    """
    root = Path(os.path.abspath(folder))
    work = _Import(store, root, read_manifest(root), progress)
    work.check()
    if work.refused and not skip_refused:
        return work.report()
    work.publish()
    return work.report()


class _Import:
    """One import: first `check`, then `publish`."""

    def __init__(self, store: PrefixStore, root: Path, listed: list[BundledSegment], progress: Progress | None) -> None:
        self.store = store
        self.root = root
        self.listed = listed
        self.refused: list[RefusedSegment] = []
        self._sound: list[tuple[BundledSegment, SegmentHeader, TokenIds]] = []
        self._there: list[str] = []
        self._added: list[tuple[BundledSegment, SegmentHeader]] = []
        self._lineage = Lineage(store)
        self._progress = progress
        self._done, self._total = 0, 1

    def report(self) -> ImportReport:
        return ImportReport(
            added=tuple(entry.key for entry, _ in self._added),
            already_there=tuple(self._there),
            refused=tuple(self.refused),
            other_salt=tuple(entry.key for entry, header in self._added if not self._lineage.is_findable(header)),
            bytes=sum(entry.bytes for entry, _ in self._added),
        )

    def check(self) -> None:
        """Sort the segments of the bundle into sound, already there, and refused; the store is only read."""
        known = {entry.key for entry in self.store.entries()}
        new: list[tuple[int, BundledSegment]] = []
        for entry in self.listed:
            there = entry.key in known and self.store.backend.identity(entry.key) is not None
            if there and self.store._read(lambda db, key=entry.key: is_reachable(db, key)):  # type: ignore[misc]
                self._there.append(entry.key)
                continue
            try:
                segment = self._open(entry)
            except (StoreError, OSError) as error:
                self._refuse(entry, error)
                continue
            new.append((segment.first_chunk, entry))
            segment.close()
        self._total = max(1, 2 * sum(entry.bytes for _, entry in new))
        # A segment begins after the one that it continues.
        for _, entry in sorted(new, key=lambda pair: pair[0]):
            try:
                segment = self._open(entry)
                try:
                    self._verify(entry, segment)
                    ids = segment.token_ids
                finally:
                    segment.close()
            except (StoreError, OSError) as error:
                self._refuse(entry, error)
            else:
                self._lineage.accept(segment.header, ids)
                self._sound.append((entry, segment.header, ids))

    def _refuse(self, entry: BundledSegment, error: Exception) -> None:
        reason = "its file is missing" if isinstance(error, FileNotFoundError) else str(error)
        self.refused.append(RefusedSegment(entry.key, reason))

    def _open(self, entry: BundledSegment) -> Segment:
        """The segment of an entry; its header is what the list says."""
        path = self.root / entry.file
        require_ordinary(path.parent, folder=True)
        require_ordinary(path)
        # Read through the page cache: everything is read more than once.
        segment = Segment(FileBlob(path, direct=False))
        header = segment.header
        told = (header.key, header.parent, prefix_tokens(header), segment.nbytes)
        if told != (entry.key, entry.parent, entry.tokens, entry.bytes):
            segment.close()
            raise BundleError(f"{path}: key, parent, tokens or bytes are not those that {MANIFEST} tells")
        return segment

    def _verify(self, entry: BundledSegment, segment: Segment) -> None:
        digest = hashlib.sha256()
        for octets in self._blocks(entry, segment):
            digest.update(octets)
        problems = segment_problems(segment, entry.key)
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise BundleError(problems[0] + more)
        if digest.hexdigest() != entry.sha256:
            raise BundleError(f"the SHA-256 of its file is not the one that {MANIFEST} tells")
        problem = self._lineage.problem(segment.header, segment.token_ids)
        if problem is not None:
            raise BundleError(problem)

    def _blocks(self, entry: BundledSegment, segment: Segment) -> Iterator[bytearray]:
        for start in range(0, entry.bytes, _BLOCK):
            octets = segment.read_bytes(start, min(_BLOCK, entry.bytes - start))
            yield octets
            self._done += len(octets)
            if self._progress is not None:
                self._progress(min(self._done, self._total), self._total)

    def publish(self) -> None:
        """Add what is sound."""
        bound, nbytes = self.store.max_disk_bytes, sum(entry.bytes for entry, _, _ in self._sound)
        if bound is not None and nbytes > bound:
            raise too_large(nbytes, bound)  # They would drive each other out.
        for entry, header, ids in self._sound:
            try:
                added = self._publish_segment(entry, header, ids)
            except OSError as error:
                raise error if isinstance(error, StoreError) else as_store_error(error, entry.key) from error
            if added:
                self._added.append((entry, header))
            else:
                self._there.append(entry.key)

    def _publish_segment(self, entry: BundledSegment, header: SegmentHeader, ids: TokenIds) -> bool:
        segment = self._open(entry)
        try:
            writer = self.store.backend.create(entry.key, entry.bytes)
            try:
                digest, start = hashlib.sha256(), 0
                for octets in self._blocks(entry, segment):
                    digest.update(octets)
                    writer.write(start, memoryview(octets))
                    start += len(octets)
                if digest.hexdigest() != entry.sha256:
                    # What was verified before had this digest: these are other bytes.
                    raise BundleError(f"{segment.name} changed while it was imported")
                writer.seal()
                return self.store._publisher.publish(header, ids, writer)
            finally:
                writer.discard()
        finally:
            segment.close()
