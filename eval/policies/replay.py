"""Replay a trace through the real store, reader and memory tiers, with the model's compute replaced by sleep."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from tqdm.auto import tqdm

from hf_contiguouskv import ContiguousKVConfig, PrefixStore, RequestStats
from hf_contiguouskv.loading.key_loader import KeyLoader
from hf_contiguouskv.loading.residency import ChunkStore
from hf_contiguouskv.memory import EvictionPolicy
from hf_contiguouskv.model.layer_plan import LayerPlan
from hf_contiguouskv.planning.read_plan import ReadPlan
from hf_contiguouskv.request.chunk_strategy import ChunkStrategy
from hf_contiguouskv.request.prefix_request import PrefixRequest
from hf_contiguouskv.request.rows import Rows
from hf_contiguouskv.request.strategy import RequestContext
from hf_contiguouskv.selection import ChunkScorer, ChunkScores, SelectionInput
from hf_contiguouskv.store import KVGeometry
from hf_contiguouskv.store.attached_prefix import AttachedPrefix
from hf_contiguouskv.store.reader import Read, Task, Ticket

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
            if store.inner.lookup(MODEL, ids, g.chunk_size) is not None:
                continue
            chance = torch.Generator().manual_seed(number)
            with store.inner.begin_segment(MODEL, g, ids) as writer:
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


class RecordedMethod:
    """The library's own strategy with the scores of a recorded request: keys are brought, but not looked at.

    Args:
        pool, number: the recorded request.
        pace: what its compute times are multiplied by.

    Attributes:
        keys_read: bytes of keys that were not in memory.
    """

    def __init__(self, pool: Pool, number: int, pace: float) -> None:
        self._pool, self._number, self._pace = pool, number, pace
        self.keys_read = 0

    def strategy(self, context: RequestContext) -> ChunkStrategy:
        """The library's own strategy, with the recorded scores."""
        return ChunkStrategy(context, self._scorer)

    def _scorer(self, keys: KeyLoader, layer: int) -> ChunkScorer:
        keys.start(layer)
        self.keys_read += keys.bytes_arriving(layer)
        keys.scorer(layer)

        def recorded(inputs: SelectionInput) -> ChunkScores:
            pause(self._pool.identify_s[self._number, layer] * self._pace)
            mass = self._pool.mass[self._number, layer].astype(np.float32)
            importance = np.zeros_like(mass)
            importance[self._pool.selected[self._number, layer]] = 1.0
            return ChunkScores(torch.from_numpy(importance)[None], torch.from_numpy(mass)[None])

        return recorded

    def run(self, request: PrefixRequest, destination: torch.Tensor) -> float:
        """All layers in order, without a model; seconds to the first token. `destination` is as in `load_full`."""
        nothing = torch.zeros(1, 1, 1, 1)
        started = time.perf_counter()
        request.begin(Rows.distinct(1, 1))
        for layer in range(len(request.plan.layers.windows)):
            request.load_full(layer, nothing, nothing, {"scaling": 1.0}, destination)
            pause(self._pool.compute_s[self._number, layer] * self._pace)
        return time.perf_counter() - started


class NoReads:
    """A store and its reader, but every read ends at once and reads nothing: for hit rates alone.

    Args:
        store: whose memory tiers are used.
    """

    def __init__(self, store: PrefixStore) -> None:
        self.memory = store.inner.memory
        self._reader = store.inner.reader

    @property
    def reader(self) -> NoReads:
        """This."""
        return self

    def submit(self, reads: Sequence[Read], **options: Any) -> Ticket:
        return self._reader.submit((), **options)

    def run(self, function: Callable[[], None]) -> Task:
        return self._reader.run(function)


@dataclass(frozen=True)
class Outcome:
    """What one replay did, over its requests after the warm-up.

    Attributes:
        chunk_hit_rate: chunks found in memory / chunks used, all layers.
        byte_hit_rate: the same in bytes, with the keys that chunks are chosen by.
        key_hit_rate: bytes of keys found in memory / bytes of keys used.
        ttft_s: seconds to the first token of each timed request, in order.
        bytes_read: per timed request, from disk, page rounding included.
        io_wait_s: per timed request.
        peak_bytes: most that the host's tier ever held.
        device_hit_rate: chunks found on the device / chunks used.
    """

    chunk_hit_rate: float
    byte_hit_rate: float
    key_hit_rate: float
    ttft_s: list[float]
    bytes_read: float
    io_wait_s: float
    peak_bytes: int
    device_hit_rate: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self)


