"""How fast a store's disk, and the network to the shared store behind it, were: noted in the index, so that the first
request of a process knows it.

How a request reads depends on it (`planning.choosing`). A note is a hint: it is never the reason for an error.
"""

from __future__ import annotations

import sqlite3
from typing import Literal

from ..errors import StoreError
from .index import StoreIndex

Way = Literal["disk", "link"]

# By name, what is noted: bytes per second; of a network also the seconds of a round trip. What is not within these
# bounds, this library did not write.
_BOUNDS: dict[Way, tuple[tuple[float, float], ...]] = {"disk": ((1e5, 1e12),), "link": ((1e3, 1e12), (0.0, 600.0))}
# Smaller changes of the bytes per second are not worth a write.
_WORTH_NOTING = 0.1


def noted_speeds(index: StoreIndex, way: Way) -> tuple[float, ...] | None:
    """What an earlier process measured of that way; `None`: none did."""
    query = "SELECT value FROM meta WHERE name = ?"
    try:
        row = index.read(lambda db: db.execute(query, (f"speed of {way}",)).fetchone())
        found = tuple(float(number) for number in row[0].split()) if row is not None else ()
    except (StoreError, AttributeError, ValueError):
        return None
    return found if _makes_sense(way, found) else None


def note_speeds(index: StoreIndex, way: Way, *found: float) -> None:
    """Note what this process measured, unless that is what the index says already."""
    if not _makes_sense(way, found):
        return
    known = noted_speeds(index, way)
    if known is not None and abs(found[0] - known[0]) < _WORTH_NOTING * known[0]:
        return
    value = " ".join(f"{number:.6g}" for number in found)

    def write(db: sqlite3.Connection) -> None:
        db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (f"speed of {way}", value))

    index.try_write(write)


def _makes_sense(way: Way, found: tuple[float, ...]) -> bool:
    bounds = _BOUNDS[way]
    return len(found) == len(bounds) and all(
        low <= number <= high for number, (low, high) in zip(found, bounds, strict=True)
    )
