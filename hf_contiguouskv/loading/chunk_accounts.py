"""What was used of the chunks that were loaded: for the statistics of a request, and for memory."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from ..memory import MemoryTiers, Usage
from ..stats import RequestStats
from ..store.attached_prefix import AttachedPrefix, Chunks
from ..store.extents import Form
from .prefix_tables import PrefixTables
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


class RequestUsage:
    """What one request used: noted as it goes, counted by the memory tiers once its first token is out.

    If the request is dropped before that, the tiers count it all the same.
    """

    def __init__(self, memory: MemoryTiers) -> None:
        self._memory = memory
        self._by_form: dict[Form, Usage] = {form: Usage() for form in get_args(Form)}
        self._tell = weakref.finalize(self, memory.finished, *self._by_form.values())
        self._tell.atexit = False

    def of(self, form: Form) -> Usage:
        """What was used of chunks in this form."""
        return self._by_form[form]

    @property
    def told(self) -> bool:
        """Whether the tiers know already."""
        return not self._tell.alive

    def tell(self) -> None:
        """Tell the tiers, once, and do the work that they have put off."""
        self._tell()
        self._memory.catch_up()


class ChunkAccounts:
    """Counts and notes what one request uses of a prefix.

    Args:
        prefixes: per stored layer, the prefix in the form in which the layer is read.
        tables: per stored layer, where its chunks are in memory.
        stats: counts hits.
        usage: notes what memory is told once the first token is out.
    """

    def __init__(
        self,
        prefixes: Sequence[AttachedPrefix],
        tables: Sequence[PrefixTables],
        stats: RequestStats,
        usage: RequestUsage,
    ) -> None:
        self._prefixes = prefixes
        self._tables = tables
        self._stats = stats
        self._usage = usage

    def _used(self, layer: int) -> Usage:
        return self._usage.of(self._prefixes[layer].form)

    def count_hits(self, layer: int, arrived: Arrival, used: npt.NDArray[np.bool_] | None = None) -> int:
        """Count the chunks that were used by the tier that they came from.

        Args:
            layer: whose chunks.
            arrived: chunks that were taken.
            used: bool `(n,)`, which of them attention uses; `None`: all.

        Returns:
            how many of those used came from disk.
        """
        count, host, disk = len(arrived.chunks), arrived.from_host, arrived.from_disk
        device = count - host - disk
        if used is not None:
            device, host, disk = (int(part.sum()) for part in np.split(used, [device, device + host]))
        hits = self._stats.hits
        hits["device"] += device
        hits["host"] += host
        hits["disk"] += disk
        # Everything that was read into memory counts there, used or not.
        self._used(layer).loaded_bytes += arrived.from_disk * self._prefixes[layer].extent_bytes
        return disk

    def note_used(self, layer: int, chunks: Chunks) -> None:
        """Attention in `layer` uses `chunks` (int64, ascending)."""
        self._used(layer).used(self._tables[layer], layer, chunks)

    def note_importance(self, layers: list[int], mass: npt.NDArray[np.float32]) -> None:
        """Memory adds `mass`, float32 `(whole_chunks,)`, to the importance of the chunks in each of `layers`.

        Args:
            layers: all read in one form.
            mass: attention mass per chunk, summed over rows.
        """
        self._used(layers[0]).mass.append((layers, mass))

    def expect_importance(self, layers: Sequence[int], mass: npt.NDArray[np.float32]) -> None:
        """Chunks of `layers` that arrive from now on compete for memory with `mass`, float32 `(whole_chunks,)`."""
        self._tables[layers[0]].mass.update(dict.fromkeys(layers, mass))
