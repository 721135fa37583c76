"""Reading a bundle, which is untrusted, into a store."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import InputError, SegmentKeyError, StoreError
from ...wording import shown
from ..eviction import too_large
from ..format import SegmentHeader
from ..local_disk import FileBlob
from ..output import as_store_error
from ..prefix_store import PrefixStore
from ..proof import is_the_same
from ..rows import segment_by_key
from ..segment import Segment
from ..transfer import copy_segment
from ..verification import segment_problems
from .lineage import Lineage, checked_roots
from .manifest import MANIFEST, BundledSegment, BundleError, read_manifest, require_ordinary

_BLOCK = 4 * 2**20
_REASON = 500  # Characters of a reason, paths included.

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
    foreign_roots: Iterable[str] = (),
) -> ImportReport:
    """Put the segments of a bundle into a store, after every byte of every new one has been verified.

    All are checked before the first is added. Each is then published whole, parents before children; what was added
    before an error (or before the process was killed) is sound, and importing again continues from there. What a
    segment says twice (key index, leader keys, packed values) is made again from its payload and compared. What nobody
    can check is left out: how long it took to compute is unknown afterwards, and it counts as stored now.

    Checks show that a bundle is whole and fits together, not that its keys and values were computed honestly: import
    only from those whose answers you would trust as well.

    Args:
        store: where they go. Where it has a key, they get the code of that key.
        folder: the bundle.
        progress: called with `(bytes done, bytes in all)`; every new byte counts twice, checked and copied.
        skip_refused: add the sound ones although others were refused.
        foreign_roots: roots (32 hex digits) of tenants whose segments may come, although this store does not look for
            them: without being named here, only what was stored with the salt of `store` comes. For the operator of
            the whole store, who opened it without a salt.

    Returns:
        what was added and what was refused. Where anything was refused, nothing was added (but see `skip_refused`).

    Raises:
        StoreFormatError: `folder` is not a bundle, or a newer one.
        BundleError: its list makes no sense, or a file changed meanwhile.
        InputError: a root is no hash; or there are some, and `store` has a salt.
        StoreFullError: there is no room.
        StoreError: the store cannot be written.
    """
    roots = checked_roots(foreign_roots)
    if roots and not store.inner.tenant.is_operator:
        # Or a tenant could learn what others have stored, and store what they are answered from.
        raise InputError("foreign_roots are for the operator of the store, who opens it without a salt")
    work = _Import(store, Path(folder), read_manifest(folder), progress, roots)
    work.check()
    if work.refused and not skip_refused:
        return work.report()
    work.publish()
    return work.report()


class _Import:
    """One import: first `check`, then `publish`.

    Its attributes are the options of `import_bundle` and what `check` has found.
    """

    def __init__(
        self,
        store: PrefixStore,
        root: Path,
        listed: list[BundledSegment],
        progress: Progress | None,
        foreign_roots: frozenset[str],
    ) -> None:
        self.store = store
        self.root = root
        self.listed = listed
        self.refused: list[RefusedSegment] = []
        self._sound: list[tuple[BundledSegment, SegmentHeader]] = []
        self._there: list[str] = []
        self._added: list[tuple[BundledSegment, SegmentHeader]] = []
        self._lineage = Lineage(store, {entry.parent for entry in listed}, foreign_roots)
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
        new: list[tuple[int, BundledSegment]] = []
        for entry in self.listed:
            try:
                segment = self._open(entry)
                try:
                    # (Before megabytes of it are read.)
                    problem = self._lineage.header_problem(segment.header)
                    if problem is not None:
                        raise BundleError(problem)
                    if self._is_there(segment):
                        self._there.append(entry.key)
                    else:
                        new.append((segment.first_chunk, entry))
                finally:
                    segment.close()
            except (StoreError, OSError) as error:
                self._refuse(entry, error)
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
                header = replace(segment.header)  # (Without what it remembers of itself: there may be 100,000.)
                self._lineage.accept(header, ids)
                self._sound.append((entry, header))

    def _refuse(self, entry: BundledSegment, error: Exception) -> None:
        reason = "its file is missing" if isinstance(error, FileNotFoundError) else shown(error, _REASON)
        self.refused.append(RefusedSegment(entry.key, reason))

    def _open(self, entry: BundledSegment) -> Segment:
        """The segment of an entry; its header is what the list says."""
        path = self.root / entry.file
        require_ordinary(path.parent, folder=True)
        require_ordinary(path)
        # Read through the page cache: everything is read more than once.
        blob = FileBlob(path, direct=False)
        if not blob.is_backed(0, blob.nbytes):
            # A few hundred bytes of an archive may unpack to gigabytes of holes; a copy of it would be full.
            blob.close()
            raise BundleError(f"{path}: more than half of it are holes; no export writes such a file")
        try:
            segment = Segment(blob)
        except SegmentKeyError:
            if self.store.inner.key is None:
                raise
            segment = Segment(FileBlob(path, direct=False), key=self.store.inner.key)
        header = segment.header
        told = (header.key, header.parent, header.prefix_tokens, segment.nbytes)
        if told != (entry.key, entry.parent, entry.tokens, entry.bytes):
            segment.close()
            raise BundleError(f"{path}: key, parent, tokens or bytes are not those that {MANIFEST} tells")
        return segment

    def _is_there(self, segment: Segment) -> bool:
        """Whether the store has the very prefix that a segment of the bundle ends; what only has its name is replaced.

        Raises:
            BundleError: it has, but in another shape; one of the two is a lie.
        """
        header, ids, publisher = segment.header, segment.token_ids, self.store.inner.publisher
        if self.store.inner.read(lambda db: segment_by_key(db, header.key)) is None:
            return False
        if self.store.inner.read(lambda db: publisher.stored_twin(db, header, ids)) is not None:
            return True
        there = publisher.open_now(header.key)
        if there is None or there.geometry.same_kv(header.geometry):
            return False  # (What only claims to be this prefix, or continues nothing, is replaced.)
        if is_the_same(there, replace(header, geometry=there.geometry), ids):
            raise BundleError(
                "the store holds the same tokens for the same model in another shape or dtype; one of the two is "
                "wrong. Delete the stored one (`contiguouskv rm`) if it is that"
            )
        return False

    def _verify(self, entry: BundledSegment, segment: Segment) -> None:
        digest = hashlib.sha256()
        for start in range(0, entry.bytes, _BLOCK):
            octets = segment.read_bytes(start, min(_BLOCK, entry.bytes - start))
            digest.update(octets)
            self._count(len(octets))
        problems = segment_problems(segment, entry.key, deep=True)
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise BundleError(problems[0] + more)
        if digest.hexdigest() != entry.sha256:
            raise BundleError(f"the SHA-256 of its file is not the one that {MANIFEST} tells")
        problem = self._lineage.problem(segment.header, segment.token_ids)
        if problem is not None:
            raise BundleError(problem)

    def _count(self, nbytes: int) -> None:
        self._done += nbytes
        if self._progress is not None:
            self._progress(min(self._done, self._total), self._total)

    def publish(self) -> None:
        """Add what is sound."""
        bound, nbytes = self.store.max_disk_bytes, sum(entry.bytes for entry, _ in self._sound)
        if bound is not None and nbytes > bound:
            raise too_large(nbytes, bound)  # They would drive each other out.
        for entry, header in self._sound:
            try:
                added = self._publish_segment(entry, header)
            except OSError as error:
                raise error if isinstance(error, StoreError) else as_store_error(error, entry.key) from error
            if added:
                self._added.append((entry, header))
            else:
                self._there.append(entry.key)

    def _publish_segment(self, entry: BundledSegment, verified: SegmentHeader) -> bool:
        segment = self._open(entry)
        try:
            digest = hashlib.sha256()

            def copied(octets: bytearray) -> None:
                digest.update(octets)
                self._count(len(octets))

            header, writer = copy_segment(segment, self.store.backend, self.store.inner.key, copied)
            try:
                # What was verified before had this digest and this header: these are other bytes.
                if digest.hexdigest() != entry.sha256 or segment.header != verified:
                    raise BundleError(f"{segment.name} changed while it was imported")
                return self.store.inner.publisher.publish(header, segment.token_ids, writer)
            finally:
                writer.discard()
        finally:
            segment.close()
