"""Looking after a shared store: what it holds, what nobody uses, and what machines that died left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from ...errors import PrefixInUseError, SegmentMissingError, StoreError, StoreFormatError
from ..entries import StoreProblem
from ..segment import Segment, SegmentOpener
from ..segment_row import is_key
from ..tenant import Tenant
from ..verification import segment_problems, tell
from .backend import FleetBackend
from .catalog import Catalog, Head
from .names import read_entry, uploaded

# What no head names may belong to a machine that is still writing; after a day it does not.
_YOUNG_S = 86400.0
# Word of deletions is kept for so long: a machine that was away for longer sends what it had not sent.
_DELETIONS_S = 90 * 86400.0


@dataclass(frozen=True)
class SharedEntry:
    """One segment of a shared store, and the prefix that ends with it.

    Attributes:
        key: name of the segment, hex.
        tokens: length of the whole prefix that ends with it.
        chunks: chunks in this segment alone.
        bytes: length of its object.
        dtype: of K and V.
        layers: layers with a KV cache.
        fingerprint: of the model, hex.
        continues: key of the segment that holds the chunk before; "" when it begins its prefix.
        created: when it was published, seconds since the epoch.
        last_used: when a machine last left word that it uses it, or when it was published.
    """

    key: str
    tokens: int
    chunks: int
    bytes: int
    dtype: str
    layers: int
    fingerprint: str
    continues: str
    created: float
    last_used: float

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain text and numbers (ready for JSON)."""
        return asdict(self)


