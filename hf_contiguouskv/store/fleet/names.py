"""What objects of a shared store are called: names that answer a look-up, so that one listing finds a prefix.

    contiguouskv-shared.json                 marks the folder
    segments/ab/KEY.UPLOAD.safetensors       a segment, exactly as on a disk; UPLOAD tells two uploads of it apart
    heads/KEY                                which upload counts; the first to create it has won
    anchors/HASH/FIRST-OWN/...-KEY-UPLOAD    empty; names of segments, found by the hash of a chunk of a prompt
    used/KEY                                 empty; when the segment was last used
    damaged/KEY.UPLOAD                       an upload whose bytes proved wrong
    deleted/KEY                              when the segment was deleted for all machines, by the engine's clock

A prompt of any length must find its longest stored beginning with one or two round trips, whatever the store's size.
So a segment has a name under the hash of its prefix's chunk number 1, 4, 16, 64, ... (its *anchors*): of those that lie
in it, and of the last one before it. A look-up lists what lies below those of the prompt's own chunks that have these
numbers, all at once. Each name says where the segment begins, how long it is, and one byte of the hash of up to 48 of
its chunks: comparing them with the prompt's own hashes shows about how far the segment and the prompt agree. That is a
guess which only chooses what to look at: what is then used is proved by the segment's own bytes, as on a disk.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

MARKER = "contiguouskv-shared.json"
SHARED_FORMAT = 1
# Anchors are at chunk numbers that grow by this factor.
FACTOR = 4
_SAMPLES = 48
# So often another choice is made where segments that were chosen are of no use.
_TRIES = 64
_KEY = "[0-9a-f]{32}"
_ENTRY = re.compile(
    rf"anchors/{_KEY}/([0-9a-f]{{6}})-([0-9a-f]{{8}})/([0-9a-f]{{7}})-([0-9a-f]{{10}})-([0-9a-f]*)-({_KEY})-([0-9a-f]{{8}})"
)
_UPLOAD = re.compile(rf"segments/[0-9a-f]{{2}}/({_KEY})\.([0-9a-f]{{8}})\.safetensors")


@dataclass(frozen=True, slots=True)
class SharedSegment:
    """A segment of a shared store, as its names describe it.

    Attributes:
        key: chain hash of its last chunk, hex.
        upload: 8 hexadecimal digits that tell this upload of it from others.
        first_chunk: position of its first chunk in the prefix.
        num_tokens: tokens in it.
        nbytes: length of the object in bytes.
    """

    key: str
    upload: str
    first_chunk: int
    num_tokens: int
    nbytes: int

    @property
    def object_name(self) -> str:
        """Where its bytes are."""
        return f"segments/{self.key[:2]}/{self.key}.{self.upload}.safetensors"

    def end_chunk(self, chunk_size: int) -> int:
        """Whole chunks of the prefix up to its end."""
        return self.first_chunk + self.num_tokens // chunk_size


def uploaded(name: str) -> tuple[str, str] | None:
    """`(key, upload)` of the object of a segment; `None` for any other name."""
    found = _UPLOAD.fullmatch(name)
    return (found[1], found[2]) if found else None


def read_entry(name: str) -> tuple[str, str] | None:
    """`(key, upload)` of a segment's name below an anchor; `None` for any other name."""
    found = _ENTRY.fullmatch(name)
    return (found[6], found[7]) if found else None


def head_name(key: str) -> str:
    """The object that says which upload of a segment counts."""
    return f"heads/{key}"


def used_name(key: str) -> str:
    """The object whose age says when a segment was last used."""
    return f"used/{key}"


def damaged_name(key: str, upload: str) -> str:
    """The object that says that an upload is damaged."""
    return f"damaged/{key}.{upload}"


def deleted_name(key: str) -> str:
    """The object that says when a segment was deleted for all machines."""
    return f"deleted/{key}"


def anchors_of_prompt(chunks: int) -> list[int]:
    """Chunk numbers (from 1) below whose hashes a prompt of so many whole chunks looks."""
    found, number = [], 1
    while number <= chunks:
        found.append(number)
        number *= FACTOR
    return found


def anchors_of_segment(first_chunk: int, end_chunk: int) -> list[int]:
    """Chunk numbers (from 1) below whose hashes a segment is named: those in it, and the last one before it."""
    numbers = anchors_of_prompt(end_chunk)
    return [number for number in numbers if number * FACTOR > first_chunk] if first_chunk else numbers


def folder_of(chunk_hash: bytes) -> str:
    """What is listed for one chunk of a prompt."""
    return f"anchors/{chunk_hash.hex()}/"


def narrowed(chunk_hash: bytes, first_chunk: int, own_hash: bytes) -> str:
    """Below `folder_of`, what begins at a chunk with this hash."""
    return f"{folder_of(chunk_hash)}{first_chunk:06x}-{own_hash[:4].hex()}/"


