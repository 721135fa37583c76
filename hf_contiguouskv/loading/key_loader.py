"""Keys for scoring chunks, read ahead of compute."""

from __future__ import annotations

from functools import partial

from ..selection import ChunkScorer
from ..selection.indexed_keys import Part
from .key_reads import KeyReads
from .lookahead import Lookahead


class KeyLoader:
    """The keys of one request: `want` them in layer order, use them through `scorer` or `index`, `release` them.

    Args:
        reads: bring keys.
        ahead: starts reads in order, of keys and of chunks.
    """

    def __init__(self, reads: KeyReads, ahead: Lookahead) -> None:
        self._reads = reads
        self._ahead = ahead

    def want(self, layer: int) -> None:
        """Queue the keys of a layer behind the reads that were queued before."""
        self._ahead.add(layer, self._reads.missing_bytes(layer), partial(self._reads.start, layer))

    def start(self, layer: int) -> None:
        """Start bringing the keys of a layer now. They must have been wanted."""
        self._ahead.need(layer)

    def scorer(self, layer: int) -> ChunkScorer:
        """The scorer of a layer, once its keys have arrived. They must have been wanted."""
        self._ahead.need(layer)
        return self._reads.scorer(layer)

    def index(self, layer: int) -> list[Part]:
        """The key index of a layer, one part per segment, once it has arrived. It must have been wanted."""
        self._ahead.need(layer)
        return self._reads.index(layer)

    def release(self, layer: int) -> None:
        """Neither the scorer nor the index of this layer is needed any more."""
        self._reads.release(layer)

    def resident(self, layer: int) -> bool:
        """Whether all keys of this layer are in the tier of its device: for measuring."""
        return self._reads.resident(layer)

    def bytes_arriving(self, layer: int) -> int:
        """Bytes of the keys of this layer that are on their way now: for measuring."""
        return self._reads.bytes_arriving(layer)

    def close(self) -> None:
        """Wait for reads under way, and give back the keys that were not used."""
        self._reads.close()
