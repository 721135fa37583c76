"""What memory asks of a segment whose chunks it keeps."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Protocol

from ..config import Payload


class KeptSegment(Protocol):
    """A stored segment as memory sees it (`store.segment.Segment`)."""

    @property
    def key(self) -> str:
        """Name of the segment: the chain hash of its last chunk, hex."""
        ...

    @property
    def identity(self) -> Hashable:
        """Tells these bytes from others that were stored under the same key."""
        ...

    @property
    def first_chunk(self) -> int:
        """Position of its first chunk in the prefix."""
        ...

    @property
    def num_chunks(self) -> int:
        """Chunks in this segment, a partial last one included."""
        ...

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        ...

    @property
    def needs_no_table(self) -> bool:
        """Whether its bytes lie in memory already, or no later request will ask for them."""
        ...

    def extent_bytes(self, form: Payload) -> int:
        """Bytes of one chunk of one layer in one form."""
        ...
