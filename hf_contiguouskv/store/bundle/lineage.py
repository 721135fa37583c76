"""Whether a segment from outside fits: it is named by its own tokens, and continues a prefix of the same model."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from ...errors import InputError, StoreError
from ...wording import quoted
from ..format import SegmentHeader
from ..hashing import TokenIds, root_hash, segment_hashes
from ..prefix_store import PrefixStore

_HASH = re.compile(r"[0-9a-f]{32}")


def checked_roots(roots: Iterable[str]) -> frozenset[str]:
    """Root hashes of other tenants.

    Raises:
        InputError: one of them is no hash.
    """
    found = [roots] if isinstance(roots, str) else list(roots)
    for root in found:
        if not isinstance(root, str) or not _HASH.fullmatch(root):
            raise InputError(f"a root is 32 lower-case hexadecimal digits, got {quoted(root)}")
    return frozenset(found)


class Lineage:
    """What new segments may continue: those of a store, and those that were accepted before.

    Args:
        store: the one that they shall join.
        parents: chain hashes (hex) that the new segments continue; of no other chunk anything is remembered.
        foreign_roots: roots (hex) whose segments may come although this store, with the salt that it has, does not
            look for them; `None`: all of them.
        alone: they may only continue each other, not what is stored.
    """

    def __init__(
        self,
        store: PrefixStore,
        parents: Collection[str],
        foreign_roots: Collection[str] | None = (),
        *,
        alone: bool = False,
    ) -> None:
        self._store = store
        self._parents = frozenset(parents)
        self._foreign_roots = foreign_roots
        self._alone = alone
        # By the hash of a whole chunk: its position in the prefix, and the segment that it is in.
        self._accepted: dict[str, tuple[int, SegmentHeader]] = {}

    def accept(self, header: SegmentHeader, ids: TokenIds) -> None:
        """Let later segments continue this one, whose bytes have been verified. `ids`: int64 `[num_tokens]`."""
        whole = header.num_tokens // header.geometry.chunk_size
        for position, name in enumerate(header.hashes(ids)[:whole]):
            if name.hex() in self._parents:
                self._accepted[name.hex()] = (header.first_chunk + position, header)

    def header_problem(self, header: SegmentHeader) -> str | None:
        """Why a segment does not fit, as far as its header tells, in words; `None` when nothing speaks against it."""
        return origin_problem(header) or self._root_problem(header)

    def problem(self, header: SegmentHeader, ids: TokenIds) -> str | None:
        """Why a segment does not fit, in words; `None` when it does. `ids`: int64 `[num_tokens]`."""
        problem = self.header_problem(header)
        if problem is not None or header.first_chunk == 0:
            return problem or self._beginning_problem(header, ids)
        found = self._accepted.get(header.parent)
        if found is not None:
            return self._parent_problem(header, *found)
        try:
            # The index only claims it: the token ids of the segment that it names are hashed.
            inner = self._store.inner
            held = not self._alone and inner.read(lambda db: inner.publisher.is_held(db, header))
        except StoreError as error:
            return f"what it continues cannot be read: {error}"
        if held:
            return None
        return (
            f"it continues chunk {header.parent}, which neither the store nor a sound segment of the bundle holds, "
            "whole, at that place, for its model and tenant"
        )

    def is_findable(self, header: SegmentHeader) -> bool:
        """Whether the store, with the salt that it has, looks for this segment's prefix at all."""
        return header.root == self._store.inner.finder.root(header.fingerprint, header.geometry.chunk_size).hex()

    def _root_problem(self, header: SegmentHeader) -> str | None:
        if self._foreign_roots is None or header.root in self._foreign_roots or self.is_findable(header):
            return None
        what = "with another salt than this store's" if header.salted else "without a salt, and this store has one"
        return (
            f"it was stored {what} (root {header.root}), so it would not be found here; import it with the same salt; "
            "or, without any, name its root in foreign_roots (--foreign-root)"
        )

    def _parent_problem(self, header: SegmentHeader, position: int, parent: SegmentHeader) -> str | None:
        same_kv = parent.geometry.same_kv(header.geometry)
        for name, fits in (
            ("position", position + 1 == header.first_chunk),
            ("model", parent.fingerprint == header.fingerprint),
            ("root", parent.root == header.root),
            ("salt", parent.salted == header.salted),
            ("geometry", same_kv),
        ):
            if not fits:
                return f"its {name} is not that of segment {parent.key}, which it continues"
        return None

    def _beginning_problem(self, header: SegmentHeader, ids: TokenIds) -> str | None:
        c = header.geometry.chunk_size
        beginning = None
        if not header.salted:
            beginning = segment_hashes(root_hash("", c), ids[:c], c, first=True)[0].hex()
        elif self.is_findable(header):
            beginning = self._store.inner.finder.beginning(ids, c)
        # (With a salt that is not ours, nothing can be said.)
        if beginning is not None and header.beginning != beginning:
            return "the name of its beginning is not that of its tokens"
        return None


def origin_problem(header: SegmentHeader) -> str | None:
    """What a header says of its model and tenant that cannot be, in words; `None` when nothing."""
    if not _HASH.fullmatch(header.fingerprint):
        return "the fingerprint of its model is none"
    if header.first_chunk > 0 and header.beginning:
        return "it continues a prefix and claims to begin one"
    unsalted = root_hash(header.fingerprint, header.geometry.chunk_size).hex()
    if header.salted and header.root == unsalted:
        return "it claims to be stored with a salt, and its root is the one without"
    if not header.salted and header.root != unsalted:
        return "its root is not that of its model without a salt, and it does not claim to have one"
    return None
