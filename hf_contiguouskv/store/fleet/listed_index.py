"""Finding segments with an engine that lists: names below the hashes of a prompt's chunks (see `names.py`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .engine import EngineUnavailableError, ListingEngine, ObjectInfo
from .names import FACTOR, Match, SharedSegment, anchors_of_prompt, chosen_chain, folder_of, names_of, read_name

# What lies below anchors: by chunk number and folder.
Listed = dict[tuple[int, str], list[ObjectInfo]]

# One answer of a listing holds so many names. A longer one, of prefixes that share very much, is read on, up to a
# bound.
_LISTED, _LISTED_AT_MOST = 1000, 20_000


class ListedIndex:
    """A `shared_index.SharedIndex` of names that are listed.

    Args:
        engine: holds them.
    """

    def __init__(self, engine: ListingEngine) -> None:
        self._engine = engine

    def find(
        self,
        hashes: Sequence[bytes],
        chunk_size: int,
        have: int,
        is_of_use: Callable[[SharedSegment], bool],
    ) -> list[SharedSegment]:
        # (What lies below an earlier anchor ends before the next one, so with what is at hand already.)
        anchors = [anchor for anchor in anchors_of_prompt(len(hashes)) if anchor * FACTOR > have]
        listed = self._list([(anchor, folder_of(hashes[anchor - 1])) for anchor in anchors], _LISTED)
        chain, reached = chosen_chain(_matches(listed, hashes, chunk_size), have, is_of_use)
        # What agrees with the prompt up to the next anchor is named there as well. So a long list is read on only where
        # it may hold more than that.
        cut = [place for place, objects in listed.items() if len(objects) >= _LISTED and place[0] * FACTOR > reached]
        if cut and reached < len(hashes):
            try:
                listed |= self._list(cut, _LISTED_AT_MOST)
            except EngineUnavailableError:
                if not chain:
                    raise
            else:
                chain, _ = chosen_chain(_matches(listed, hashes, chunk_size), have, is_of_use)
        return chain

    def _list(self, folders: Sequence[tuple[int, str]], limit: int) -> Listed:
        return dict(zip(folders, self._engine.list_each([folder for _, folder in folders], limit), strict=True))

    def names(self, segment: SharedSegment, hashes: Sequence[bytes], chunk_size: int) -> list[str]:
        return names_of(segment, hashes, chunk_size)

    def add(
        self,
        segment: SharedSegment,
        hashes: Sequence[bytes],
        chunk_size: int,
        is_sound: Callable[[SharedSegment], bool],
    ) -> None:
        # (Names of other segments stand beside these and hide none of them, so it does not matter whether those lead
        # anywhere.)
        self._engine.put_many(names_of(segment, hashes, chunk_size))


def _matches(listed: Listed, hashes: Sequence[bytes], chunk_size: int) -> list[Match]:
    """What listed names say of a prompt, each name once."""
    found = {
        one.name: match
        for (anchor, _), objects in listed.items()
        for one in objects
        if (match := read_name(one.name, anchor, hashes, chunk_size)) is not None
    }
    return list(found.values())
