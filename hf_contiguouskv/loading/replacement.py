"""From one choice of chunks to the next: K and V of those that stay are moved, the others are put beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..hardware.accelerator import send
from ..memory.blocks import among
from ..selection.index_parts import KeyIndex
from ..store.attached_prefix import AttachedPrefix, Chunks
from .placement import chosen, place_chunk_keys, put
from .residency import LoadedChunks


class Exchange(NamedTuple):
    """What has to happen to the chunks of a row, so that they are those of another choice. All are int64 `(n,)`.

    Attributes:
        missing: chunks that the row does not have, ascending.
        places: where each of them goes among the chunks of the new choice.
        origins, targets: chunks that stay and change their place: from where to where.
    """

    missing: Chunks
    places: Chunks
    origins: Chunks
    targets: Chunks

    @classmethod
    def between(cls, before: Chunks, after: Chunks) -> Exchange:
        """From the chunks `before` to those `after`, both int64 `(keep,)`, ascending."""
        stay = among(after, before)
        targets = np.flatnonzero(stay)
        origins = np.searchsorted(before, after[stay])
        moves = origins != targets
        return cls(after[~stay], np.flatnonzero(~stay), origins[moves], targets[moves])


class NewChunks:
    """Chunks that rows of one layer are missing, collected before anything is overwritten: a read may still fail.

    Args:
        prefix: in the form in which chunks are read.
        exchanges: one per row of `destination`.
        destination: `(2 (K, V), rows, kv_heads, kept_tokens, head_dim)`: K and V of the chunks before.
    """

    def __init__(self, prefix: AttachedPrefix, exchanges: Sequence[Exchange], destination: torch.Tensor) -> None:
        self._prefix = prefix
        self._exchanges = exchanges
        self._destination = destination
        kv_heads, head_dim = destination.shape[2], destination.shape[4]
        self._chunk_size = c = prefix.geometry.chunk_size
        # One row at a time, as rows miss different numbers of chunks: (2, 1, kv_heads, n, c, head_dim).
        self._rows = [destination.new_empty(2, 1, kv_heads, len(one.missing), c, head_dim) for one in exchanges]

    def add(self, part: LoadedChunks) -> None:
        """Copy what rows are missing from chunks that have arrived (of a packed prefix only the values)."""
        for exchange, row in zip(self._exchanges, self._rows, strict=True):
            missing = exchange.missing
            if len(missing):
                take, places = chosen(part.chunks, missing, len(missing))
                if len(places):
                    put(self._prefix, part.extents(take), places, row)

    def add_keys(self, parts: Sequence[KeyIndex]) -> None:
        """Copy the keys of a packed prefix from its index (see `placement.place_keys`)."""
        for exchange, row in zip(self._exchanges, self._rows, strict=True):
            place_chunk_keys(self._prefix, parts, exchange.missing, row[0, 0])

    def replace(self) -> None:
        """Put everything in place: the destination then has the chunks of the new choice, in the order of the text."""
        for number, (exchange, new) in enumerate(zip(self._exchanges, self._rows, strict=True)):
            whole = self._destination.shape[3] // self._chunk_size * self._chunk_size
            chunks = self._destination[:, number, :, :whole].unflatten(2, (-1, self._chunk_size))
            if len(exchange.targets):
                moved = chunks.index_select(2, _sent(exchange.origins, chunks))
                chunks.index_copy_(2, _sent(exchange.targets, chunks), moved)
            if len(exchange.places):
                chunks.index_copy_(2, _sent(exchange.places, chunks), new[:, 0])


def _sent(places: Chunks, where: torch.Tensor) -> torch.Tensor:
    return send(torch.from_numpy(places), where.device)
