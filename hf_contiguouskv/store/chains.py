"""Which segment continues which: segments form trees, and a prefix is the way from a root to one of them."""

from __future__ import annotations

import sqlite3

from ..errors import StoreError
from .prefix_store import PrefixStore
from .rows import SegmentRow, all_segments

# (A parent begins before its child, whatever the index says: there are no cycles.)
_PARENTS = """
SELECT child.key, parent.key FROM segments child
JOIN chunks ON chunks.hash = child.parent JOIN segments parent ON parent.id = chunks.segment
WHERE child.first_chunk > 0 AND parent.first_chunk + chunks.position + 1 = child.first_chunk
ORDER BY chunks.position, parent.created DESC, parent.id DESC
"""


def parents_of_all(store: PrefixStore) -> dict[str, str]:
    """The key of the segment that each segment continues, by its own key.

    Segments that begin a prefix are missing, and those whose parent is lost. Where several segments hold the chunk
    that is continued, it is the one that holds the most chunks before it, and of these the oldest.
    """
    return dict(store._read(lambda db: db.execute(_PARENTS).fetchall()))


def chains(store: PrefixStore, keys: list[str]) -> dict[str, list[SegmentRow]]:
    """The segments of each of the prefixes that end with `keys`, from the beginning on; the last one is named so.

    Raises:
        StoreError: there is no such segment, or what it continues is lost.
    """

    def query(db: sqlite3.Connection) -> tuple[list[SegmentRow], dict[str, str]]:
        return all_segments(db), dict(db.execute(_PARENTS).fetchall())

    rows, parents = store._read(query)
    by_key = {row.key: row for row in rows}
    found = {}
    for key in keys:
        if key not in by_key:
            raise StoreError(f"no stored prefix has the key {key!r}")
        chain = [by_key[key]]
        while chain[-1].first_chunk:
            parent = parents.get(chain[-1].key)
            if parent is None:
                raise StoreError(f"segment {chain[-1].key} continues a prefix that is not stored any more")
            chain.append(by_key[parent])
        found[key] = chain[::-1]
    return found
