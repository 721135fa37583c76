"""Counters say what happened: bytes that attention used, bytes that were read, and never one byte twice."""

from __future__ import annotations

import itertools
import json
import math
import threading
from pathlib import Path

import pytest
import torch

from hf_contiguouskv import AttentionMass, ContiguousKVConfig, RequestStats

from .models import token_ids
from .references import generate
from .subject import ContiguousKVCache, PrefixStore, write_prefix

pytestmark = pytest.mark.needs_library

LAYERS, KV_HEADS, HEAD_DIM, FLOAT32 = 4, 2, 16, 4
CHUNK_BYTES = 2 * KV_HEADS * 16 * HEAD_DIM * FLOAT32
assert CHUNK_BYTES == 4096
SUFFIX = token_ids(6, seed=601)

CONFIGS = {
    "paper": lambda budget: ContiguousKVConfig.paper(budget),
    "paper, period 2": lambda budget: ContiguousKVConfig.paper(budget, selection=AttentionMass(period=2, subperiod=1)),
    "default, exact payload": lambda budget: ContiguousKVConfig(budget=budget, payload="exact"),
}


def prompt(prefix_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    prefix = token_ids(prefix_tokens, seed=602)
    return prefix, torch.cat([prefix, SUFFIX], dim=1)


def one_request(model, prefix_tokens: int, path, config) -> RequestStats:
    prefix, ids = prompt(prefix_tokens)
    write_prefix(model, prefix, path)
    with PrefixStore(path) as store:
        cache = ContiguousKVCache(model, prefix, store=store, config=config)
        generate(model, ids, cache, tokens=4)
        stats = cache.stats
        cache.close()
    return stats


@pytest.mark.parametrize("prefix_tokens", [80, 83, 160])
def test_the_whole_budget_uses_every_chunk_of_every_layer(tiny_model, store_path, prefix_tokens):
    stats = one_request(tiny_model("llama"), prefix_tokens, store_path, ContiguousKVConfig(budget=1.0))
    chunks = math.ceil(prefix_tokens / 16)
    assert stats.prefix_tokens == prefix_tokens
    assert stats.chunks_total == chunks
    assert stats.chunks_used == [chunks] * LAYERS
    assert stats.bytes_used == LAYERS * prefix_tokens * CHUNK_BYTES // 16


def test_whole_pages_are_read_without_amplification(tiny_model, store_path):
    stats = one_request(tiny_model("llama"), 160, store_path, ContiguousKVConfig(budget=1.0))
    assert stats.bytes_read >= stats.bytes_used
    assert stats.payload_amplification == 1.0


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("prefix_tokens", [320, 325])
def test_a_pruned_prefix_uses_its_budget(tiny_model, store_path, prefix_tokens, config):
    settings = CONFIGS[config](0.2)
    stats = one_request(tiny_model("llama"), prefix_tokens, store_path, settings)
    partial = 1 if prefix_tokens % 16 else 0
    assert stats.chunks_total == 20 + partial
    assert stats.chunks_used == [4 + partial] * LAYERS
    assert stats.bytes_used == LAYERS * (4 * CHUNK_BYTES + prefix_tokens % 16 * CHUNK_BYTES // 16)


@pytest.mark.parametrize("config", CONFIGS)
def test_payload_is_read_without_amplification_when_pruned(tiny_model, store_path, config):
    stats = one_request(tiny_model("llama"), 320, store_path, CONFIGS[config](0.2))
    assert stats.payload_amplification == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("budget", [0.2, 1.0])
@pytest.mark.parametrize("layers", [4, 10])
def test_no_byte_is_read_twice_in_one_request(tiny_model, store_path, monkeypatch, config, budget, layers):
    model = tiny_model("llama", layers=layers)
    prefix, ids = prompt(325)
    write_prefix(model, prefix, store_path)
    seen: list[tuple[str, int, int]] = []
    with PrefixStore(store_path) as store:
        reader = type(store.inner.reader)
        submit = reader.submit

        def spy(self, reads, *args, **kwargs):
            reads = list(reads)
            seen.extend((str(read.segment), read.offset, read.offset + read.nbytes) for read in reads)
            return submit(self, reads, *args, **kwargs)

        monkeypatch.setattr(reader, "submit", spy)
        cache = ContiguousKVCache(model, prefix, store=store, config=CONFIGS[config](budget))
        generate(model, ids, cache, tokens=4)
        cache.close()
    assert seen, "nothing was read through store.reader.submit"
    seen.sort()
    for (segment, start, end), (next_segment, next_start, next_end) in itertools.pairwise(seen):
        assert segment != next_segment or end <= next_start, f"[{start}, {end}) overlaps [{next_start}, {next_end})"


def test_what_is_prefilled_and_what_is_found_adds_up(tiny_model, store_path):
    model = tiny_model("llama")
    prefix, _ = prompt(83)
    with PrefixStore(store_path) as store:
        writer = ContiguousKVCache(model, prefix, store=store)
        assert (writer.stats.tokens_from_store, writer.stats.tokens_prefilled) == (0, 83)
        writer.close()
    with PrefixStore(store_path) as store:
        reader = ContiguousKVCache(model, prefix, store=store)
        stats = reader.stats
        assert stats.tokens_from_store >= 80
        assert stats.tokens_from_store + stats.tokens_prefilled == 83
        reader.close()


def test_reset_starts_the_counters_of_a_new_request(tiny_model, store_path):
    model = tiny_model("llama")
    prefix, ids = prompt(160)
    write_prefix(model, prefix, store_path)
    with PrefixStore(store_path) as store:
        cache = ContiguousKVCache(model, prefix, store=store, config=ContiguousKVConfig.paper(0.2))
        used = []
        for _ in range(2):
            generate(model, ids, cache, tokens=3)
            used.append((cache.stats.bytes_used, list(cache.stats.chunks_used), cache.stats.prefix_tokens))
            cache.reset()
        assert used[0] == used[1]
        cache.close()


@pytest.mark.parametrize("config", CONFIGS)
def test_counters_are_plain_and_sane(tiny_model, store_path, config):
    stats = one_request(tiny_model("llama"), 325, store_path, CONFIGS[config](0.2))
    assert isinstance(stats, RequestStats)
    assert json.loads(json.dumps(stats.as_dict()))["bytes_read"] == stats.bytes_read
    assert set(stats.hits) == {"device", "host", "disk"}
    assert sum(stats.hits.values()) > 0
    assert 0 <= stats.io_wait_s < 60
    assert 0 <= stats.bytes_identified <= stats.bytes_read
    assert stats.prefetch_hits >= 0
    assert stats.prefetch_wasted_bytes >= 0


def test_a_closed_store_leaves_no_thread_behind(tiny_model, store_path):
    before = set(threading.enumerate())
    for config in CONFIGS.values():
        one_request(tiny_model("llama"), 325, store_path, config(0.2))
    assert set(threading.enumerate()) <= before


def test_a_store_reports_what_it_holds(tiny_model, store_path):
    model = tiny_model("llama")
    prefix, ids = prompt(160)
    with PrefixStore(store_path) as store:
        assert store.match(model, ids[0]) == 0
        assert store.entries() == []
        ContiguousKVCache(model, prefix, store=store).close()
        assert store.match(model, ids[0]) == 160
        assert store.match(model, ids) == 160
        assert store.match(model, token_ids(50, seed=603)) == 0
        assert len(store.entries()) >= 1
        assert store.stats.disk_bytes >= LAYERS * 10 * CHUNK_BYTES


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux's /proc/self/io")
@pytest.mark.parametrize("config", CONFIGS)
def test_the_system_counts_the_bytes_that_the_stats_claim(tiny_model, store_path, config):
    model = tiny_model("llama")
    prefix, ids = prompt(3200)
    write_prefix(model, prefix, store_path)

    def device_bytes() -> int:
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("read_bytes:")))

    with PrefixStore(store_path) as store:
        if not store.stats.direct_reads:
            pytest.skip("this file system does not read past the page cache")
        before = device_bytes()
        with ContiguousKVCache(model, prefix, store=store, config=CONFIGS[config](0.05)) as cache:
            generate(model, ids, cache, tokens=2)
            claimed = cache.stats.bytes_read
        # Headers and the index may come from the device as well, if the page cache has lost them.
        assert claimed <= device_bytes() - before <= claimed + 2**20
