"""A compact prefix: chunks chosen by an index of 2 bits, each with its keys in 8 bits and its values in 4."""

from __future__ import annotations

import dataclasses
from contextlib import closing
from typing import Any

import pytest
import torch
from unit.fake_device import EARLY, LATE, SCHEDULES, accelerated

from hf_contiguouskv import ContiguousKVConfig, IndexedKeys
from hf_contiguouskv.errors import ConfigError
from hf_contiguouskv.model.kv_geometry import KVGeometry
from hf_contiguouskv.planning.read_plan import chunks_kept
from hf_contiguouskv.selection import CoarseIndex

from .device_helpers import MEBIBYTE, assert_idle
from .models import full_attention_layers, token_ids
from .references import PrunedReference, assert_close, forward, generate, prefilled, visible_tokens
from .subject import ContiguousKVCache, PrefixStore, prefix_from_disk, write_prefix
from .test_packed import chunks_alone
from .test_pruned import assert_as_masked, masked_reference
from .test_recovery import damage, files

pytestmark = pytest.mark.needs_library

PREFIX = token_ids(165, seed=1701)
SUFFIX = token_ids(9, seed=1702)
COMPACT = ContiguousKVConfig(budget=0.3, index_bits=2)
PACKED = ContiguousKVConfig(budget=0.3)
CHUNK = 2 * (16 * (16 // 2 + 4) + (16 + 2) * 16)
"""Bytes of a chunk of a layer: two heads of 16 tokens with 16 channels; one scale per token, and per channel."""
INDEX = 2 * 4 * (4 * 3) * 16
"""Bytes of the codes of a layer: two heads, a quarter of 16 positions, 12 chunks in three blocks, 16 channels."""
LEVELS_AND_SCALES = 2 * 2 * 3 * 16 + 4 * 2 * 16


def geometries(store: Any) -> list[KVGeometry]:
    """Of all stored segments, from the beginning of the prefix on."""
    found = []
    for entry in sorted(store.entries(), key=lambda entry: entry.tokens):
        with closing(store.inner.opener(store.backend.open(entry.key))) as segment:
            found.append(segment.geometry)
    return found


# ---- what attention gets ----


@pytest.mark.parametrize("alone", [False, True], ids=["whole layers", "chunks alone"])
@pytest.mark.parametrize("budget", [0.1, 0.45])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt-neox", "qwen3"])
def test_pruned_chunks_are_as_good_as_masked(tiny_model, store_path, family, budget, alone, monkeypatch):
    if alone:
        chunks_alone(monkeypatch)
    model, config = tiny_model(family), dataclasses.replace(COMPACT, budget=budget)
    with prefix_from_disk(model, PREFIX, store_path, config=config) as cache:
        logits = forward(model, SUFFIX, cache)
        for layer in full_attention_layers(model):
            assert cache.selected_chunks(layer).shape == (1, chunks_kept(budget, 10))
        reference = masked_reference(model, cache, PREFIX)
        assert_as_masked(cache, logits, reference.forward(SUFFIX))
        for block, tokens in enumerate([1, 3]):
            ids = token_ids(tokens, seed=1710 + block)
            assert_as_masked(cache, forward(model, ids, cache), reference.forward(ids))


def test_rows_with_different_selections_are_as_good_as_masked(tiny_model, store_path):
    model, suffixes = tiny_model("llama"), token_ids(9, seed=1703, rows=3)
    with prefix_from_disk(model, PREFIX, store_path, config=COMPACT) as cache:
        logits = forward(model, suffixes, cache)
        assert len({tuple(row.tolist()) for row in cache.selected_chunks(0)}) > 1
        assert_as_masked(cache, logits, masked_reference(model, cache, PREFIX, rows=3).forward(suffixes))


def test_generation_follows_the_masked_reference(tiny_model, store_path):
    model = tiny_model("llama")
    with prefix_from_disk(model, PREFIX, store_path, config=COMPACT) as cache:
        output = generate(model, torch.cat([PREFIX, SUFFIX], dim=1), cache)
        tokens, scores = masked_reference(model, cache, PREFIX).greedy(SUFFIX, 8)
        for ours, theirs in zip(output.logits, scores, strict=True):
            assert_as_masked(cache, ours, theirs)
        assert output.sequences[0, -8:].tolist() == tokens


@pytest.mark.parametrize("period", [2, 3])
def test_layers_that_share_a_selection_have_their_own_keys(tiny_model, store_path, period):
    model = tiny_model("llama", layers=5)
    config = dataclasses.replace(COMPACT, selection=IndexedKeys(period=period, subperiod=period - 1))
    with prefix_from_disk(model, PREFIX, store_path, config=config) as cache:
        logits = forward(model, SUFFIX, cache)
        assert torch.equal(cache.selected_chunks(0), cache.selected_chunks(1))
        assert_as_masked(cache, logits, masked_reference(model, cache, PREFIX).forward(SUFFIX))


def test_the_first_layer_chooses_by_the_index_of_two_bits(tiny_model, store_path, monkeypatch):
    """What it scores with is what is stored for the keys that the model computes."""
    model, parts = tiny_model("llama"), []
    scored = CoarseIndex.scored
    monkeypatch.setattr(CoarseIndex, "scored", lambda part, *about: parts.append(part) or scored(part, *about))
    with prefix_from_disk(model, PREFIX, store_path, config=COMPACT) as cache:
        forward(model, SUFFIX, cache)
    keys = prefilled(model, PREFIX).layers[0].keys[0]
    for found, made in zip(parts[0], CoarseIndex.of(keys, 16), strict=True):
        assert torch.equal(torch.as_tensor(found), torch.as_tensor(made))
    assert len(parts) == 4


def test_the_whole_budget_and_an_exact_payload_are_exact(tiny_model, store_path):
    model = tiny_model("llama")
    whole = dataclasses.replace(COMPACT, budget=1.0)
    with prefix_from_disk(model, PREFIX, store_path, config=whole) as cache:
        assert torch.equal(forward(model, SUFFIX, cache), forward(model, SUFFIX, prefilled(model, PREFIX)))
    exact = dataclasses.replace(COMPACT, payload="exact")
    with PrefixStore(store_path) as store, ContiguousKVCache(model, PREFIX, store=store, config=exact) as cache:
        logits = forward(model, SUFFIX, cache)
        visible = {layer: visible_tokens(cache.selected_chunks(layer), 165) for layer in range(4)}
        assert_close(logits, PrunedReference(model, PREFIX, visible=visible).forward(SUFFIX))


def test_the_published_method_serves_a_compact_prefix_from_its_leader_keys(tiny_model, store_path):
    model = tiny_model("llama")
    paper = ContiguousKVConfig.paper(0.3)
    with prefix_from_disk(model, PREFIX, store_path / "packed", config=paper) as cache:
        expected = forward(model, SUFFIX, cache)
    write_prefix(model, PREFIX, store_path / "compact", config=COMPACT)
    with (
        PrefixStore(store_path / "compact") as store,
        ContiguousKVCache(model, PREFIX, store=store, config=paper) as cache,
    ):
        assert torch.equal(forward(model, SUFFIX, cache), expected)
        assert cache.stats.tokens_prefilled == 0


# ---- what is read ----


def test_its_reads_are_counted(tiny_model, store_path, monkeypatch):
    chunks_alone(monkeypatch)
    model, prefix = tiny_model("llama"), PREFIX[:, :160]
    with prefix_from_disk(model, prefix, store_path, config=COMPACT) as cache:
        forward(model, SUFFIX, cache)
        assert cache.stats.bytes_used == 4 * 3 * CHUNK
        assert cache.stats.chunks_used == [3] * 4
        # Whole pages are read; a chunk lies on two at most.
        assert 4 * 3 * CHUNK <= cache.stats.bytes_read - cache.stats.bytes_identified <= 4 * 3 * 2 * 4096
        # Indexes of small layers are read together, with what lies between them.
        assert 4 * (INDEX + LEVELS_AND_SCALES) <= cache.stats.bytes_identified <= 4 * (INDEX + LEVELS_AND_SCALES + 4096)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_an_accelerator_answers_as_a_cpu(tiny_model, store_path, family, schedule):
    model = tiny_model(family, "sdpa")
    with prefix_from_disk(model, PREFIX, store_path, config=COMPACT) as cache:
        expected = forward(model, SUFFIX, cache)
    with (
        accelerated(schedule),
        PrefixStore(store_path, host_bytes=8 * MEBIBYTE, device_bytes=16 * MEBIBYTE) as store,
    ):
        for _ in range(3):
            with ContiguousKVCache(model, PREFIX, store=store, config=COMPACT) as cache:
                assert torch.equal(forward(model, SUFFIX, cache), expected)
                stats = cache.stats
            assert_idle(store.inner.memory)
        assert stats.hits["device"] == sum(stats.hits.values()) > 0
        assert stats.bytes_read == 0


@pytest.mark.parametrize("schedule", [LATE, EARLY, 4], ids=str)
@pytest.mark.parametrize(("device", "host"), [(0, 0), (5000, 0), (5000, 100_000), (60_000, 5000), (0, 100_000)])
def test_the_smallest_memory_still_answers(tiny_model, store_path, device, host, schedule):
    model, suffixes = tiny_model("llama", "sdpa"), [SUFFIX, token_ids(6, seed=1704)]
    write_prefix(model, PREFIX, store_path, config=COMPACT)
    expected = []
    for suffix in suffixes:
        with PrefixStore(store_path) as store, ContiguousKVCache(model, PREFIX, store=store, config=COMPACT) as cache:
            expected.append(forward(model, suffix, cache))
    with accelerated(schedule), PrefixStore(store_path, host_bytes=host, device_bytes=device) as store:
        for turn in (0, 1, 0):
            with ContiguousKVCache(model, PREFIX, store=store, config=COMPACT) as cache:
                assert_close(forward(model, suffixes[turn], cache), expected[turn])
            assert_idle(store.inner.memory)


# ---- what is stored ----


@pytest.mark.parametrize(("first", "then"), [(PACKED, COMPACT), (COMPACT, PACKED)], ids=["packed", "compact"])
def test_what_continues_a_stored_prefix_takes_its_form(tiny_model, store_path, first, then):
    model = tiny_model("llama")
    write_prefix(model, PREFIX[:, :80], store_path, config=first)
    write_prefix(model, PREFIX, store_path, config=then)
    with PrefixStore(store_path) as store:
        compact = [bool(g.compact_layers) for g in geometries(store)]
        assert compact == [first is COMPACT] * 2
        with ContiguousKVCache(model, PREFIX, store=store, config=then) as cache:
            forward(model, SUFFIX, cache)
            size = CHUNK if first is COMPACT else 2 * 16 * (16 // 2 + 4)
            assert cache.stats.bytes_used == 4 * (3 * size + 5 * (size // 16))
        assert store.verify(deep=True) == []


@pytest.mark.parametrize("first", [PACKED, COMPACT], ids=["packed first", "compact first"])
def test_a_prefix_of_both_forms_is_served_exactly_and_scored_by_both_indexes(
    tiny_model, store_path, first, monkeypatch
):
    """Machines with different settings may share a store; none of them loses what another one has written."""
    monkeypatch.setattr(KVGeometry, "continuing", lambda own, earlier: own)
    model, second = tiny_model("llama"), COMPACT if first is PACKED else PACKED
    write_prefix(model, PREFIX[:, :80], store_path, config=first)
    write_prefix(model, PREFIX, store_path, config=second)
    with PrefixStore(store_path) as store:
        assert [bool(g.compact_layers) for g in geometries(store)] == [first is COMPACT, second is COMPACT]
        with ContiguousKVCache(model, PREFIX, store=store, config=PACKED) as cache:
            logits = forward(model, SUFFIX, cache)
            assert cache.stats.tokens_prefilled == 0
            # Not a single layer was read for its keys.
            assert cache.stats.bytes_identified < 4 * 10 * 16 * 16 * 4
            visible = {layer: visible_tokens(cache.selected_chunks(layer), 165) for layer in range(4)}
        assert_close(logits, PrunedReference(model, PREFIX, visible=visible).forward(SUFFIX))


def test_a_stored_prefix_is_served_in_its_own_form(tiny_model, store_path):
    model = tiny_model("llama")
    write_prefix(model, PREFIX, store_path, config=COMPACT)
    with PrefixStore(store_path) as store:
        with ContiguousKVCache(model, PREFIX, store=store, config=COMPACT) as cache:
            expected = forward(model, SUFFIX, cache)
        with ContiguousKVCache(model, PREFIX, store=store, config=PACKED) as cache:
            assert torch.equal(forward(model, SUFFIX, cache), expected)
            assert cache.stats.tokens_prefilled == 0


@pytest.mark.parametrize(("config", "version"), [(COMPACT, b'"version":"4"'), (PACKED, b'"version":"3"')])
def test_only_compact_prefixes_need_the_newest_format(tiny_model, store_path, config, version):
    """What earlier releases can read is written as they read it."""
    write_prefix(tiny_model("llama"), PREFIX, store_path, config=config)
    (path,) = files(store_path).values()
    assert version in path.read_bytes()[:4096]
    with PrefixStore(store_path) as store:
        assert store.verify(deep=True) == []


def test_damage_is_found_and_computed_again(tiny_model, store_path):
    model = tiny_model("llama")
    with prefix_from_disk(model, PREFIX, store_path, config=COMPACT) as cache:
        expected = forward(model, SUFFIX, cache)
    (path,) = files(store_path).values()
    for tensor in ("coarse_index.1", "coarse_levels.2", "compact.3"):
        damage(path, tensor)
    with PrefixStore(store_path) as store:
        told = " ".join(problem.problem for problem in store.verify())
        assert all(tensor in told for tensor in ("coarse_index.1", "coarse_levels.2", "compact.3"))
    with PrefixStore(store_path) as store, ContiguousKVCache(model, PREFIX, store=store, config=COMPACT) as cache:
        assert_close(forward(model, SUFFIX, cache), expected)


def test_small_chunks_cannot_be_compact():
    with pytest.raises(ConfigError, match="chunk_size of 4 or more"):
        ContiguousKVConfig(index_bits=2, chunk_size=2)
    for wrong in (4, 2.0, True, "2", None):
        with pytest.raises(ConfigError, match="index_bits must be one of"):
            ContiguousKVConfig(index_bits=wrong)  # type: ignore[arg-type]
