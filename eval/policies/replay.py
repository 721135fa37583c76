"""Replay a trace through the real store, reader and memory tiers, with the model's compute replaced by sleep."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from hf_contiguouskv import ContiguousKVConfig, PrefixStore, RequestStats
from hf_contiguouskv.keys import KeySource
from hf_contiguouskv.memory import EvictionPolicy
from hf_contiguouskv.plan import LayerPlan, Rows
from hf_contiguouskv.prefix import AttachedPrefix
from hf_contiguouskv.request import PrefixRequest
from hf_contiguouskv.selection import ChunkScorer, SelectionInput
from hf_contiguouskv.store import KVGeometry
from hf_contiguouskv.store.reader import ExtentReader, Read, Ticket

from ..store_fixtures import MODEL, no_fsync, some_ids
from .trace import Pool, Trace

CPU = torch.device("cpu")


def geometry_of(trace: Trace) -> KVGeometry:
    """Of the stores that a trace is replayed on. (Exact leader keys are left out: the default does not read them.)"""
    return replace(KVGeometry.from_metadata(trace.about["geometry"]), leader_layers=())


def fill_store(folder: Path, trace: Trace) -> Path:
    """A store with a segment of random bytes for every prefix, made once in `folder`; where it is."""
    g = geometry_of(trace)
    tokens = [pool.tokens for pool in trace.pools]
    name = blake2b(f"{g} {tokens}".encode(), digest_size=8).hexdigest()
    path = folder / f"store-{name}"
    with no_fsync(), PrefixStore(path, host_bytes=0) as store:
        for number, count in enumerate(tqdm(tokens, "segments", disable=None, leave=False)):
            ids = some_ids(count, number)
            if store.lookup(MODEL, ids, g.chunk_size) is not None:
                continue
            chance = torch.Generator().manual_seed(number)
            with store.begin_segment(MODEL, g, ids) as writer:
                chunks = writer.header.num_chunks
                shape = (chunks, 2, g.kv_heads, g.chunk_size, g.head_dim)
                for layer in range(g.num_layers):
                    writer.write_chunks(layer, 0, torch.rand(shape, generator=chance).to(g.dtype))
                    if layer in g.indexed_layers:
                        shape_of_keys = (g.kv_heads, g.chunk_size, chunks, g.head_dim)
                        keys = torch.randint(-128, 128, shape_of_keys, generator=chance, dtype=torch.int8)
                        writer.write_index(layer, keys, torch.ones(g.kv_heads, g.head_dim))
                writer.commit()
    return path


def keys_bytes(pool: Pool, g: KVGeometry) -> int:
    """Bytes of the key index of one prefix, all layers."""
    chunks = -(-pool.tokens // g.chunk_size)
    return len(g.indexed_layers) * g.kv_heads * g.head_dim * (chunks * g.chunk_size + 4)


def footprint(trace: Trace, drawn: Iterable[tuple[int, int]]) -> dict[str, int]:
    """Bytes of everything that these requests touch, each thing once: `chunks` and `keys`."""
    g = geometry_of(trace)
    asked: dict[int, set[int]] = {}
    for prefix, number in drawn:
        asked.setdefault(prefix, set()).add(number)
    chunks = keys = 0
    for prefix, numbers in asked.items():
        pool = trace.pools[prefix]
        selected = pool.selected[sorted(numbers)]
        chunks += sum(len(np.unique(selected[:, layer])) for layer in range(selected.shape[1]))
        chunks += selected.shape[1] if pool.tokens % g.chunk_size else 0
        keys += keys_bytes(pool, g)
    return {"chunks": chunks * g.extent_bytes, "keys": keys}


def pause(seconds: float) -> None:
    """Sleep, unless there is nothing to sleep for."""
    if seconds > 0.0:
        time.sleep(float(seconds))


class RecordedKeys(KeySource):
    """Brings the keys, and then hands out what they once led to. See `RecordedRequest`."""

    def __init__(self, *arguments: Any, pool: Pool, number: int, pace: float) -> None:
        super().__init__(*arguments)
        self._pool, self._number, self._pace = pool, number, pace
        self.bytes_missed = 0

    def scorer(self, layer: int, device: torch.device) -> ChunkScorer:
        """See `KeySource`."""
        self.bytes_missed += sum(pending.nbytes for pending in self._taken.pending.get(layer, []))
        super().scorer(layer, device)

        def recorded(inputs: SelectionInput) -> torch.Tensor:
            pause(self._pool.identify_s[self._number, layer] * self._pace)
            mass = self._pool.importance[self._number, layer].astype(np.float32)
            # Rounding may have made the last one selected and the first one left out equal.
            selected = self._pool.selected[self._number, layer]
            mass[selected] = np.nextafter(mass[selected], np.float32(np.inf))
            return torch.from_numpy(mass)[None]

        return recorded


class RecordedRequest(PrefixRequest):
    """A request that selects what was recorded, without a model. All else is as in the library.

    Args:
        prefix, config, plan, store, stats: see `PrefixRequest`.
        pool, number: the recorded request.
        pace: what its compute times are multiplied by.
    """

    def __init__(
        self,
        prefix: AttachedPrefix,
        config: ContiguousKVConfig,
        plan: LayerPlan,
        store: PrefixStore,
        stats: RequestStats,
        pool: Pool,
        number: int,
        pace: float,
    ) -> None:
        self._pool, self._number, self._pace = pool, number, pace
        super().__init__(prefix, config, plan, store, stats)

    def _open_reads(self) -> None:
        super()._open_reads()
        arguments = self.prefix, self.config, self._store, self._payload, self.stats
        self._keys: RecordedKeys = RecordedKeys(*arguments, pool=self._pool, number=self._number, pace=self._pace)

    @property
    def keys_read(self) -> int:
        """Bytes of keys that were not in memory."""
        return self._keys.bytes_missed

    def run(self, destination: torch.Tensor) -> float:
        """All layers in order; seconds to the first token. `destination` is as in `load_full`."""
        nothing = torch.zeros(1, 1, 1, 1)
        started = time.perf_counter()
        self.begin(Rows.distinct(1, 1))
        for layer in range(len(self.plan.windows)):
            self.load_full(layer, nothing, nothing, {"scaling": 1.0}, destination)
            pause(self._pool.compute_s[self._number, layer] * self._pace)
        return time.perf_counter() - started


class NoReads(ExtentReader):
    """Says that everything was read, and reads nothing: for hit rates alone."""

    def submit(
        self, reads: Sequence[Read], *, threads: int | None = None, then: Callable[[], None] | None = None
    ) -> Ticket:
        """See `ExtentReader`."""
        return super().submit((), threads=threads, then=then)


@dataclass(frozen=True)
class Outcome:
    """What one replay did, over its requests after the warm-up.

    Attributes:
        chunk_hit_rate: chunks found in memory / chunks used, all layers.
        byte_hit_rate: the same in bytes, with the keys that chunks are chosen by.
        key_hit_rate: bytes of keys found in memory / bytes of keys used.
        bytes_read: per request, from disk, page rounding included (0 where nothing was really read).
        ttft_mean_s, ttft_p95_s, io_wait_s: over the timed requests; `io_wait_s` is a mean.
        peak_bytes: most that the tier ever held.
    """

    chunk_hit_rate: float
    byte_hit_rate: float
    key_hit_rate: float
    bytes_read: float
    ttft_mean_s: float
    ttft_p95_s: float
    io_wait_s: float
    peak_bytes: int

    def as_dict(self) -> dict[str, float]:
        """The fields, ready for JSON."""
        return asdict(self)


def replay(
    trace: Trace,
    drawn: Sequence[tuple[int, int]],
    path: Path,
    policy: str | EvictionPolicy,
    host_bytes: int,
    *,
    warm_up: int = 500,
    timed: int = 0,
    pace: float = 0.0,
    reads: bool = True,
    progress: str | None = None,
) -> Outcome:
    """Make all requests, one after the other.

    Args:
        trace, drawn: which requests (`Workload.draw`).
        path: of the store (`fill_store`).
        policy, host_bytes: of the store.
        warm_up: requests that are not counted.
        timed: so many requests at the end run at `pace`, and TTFT is taken of them; the others do not sleep.
            0: TTFT is taken of all after the warm-up.
        pace: what the recorded compute times are multiplied by.
        reads: whether to read from disk at all.
        progress: name of a progress bar.
    """
    g = geometry_of(trace)
    config = ContiguousKVConfig(budget=trace.about["budget"], chunk_size=g.chunk_size)
    plan = LayerPlan((None,) * g.num_layers, (CPU,) * g.num_layers)
    rows = []
    with PrefixStore(path, host_bytes=host_bytes, eviction=policy) as store:
        if not reads:
            store._reader = NoReads(1)
        attached: dict[int, AttachedPrefix] = {}
        for position, (prefix, number) in enumerate(
            tqdm(drawn, progress, disable=True if progress is None else None, leave=False)
        ):
            pool = trace.pools[prefix]
            if prefix not in attached:
                found = store.lookup(MODEL, some_ids(pool.tokens, prefix), g.chunk_size, count=False)
                assert found is not None
                attached[prefix] = AttachedPrefix.of(found, pool.tokens)
            paced = pace if position >= len(drawn) - timed else 0.0
            stats = RequestStats()
            request = RecordedRequest(attached[prefix], config, plan, store, stats, pool, number, paced)
            shape = (2, 1, g.kv_heads, request.kept_tokens, g.head_dim)
            seconds = request.run(torch.empty(shape, dtype=g.dtype))
            request.close()
            keys = keys_bytes(pool, g)
            hits, misses = stats.hits["host"], stats.hits["disk"]
            rows.append((hits, misses, keys, request.keys_read, stats.bytes_read, seconds, stats.io_wait_s))
        peak = store.memory.host.peak_bytes
    return _outcome(np.array(rows), g.extent_bytes, warm_up, timed, peak)


def _outcome(rows: np.ndarray, extent_bytes: int, warm_up: int, timed: int, peak: int) -> Outcome:
    counted = rows[warm_up:] if len(rows) > warm_up else rows
    hits, misses, keys, keys_read, bytes_read, *_ = counted.sum(0)
    _, _, _, _, _, seconds, waits = (rows[-timed:] if timed else counted).T
    return Outcome(
        float(hits / (hits + misses)),
        float(1 - (misses * extent_bytes + keys_read) / ((hits + misses) * extent_bytes + keys)),
        float(1 - keys_read / keys),
        float(bytes_read / len(counted)),
        float(seconds.mean()),
        float(np.quantile(seconds, 0.95)),
        float(waits.mean()),
        int(peak),
    )
