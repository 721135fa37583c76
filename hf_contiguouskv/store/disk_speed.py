"""How fast a store's disk is: noted in its index, so that the first request of a process knows it.

How a request reads depends on it (`planning.choosing`). The note is a hint: it is never the reason for an error.
"""

from __future__ import annotations

import sqlite3

from ..errors import StoreError
from .index import StoreIndex

_NAME = "disk_bytes_per_second"
# What is not between these, somebody else wrote.
_LEAST, _MOST = 1e5, 1e12
# Smaller changes are not worth a write.
_WORTH_NOTING = 0.1


def noted_speed(index: StoreIndex) -> float | None:
    """Bytes per second of the disk, as an earlier process measured them; `None`: none did."""
    try:
        row = index.read(lambda db: db.execute("SELECT value FROM meta WHERE name = ?", (_NAME,)).fetchone())
        speed = float(row[0]) if row is not None else 0.0
    except (StoreError, TypeError, ValueError):
        return None
    return speed if _LEAST <= speed <= _MOST else None


def note_speed(index: StoreIndex, speed: float | None) -> None:
    """Note what this process measured, unless that is what the index says already."""
    if speed is None or not _LEAST <= speed <= _MOST:
        return
    known = noted_speed(index)
    if known is not None and abs(speed - known) < _WORTH_NOTING * known:
        return

    def write(db: sqlite3.Connection) -> None:
        db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (_NAME, f"{speed:.0f}"))

    index.try_write(write)
