"""What lies in a tier besides chunks: buffers for reads and copies, and keys to select with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .history import SegmentTable


@dataclass(eq=False)
class Buffer:
    """Memory for reads or copies.

    Where the limit leaves no room a buffer is had all the same, uncounted (see `Tier.lease`), and never kept.

    Attributes:
        data: uint8 `(capacity,)`.
        counted: what of it the tier's limit covers: all or nothing.
        busy: an event; until it has happened, an accelerator reads or writes this memory.
        ready: an event; once it has happened, what was copied here can be read (device memory only).
    """

    data: torch.Tensor
    counted: int
    busy: Any = None
    ready: Any = None


@dataclass(eq=False)
class KeptKeys:
    """Keys that are kept under a name. Whoever holds them gives them back with `Tier.let_go`.

    `which`: of their table's (see `SegmentTable.uses_of_keys`).
    """

    name: str
    which: int
    buffer: Buffer
    table: SegmentTable
    worth: float
    users: int = 0
    gone: bool = False


def buffer_capacity(nbytes: int) -> int:
    """Sizes of buffers: powers of two up to 4 MiB (few sizes are reused more often), then whole MiB."""
    if nbytes <= 2**22:
        return max(4096, 1 << (nbytes - 1).bit_length())
    return -(-nbytes // 2**20) * 2**20
