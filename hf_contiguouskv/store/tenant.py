"""Whose segments are whose: a store that is opened with a salt is one tenant's view of it.

The hash before the first chunk of a prefix covers model, chunk size and salt. So a segment is a tenant's when its root
hash is the one that the tenant's salt gives with the segment's own model and chunk size. Nobody needs to be asked, and
nobody who lacks the salt can tell whose a segment is.

Who opens the store without a salt looks after all of it: the operator. A tenant lists, counts, pins, deletes, verifies,
exports and evicts only what is its own.
"""

from __future__ import annotations

import sqlite3

from ..errors import ConfigError, StoreError
from ..wording import quoted
from .hashing import root_hash
from .rows import SegmentRow, is_key, segment_by_key
from .totals import Roots, stored_models

_REMEMBERED = 1024


class Tenant:
    """Whose view of a store this is.

    Args:
        salt: of the tenant; `None`: of the operator, who looks after the whole store.

    Attributes:
        salt: as bytes; empty for `None`.
        is_operator: whether everything is regarded, because there is no salt.

    Raises:
        ConfigError: the salt is neither str nor bytes, or empty.
    """

    def __init__(self, salt: str | bytes | None = None) -> None:
        if salt is None:
            self.salt = b""
        elif isinstance(salt, str | bytes) and len(salt) > 0:
            try:
                self.salt = salt.encode() if isinstance(salt, str) else salt
            except UnicodeEncodeError as error:
                raise ConfigError("salt holds half of a surrogate pair, which UTF-8 cannot say; pass bytes") from error
        else:
            # (What the value is stays out of the message: a salt may be a secret.)
            kind = "an empty one" if isinstance(salt, str | bytes) else type(salt).__name__
            raise ConfigError(f"salt must be str or bytes and not empty, got {kind}; None is no salt")
        self.is_operator = salt is None
        self._roots: dict[tuple[str, int], bytes] = {}

    def root(self, fingerprint: str, chunk_size: int) -> bytes:
        """The hash before the first chunk of this tenant's prefixes of a model."""
        known = self._roots.get((fingerprint, chunk_size))
        if known is None:
            if len(self._roots) >= _REMEMBERED:
                self._roots = {}
            known = self._roots[fingerprint, chunk_size] = root_hash(fingerprint, chunk_size, self.salt)
        return known

    def owns(self, row: SegmentRow) -> bool:
        """Whether a segment is regarded."""
        return self.is_operator or row.root == self.root(row.fingerprint, row.chunk_size)

    def roots(self, db: sqlite3.Connection) -> Roots:
        """The root hashes of what is regarded, for functions that take `roots`; `None` is everything."""
        if self.is_operator:
            return None
        found = {self.root(*model) for model in stored_models(db)}
        return [root for root in found if db.execute("SELECT 1 FROM totals WHERE root = ?", (root,)).fetchone()]

    def find(self, db: sqlite3.Connection, key: str) -> SegmentRow:
        """The segment named `key`.

        Raises:
            StoreError: there is none, or it is another tenant's: which of the two is not said.
        """
        row = segment_by_key(db, key) if is_key(key) else None
        if row is None or not self.owns(row):
            raise StoreError(f"no stored prefix has the key {quoted(key)}; `entries()` lists those that there are")
        return row
