"""Which segment continues which: segments form trees, and a prefix is the way from a root to one of them."""

from __future__ import annotations

import sqlite3

from ..errors import StoreError
from .prefix_store import PrefixStore
from .rows import SegmentRow, segments_by_id
from .search import CONTINUES, chain_of, children_of
from .totals import Roots

# (A parent begins before its child, whatever the index says: there are no cycles.)
_PARENTS = f"""
SELECT child.key, parent.key FROM segments child
CROSS JOIN chunks ON chunks.hash = child.parent CROSS JOIN segments parent ON parent.id = chunks.segment
WHERE {CONTINUES}
"""
_ORDER = "ORDER BY chunks.position, parent.created DESC, parent.id DESC"


def parents_of_all(store: PrefixStore) -> dict[str, str]:
    """The key of the segment that each segment continues, by its own key.

    Segments that begin a prefix are missing, and those whose parent is lost. Where several segments hold the chunk
    that is continued, it is the one that holds the most chunks before it, and of these the oldest.
    """

    def query(db: sqlite3.Connection) -> dict[str, str]:
        roots: Roots = store.inner.tenant.roots(db)
        if roots is None:
            return dict(db.execute(f"{_PARENTS} {_ORDER}"))
        own = f"{_PARENTS} AND child.root = ? {_ORDER}"
        return dict(pair for root in roots for pair in db.execute(own, (root,)))

    found: dict[str, str] = store.inner.read(query)
    return found


def children(store: PrefixStore, key: str) -> list[str]:
    """The keys of the segments that continue the one named `key`, oldest first.

    Raises:
        StoreError: there is no such segment.
    """

    def query(db: sqlite3.Connection) -> list[SegmentRow]:
        return segments_by_id(db, sorted({*children_of(db, store.inner.tenant.find(db, key).id)}))

    return [row.key for row in sorted(store.inner.read(query), key=lambda row: (row.created, row.id))]


def chains(store: PrefixStore, keys: list[str]) -> dict[str, list[SegmentRow]]:
    """The segments of each of the prefixes that end with `keys`, from the beginning on; the last one is named so.

    Raises:
        StoreError: there is no such segment, or what it continues is lost.
    """

    def query(db: sqlite3.Connection) -> dict[str, list[SegmentRow]]:
        return {key: _chain(db, store.inner.tenant.find(db, key)) for key in keys}

    found: dict[str, list[SegmentRow]] = store.inner.read(query)
    return found


def _chain(db: sqlite3.Connection, row: SegmentRow) -> list[SegmentRow]:
    chain = chain_of(db, row)
    if isinstance(chain, int):
        raise StoreError(f"segment {row.key} continues a prefix that is not stored any more")
    return [one for one, _ in chain]
