"""How segments are found by the chunks of a prompt: which way, the engine decides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from .engine import KeyValueEngine, ListingEngine, SharedEngine
from .keyed_index import KeyedIndex
from .listed_index import ListedIndex
from .names import SharedSegment


class SharedIndex(Protocol):
    """Finds segments of one shared store, and makes them findable."""

    def find(
        self,
        hashes: Sequence[bytes],
        chunk_size: int,
        have: int,
        is_of_use: Callable[[SharedSegment], bool],
    ) -> list[SharedSegment]:
        """As `Catalog.find`."""
        ...

    def names(self, segment: SharedSegment, hashes: Sequence[bytes], chunk_size: int) -> list[str]:
        """The names of a segment that its head keeps, so that they are deleted with it."""
        ...

    def add(
        self,
        segment: SharedSegment,
        hashes: Sequence[bytes],
        chunk_size: int,
        is_sound: Callable[[SharedSegment], bool],
    ) -> None:
        """Make a segment, whose bytes and head are there, findable.

        Args:
            segment: what is found.
            hashes: of the whole chunks of its prefix, up to its end at least.
            chunk_size: tokens per chunk.
            is_sound: asked of segments that are found in its place: whether they can be read.

        Raises:
            OSError: the engine failed.
        """
        ...


def index_of(engine: SharedEngine) -> SharedIndex:
    """The index that fits an engine."""
    if isinstance(engine, ListingEngine):
        return ListedIndex(engine)
    if isinstance(engine, KeyValueEngine):
        return KeyedIndex(engine)
    raise TypeError(f"{engine.name}: expected a ListingEngine or a KeyValueEngine, got {type(engine).__name__}")
