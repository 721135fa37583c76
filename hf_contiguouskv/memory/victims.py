"""What a tier evicts when it needs room: chunks and keys compared by worth, lowest first."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from .arena import Arena
from .blocks import Slots
from .entries import KeptKeys

# The worth, the bytes freed, and the entry: keys, or a number in an arena (a slot or a block of slots).
_Candidate = tuple[float, int, KeptKeys | tuple[Arena, int]]


def choose_victims(
    nbytes: int, arenas: Iterable[Arena], keys_in_order: Iterable[KeptKeys], into: Arena | None
) -> tuple[list[KeptKeys], dict[Arena, Slots]]:
    """Unused entries, lowest worth first, that add up to `nbytes`.

    Args:
        nbytes: bytes to free.
        arenas: the tier's arenas.
        keys_in_order: the tier's keys, lowest worth first; keys in use or forgotten are skipped.
        into: slots of this arena are chosen one by one, because it will reuse them; other arenas lose whole blocks,
            whose memory can be returned.

    Returns:
        keys, and per arena the slots (int64, resident, without users) to evict.
    """
    candidates: list[_Candidate] = []
    for arena in arenas:
        if _one_by_one(arena, into):
            slots = arena.lowest(-(-nbytes // arena.slot_bytes))
            found = zip(arena.worth[slots].tolist(), slots.tolist(), strict=True)
            candidates += [(worth, arena.slot_bytes, (arena, slot)) for worth, slot in found]
        else:
            candidates += [(worth, arena.block_bytes, (arena, block)) for worth, block in arena.lowest_blocks()]
    candidates += _lowest_keys(nbytes, keys_in_order)  # Ties evict chunks before keys, because keys lead to chunks.
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
    """The unused keys of lowest worth that add up to `nbytes`."""
    found: list[_Candidate] = []
    for keys in keys_in_order:
        if nbytes <= 0:
            break
        if not keys.users and not keys.gone:
            found.append((keys.worth, keys.buffer.counted, keys))
            nbytes -= keys.buffer.counted
    return found
