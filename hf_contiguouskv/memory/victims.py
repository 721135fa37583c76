"""What goes when a tier needs room: chunks and keys compared by worth, the least first."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from .arena import Arena
from .blocks import Slots
from .entries import KeptKeys

# Worth, bytes that it frees, and what: keys, or a number in an arena (a slot, or a block of slots).
_Candidate = tuple[float, int, KeptKeys | tuple[Arena, int]]


def choose_victims(
    nbytes: int, arenas: Iterable[Arena], keys_in_order: Iterable[KeptKeys], into: Arena | None
) -> tuple[list[KeptKeys], dict[Arena, Slots]]:
    """Entries that nobody uses, least worth first, until they are `nbytes`.

    Args:
        nbytes: to be freed.
        arenas: of the tier.
        keys_in_order: its keys, least worth first; those that are in use or gone are passed over.
        into: slots of this arena go one by one, because it is going to use them itself; others go by whole blocks,
            whose memory can be returned.

    Returns:
        keys, and per arena the slots (int64, resident, without users) to be taken away.
    """
    candidates: list[_Candidate] = []
    for arena in arenas:
        if _one_by_one(arena, into):
            slots = arena.lowest(-(-nbytes // arena.slot_bytes))
            found = zip(arena.worth[slots].tolist(), slots.tolist(), strict=True)
            candidates += [(worth, arena.slot_bytes, (arena, slot)) for worth, slot in found]
        else:
            candidates += [(worth, arena.block_bytes, (arena, block)) for worth, block in arena.lowest_blocks()]
    candidates += _lowest_keys(nbytes, keys_in_order)  # Of equals, chunks go first: they lead to nothing else.
    candidates.sort(key=lambda candidate: candidate[0])
    keys: list[KeptKeys] = []
    numbers: dict[Arena, list[int]] = {}
    for _, size, entry in candidates:
        if nbytes <= 0:
            break
        nbytes -= size
        if isinstance(entry, KeptKeys):
            keys.append(entry)
        else:
            numbers.setdefault(entry[0], []).append(entry[1])
    return keys, {arena: _slots(arena, chosen, into) for arena, chosen in numbers.items()}


def _one_by_one(arena: Arena, into: Arena | None) -> bool:
    return arena is into or arena.blocks.slots_per_block == 1


def _slots(arena: Arena, numbers: list[int], into: Arena | None) -> Slots:
    if _one_by_one(arena, into):
        return np.array(numbers, dtype=np.int64)
    return np.concatenate([arena.in_block(block) for block in numbers])


def _lowest_keys(nbytes: int, keys_in_order: Iterable[KeptKeys]) -> list[_Candidate]:
    """As many as make up `nbytes`."""
    found: list[_Candidate] = []
    for keys in keys_in_order:
        if nbytes <= 0:
            break
        if not keys.users and not keys.gone:
            found.append((keys.worth, keys.buffer.counted, keys))
            nbytes -= keys.buffer.counted
    return found
