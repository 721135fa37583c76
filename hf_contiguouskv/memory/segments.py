"""What memory asks of a stored segment."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Literal, Protocol

# `exact`: K and V in the model's dtype. `packed`: values in 4 bits; the keys are those of the key index. `compact`:
# keys in 8 bits and values in 4 bits.
Form = Literal["exact", "packed", "compact"]


class CachedSegment(Protocol):
    """A segment whose chunks may be kept in memory. `store.segment.Segment` is one."""

    @property
    def key(self) -> str:
        """Its name in the store."""
        ...

    @property
    def identity(self) -> Hashable:
        """Tells its bytes from others under the same key."""
        ...

    @property
    def first_chunk(self) -> int:
        """Position of its first chunk in its prefix."""
        ...

    @property
    def num_chunks(self) -> int:
        """Its chunks, a partial last one included."""
        ...

    @property
    def num_layers(self) -> int:
        """Layers that it has chunks of."""
        ...

    @property
    def in_memory(self) -> bool:
        """Whether its bytes lie in memory anyway, so that a copy is of no use."""
        ...

    @property
    def retired(self) -> bool:
        """Whether it was removed from its store, so that no later request asks for it."""
        ...

    def extent_bytes(self, form: Form) -> int:
        """Bytes of one chunk of one layer in this form."""
        ...