class SharedUpkeep:
    """What can be done with a shared store as a whole. A tenant regards only what was stored with its salt.

    Args:
        catalog: of the shared store.
        backend: of the store on this machine.
        tenant: who asks.
        opener: opens what is in a blob.

    Attributes:
        catalog, backend: as passed.
    """

    def __init__(self, catalog: Catalog, backend: FleetBackend, tenant: Tenant, opener: SegmentOpener) -> None:
        self.catalog = catalog
        self.backend = backend
        self._tenant = tenant
        self._opener = opener

    def entries(self) -> list[SharedEntry]:
        """All segments, oldest first.

        Raises:
            StoreError: the shared store does not answer.
        """
        try:
            uses = self.catalog.last_uses()
            found = [
                _entry(head, created, uses)
                for _, head, created in self.catalog.heads()
                if head is not None and self._owns(head)
            ]
        except OSError as error:
            raise _as_store_error(error, self.catalog) from error
        return sorted(found, key=lambda entry: (entry.created, entry.key))

    def heads(self, keys: Iterable[str]) -> list[Head]:
        """The heads of segments, and of what they continue.

        Raises:
            SegmentMissingError: there is no such segment.
            StoreError: the shared store does not answer.
        """
        found: dict[str, Head] = {}
        for key in keys:
            wanted = key
            while wanted and wanted not in found:
                head = found[wanted] = self._head(wanted)
                wanted = head.about.continues
        return list(found.values())

    def _owns(self, head: Head) -> bool:
        about = head.about
        return self._tenant.is_operator or about.root == self._tenant.root(about.fingerprint, about.chunk_size).hex()

    def verify(
        self, keys: Iterable[str], progress: Callable[[int, int], None] | None = None, deep: bool = False
    ) -> list[StoreProblem]:
        """Compare every byte of segments with its checksum, as they lie in the shared store.

        Args:
            keys: of the segments.
            progress: called with `(bytes done, bytes in all)`.
            deep: also make what approximates or repeats keys and values again from these, and compare it.

        Raises:
            SegmentMissingError: there is no such segment.
            StoreError: the shared store does not answer.
        """
        heads = [self._head(key) for key in keys]
        total, done = sum(head.segment.nbytes for head in heads), 0
        problems: list[StoreProblem] = []
        for head in heads:
            segment = head.segment
            try:
                blob = self.backend.open_uncached(segment)
                opened: Segment = self._opener(blob)
                found = segment_problems(opened, segment.key, partial(tell, progress, total, done), deep)
                problems += [StoreProblem(segment.key, opened.name, text) for text in found]
                opened.close()
            except StoreError as error:
                found = [str(error)]
                problems.append(StoreProblem(segment.key, f"segment {segment.key}", str(error)))
            if found and blob.was_unreachable:
                raise StoreError(f"{self.catalog.engine.name} could not be read to the end: {found[0]}")
            done += segment.nbytes
            tell(progress, total, done, 0)
        return problems

    def _head(self, key: str) -> Head:
        try:
            head = self.catalog.head(key) if is_key(key) else None
        except StoreFormatError:
            raise
        except OSError as error:
            raise _as_store_error(error, self.catalog) from error
        if head is None or not self._owns(head):
            raise SegmentMissingError(f"no prefix of {self.catalog.engine.name} has the key {key}")
        return head

    def delete(self, keys: Iterable[str], *, recursive: bool = False, dry_run: bool = False) -> list[SharedEntry]:
        """Delete segments for all machines. A request that reads one meanwhile computes what it does not have yet.

        Copies that machines computed before and have not sent yet are not sent. What is computed later is.

        Args:
            keys: of the segments.
            recursive: also delete what continues their last chunks.
            dry_run: only say what would be deleted.

        Returns:
            what was deleted, longer prefixes before what they continue.

        Raises:
            SegmentMissingError: there is no such segment.
            PrefixInUseError: longer prefixes continue one, and not `recursive`.
            StoreError: the shared store does not answer.
        """
        entries = {entry.key: entry for entry in self.entries()}
        below: dict[str, list[str]] = {}
        for entry in entries.values():
            below.setdefault(entry.continues, []).append(entry.key)
        doomed: dict[str, None] = {}
        waiting = list(keys)
        asked = set(waiting)
        while waiting:
            key = waiting.pop()
            if key not in entries:
                raise SegmentMissingError(f"no prefix of {self.catalog.engine.name} has the key {key}")
            if key in doomed:
                continue
            doomed[key] = None
            more = below.get(key, [])
            if not recursive and not asked.issuperset(more):
                others = ", ".join(sorted(set(more) - asked)[:5])
                raise PrefixInUseError(f"{key} is continued by {others}; delete these first, or all of them at once")
            waiting += more
        found = sorted((entries[key] for key in doomed), key=lambda entry: (-entry.tokens, entry.key))
        if not dry_run:
            self._withdraw(found)
        return found

    def delete_unused(self, seconds: float, *, dry_run: bool = False) -> list[SharedEntry]:
        """Delete for all machines what none has used for so long; what was deleted.

        Raises:
            StoreError: the shared store does not answer; or its engine is volatile, and itself evicts what nobody uses.
        """
        self._require_lasting("which prefixes nobody used")
        since = self._now() - seconds
        # (A use is noted for the whole chain, so nothing outlives what it continues.)
        found = sorted(
            (entry for entry in self.entries() if entry.last_used < since), key=lambda entry: (-entry.tokens, entry.key)
        )
        if not dry_run:
            self._withdraw(found)
        return found

    def _require_lasting(self, what: str) -> None:
        name = self.catalog.engine.name
        if self.catalog.engine.is_volatile:
            raise StoreError(f"{name} does not know {what}. It needs no such care: it evicts what is not used")

    def _now(self) -> float:
        # (The clock of this machine may be wrong, and what others use would be deleted.)
        try:
            return self.catalog.now()
        except OSError as error:
            raise _as_store_error(error, self.catalog) from error

    def _withdraw(self, entries: Iterable[SharedEntry]) -> None:
        try:
            gone = list(entries)
            # (A volatile engine keeps no word, and what is in it may vanish or come again at any moment.)
            leaves_word = bool(gone) and not self.catalog.engine.is_volatile
            now = self.catalog.now() if leaves_word else 0.0
            for entry in gone:
                # (Some machine may have a copy that it has not sent yet.)
                if leaves_word:
                    self.catalog.report_deletion(entry.key, now)
                self.catalog.withdraw(entry.key)
        except OSError as error:
            raise _as_store_error(error, self.catalog) from error

    def collect(self, dry_run: bool = False) -> tuple[list[str], int]:
        """Delete what no head names and a machine that died left, and old word of deletions.

        Returns:
            names, and bytes that they took up.

        Raises:
            StoreError: the shared store does not answer; or this is a tenant's, who cannot tell whose they are; or its
                engine is volatile, and itself evicts what nobody uses.
        """
        self._require_lasting("which leftovers are old")
        if not self._tenant.is_operator:
            raise StoreError("leftovers may be anybody's: collect them with the store that was opened without a salt")
        engine, now = self.catalog.engine, self._now()
        try:
            heads = list(self.catalog.heads())
            counts = {(key, head.segment.upload) for key, head, _ in heads if head is not None}
            # (What a later release wrote is not for this one to judge.)
            untouched = {key for key, head, _ in heads if head is None}
            doomed = [
                info
                for folder, names in (("segments", uploaded), ("anchors", read_entry), ("damaged", _damaged))
                for info in engine.walk(folder)
                if info.modified < now - _YOUNG_S
                and (named := names(info.name)) is not None
                and named not in counts
                and named[0] not in untouched
            ]
            doomed += [info for info in engine.walk("deleted") if info.modified < now - _DELETIONS_S]
            if not dry_run:
                engine.delete([info.name for info in doomed])
        except OSError as error:
            raise _as_store_error(error, self.catalog) from error
        return [info.name for info in doomed], sum(info.nbytes for info in doomed)


def _entry(head: Head, created: float, uses: dict[str, float]) -> SharedEntry:
    segment, about = head.segment, head.about
    return SharedEntry(
        key=segment.key,
        tokens=segment.first_chunk * about.chunk_size + segment.num_tokens,
        chunks=-(-segment.num_tokens // about.chunk_size),
        bytes=segment.nbytes,
        dtype=about.dtype,
        layers=about.layers,
        fingerprint=about.fingerprint,
        continues=about.continues,
        created=created,
        last_used=max(created, uses.get(segment.key, 0.0)),
    )


def _damaged(name: str) -> tuple[str, str] | None:
    key, _, upload = name.rpartition("/")[2].partition(".")
    return (key, upload) if is_key(key) else None


def _as_store_error(error: OSError, catalog: Catalog) -> StoreError:
    return StoreError(f"{catalog.engine.name}: {error.strerror or error}")
