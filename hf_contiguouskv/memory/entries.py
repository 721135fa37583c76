"""What a tier holds besides chunks: buffers for reads and copies, and keys for selection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .history import SegmentTable


@dataclass(eq=False)
class Buffer:
    """Memory for reads or copies.

    Where the limit leaves no room, a buffer may be allocated uncounted (see `Tier.lease`); it is never kept.

    Attributes:
        data: uint8 `(capacity,)`.
        counted: bytes that count towards the tier's limit: the whole capacity, or 0.
        busy: an event; until it has happened, an accelerator reads or writes this memory.
        ready: an event; once it has happened, the bytes copied here can be read (device memory only).
    """

    data: torch.Tensor
    counted: int
    busy: Any = None
    ready: Any = None


@dataclass(eq=False)
class KeptKeys:
    """Keys that are kept under a name. Every holder releases them with `Tier.let_go`.

    `which` is the number of these keys in their table (see `SegmentTable.uses_of_keys`).
    """

    name: str
    which: int
    buffer: Buffer
    table: SegmentTable
    worth: float
    users: int = 0
    gone: bool = False


def buffer_capacity(nbytes: int) -> int:
    """Capacity of a buffer: powers of two up to 4 MiB, because few sizes are reused more often; above, whole MiB."""
    if nbytes <= 2**22:
        return max(4096, 1 << (nbytes - 1).bit_length())
    return -(-nbytes // 2**20) * 2**20