def names_of(segment: SharedSegment, hashes: Sequence[bytes], chunk_size: int) -> list[str]:
    """The names of a segment below its anchors.

    Args:
        segment: what is named.
        hashes: of all whole chunks of its prefix, up to its end at least.
        chunk_size: tokens per chunk.
    """
    end = segment.end_chunk(chunk_size)
    own = hashes[segment.first_chunk] if end > segment.first_chunk else bytes.fromhex(segment.key)
    return [
        f"{narrowed(hashes[anchor - 1], segment.first_chunk, own)}{segment.num_tokens:07x}-{segment.nbytes:010x}-"
        f"{bytes(hashes[number - 1][0] for number in _sampled(anchor, segment.first_chunk, end)).hex()}-"
        f"{segment.key}-{segment.upload}"
        for anchor in anchors_of_segment(segment.first_chunk, end)
    ]


def _sampled(anchor: int, first_chunk: int, end: int) -> list[int]:
    """The chunk numbers of which a name below this anchor holds a byte."""
    low, high = max(anchor, first_chunk + 1), min(end, anchor * FACTOR)
    count = min(_SAMPLES, high - low)
    return [low + -(-(number + 1) * (high - low) // count) for number in range(count)]


@dataclass(frozen=True, slots=True)
class Match:
    """A segment whose name says that it may hold chunks of a prompt.

    Attributes:
        segment: as the name describes it.
        chunks: whole chunks of the prefix, from its beginning on, in which segment and prompt agree, as far as the name
            tells; at least so many where none of its bytes is equal by chance.
        at_most: chunks in which they may agree: the name says nothing of those between two of its bytes.
    """

    segment: SharedSegment
    chunks: int
    at_most: int


def read_name(name: str, anchor: int, hashes: Sequence[bytes], chunk_size: int) -> Match | None:
    """What a name below an anchor says of a prompt.

    Args:
        name: of an object below `folder_of(hashes[anchor - 1])`.
        anchor: chunk number.
        hashes: of the whole chunks of the prompt.
        chunk_size: tokens per chunk.

    Returns:
        `None` for a name that says nothing, or of a segment that holds nothing of this prompt.
    """
    found = _ENTRY.fullmatch(name)
    if not found:
        return None
    first, own, tokens, nbytes = int(found[1], 16), bytes.fromhex(found[2]), int(found[3], 16), int(found[4], 16)
    segment = SharedSegment(found[6], found[7], first, tokens, nbytes)
    end, count = segment.end_chunk(chunk_size), len(hashes)
    samples = _sampled(anchor, first, end) if end >= max(anchor, first + 1) else []
    if not tokens or len(samples) * 2 != len(found[5]):
        return None
    if first >= count or first >= end or hashes[first][:4] != own:
        # (What begins behind the prompt's whole chunks can share only a part of one chunk: not worth a round trip.)
        return None
    # (What agrees further than this name tells is named below the next anchor as well.)
    agreed = max(anchor, first + 1)
    at_most = max(agreed, min(end, anchor * FACTOR))
    for number, byte in zip(samples, bytes.fromhex(found[5]), strict=True):
        if number > count or hashes[number - 1][0] != byte:
            at_most = number - 1
            break
        agreed = number
    return Match(segment, min(agreed, end), min(at_most, count))


def best_chain(matches: Iterable[Match], have: int) -> list[SharedSegment]:
    """Segments that bring a prompt further than its first `have` whole chunks, each continuing those before it.

    Of several that begin early enough, the one that reaches furthest is taken; of equal ones, the longest. What begins
    behind what is certain is taken where another one may reach so far: its name agrees with the prompt up to there, so
    something does.
    """
    left = sorted(set(matches), key=_rank, reverse=True)
    chain: dict[SharedSegment, None] = {}
    reached = have
    while True:
        further = [match for match in left if match.chunks > reached]
        best = next((match for match in further if match.segment.first_chunk <= reached), None)
        if best is None:
            bridged = _bridged(further, left, reached)
            if bridged is None:
                return list(chain)
            bridge, best = bridged
            chain[bridge.segment] = None
        chain[best.segment] = None
        reached = best.chunks


def chosen_chain(
    matches: list[Match], have: int, is_of_use: Callable[[SharedSegment], bool]
) -> tuple[list[SharedSegment], int]:
    """The best chain of segments that are all of use, and how many chunks of the prompt it reaches for certain.

    Args:
        matches: what names say.
        have: chunks that are at hand already.
        is_of_use: asked of each segment before it is taken.
    """
    left = matches
    # (Very many may share the beginning of a prompt. Only those that would be taken are asked about.)
    for _ in range(_TRIES):
        chain = best_chain(left, have)
        useless = {segment for segment in chain if not is_of_use(segment)}
        if not useless:
            return chain, max((match.chunks for match in left if match.segment in chain), default=have)
        left = [match for match in left if match.segment not in useless]
    return [], have


def _rank(match: Match) -> tuple[int, int, str, str]:
    return match.chunks, match.segment.num_tokens, match.segment.key, match.segment.upload


def _bridged(further: list[Match], matches: list[Match], reached: int) -> tuple[Match, Match] | None:
    """A match that begins behind what is reached, after one that may reach to its beginning."""
    for match in further:
        for bridge in matches:  # (Those that reach furthest for certain come first.)
            if bridge.segment.first_chunk <= reached and bridge.at_most >= match.segment.first_chunk:
                return bridge, match
    return None
