"""Limits of memory are hard, and however little there is, the answer is right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_contiguouskv import AttentionMass, ContiguousKVConfig
from hf_contiguouskv.memory import MemoryTiers
from hf_contiguouskv.memory.history import SegmentTable

from . import memory_child
from .memory_child import MIB
from .memory_helpers import CHUNK_BYTES, CONFIGS, LAYERS, POLICIES, ask, assert_nothing_in_use
from .models import token_ids
from .references import assert_close, generate, prefilled
from .subject import ContiguousKVCache, PrefixStore, write_prefix

pytestmark = pytest.mark.needs_library

TOKENS, CHUNKS = 325, 21
PREFIX = token_ids(TOKENS, seed=1001)
SUFFIXES = [token_ids(6, seed=1010 + number) for number in range(4)]
EXACT = ContiguousKVConfig(budget=1.0)
LAYER = CHUNKS * CHUNK_BYTES

LIMITS = {
    "none": 0,
    "less than a page": CHUNK_BYTES - 1,
    "one chunk": CHUNK_BYTES,
    "a few chunks": 7 * CHUNK_BYTES + 123,
    "less than one layer": LAYER // 2,
    "one layer": LAYER,
    "less than one request": 2 * LAYER + 5,
    "half of the prefix": LAYERS * LAYER // 2,
    "nearly all": LAYERS * LAYER - CHUNK_BYTES,
    "plenty": 2**30,
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("limit", LIMITS)
def test_the_exact_answer_is_right_within_any_limit(tiny_model, store_path, limit, policy):
    model, host_bytes = tiny_model("llama"), LIMITS[limit]
    write_prefix(model, PREFIX, store_path)
    with PrefixStore(store_path, host_bytes=host_bytes, eviction=policy) as store:
        for suffix in SUFFIXES:
            expected = generate(model, torch.cat([PREFIX, suffix], dim=1), prefilled(model, PREFIX), tokens=3)
            answer = ask(model, PREFIX, suffix, store, EXACT)
            assert answer.sequences.tolist() == expected.sequences.tolist()
            for ours, theirs in zip(answer.logits, expected.logits, strict=True):
                assert_close(ours, theirs)
            hits = answer.stats.hits
            assert hits["disk"] + hits["host"] == LAYERS * CHUNKS
            assert answer.stats.bytes_read == hits["disk"] * CHUNK_BYTES, "each byte once"
            assert_nothing_in_use(store)
            assert store.inner.memory.host.held_bytes <= store.inner.memory.host.peak_bytes <= host_bytes


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_pruned_answer_does_not_depend_on_the_limit(tiny_model, store_path, family, limit, config):
    model, settings = tiny_model(family), CONFIGS[config](0.2)
    write_prefix(model, PREFIX, store_path)
    with PrefixStore(store_path) as store:
        expected = [ask(model, PREFIX, suffix, store, settings) for suffix in SUFFIXES]
    with PrefixStore(store_path, host_bytes=LIMITS[limit]) as store:
        for suffix, theirs in zip(SUFFIXES, expected, strict=True):
            answer = ask(model, PREFIX, suffix, store, settings)
            for our_step, their_step in zip(answer.logits, theirs.logits, strict=True):
                assert_close(our_step, their_step)
            assert_nothing_in_use(store)
        assert store.inner.memory.host.peak_bytes <= LIMITS[limit]


@pytest.mark.parametrize("limit", ["a few chunks", "one layer", "half of the prefix", "plenty"])
def test_leaders_without_stored_keys_stay_within_the_limit(tiny_model, store_path, limit):
    """Odd leader layers have no keys on disk: their whole payload is read to choose from it."""
    model, settings = tiny_model("llama"), ContiguousKVConfig.paper(0.2, selection=AttentionMass(period=1, subperiod=1))
    write_prefix(model, PREFIX, store_path)
    with PrefixStore(store_path) as store:
        expected = ask(model, PREFIX, SUFFIXES[0], store, settings)
    with PrefixStore(store_path, host_bytes=LIMITS[limit]) as store:
        for _ in range(3):
            answer = ask(model, PREFIX, SUFFIXES[0], store, settings)
            for ours, theirs in zip(answer.logits, expected.logits, strict=True):
                assert_close(ours, theirs)
            assert_nothing_in_use(store)
        assert store.inner.memory.host.peak_bytes <= LIMITS[limit]


@pytest.mark.parametrize("chunks", [20, 40, 41, 120])
def test_many_requests_at_once_share_one_limit(tiny_model, store_path, chunks):
    model, host_bytes = tiny_model("llama"), chunks * CHUNK_BYTES
    prefixes = [token_ids(160, seed=1020 + number) for number in range(8)]
    for prefix in prefixes:
        write_prefix(model, prefix, store_path)
    most: list[int] = []
    over = threading.Event()
    with PrefixStore(store_path, host_bytes=host_bytes) as store:

        def watch() -> None:
            while not over.is_set():
                most.append(store.stats.host_bytes)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            # All of them have reads under way before the first one is asked.
            caches = [ContiguousKVCache(model, prefix, store=store, config=EXACT) for prefix in prefixes]
            for prefix, cache in zip(prefixes, caches, strict=True):
                ids = torch.cat([prefix, SUFFIXES[0]], dim=1)
                expected = generate(model, ids, prefilled(model, prefix), tokens=2)
                for ours, theirs in zip(generate(model, ids, cache, tokens=2).logits, expected.logits, strict=True):
                    assert_close(ours, theirs)
        finally:
            over.set()
            watcher.join()
        for cache in caches:
            cache.close()
        assert_nothing_in_use(store)
        assert max(most) <= host_bytes
        assert store.inner.memory.host.peak_bytes <= host_bytes


@pytest.mark.parametrize("policy", POLICIES)
def test_what_little_memory_there_is_gets_used(tiny_model, store_path, policy):
    model = tiny_model("llama")
    write_prefix(model, PREFIX, store_path)
    with PrefixStore(store_path, host_bytes=LAYERS * LAYER * 9 // 10, eviction=policy) as store:
        settings = ContiguousKVConfig(budget=0.2)
        answers = [ask(model, PREFIX, SUFFIXES[0], store, settings) for _ in range(2)]
        assert answers[1].stats.bytes_read == 0


def test_all_room_that_can_be_made_is_made():
    size, other = CHUNK_BYTES, 2 * CHUNK_BYTES
    tier = (memory := MemoryTiers(100 * size, 0, "lru")).host
    small, large = SegmentTable(1, "small", 1, 200, size), SegmentTable(2, "large", 1, 200, other)
    memory._tables.update({1: small, 2: large})
    busy = tier.take(size, 30)
    idle = tier.take(size, 30)
    tier.keep(small, np.arange(30), idle, size)
    tier.release(idle, size)
    slots = tier.take(other, 20)
    tier.keep(large, np.arange(20), slots, other)
    tier.release(slots, other)
    freed = tier.find(small, np.arange(20))
    tier.release(freed, size)
    tier._vacate(tier._arenas[size], freed)
    assert (len(busy), tier._arenas[size].free_slots, tier.held_bytes) == (30, 20, 100 * size)
    # 20 are free, 10 hold what nobody uses, and the memory of the other size makes 40 more.
    assert len(tier.take(size, 60)) == 60


# ---- resident memory, as the system counts it ----

STATED = 16 * MIB
"""What requests may take beyond `host_bytes` and their own K and V, where one layer of the prefix is 8 MiB.

