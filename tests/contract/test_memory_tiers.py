"""What one request has read, the next one finds in memory: the same answer, no reads, one copy, and all of it returned.

`test_memory_limits.py` asks how much memory that takes, `test_memory_stress.py` what happens when many do it at once.
"""

from __future__ import annotations

import copy
import itertools
import threading
from dataclasses import replace

import pytest
import torch

from hf_contiguouskv import ContiguousKVConfig, ReadOptions
from hf_contiguouskv.planning.read_plan import chunks_kept
from hf_contiguouskv.store.memory_backend import MemoryBackend

from .memory_helpers import (
    CHUNK_BYTES,
    CONFIGS,
    LAYERS,
    POLICIES,
    ask,
    assert_nothing_in_use,
    chunk_bytes,
)
from .models import FAMILIES, token_ids
from .references import assert_close, forward, generate, prefilled
from .subject import ContiguousKVCache, PrefixStore, write_prefix

pytestmark = pytest.mark.needs_library

SUFFIX = token_ids(6, seed=901)
OTHER_SUFFIX = token_ids(6, seed=902)
EXACT = ContiguousKVConfig(budget=1.0)
PRUNED = ContiguousKVConfig(budget=0.3)


def document(tokens: int, seed: int = 903) -> torch.Tensor:
    return token_ids(tokens, seed=seed)


# ---- the second request ----

