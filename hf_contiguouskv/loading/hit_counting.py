"""Which tier used chunks came from."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..memory import Usage
from ..stats import RequestStats
from ..store.attached_prefix import Chunks
from .residency import LoadedChunks


class Arrival(NamedTuple):
    """Chunks that were taken, without the memory that they were in.

    Attributes:
        chunks: int64 `(n,)`: first those from the device, then those from the host's tier, then those from disk.
        from_disk, from_host: how many came from there.
        speculative: whether they were asked for before they were selected.
    """

    chunks: Chunks
    from_disk: int
    from_host: int
    speculative: bool

    @classmethod
    def of(cls, part: LoadedChunks) -> Arrival:
        """Of chunks that were just taken."""
        return cls(part.chunks, part.from_disk, part.from_host, part.speculative)


def count_hits(
    stats: RequestStats, usage: Usage, arrived: Arrival, extent_bytes: int, used: npt.NDArray[np.bool_] | None = None
) -> int:
    """Count used chunks by the tier that they came from.

    Args:
        stats: counts hits.
        usage: counts bytes that were read into memory, used or not.
        arrived: chunks that were taken.
        extent_bytes: of one of them.
        used: bool `(n,)`, which of them attention uses; `None`: all.

    Returns:
        how many of those used came from disk.
    """
    count, host, disk = len(arrived.chunks), arrived.from_host, arrived.from_disk
    device = count - host - disk
    if used is not None:
        device, host, disk = (int(part.sum()) for part in np.split(used, [device, device + host]))
    stats.hits["device"] += device
    stats.hits["host"] += host
    stats.hits["disk"] += disk
    usage.loaded_bytes += arrived.from_disk * extent_bytes
    return disk
