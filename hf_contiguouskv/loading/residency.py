"""What loading asks of a store, and how chunks of one layer reach the device where attention reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from ..memory import MemoryTiers
from ..store.attached_prefix import Chunks
from ..store.reader import ExtentReader, Ticket

# Bytes that are read at a time where the tiers have no room: few enough to be allocated beside every limit.
PIECE_BYTES = 4 * 2**20


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


class LoadedChunks(Protocol):
    """Chunks that one layer asked for together and that come from one place. One request uses them.

    Attributes:
        chunks: int64 `(n,)`, each once, in the order of `extents`.
        from_disk: how many of them are read from disk.
        from_host: how many were in the host's tier when they were asked for. The others were on the device.
        speculative: whether they were asked for before they were selected.
        ticket: of the reads; `None`: nothing is read.
    """

    chunks: Chunks
    from_disk: int
    from_host: int
    speculative: bool
    ticket: Ticket | None

    def extents(self, take: Chunks | None) -> torch.Tensor:
        """Bytes of the chunks at positions `take` (all: `None`), uint8 `(n, extent_bytes)`, where attention runs.

        The ticket must have ended. The bytes are valid until `release`.
        """
        ...

    def release(self) -> None:
        """Attention's buffer is filled, or nothing needs the chunks: keep in memory those that are worth it."""
        ...


class Residency(Protocol):
    """Brings chunks of one prefix to one device."""

    def find_or_read(
        self, layer: int, chunks: Chunks, *, speculative: bool = False, alone: bool = True
    ) -> tuple[list[LoadedChunks], Chunks]:
        """Find `chunks` (int64, ascending) of `layer` in memory, or start reading them.

        Args:
            layer: layer index.
            chunks: of the prefix.
            speculative: whether they have not been selected yet.
            alone: whether no other layer is asked for at the same time: then all reader threads share the reads.

        Returns:
            the chunks that memory has room for, by place; and those that it has no room for now, int64.
        """
        ...

    def find_or_read_together(
        self, asked: Sequence[tuple[int, Chunks]], *, speculative: bool
    ) -> list[tuple[list[LoadedChunks], Chunks]]:
        """As `find_or_read`, for several layers and chunks of each, whose reads may be one ticket.

        Reads of neighbouring bytes are joined, whichever layers they belong to.
        """
        ...

    def read_piece(self, layer: int, chunks: Chunks) -> tuple[LoadedChunks, Chunks]:
        """Start reading the first `PIECE_BYTES` of `chunks` beside the limits of memory; also returns the rest."""
        ...

    def settle(self) -> None:
        """The first token is out, or the request is over: do the work that was put off until then."""
        ...