class Replay:
    """One policy at one size, request by request. A context manager.

    Args:
        trace: where requests come from.
        path: of the store (`fill_store`).
        policy, host_bytes: of the store.
        device, device_bytes: where chunks are used, and how much of them stays there; the CPU has no tier of its own.
    """

    def __init__(
        self,
        trace: Trace,
        path: Path,
        policy: str | EvictionPolicy,
        host_bytes: int,
        device: torch.device = CPU,
        device_bytes: int = 0,
    ) -> None:
        self._trace = trace
        self._geometry = g = geometry_of(trace)
        self._config = ContiguousKVConfig(budget=trace.about["budget"], chunk_size=g.chunk_size, payload="exact")
        self._layers = LayerPlan((None,) * g.num_layers, (device,) * g.num_layers)
        self._attached: dict[int, AttachedPrefix] = {}
        self._rows: list[tuple[float, ...]] = []
        self._store = PrefixStore(path, host_bytes=host_bytes, device_bytes=device_bytes, eviction=policy)

    def __enter__(self) -> Replay:
        return self

    def __exit__(self, *exception: object) -> None:
        self._store.close()

    def _prefix(self, number: int) -> AttachedPrefix:
        if number not in self._attached:
            tokens = self._trace.pools[number].tokens
            found = self._store.inner.lookup(MODEL, some_ids(tokens, number), self._geometry.chunk_size, count=False)
            assert found is not None
            self._attached[number] = AttachedPrefix.of(found, tokens)
        return self._attached[number]

    def make(self, prefix: int, number: int, pace: float, reads: bool) -> None:
        """Make one request.

        Args:
            prefix, number: of the prefix, and in its pool.
            pace: what its compute times are multiplied by.
            reads: whether anything is read from disk.
        """
        g, pool, stats = self._geometry, self._trace.pools[prefix], RequestStats()
        # Without reads, a request finds the two calls of the reader that it makes.
        store = self._store.inner if reads else cast(ChunkStore, NoReads(self._store))
        method = RecordedMethod(pool, number, pace)
        plan = ReadPlan.of(self._prefix(prefix), self._config, self._layers)
        request = PrefixRequest(plan, store, stats, method=method)
        seconds = method.run(request, torch.empty((2, 1, g.kv_heads, request.kept_tokens, g.head_dim), dtype=g.dtype))
        request.settle()  # What stays on a device is put into its slots now.
        request.close()
        keys, found = keys_bytes(pool, g), stats.hits
        hits = found["device"], found["host"], found["disk"]
        self._rows.append((*hits, keys, method.keys_read, stats.bytes_read, seconds, stats.io_wait_s))

    def outcome(self, warm_up: int, timed: int) -> Outcome:
        """Without the first `warm_up` requests; reads and TTFT of the last `timed`."""
        peak = self._store.inner.memory.host.peak_bytes
        return _outcome(np.array(self._rows), self._geometry.extent_bytes, warm_up, timed, peak)


def replay_together(
    replays: Sequence[Replay],
    drawn: Sequence[tuple[int, int]],
    *,
    warm_up: int,
    timed: int,
    pace: float,
    seed: int = 0,
    progress: bool = False,
) -> list[Outcome]:
    """Make the same requests in several replays, each request in all of them, in random order, before the next.

    What the machine does meanwhile is thus shared fairly among them.

    Args:
        replays: which.
        drawn: the requests (`Workload.draw`).
        warm_up: requests that are not counted.
        timed: so many requests at the end read from disk and compute, and TTFT is taken of them; the others only move
            what is in memory.
        pace: what the recorded compute times are multiplied by.
        seed: of the order.
        progress: whether to show a bar.
    """
    chance = np.random.default_rng(seed)
    for position, (prefix, number) in enumerate(tqdm(drawn, "requests", disable=not progress, leave=False)):
        real = position >= len(drawn) - timed
        for which in chance.permutation(len(replays)).tolist():
            replays[which].make(prefix, number, pace if real else 0.0, real)
    return [one.outcome(warm_up, timed) for one in replays]


def replay(
    trace: Trace,
    drawn: Sequence[tuple[int, int]],
    path: Path,
    policy: str | EvictionPolicy,
    host_bytes: int,
    device: torch.device = CPU,
    device_bytes: int = 0,
    *,
    warm_up: int = 500,
    timed: int = 0,
    pace: float = 0.0,
) -> Outcome:
    """Make all requests in one replay; see `Replay` and `replay_together`."""
    with Replay(trace, path, policy, host_bytes, device, device_bytes) as one:
        return replay_together([one], drawn, warm_up=warm_up, timed=timed, pace=pace)[0]


def _outcome(rows: np.ndarray, extent_bytes: int, warm_up: int, timed: int, peak: int) -> Outcome:
    counted = rows[warm_up:] if len(rows) > warm_up else rows
    on_device, on_host, misses, keys, keys_read, *_ = counted.sum(0)
    used, hits = on_device + on_host + misses, on_device + on_host
    *_, bytes_read, seconds, waits = rows[len(rows) - timed :].T
    return Outcome(
        float(hits / used),
        float(1 - (misses * extent_bytes + keys_read) / (used * extent_bytes + keys)),
        float(1 - keys_read / keys),
        [round(float(one), 6) for one in seconds],
        float(bytes_read.mean()) if timed else 0.0,
        float(waits.mean()) if timed else 0.0,
        int(peak),
        float(on_device / used),
    )