8 MiB for one layer's chunks, where they are copied together because they lie apart, or for the pieces (4 MiB each) in
which they are read where there is no room; 4 MiB for rounding to huge pages (2 MiB, the tier's and a buffer's); 4 MiB
for one layer's keys or their index (1 MiB, three read ahead), its scores, the pages of reader threads, and the books.
Measured: 10 MiB at most.
"""


@pytest.fixture(scope="module")
def large_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("limits") / "kv-store"
    model = memory_child.make_model()
    for prefix in memory_child.prefixes():
        write_prefix(model, prefix, folder)
    return folder


def reports_of_a_child(folder: Path, *runs: str, **environment: str) -> list[dict[str, Any]]:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peaks of resident memory are reset through Linux's /proc/self/clear_refs")
    command = [sys.executable, "-W", "ignore", "-m", memory_child.__name__, str(folder), *runs]
    tests = Path(__file__).parents[1]
    paths = os.pathsep.join(filter(None, [str(tests), str(tests.parent), os.environ.get("PYTHONPATH")]))
    child = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": paths} | environment,
        timeout=400,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-2000:]
    return [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]


def excess(report: dict[str, Any]) -> float:
    """MiB of resident memory at the peak, beyond the limit and the request's own K and V."""
    return (report["peak"] - report["own"] - min(report["limit"], report["tier_peak"])) / MIB


def test_resident_memory_stays_within_the_limit(large_store):
    """glibc is told to return what is freed: `test_resident_memory_does_not_creep` is about what it keeps otherwise."""
    runs = [f"{config}:{limit}:2" for config in memory_child.CONFIGS for limit in (0, 8, 32)]
    help_of_glibc = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), str(MIB))
    *bounded, unbounded = reports_of_a_child(large_store, *runs, "exact:256:1", **help_of_glibc)
    assert len(bounded) == len(runs)
    for report in bounded:
        assert report["tier_peak"] <= report["limit"]
        assert excess(report) * MIB <= STATED, report
        assert report["kept"] <= report["held"] + STATED, report
    # Where there is room it is taken: it was the limit that bounded the others.
    assert unbounded["held"] >= 2 * memory_child.KV_BYTES
    assert unbounded["peak"] > unbounded["own"] + 32 * MIB + STATED


@pytest.mark.xfail(
    strict=False,
    reason="defect: K/V buffers of layers come from glibc's heap, which fragments: up to twice the K and V of a "
    "request stay resident on top of the limit (another libc may do better)",
)
def test_resident_memory_does_not_creep(large_store):
    """The same without help: what is freed must not stay resident in a fragmented heap."""
    (report,) = reports_of_a_child(large_store, "exact:8:5")
    assert excess(report) * MIB <= STATED, report
