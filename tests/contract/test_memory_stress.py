"""Many threads, few slots: evictions all the time, and every answer is right.

Random numbers follow `FAULTS_SEED` (see `tests/faults/scale.py`); `FAULTS_SCALE` makes it longer.
"""

from __future__ import annotations

import itertools
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.scale import SEED, scaled

from hf_contiguouskv import AttentionMass, ContiguousKVConfig
from hf_contiguouskv.errors import StoreError

from .memory_helpers import CHUNK_BYTES, POLICIES, Answer, ask, assert_nothing_in_use
from .models import build, token_ids
from .references import assert_close, forward, generate, prefilled
from .subject import ContiguousKVCache, PrefixStore, write_prefix

pytestmark = pytest.mark.needs_library

THREADS = 8
PARENT = token_ids(96, seed=1300)
PREFIXES = [
    PARENT,
    torch.cat([PARENT, token_ids(69, seed=1301)], dim=1),
    token_ids(165, seed=1302),
    token_ids(208, seed=1303),
]
SUFFIXES = [token_ids(5, seed=1310 + number) for number in range(3)]
BUDGETS = (0.1, 0.3, 0.5, 1.0, 1.0)
PAPER = (False, True)
Key = tuple[int, int, float, bool]


def config_of(budget: float, paper: bool) -> ContiguousKVConfig:
    return (
        ContiguousKVConfig.paper(budget, selection=AttentionMass(period=2, subperiod=1))
        if paper
        else ContiguousKVConfig(budget=budget)
    )


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, dict[Key, Any]]:
    """A model, a folder with its prefixes, and what each request answers alone.

    Exact ones are compared with a prefilled `DynamicCache`, pruned ones with the first request of a store.
    """
    model, folder = build("llama"), tmp_path_factory.mktemp("stress") / "kv-store"
    for prefix in PREFIXES:
        write_prefix(model, prefix, folder)
    found: dict[Key, Any] = {}
    with PrefixStore(folder, host_bytes=0) as store:
        for p, s, budget, paper in itertools.product(range(len(PREFIXES)), range(len(SUFFIXES)), set(BUDGETS), PAPER):
            if budget == 1.0:
                ids = torch.cat([PREFIXES[p], SUFFIXES[s]], dim=1)
                found[p, s, budget, paper] = generate(model, ids, prefilled(model, PREFIXES[p]), tokens=3)
            else:
                found[p, s, budget, paper] = ask(model, PREFIXES[p], SUFFIXES[s], store, config_of(budget, paper))
    return model, folder, found


def check(answer: Answer, expected: Any) -> None:
    assert answer.sequences.tolist() == expected.sequences.tolist()
    for ours, theirs in zip(answer.logits, expected.logits, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("chunks", [12, 60])
@pytest.mark.parametrize("policy", POLICIES)
def test_threads_that_evict_each_others_chunks_all_answer_rightly(stored, policy, chunks):
    model, folder, expected = stored
    limit = chunks * CHUNK_BYTES
    barrier = threading.Barrier(THREADS)

    with PrefixStore(folder, host_bytes=limit, eviction=policy) as store:

        def work(number: int) -> None:
            choose = random.Random(f"{SEED} {policy} {chunks} {number}")
            barrier.wait()
            for _ in range(scaled(5)):
                p, s = choose.randrange(len(PREFIXES)), choose.randrange(len(SUFFIXES))
                budget, paper = choose.choice(BUDGETS), choose.choice(PAPER)
                config = config_of(budget, paper)
                kind = choose.random()
                if kind < 0.1:  # Made and dropped.
                    ContiguousKVCache(model, PREFIXES[p], store=store, config=config)
                elif kind < 0.2:  # Dropped, or cut short, in mid-answer.
                    cache = ContiguousKVCache(model, PREFIXES[p], store=store, config=config)
                    forward(model, SUFFIXES[s], cache)
                    if kind < 0.15:
                        cache.crop(50 - cache.get_seq_length())
                        forward(model, SUFFIXES[s], cache)
                elif kind < 0.25:
                    assert store.stats.host_bytes <= limit
                else:
                    check(ask(model, PREFIXES[p], SUFFIXES[s], store, config), expected[p, s, budget, paper])

        with ThreadPoolExecutor(THREADS) as pool:
            for done in [pool.submit(work, number) for number in range(THREADS)]:
                done.result()
        assert_nothing_in_use(store)
        assert store.stats.quarantined == store.stats.recovered == 0
        assert store.inner.memory.host.evicted > 0, "nothing had to go"
        assert store.inner.memory.host.peak_bytes <= limit
        # One more alone: nothing that the crowd left in memory is wrong.
        for key in [(p, 0, 1.0, False) for p in range(len(PREFIXES))]:
            check(ask(model, PREFIXES[key[0]], SUFFIXES[0], store, config_of(1.0, False)), expected[key])


@pytest.mark.parametrize("policy", ["expected-use", "lru"])
def test_segments_may_be_deleted_and_stored_again_while_threads_use_them(tiny_model, store_path, policy):
    model = tiny_model("llama")
    with PrefixStore(store_path, host_bytes=40 * CHUNK_BYTES, eviction=policy) as store:
        ids = [torch.cat([prefix, SUFFIXES[0]], dim=1) for prefix in PREFIXES]
        expected = [
            generate(model, one, prefilled(model, prefix), tokens=3) for one, prefix in zip(ids, PREFIXES, strict=True)
        ]
        over = threading.Event()

        def delete() -> None:
            while not over.is_set():
                for entry in store.entries():
                    if not over.is_set():
                        with suppress(StoreError):  # It went with the one that it continued.
                            store.delete(entry.key, recursive=True)
                    over.wait(0.02)

        def work(number: int) -> None:
            choose = random.Random(f"{SEED} {policy} {number}")
            for _ in range(scaled(4)):
                p = choose.randrange(len(PREFIXES))
                check(ask(model, PREFIXES[p], SUFFIXES[0], store, ContiguousKVConfig(budget=1.0)), expected[p])

        with ThreadPoolExecutor(5) as pool:
            deleting = pool.submit(delete)
            try:
                for done in [pool.submit(work, number) for number in range(4)]:
                    done.result()
            finally:
                over.set()
            deleting.result()
        assert_nothing_in_use(store)