SHAPES = {
    "one row": (SUFFIX, {}),
    "three rows": (token_ids(6, seed=904, rows=3), {}),
    "beams": (SUFFIX, {"num_beams": 3}),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prefix_tokens", [160, 165])
@pytest.mark.parametrize("budget", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("config", ["default", "paper"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral-window"])
def test_a_warm_answer_is_the_cold_one_bit_for_bit_and_reads_nothing(
    tiny_model, store_path, family, config, budget, prefix_tokens, shape
):
    model, prefix, settings = tiny_model(family), document(prefix_tokens), CONFIGS[config](budget)
    suffix, options = SHAPES[shape]
    write_prefix(model, prefix, store_path)
    with PrefixStore(store_path, host_bytes=0) as store:
        unkept = [ask(model, prefix, suffix, store, settings, **options) for _ in range(2)]
        assert store.stats.host_bytes == 0
    with PrefixStore(store_path) as store:
        cold, *warm = (ask(model, prefix, suffix, store, settings, **options) for _ in range(3))
        assert_nothing_in_use(store)
    assert cold.stats.bytes_read > 0
    assert cold.stats.hits["host"] == 0
    for answer in [*unkept, *warm]:
        assert answer.is_bit_for_bit(cold)
    for answer in warm:
        assert answer.stats.bytes_read == 0
        assert answer.stats.hits == {"device": 0, "host": cold.stats.hits["disk"], "disk": 0}
        assert answer.stats.bytes_used == cold.stats.bytes_used
        assert answer.stats.prefetch_wasted_bytes == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_reads_a_prefix_once(tiny_model, store_path, family):
    model, prefix = tiny_model(family), document(83)
    write_prefix(model, prefix, store_path)
    with PrefixStore(store_path) as store:
        cold, warm = (ask(model, prefix, SUFFIX, store, EXACT) for _ in range(2))
        assert warm.is_bit_for_bit(cold)
        assert warm.stats.bytes_read == 0


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("config", CONFIGS)
def test_another_question_reads_only_what_it_selects_besides(tiny_model, store_path, config, policy):
    model, prefix, settings = tiny_model("llama"), document(325), CONFIGS[config](0.2)
    write_prefix(model, prefix, store_path)
    with PrefixStore(store_path, eviction=policy) as store:
        alone = ask(model, prefix, OTHER_SUFFIX, store, settings)
    with PrefixStore(store_path, eviction=policy) as store:
        ask(model, prefix, SUFFIX, store, settings)
        second = ask(model, prefix, OTHER_SUFFIX, store, settings)
        assert second.stats.hits["host"] > 0
        assert second.stats.hits["host"] + second.stats.hits["disk"] == alone.stats.hits["disk"]
        payload = second.stats.bytes_read - second.stats.bytes_identified - second.stats.prefetch_wasted_bytes
        assert payload == second.stats.hits["disk"] * CHUNK_BYTES
        for ours, theirs in zip(second.logits, alone.logits, strict=True):
            assert_close(ours, theirs)


ORDER = (
    "defect: attention's buffer is filled in the order in which chunks come (speculative ones and those from memory "
    "first), so the last bits of an answer depend on what memory held"
)


def test_answers_with_and_without_speculative_reads_are_the_same_bit_for_bit(tiny_model, store_path):
    model, prefix, settings = tiny_model("llama"), document(160), CONFIGS["paper, period 2"](0.5)
    write_prefix(model, prefix, store_path)
    answers = []
    for host_bytes in (0, 2**30):  # With no room there is no speculation.
        with PrefixStore(store_path, host_bytes=host_bytes) as store:
            answers.append(ask(model, prefix, SUFFIX, store, settings))
    for ours, theirs in zip(answers[0].logits, answers[1].logits, strict=True):
        assert_close(ours, theirs)
    assert answers[0].is_bit_for_bit(answers[1])


@pytest.mark.parametrize("budget", [0.3, 1.0])
def test_an_answer_that_is_partly_in_memory_is_the_cold_one_bit_for_bit(tiny_model, store_path, budget):
    model, prefix = tiny_model("llama"), document(325)
    write_prefix(model, prefix, store_path)
    answers = []
    for warming in (None, token_ids(6, seed=905), token_ids(6, seed=906)):
        with PrefixStore(store_path) as store:
            if warming is not None:
                ask(model, prefix, warming, store, ContiguousKVConfig(budget=0.2, payload="exact"))
            answers.append(ask(model, prefix, SUFFIX, store, ContiguousKVConfig(budget=budget, payload="exact")))
            assert answers[-1].stats.hits["disk"] > 0
    assert answers[1].stats.hits["host"] > 0
    assert all(answer.is_bit_for_bit(answers[0]) for answer in answers[1:])


def test_a_prefix_of_several_segments_is_found_in_all_of_them(tiny_model, store_path):
    model, whole = tiny_model("llama"), document(325)
    for tokens in (96, 208, 325):
        write_prefix(model, whole[:, :tokens], store_path)
    for settings in (EXACT, PRUNED, ContiguousKVConfig.paper(0.3)):
        with PrefixStore(store_path) as store:
            assert len(store.entries()) == 3
            cold, warm = (ask(model, whole, SUFFIX, store, settings) for _ in range(2))
            assert warm.is_bit_for_bit(cold)
            assert warm.stats.bytes_read == 0
            assert len([table for table in store.inner.memory._tables.values() if table.resident]) == 3
            assert_nothing_in_use(store)


@pytest.mark.parametrize("cut", [300, 208, 100, 5])
def test_a_beginning_of_a_stored_prompt_uses_what_the_whole_one_read(tiny_model, store_path, cut):
    model, whole = tiny_model("llama"), document(325)
    write_prefix(model, whole, store_path)
    with PrefixStore(store_path) as store:
        ask(model, whole, SUFFIX, store, EXACT)
        part = ask(model, whole[:, :cut], SUFFIX, store, EXACT)
        assert part.stats.bytes_read == 0
        expected = generate(
            model, torch.cat([whole[:, :cut], SUFFIX], dim=1), prefilled(model, whole[:, :cut]), tokens=3
        )
        for ours, theirs in zip(part.logits, expected.logits, strict=True):
            assert_close(ours, theirs)


# ---- one copy ----


@pytest.mark.parametrize("budget", [0.3, 1.0])
def test_caches_over_one_prefix_share_one_copy_in_memory(tiny_model, store_path, budget):
    model, prefix = tiny_model("llama"), document(165)
    write_prefix(model, prefix, store_path)
    settings = ContiguousKVConfig(budget=budget, payload="exact")
    with PrefixStore(store_path) as store:
        caches = [ContiguousKVCache(model, prefix, store=store, config=settings) for _ in range(4)]
        held = []
        for cache in caches:
            forward(model, SUFFIX, cache)
            held.append(chunk_bytes(store))
        kept = chunks_kept(settings.budget, 10) + 1
        assert held == [LAYERS * kept * CHUNK_BYTES] * 4
        for cache in caches:
            cache.close()
        assert chunk_bytes(store) == held[0]
        assert_nothing_in_use(store)


def test_caches_that_read_the_same_chunks_at_once_leave_one_copy(tiny_model, store_path):
    model, prefix = tiny_model("llama"), document(165)
    write_prefix(model, prefix, store_path)
    with PrefixStore(store_path) as store:
        # Each has its reads under way when the next one asks.
        caches = [ContiguousKVCache(model, prefix, store=store, config=EXACT) for _ in range(4)]
        for cache in caches:
            forward(model, SUFFIX, cache)
        assert chunk_bytes(store) == LAYERS * 11 * CHUNK_BYTES
        for cache in caches:
            cache.close()
        assert_nothing_in_use(store)


def test_prefixes_that_continue_one_parent_share_its_chunks(tiny_model, store_path):
    model, parent = tiny_model("llama"), document(160)
    children = [torch.cat([parent, document(32, seed=seed)], dim=1) for seed in (911, 912)]
    for prefix in (parent, *children):
        write_prefix(model, prefix, store_path)
    with PrefixStore(store_path) as store:
        first = ask(model, children[0], SUFFIX, store, EXACT)
        assert first.stats.hits["disk"] == LAYERS * 12
        second = ask(model, children[1], SUFFIX, store, EXACT)
        assert second.stats.hits == {"device": 0, "host": LAYERS * 10, "disk": LAYERS * 2}
        assert second.stats.bytes_read == LAYERS * 2 * CHUNK_BYTES
        assert chunk_bytes(store) == LAYERS * (10 + 2 + 2) * CHUNK_BYTES
        assert ask(model, parent, SUFFIX, store, EXACT).stats.bytes_read == 0


def test_models_with_chunks_of_different_sizes_share_one_memory(tiny_model, store_path):
    prefix = document(165)
    models = [tiny_model("llama"), tiny_model("gpt-neox"), copy.deepcopy(tiny_model("llama")).to(torch.bfloat16)]
    for model in models:
        write_prefix(model, prefix, store_path)
    # Room for one and a half of the largest.
    limit = 3 * LAYERS * 11 * 2 * CHUNK_BYTES // 2
    with PrefixStore(store_path, host_bytes=limit, eviction="lru") as store:
        for model, _ in itertools.product(models, range(2)):
            answers = [ask(model, prefix, SUFFIX, store, EXACT) for _ in range(2)]
            assert answers[1].is_bit_for_bit(answers[0])
            assert answers[1].stats.hits["host"] > 0
            assert_nothing_in_use(store)
        assert len(store.inner.memory.host._arenas) == 3
        assert store.inner.memory.host.peak_bytes <= limit


# ---- what is said of it ----


def test_the_store_says_what_memory_it_holds_at_any_time(tiny_model, store_path):
    model, prefix = tiny_model("llama"), document(325)
    write_prefix(model, prefix, store_path)
    limit = 48 * CHUNK_BYTES
    seen: list[int] = []
    with PrefixStore(store_path, host_bytes=limit) as store:
        assert store.stats.host_bytes == 0
        over = threading.Event()

        def watch() -> None:
            while not over.is_set():
                seen.append(store.stats.host_bytes)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            for number in range(6):
                ask(model, prefix, token_ids(6, seed=920 + number), store, EXACT if number % 2 else PRUNED)
                uses = store.inner.memory.host.bytes_by_use
                assert store.stats.host_bytes == sum(uses.values())
                assert all(nbytes >= 0 for nbytes in uses.values())
        finally:
            over.set()
            watcher.join()
        assert store.stats.device_bytes == 0
    assert 0 < max(seen) <= limit
    assert min(seen) >= 0
    assert store.inner.memory.bytes_by_tier == {"device": 0, "host": 0}


# ---- what must not be in memory ----


@pytest.mark.parametrize("config", CONFIGS)
def test_what_was_read_without_a_check_never_stays(tiny_model, store_path, config):
    model, prefix = tiny_model("llama"), document(165)
    write_prefix(model, prefix, store_path)
    with PrefixStore(store_path) as store:
        for _ in range(2):
            for budget in (0.3, 1.0):
                settings = replace(CONFIGS[config](budget), reading=ReadOptions(verify=False))
                answer = ask(model, prefix, SUFFIX, store, settings)
                assert answer.stats.bytes_read > 0
                assert answer.stats.hits["host"] == 0
                uses = store.inner.memory.host.bytes_by_use
                assert (uses["chunks"], uses["keys"]) == (0, 0)
        assert_nothing_in_use(store)


def test_a_request_without_checks_uses_what_others_have_checked(tiny_model, store_path):
    model, prefix = tiny_model("llama"), document(165)
    write_prefix(model, prefix, store_path)
    with PrefixStore(store_path) as store:
        ask(model, prefix, SUFFIX, store, EXACT)
        assert (
            ask(
                model, prefix, SUFFIX, store, ContiguousKVConfig(budget=1.0, reading=ReadOptions(verify=False))
            ).stats.bytes_read
            == 0
        )


@pytest.mark.parametrize("settings", [EXACT, PRUNED, ContiguousKVConfig.paper(0.3)], ids=["exact", "pruned", "paper"])
@pytest.mark.parametrize("why", ["the backend is memory", "the disk is full"])
def test_segments_in_memory_are_not_copied_into_the_tier(tiny_model, store_path, why, settings):
    model, prefix = tiny_model("llama"), document(165)
    options = {"backend": MemoryBackend()} if why == "the backend is memory" else {"max_disk_bytes": 1}
    with PrefixStore(store_path, **options) as store:
        ids = torch.cat([prefix, SUFFIX], dim=1)
        cache = ContiguousKVCache(model, prefix, store=store, config=settings)
        logits = []
        for _ in range(2):
            logits.append(generate(model, ids, cache, tokens=3).logits)
            uses = store.inner.memory.host.bytes_by_use
            assert (uses["chunks"], uses["keys"], uses["tables"]) == (0, 0, 0)
            cache.reset()
        assert all(map(torch.equal, *logits))
        if settings is EXACT:
            assert_close(logits[0][0], generate(model, ids, prefilled(model, prefix), tokens=3).logits[0])
        cache.close()
        assert_nothing_in_use(store)


@pytest.mark.parametrize("settings", [EXACT, PRUNED], ids=["exact", "pruned"])
def test_a_deleted_segment_leaves_memory(tiny_model, store_path, settings):
    model, first, second = tiny_model("llama"), document(165), document(165, seed=930)
    for prefix in (first, second):
        write_prefix(model, prefix, store_path)
    with PrefixStore(store_path) as store:
        ask(model, first, SUFFIX, store, settings)
        alone = store.inner.memory.host.bytes_by_use
        keys = {entry.key for entry in store.entries()}
        ask(model, second, SUFFIX, store, settings)
        assert chunk_bytes(store) == 2 * alone["chunks"]
        doomed = {table.identity[0] for table in store.inner.memory._tables.values()} - {
            next(iter(store.inner.memory._by_identity))[0]
        }
        assert doomed < keys
        store.delete(doomed.pop())
        assert {name: store.inner.memory.host.bytes_by_use[name] for name in ("chunks", "keys")} == {
            name: alone[name] for name in ("chunks", "keys")
        }
        store.delete(keys.intersection(entry.key for entry in store.entries()).pop())
        uses = store.inner.memory.host.bytes_by_use
        assert (uses["chunks"], uses["keys"], uses["tables"]) == (0, 0, 0)
        assert store.inner.memory._tables == {}
        assert_nothing_in_use(store)


def test_a_deleted_segment_in_use_leaves_memory_when_its_request_is_over(tiny_model, store_path):
    model, prefix = tiny_model("llama"), document(165)
    write_prefix(model, prefix, store_path)
    ids = torch.cat([prefix, SUFFIX], dim=1)
    with PrefixStore(store_path) as store:
        cold = ask(model, prefix, SUFFIX, store, EXACT)
        cache = ContiguousKVCache(model, prefix, store=store, config=EXACT)
        assert sum(int(arena.users.sum()) for arena in store.inner.memory.host._arenas.values()) > 0
        store.delete(store.entries()[0].key)
        assert all(map(torch.equal, generate(model, ids, cache, tokens=3).logits, cold.logits))
        cache.close()
        assert chunk_bytes(store) == 0
        assert_nothing_in_use(store)


@pytest.mark.parametrize("budget", [0.3, 1.0])
def test_a_cache_that_outlives_its_segment_does_not_bring_it_back_to_memory(tiny_model, store_path, budget):
    model, prefix = tiny_model("llama"), document(165)
    with PrefixStore(store_path) as store:
        cache = ContiguousKVCache(model, prefix, store=store, budget=budget)
        forward(model, SUFFIX, cache)
        store.delete(store.entries()[0].key)
        cache.reset()
        forward(model, SUFFIX, cache)
        cache.close()
        uses = store.inner.memory.host.bytes_by_use
        assert (uses["chunks"], uses["keys"]) == (0, 0)


def make_room_on_disk(store, model):
    for seed in range(3):
        # (A packed prefix would be read ahead at once.)
        config = ContiguousKVConfig(payload="exact")
        ContiguousKVCache(model, document(165, seed=940 + seed), store=store, config=config).close()


def take_out_of_service(store, model):
    cache = ContiguousKVCache(model, document(165), store=store)
    segment = cache.session.held.slot.whole.spans[0].segment
    cache.close()
    store.inner.discard(segment, "a test says so")


def expire(store, model):
    store.inner.room.ttl_s = 1e-9
    store.gc()


@pytest.mark.parametrize("end", [make_room_on_disk, take_out_of_service, expire])
def test_a_segment_that_goes_in_another_way_leaves_memory_too(tiny_model, store_path, end):
    model, prefix = tiny_model("llama"), document(165)
    write_prefix(model, prefix, store_path)
    with PrefixStore(store_path) as store:
        size = store.stats.segment_bytes
    with PrefixStore(store_path, max_disk_bytes=size * 3 // 2, eviction="published") as store:
        ask(model, prefix, SUFFIX, store, EXACT)
        key = store.entries()[0].key
        end(store, model)
        assert key not in {entry.key for entry in store.entries()}
        assert key not in {table.identity[0] for table in store.inner.memory._tables.values()}
        assert chunk_bytes(store) == 0
