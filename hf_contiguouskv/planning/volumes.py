"""How many bytes and reads it takes to bring something."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..hardware.aligned_memory import PAGE

# Reads that follow each other are put together up to this size (`store.reads.ReadBatch`).
JOINED_BYTES = 2**20


@dataclass(frozen=True)
class Volume:
    """What one step asks for.

    Attributes:
        nbytes: bytes.
        reads: how many reads bring them; a fraction where a read serves several steps.
    """

    nbytes: float
    reads: float = 1.0


def in_a_row(nbytes: float) -> Volume:
    """Bytes that follow each other."""
    return Volume(nbytes, max(1, math.ceil(nbytes / JOINED_BYTES)))


def scattered(pieces: float, share: float, piece_bytes: int, gap_bytes: int) -> Volume:
    """Pieces that are chosen at random from a row of them.

    Args:
        pieces: how many are read.
        share: of all pieces that are chosen, in (0, 1].
        piece_bytes: of one.
        gap_bytes: what lies between two pieces is read as well, up to so many bytes; 0: nothing is.
    """
    bridged = gap_bytes // piece_bytes
    rest = 1.0 - min(1.0, share)
    # The number of pieces between two chosen ones is geometric.
    between = sum(length * share * rest**length for length in range(1, bridged + 1))
    nbytes = pieces * (1 + between) * piece_bytes
    reads = max(1 + max(0.0, pieces - 1) * rest ** (bridged + 1), nbytes / JOINED_BYTES)
    # Direct reads begin and end at pages.
    return Volume(nbytes + (reads * PAGE if piece_bytes % PAGE else 0), reads)
