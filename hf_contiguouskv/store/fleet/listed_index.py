"""Finding segments with an engine that lists: names below the hashes of a prompt's chunks (see `names.py`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .engine import ListingEngine, ObjectInfo
from .names import FACTOR, SharedSegment, anchors_of_prompt, best_chain, folder_of, names_of, read_name

# One answer of a listing holds so many names. A longer one, of prefixes that share very much, is read on, up to a
# bound.
_LISTED, _LISTED_AT_MOST = 1000, 20_000
# So often another choice is made where segments that were chosen are of no use.
_TRIES = 64


class ListedIndex:
    """A `catalog.SharedIndex` of names that are listed.

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
        cut = [(anchor, folder) for (anchor, folder), objects in listed.items() if len(objects) >= _LISTED]
        if cut:
            listed |= self._list(cut, _LISTED_AT_MOST)
        matches = {
            one.name: match
            for (anchor, _), objects in listed.items()
            for one in objects
            if (match := read_name(one.name, anchor, hashes, chunk_size)) is not None
        }
        left = list(matches.values())
        # (Very many may share the beginning of a prompt. Only those that would be taken are asked about.)
        for _ in range(_TRIES):
            chain = best_chain(left, have)
            useless = {segment for segment in chain if not is_of_use(segment)}
            if not useless:
                return chain
            left = [match for match in left if match.segment not in useless]
        return []

    def _list(self, folders: Sequence[tuple[int, str]], limit: int) -> dict[tuple[int, str], list[ObjectInfo]]:
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
