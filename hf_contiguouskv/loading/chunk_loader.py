"""The one way to chunks: `want` them, `take` them, `close`.

Three kinds of reads, all through the store's one reader, first come first served:

- *demand* (`want`): chunks that a selection has just named, for every layer of the period (intra-period);
- *ahead* (`want_later`, `keys.want`): what is needed whatever the queries are (all chunks at budget 1.0, sliding-window
  tails, keys for identification), started in layer order within a limit of bytes;
- *speculative* (`want(..., speculative=True)`): the current selection, for the next period (inter-period). The next
  selection then asks only for the chunks that are missing.
"""

from __future__ import annotations

from collections.abc import Generator, Hashable, Sequence
from functools import partial
from itertools import groupby

import numpy as np
import torch

from ..memory import Tier
from ..planning.read_plan import ReadPlan
from ..stats import RequestStats
from ..store.attached_prefix import AttachedPrefix, Chunks
from ..timeline import NO_TIMELINE, SpanRecorder
from .chunk_accounts import ChunkAccounts, RequestUsage
from .key_loader import KeyLoader
from .payload_reads import Lookahead, PayloadReads
from .residency import ChunkStore, LoadedChunks


class ChunkLoader:
    """Brings chunks of one prefix, and its keys, to the devices where attention reads them. One per request.

    Args:
        store: reads and keeps chunks.
        prefixes: per stored layer, the prefix in the form in which the layer is read.
        devices: per stored layer, where its chunks are used.
        stats: counts bytes, waits and hits; `None`: nothing needs the counts.
        lookahead_bytes: how many bytes `want_later` may have under way or unused. At least one layer always is.
        verify: whether to compare checksums. Chunks that were not compared never stay in memory.
        timeline: records reads and waits.
        usage: notes what memory is told; `None`: the loader's own, told when it is closed.

    Attributes:
        accounts: counts and notes what was used of the chunks.
        accelerated: whether the store serves an accelerator, to this request or to others.
    """

    def __init__(
        self,
        store: ChunkStore,
        prefixes: Sequence[AttachedPrefix],
        devices: Sequence[torch.device],
        stats: RequestStats | None = None,
        *,
        lookahead_bytes: int,
        verify: bool = True,
        timeline: SpanRecorder = NO_TIMELINE,
        usage: RequestUsage | None = None,
    ) -> None:
        self.accelerated = _crosses(store, devices) or bool(store.memory.devices)
        self._memory = store.memory
        self._prefixes = prefixes
        self._devices = devices
        self._stats = RequestStats() if stats is None else stats
        self._usage = RequestUsage(store.memory) if usage is None else usage
        self._owns_usage = usage is None
        # (Two forms of a prefix are two sets of chunks.)
        self._by_form = {
            prefix.form: PayloadReads(prefix, store.reader, store.memory, self._stats, verify, timeline)
            for prefix in {one.form: one for one in prefixes}.values()
        }
        self._reads = [self._by_form[prefix.form] for prefix in prefixes]
        tables = [reads.tables for reads in self._reads]
        self.accounts = ChunkAccounts(prefixes, tables, self._stats, self._usage)
        self._ahead = Lookahead(lookahead_bytes)
        self._keys: KeyLoader | None = None

    @classmethod
    def of(
        cls,
        plan: ReadPlan,
        store: ChunkStore,
        stats: RequestStats,
        *,
        timeline: SpanRecorder = NO_TIMELINE,
        usage: RequestUsage | None = None,
    ) -> ChunkLoader:
        """The loader of a request with this plan. It also brings the keys that chunks are scored with."""
        devices = plan.layers.devices
        loader = cls(
            store,
            plan.prefixes,
            devices,
            stats,
            lookahead_bytes=plan.lookahead_bytes(_crosses(store, devices)),
            verify=plan.config.reading.verify,
            timeline=timeline,
            usage=usage,
        )
        payload = loader._by_form.get(plan.served.form)
        if payload is not None:
            loader._keys = KeyLoader(plan, store, payload, loader._ahead, stats, timeline, loader.accelerated)
        return loader

    @property
    def keys(self) -> KeyLoader:
        """The keys that chunks are scored with. Only loaders made by `of` have them."""
        assert self._keys is not None
        return self._keys

    # -- asking -------------------------------------------------------------------------------------------------------

    def want(self, layers: Sequence[int], chunks: Chunks, *, speculative: bool = False) -> None:
        """Start bringing `chunks` (int64, ascending) of each of `layers`, where they have not been asked for.

        Args:
            layers: ascending. The model waits for the first one, unless the reads are speculative.
            chunks: of the prefix.
            speculative: whether they have not been selected yet. Those that memory has no room for are not read.
        """
        for (device, _), group in groupby(layers, key=lambda layer: (self._devices[layer], self._prefixes[layer].form)):
            some = list(group)
            self._reads[some[0]].ask(some, chunks, device, speculative)

    def want_later(self, layers: Sequence[int], chunks: Chunks) -> None:
        """Queue `chunks` (int64, ascending) of each of `layers` (ascending) behind the reads that were queued before.
        Layers that lie side by side in the file are read together."""
        for _, group in groupby(layers, key=self._lies_in):
            some = list(group)
            first = some[0]
            start = partial(self._reads[first].start, some, chunks, self._devices[first])
            self._ahead.add(some, len(some) * len(chunks) * self._prefixes[first].extent_bytes, start)

    def _lies_in(self, layer: int) -> Hashable:
        """Differs between layers that are not read together."""
        prefix = self._prefixes[layer]
        return self._devices[layer], prefix.form, prefix.group_of(layer)

    def want_whole_layers_later(self, layers: Sequence[int], enough: int) -> None:
        """Queue all chunks of layers (ascending, of one form and device), speculatively, to be read together.

        A layer is not read if memory has `enough` chunks of it by then.
        """
        first, prefix = layers[0], self._prefixes[layers[0]]
        chunks = np.arange(prefix.chunks)
        start = partial(self._reads[first].start_unless_resident, layers, chunks, self._devices[first], enough)
        self._ahead.add(layers, len(layers) * len(chunks) * prefix.extent_bytes, start)

    def start_queued(self) -> None:
        """Start queued reads, as far as the limit allows."""
        self._ahead.pump()

    def read_on(self, layer: int) -> None:
        """What was read ahead for `layer` has been used: start the queued reads that now fit."""
        self._ahead.used(layer)

    # -- taking -------------------------------------------------------------------------------------------------------

    def asked(self, layer: int) -> int:
        """How many chunks of this layer were asked for and not taken yet. Chunks in the queue are asked for first."""
        self._ahead.need(layer)
        return self._reads[layer].asked(layer)

    def take(self, layer: int) -> Generator[LoadedChunks]:
        """The chunks of this layer that were asked for, part by part, each as soon as it has arrived.

        A part is valid until the next one is asked for. Close the generator if it is not run to its end.

        Raises:
            SegmentCorruptError: a segment ends too early, or a checksum does not match.
            SegmentReadError: the storage failed.
        """
        self._ahead.need(layer)
        yield from self._reads[layer].take(layer)
        self._ahead.used(layer)

    # -- memory -------------------------------------------------------------------------------------------------------

    def resident(self, layer: int, chunks: Chunks, tier: Tier | None = None) -> Chunks:
        """Those of `chunks` (int64, ascending) that are in `tier` (`None`: in some tier)."""
        return chunks[self._reads[layer].tables.which_resident(layer, chunks, tier)]

    def forget_on_devices(self) -> None:
        """For measuring: drop chunks and keys of the prefix's segments from accelerators, unless they are in use."""
        for reads in self._by_form.values():
            for table in reads.tables.known:
                for tier in self._memory.devices.values():
                    tier.forget(table)

    # -- the end ------------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """A token is out: keep the chunks that stay, and tell memory what was used (once per request)."""
        for reads in self._by_form.values():
            reads.settle()
        if not self._usage.told:
            self._usage.tell()

    def close(self) -> None:
        """Wait for reads under way and give their memory back. May be called more than once."""
        if self._keys is not None:
            self._keys.close()
        for reads in self._by_form.values():
            reads.close()
        if self._owns_usage:
            self._usage.tell()


def _crosses(store: ChunkStore, devices: Sequence[torch.device]) -> bool:
    return any(store.memory.on(device) is not None for device in devices)
