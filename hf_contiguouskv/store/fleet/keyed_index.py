"""Finding segments with an engine that cannot list: a pointer for each chunk, all of them asked for at once.

    chunks/HASH      says which segment holds the chunk with this hash (a `SharedSegment`)

The names of `names.py` answer a look-up because they can be listed. Where they cannot, a name must be known before it
is asked for, and all that a machine knows is its own prompt. So each whole chunk of a segment has a pointer under its
chain hash, and a look-up asks which pointers of the prompt's own chunks exist. That is one question for a thousand
chunks, and it takes as long in a store of ten prefixes as in one of a million, or where a million share a beginning.
The longest pointer that exists leads to the segment that reaches furthest; a second question reads it, and some that
are spread over the chunks before it, since a conversation is a chain of segments.

Numbered places below anchors (`anchors/HASH/0`, `1`, ...) would be fewer objects. But writers would compete for them, a
place that was evicted would hide those behind it, and their number would bound how many prefixes may share a
beginning. A pointer is named by what it says, so the first writer is as right as any other, and a chunk that several
segments hold needs only one.

A pointer may lead to what has vanished, or lie. A look-up then tries a shorter one, and what it finds is proved by the
segment's own bytes. The next machine that publishes a segment with this chunk puts its own pointer there.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence

from .engine import KeyValueEngine
from .names import SharedSegment

# Key and upload, first chunk, tokens, bytes.
_POINTER = struct.Struct("<16s4sIIQ")
_MAX_POINTER = 256
# Pointers are read so many at once; and so often, where chains of short segments lie between those that were read.
_SPREAD, _ROUNDS = 64, 6


def pointer_name(chunk_hash: bytes) -> str:
    """The name of the pointer of a chunk."""
    return f"chunks/{chunk_hash.hex()}"


class KeyedIndex:
    """A `shared_index.SharedIndex` of pointers that are asked for.

    Args:
        engine: holds them.
    """

    def __init__(self, engine: KeyValueEngine) -> None:
        self._engine = engine

    def find(
        self,
        hashes: Sequence[bytes],
        chunk_size: int,
        have: int,
        is_of_use: Callable[[SharedSegment], bool],
    ) -> list[SharedSegment]:
        numbers = range(have + 1, len(hashes) + 1)
        exist = self._engine.which_exist([pointer_name(hashes[number - 1]) for number in numbers])
        there = [number for number, exists in zip(numbers, exist, strict=True) if exists]
        known = _Pointers(
            there, lambda some: self._read([hashes[number - 1] for number in some], some, chunk_size), chunk_size
        )
        useless: set[SharedSegment] = set()
        for top in known.longest_first():
            chain = known.chain(top, have)
            if chain is None:
                continue
            useful = [segment for segment in chain if segment not in useless and is_of_use(segment)]
            if useful:
                return useful
            useless.update(chain)
        return []

    def _read(self, hashes: Sequence[bytes], numbers: Sequence[int], chunk_size: int) -> list[SharedSegment | None]:
        found = self._engine.get_each([pointer_name(one) for one in hashes], _MAX_POINTER)
        return [_unpacked(octets, number, chunk_size) for octets, number in zip(found, numbers, strict=True)]

    def names(self, segment: SharedSegment, hashes: Sequence[bytes], chunk_size: int) -> list[str]:
        # (They are too many for a head. Without their segment they lead nowhere, and are evicted or replaced.)
        return []

    def add(
        self,
        segment: SharedSegment,
        hashes: Sequence[bytes],
        chunk_size: int,
        is_sound: Callable[[SharedSegment], bool],
    ) -> None:
        numbers = range(segment.first_chunk + 1, segment.end_chunk(chunk_size) + 1)
        names = [pointer_name(hashes[number - 1]) for number in numbers]
        own = _packed(segment)
        exist = self._engine.which_exist(names)
        there = [(number, name) for number, name, exists in zip(numbers, names, exist, strict=True) if exists]
        found = self._engine.get_each([name for _, name in there], _MAX_POINTER)
        sound: dict[SharedSegment, bool] = {segment: True}
        lost = []
        for (number, name), octets in zip(there, found, strict=True):
            other = _unpacked(octets, number, chunk_size)
            if other is not None and other not in sound:
                sound[other] = is_sound(other)
            if other is None or not sound[other]:
                lost.append(name)
        self._engine.put_each(dict.fromkeys(lost, own), replace=True)
        kept = {name for _, name in there}
        self._engine.put_each(dict.fromkeys((name for name in names if name not in kept), own), replace=False)


class _Pointers:
    """The pointers of a prompt that exist, read as they are needed.

    Args:
        there: chunk numbers (from 1) whose pointers exist, in order.
        read: what the pointers of some chunk numbers say; `None` for those that say nothing.
        chunk_size: tokens per chunk.
    """

    def __init__(
        self, there: Sequence[int], read: Callable[[Sequence[int]], Sequence[SharedSegment | None]], chunk_size: int
    ) -> None:
        self._there = there
        self._read = read
        self._chunk_size = chunk_size
        self._known: dict[int, SharedSegment | None] = {}
        self._rounds = 0

    def longest_first(self) -> Iterator[int]:
        """The chunk numbers whose pointers were read and say something, also those that are read meanwhile."""
        if self._there:
            self._learn(self._there[-1])
        tried: set[int] = set()
        while left := [number for number, segment in self._known.items() if segment and number not in tried]:
            tried.add(max(left))
            yield max(left)

    def chain(self, top: int, have: int) -> list[SharedSegment] | None:
        """The segments that hold the chunks behind `have` up to `top`, in order; `None` where one is not known."""
        chain: list[SharedSegment] = []
        reached = top
        while reached > have:
            segment = self._holder(reached)
            if segment is None:
                return None
            chain.append(segment)
            reached = segment.first_chunk
        return chain[::-1]

    def _holder(self, number: int) -> SharedSegment | None:
        """A segment that holds a chunk of the prompt, or may."""
        found = self._holding(number) or self._ending_at(number)
        if found is None and number not in self._known:
            self._learn(number)
            found = self._holding(number) or self._ending_at(number)
        return found or self._reaching(number)

    def _holding(self, number: int) -> SharedSegment | None:
        # (A chain hash stands for all chunks before it. So what holds a later chunk of the prompt holds this one too,
        # if it begins early enough.)
        holding = [segment for at, segment in self._known.items() if segment and segment.first_chunk < number <= at]
        return min(holding, key=lambda segment: segment.first_chunk, default=None)

    def _ending_at(self, number: int) -> SharedSegment | None:
        # (What holds an earlier chunk of the prompt and ends with this one is what the next segment continues, or
        # another one that ends there. Its own pointer need not be read.)
        ending = (
            segment
            for at, segment in self._known.items()
            if segment and at <= number and segment.end_chunk(self._chunk_size) == number
        )
        return min(ending, key=lambda segment: segment.first_chunk, default=None)

    def _reaching(self, number: int) -> SharedSegment | None:
        # (Where the pointer of this chunk was evicted: what holds an earlier one, and is long enough, was probably what
        # the next segment continues. It is proved as everything is.)
        reaching = {
            at: segment
            for at, segment in self._known.items()
            if segment and segment.first_chunk < number <= segment.end_chunk(self._chunk_size)
        }
        return reaching[max(reaching)] if reaching else None

    def _learn(self, number: int) -> None:
        """Read the pointer of a chunk, and some before it that no known segment holds."""
        held = {one for at, segment in self._known.items() if segment for one in range(segment.first_chunk + 1, at + 1)}
        left = [one for one in self._there if one <= number and one not in self._known and one not in held]
        if not left or self._rounds >= _ROUNDS:
            return
        self._rounds += 1
        step = -(-len(left) // _SPREAD)
        chosen = left[::-1][::step]
        self._known |= dict(zip(chosen, self._read(chosen), strict=True))


def _packed(segment: SharedSegment) -> bytes:
    return _POINTER.pack(
        bytes.fromhex(segment.key),
        bytes.fromhex(segment.upload),
        segment.first_chunk,
        segment.num_tokens,
        segment.nbytes,
    )


def _unpacked(octets: bytes | None, number: int, chunk_size: int) -> SharedSegment | None:
    """The segment that a pointer names; `None` where it cannot hold the chunk with this number."""
    if octets is None or len(octets) != _POINTER.size:
        return None
    key, upload, first, tokens, nbytes = _POINTER.unpack(octets)
    segment = SharedSegment(key.hex(), upload.hex(), first, tokens, nbytes)
    return segment if nbytes and first < number <= segment.end_chunk(chunk_size) else None
