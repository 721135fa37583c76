"""The parts of a store that loading works with."""

from __future__ import annotations

from typing import Protocol

from ..memory import MemoryTiers
from ..store.reader import ExtentReader


class ChunkStore(Protocol):
    """The inside of a `PrefixStore`, or anything else that has a reader and memory tiers."""

    @property
    def reader(self) -> ExtentReader:
        """Reads extents of segments."""
        ...

    @property
    def memory(self) -> MemoryTiers:
        """Keeps chunks and keys above the disk."""
        ...
