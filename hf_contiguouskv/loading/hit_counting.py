"""What of the chunks that came was used, and where they came from."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ..memory import Usage
from ..stats import RequestStats
from ..store.attached_prefix import Chunks
from .host_residency import Batch


class Arrived(Protocol):
    """Chunks that came from one place; see `residency.Batch`."""

    @property
    def chunks(self) -> Chunks: ...

    @property
    def from_disk(self) -> int: ...

    @property
    def from_host(self) -> int: ...


class Noted(NamedTuple):
    """What is to be counted of a batch, without the memory that the batch holds."""

    chunks: Chunks
    from_disk: int
    from_host: int
    speculative: bool

    @classmethod
    def of(cls, batch: Batch) -> Noted:
        """Of a batch that has arrived."""
        return cls(batch.chunks, batch.from_disk, batch.from_host, batch.speculative)


def count_hits(
    stats: RequestStats, usage: Usage, batch: Arrived, extent_bytes: int, used: npt.NDArray[np.bool_] | None = None
) -> int:
    """Count the chunks of a batch that were used by the tier they came from.

    Args:
        stats: counts hits.
        usage: counts what was loaded into memory, used or not.
        batch: has arrived.
        extent_bytes: of one of its chunks.
        used: bool `(n,)`, which of them attention uses; `None`: all.

    Returns:
        how many of those used came from disk.
    """
    count, host, disk = len(batch.chunks), batch.from_host, batch.from_disk
    device = count - host - disk
    if used is not None:
        device, host, disk = (int(part.sum()) for part in np.split(used, [device, device + host]))
    stats.hits["device"] += device
    stats.hits["host"] += host
    stats.hits["disk"] += disk
    usage.loaded_bytes += batch.from_disk * extent_bytes
    return disk
