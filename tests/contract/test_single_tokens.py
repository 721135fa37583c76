"""Single tokens beside whole chunks: attention is that of a model which masks everything else out.

Which tokens those are is read from the cache; that they are the best ones is checked against plain loops.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from unit.fake_device import EARLY, LATE, SCHEDULES, accelerated

from hf_contiguouskv import ContiguousKVConfig, IndexedKeys
from hf_contiguouskv.errors import ConfigError
from hf_contiguouskv.planning import read_plan as needs
from hf_contiguouskv.planning.read_plan import chunks_kept

from .device_helpers import MEBIBYTE, assert_idle
from .models import PAD, full_attention_layers, token_ids
from .references import (
    PrunedReference,
    assert_close,
    forward,
    generate,
    keys_in_8_bits,
    prefilled,
    visible_tokens,
)
from .subject import ContiguousKVCache, PrefixStore, prefix_from_disk, write_prefix
from .test_packed import chunks_alone
from .test_recovery import damage, files

pytestmark = pytest.mark.needs_library

PREFIX = token_ids(325, seed=2701)
SUFFIX = token_ids(9, seed=2702)
HALF = ContiguousKVConfig(budget=0.4, selection=IndexedKeys(single_tokens=0.5))
"""Of 20 whole chunks 8 are kept: 4 of them as a whole, and 64 single tokens."""
WITHOUT = dataclasses.replace(HALF, selection=IndexedKeys())


@pytest.fixture(autouse=True)
def _few_whole_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefixes of tests are short."""
    monkeypatch.setattr(needs, "LEAST_WHOLE_CHUNKS", 0)


def visible(cache: Any, layer: int, tokens: int) -> torch.Tensor:
    """Bool `[rows, n]`: what a layer sees of the prefix. Nothing is there twice."""
    seen = visible_tokens(cache.selected_chunks(layer), tokens)
    single = cache.single_tokens(layer)
    for row, own in enumerate(single.tolist()):
        assert own == sorted(set(own))
        assert not seen[row, own].any()
        seen[row, own] = True
    return seen


def reference(model: Any, cache: Any, prefix: torch.Tensor = PREFIX, rows: int = 1) -> PrunedReference:
    seen = {layer: visible(cache, layer, prefix.shape[1]) for layer in full_attention_layers(model)}
    return PrunedReference(model, prefix, rows=rows, visible=seen, packed=True)


def assert_as_rounded(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal within the noise that may move a number to the next step of its rounding."""
    assert_close(actual, expected, relative=0.01, absolute=3e-4)


# ---- what attention gets ----


@pytest.mark.parametrize("alone", [False, True], ids=["whole layers", "by name"])
@pytest.mark.parametrize("tokens", [320, 325])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt-neox", "qwen3"])
def test_they_are_as_good_as_masked(tiny_model, store_path, family, tokens, alone, monkeypatch):
    if alone:
        chunks_alone(monkeypatch)
    model, prefix = tiny_model(family), PREFIX[:, :tokens]
    with prefix_from_disk(model, prefix, store_path, config=HALF) as cache:
        logits = forward(model, SUFFIX, cache)
        for layer in full_attention_layers(model):
            assert cache.selected_chunks(layer).shape == (1, 4)
            assert cache.single_tokens(layer).shape == (1, 64)
        masked = reference(model, cache, prefix)
        assert_as_rounded(logits, masked.forward(SUFFIX))
        for block, count in enumerate([1, 3]):
            ids = token_ids(count, seed=2710 + block)
            assert_as_rounded(forward(model, ids, cache), masked.forward(ids))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_share_of_single_tokens_is_what_was_asked_for(tiny_model, store_path, share):
    model, rule = tiny_model("llama"), IndexedKeys(single_tokens=share)
    with prefix_from_disk(model, PREFIX, store_path, config=dataclasses.replace(HALF, selection=rule)) as cache:
        logits = forward(model, SUFFIX, cache)
        # Both ends stay whole, and no budget is exceeded.
        chunks = {0.0: 8, 0.3: 6, 1.0: 2}[share]
        assert cache.selected_chunks(0).shape == (1, chunks)
        if share:
            assert cache.single_tokens(0).shape == (1, (8 - chunks) * 16)
            assert_as_rounded(logits, reference(model, cache).forward(SUFFIX))
        else:
            assert cache.single_tokens(0) is None
        assert cache.layers[0].get_mask_sizes(1)[0] == 8 * 16 + 5 + SUFFIX.shape[1] + 1


@pytest.mark.parametrize(("least", "whole"), [(3, 4), (6, 6), (8, 8), (9, 8)])
def test_some_chunks_stay_whole_before_single_tokens_get_anything(tiny_model, store_path, least, whole, monkeypatch):
    monkeypatch.setattr(needs, "LEAST_WHOLE_CHUNKS", least)
    with prefix_from_disk(tiny_model("llama"), PREFIX, store_path, config=HALF) as cache:
        forward(tiny_model("llama"), SUFFIX, cache)
        assert cache.selected_chunks(0).shape == (1, whole)
        single = cache.single_tokens(0)
        assert (0 if single is None else single.shape[1]) == (8 - whole) * 16


@pytest.mark.parametrize("alone", [False, True], ids=["whole layers", "by name"])
def test_rows_choose_their_own(tiny_model, store_path, alone, monkeypatch):
    if alone:
        chunks_alone(monkeypatch)
    model, suffixes = tiny_model("llama"), token_ids(9, seed=2703, rows=3)
    with prefix_from_disk(model, PREFIX, store_path, config=HALF) as cache:
        logits = forward(model, suffixes, cache)
        assert len({tuple(row.tolist()) for row in cache.single_tokens(0)}) > 1
        assert_as_rounded(logits, reference(model, cache, rows=3).forward(suffixes))
        used = 0
        for layer in range(4):
            whole = set(cache.selected_chunks(layer).flatten().tolist())
            # (What one row uses as a whole, another one may take tokens from.)
            single = {token for token in cache.single_tokens(layer).flatten().tolist() if token // 16 not in whole}
            used += 16 * len(whole) + len(single) + 5
        assert cache.stats.bytes_used == used * 2 * (16 // 2 + 4)


def test_a_padded_row_chooses_as_alone(tiny_model, store_path):
    model, suffixes = tiny_model("llama"), [token_ids(9, seed=2704), token_ids(4, seed=2705)]
    pads = torch.full((1, 5), PAD)
    ids = torch.cat([torch.cat([PREFIX, suffixes[0]], dim=1), torch.cat([pads, PREFIX, suffixes[1]], dim=1)])
    write_prefix(model, PREFIX, store_path, config=HALF)
    with PrefixStore(store_path) as store:
        with ContiguousKVCache(model, PREFIX, store=store, config=HALF) as cache:
            generate(model, ids, cache, attention_mask=(ids != PAD).long())
            together = [cache.single_tokens(layer) for layer in range(4)]
        for row, suffix in enumerate(suffixes):
            with ContiguousKVCache(model, PREFIX, store=store, config=HALF) as cache:
                generate(model, torch.cat([PREFIX, suffix], dim=1), cache)
                for layer in range(4):
                    assert torch.equal(cache.single_tokens(layer)[0], together[layer][row])


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_follows_the_masked_reference(tiny_model, store_path, beams):
    model = tiny_model("llama")
    with prefix_from_disk(model, PREFIX, store_path, config=HALF) as cache:
        output = generate(model, torch.cat([PREFIX, SUFFIX], dim=1), cache, num_beams=beams)
        assert cache.single_tokens(0).shape == (beams, 64)
        if beams == 1:
            tokens, scores = reference(model, cache).greedy(SUFFIX, 8)
            for ours, theirs in zip(output.logits, scores, strict=True):
                assert_as_rounded(ours, theirs)
            assert output.sequences[0, -8:].tolist() == tokens


@pytest.mark.parametrize("alone", [False, True], ids=["whole layers", "by name"])
@pytest.mark.parametrize("period", [2, 3])
def test_layers_of_a_period_share_them(tiny_model, store_path, period, alone, monkeypatch):
    if alone:
        chunks_alone(monkeypatch)  # The chunks of single tokens are read ahead for the next period as well.
    model = tiny_model("llama", layers=5)
    rule = IndexedKeys(period=period, subperiod=period - 1, single_tokens=0.5)
    with prefix_from_disk(model, PREFIX, store_path, config=dataclasses.replace(HALF, selection=rule)) as cache:
        logits = forward(model, SUFFIX, cache)
        assert torch.equal(cache.single_tokens(0), cache.single_tokens(1))
        assert_as_rounded(logits, reference(model, cache).forward(SUFFIX))
        assert not alone or cache.stats.prefetch_hits > 0


@pytest.mark.parametrize("alone", [False, True], ids=["whole layers", "by name"])
def test_they_may_lie_in_several_segments(tiny_model, store_path, alone, monkeypatch):
    if alone:
        chunks_alone(monkeypatch)
    model = tiny_model("llama")
    with PrefixStore(store_path) as store:
        for end in (100, 213, 325):
            ContiguousKVCache(model, PREFIX[:, :end], store=store, config=HALF).close()
        with ContiguousKVCache(model, PREFIX, store=store, config=HALF) as cache:
            assert len(cache.session.request.prefix.spans) == 3
            logits = forward(model, SUFFIX, cache)
            chunks = {int(token) // 16 for token in cache.single_tokens(0)[0]}
            assert min(chunks) < 6
            assert max(chunks) > 13
    # (Each segment has key scales of its own, so the reference, which has one, is not quite the same.)
    with prefix_from_disk(model, PREFIX, store_path / "one", config=HALF) as cache:
        assert_close(logits, forward(model, SUFFIX, cache), relative=0.1, absolute=0.05)


def test_of_the_beginning_of_a_stored_prefix(tiny_model, store_path):
    model, beginning = tiny_model("llama"), PREFIX[:, :200]
    write_prefix(model, PREFIX, store_path, config=HALF)
    with PrefixStore(store_path) as store, ContiguousKVCache(model, beginning, store=store, config=HALF) as cache:
        assert cache.stats.tokens_prefilled == 0
        logits = forward(model, SUFFIX, cache)
        assert int(cache.single_tokens(0).max()) < 192
        masked = reference(model, cache, beginning)
        # The scales of its keys are those of all that is stored.
        for layer, stored in enumerate(prefilled(model, PREFIX).layers):
            masked.cache.layers[layer].keys = keys_in_8_bits(stored.keys)[:, :, :200]
        assert_as_rounded(logits, masked.forward(SUFFIX))


# ---- which tokens ----


def test_the_best_tokens_of_the_best_chunks_are_chosen(tiny_model, store_path):
    """Of the first layer, by loops in float64 over the keys as they are stored."""
    model = tiny_model("llama", layers=1)
    rule = IndexedKeys(single_tokens=0.5, queries=None, keep_first=0, keep_last=0)
    config = dataclasses.replace(HALF, selection=rule)
    with prefix_from_disk(model, PREFIX, store_path, config=config) as cache:
        taken = []
        attached = cache.layers[0].attached
        load = attached.request.load_full

        def noting(layer, query, *rest):
            taken.append(query)
            return load(layer, query, *rest)

        attached.request.load_full = noting
        forward(model, SUFFIX, cache)
        chunks, tokens = cache.selected_chunks(0)[0].tolist(), cache.single_tokens(0)[0].tolist()
    everything = PrunedReference(model, PREFIX, visible={}, packed=True)
    keys = everything.cache.layers[0].keys[0, :, :320].double()
    queries = taken[0][0].double()
    logits = torch.einsum("hqd,htd->hqt", queries, keys.repeat_interleave(len(queries) // len(keys), 0))
    logits = logits * queries.shape[-1] ** -0.5

    strongest = logits.unflatten(-1, (20, 16)).amax(-1)
    totals = strongest.logsumexp(-1, keepdim=True)

    by_chunk = (strongest - totals).exp().square().sum((0, 1)).tolist()
    ranked = sorted(range(20), key=lambda chunk: -by_chunk[chunk])
    assert chunks == sorted(ranked[:4])
    nominees = [token for chunk in ranked[:16] for token in range(16 * chunk, 16 * chunk + 16)]
    score = dict(zip(nominees, (logits - totals)[..., nominees].amax((0, 1)).tolist(), strict=True))
    others = [token for token in nominees if token // 16 not in chunks]
    best = sorted(others, key=lambda token: -score[token])
    # (Queries are rounded to 8 bits for the product, so what is nearly alike may change places.)
    assert len(set(tokens) & set(best[:64])) >= 62
    assert set(tokens) <= set(best[:72])


# ---- what is read ----


def test_nothing_more_is_read_than_their_chunks(tiny_model, store_path, monkeypatch):
    chunks_alone(monkeypatch)
    model, extent = tiny_model("llama"), 2 * 16 * (16 // 2 + 4)
    with prefix_from_disk(model, PREFIX, store_path, config=HALF) as cache:
        forward(model, SUFFIX, cache)
        chunks = 0
        for layer in range(4):
            used = set(cache.selected_chunks(layer)[0].tolist())
            single = {int(token) // 16 for token in cache.single_tokens(layer)[0]}
            assert len(used | single) <= 16  # Twice as many as the budget keeps.
            chunks += len(used | single) + 1
        # Whole pages are read; a chunk lies on two at most.
        assert chunks * extent <= cache.stats.bytes_read - cache.stats.bytes_identified <= chunks * 2 * 4096
        assert cache.stats.hits["disk"] == chunks
        assert cache.stats.bytes_used == 4 * (4 * extent + (64 + 5) * extent // 16)


@pytest.mark.parametrize("limit", [0, 40_000])
def test_little_memory_changes_no_answer(tiny_model, store_path, limit, monkeypatch):
    chunks_alone(monkeypatch)
    model = tiny_model("llama")
    write_prefix(model, PREFIX, store_path, config=HALF)
    found = []
    for host_bytes in (MEBIBYTE, limit):
        with PrefixStore(store_path, host_bytes=host_bytes) as store:
            for _ in range(3):
                with ContiguousKVCache(model, PREFIX, store=store, config=HALF) as cache:
                    found.append(forward(model, SUFFIX, cache))
    assert all(torch.equal(found[0], one) for one in found)


def test_a_copy_and_a_reset_cache_answer_alike(tiny_model, store_path):
    model = tiny_model("llama")
    with prefix_from_disk(model, PREFIX, store_path, config=HALF) as cache:
        first = forward(model, SUFFIX, cache)
        with copy.deepcopy(cache) as twin:
            assert torch.equal(twin.single_tokens(2), cache.single_tokens(2))
            assert_close(forward(model, SUFFIX, twin), forward(model, SUFFIX, cache))
        cache.reset()
        assert cache.single_tokens(0) is None
        assert torch.equal(forward(model, SUFFIX, cache), first)


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_damage_in_mid_request_is_computed_again(tiny_model, store_path, layer, monkeypatch):
    chunks_alone(monkeypatch)
    model = tiny_model("llama")
    with prefix_from_disk(model, PREFIX, store_path, config=HALF) as cache:
        expected = forward(model, SUFFIX, cache)
        chunk = int(cache.single_tokens(layer)[0, 10]) // 16
    (path,) = files(store_path).values()
    damage(path, f"values4.{layer}", chunk * 2 * 16 * (16 // 2 + 4) + 3)
    with PrefixStore(store_path) as store, ContiguousKVCache(model, PREFIX, store=store, config=HALF) as cache:
        assert_close(forward(model, SUFFIX, cache), expected)
        assert cache.stats.tokens_prefilled == 325
        assert store.stats.recovered == 1


def test_damage_may_change_the_form_of_the_chunks_in_mid_request(tiny_model, store_path, monkeypatch):
    """What is computed again is stored as the configuration says: single tokens that were chosen come from that."""
    chunks_alone(monkeypatch)
    model, compact = tiny_model("llama"), dataclasses.replace(HALF, index_bits=2)
    with prefix_from_disk(model, PREFIX, store_path, config=HALF) as cache:
        forward(model, SUFFIX, cache)
        tokens = [cache.single_tokens(layer) for layer in (0, 1)]
    (path,) = files(store_path).values()
    damage(path, "values4.1", int(tokens[1][0, 10]) // 16 * 2 * 16 * (16 // 2 + 4) + 3)
    with PrefixStore(store_path) as store, ContiguousKVCache(model, PREFIX, store=store, config=compact) as cache:
        logits = forward(model, SUFFIX, cache)
        assert cache.session.request.plan.served.form == "compact"
        seen = {}
        for layer in range(4):
            if layer < 2:
                assert torch.equal(cache.single_tokens(layer), tokens[layer])
                seen[layer] = visible(cache, layer, 325)
            else:
                assert cache.single_tokens(layer) is None
                seen[layer] = visible_tokens(cache.selected_chunks(layer), 325)
    masked = PrunedReference(model, PREFIX, visible=seen, packed=True, scale_per_chunk=True)
    masked.cache.layers[0].keys = keys_in_8_bits(prefilled(model, PREFIX).layers[0].keys)
    assert_as_rounded(logits, masked.forward(SUFFIX))


@pytest.mark.parametrize("alone", [False, True], ids=["whole layers", "by name"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_an_accelerator_chooses_and_answers_alike(tiny_model, store_path, schedule, alone, monkeypatch):
    if alone:
        chunks_alone(monkeypatch)
    model = tiny_model("llama")
    with prefix_from_disk(model, PREFIX, store_path, config=HALF) as cache:
        expected = forward(model, SUFFIX, cache)
        tokens = [cache.single_tokens(layer) for layer in range(4)]
    with (
        accelerated(schedule),
        PrefixStore(store_path, host_bytes=8 * MEBIBYTE, device_bytes=16 * MEBIBYTE) as store,
    ):
        for _ in range(2):
            with ContiguousKVCache(model, PREFIX, store=store, config=HALF) as cache:
                assert torch.equal(forward(model, SUFFIX, cache), expected)
                for layer in range(4):
                    assert torch.equal(cache.single_tokens(layer), tokens[layer])
            assert_idle(store.inner.memory)


@pytest.mark.parametrize("schedule", [LATE, EARLY, 4], ids=str)
@pytest.mark.parametrize(("device", "host"), [(0, 0), (5000, 100_000), (60_000, 5000)])
def test_the_smallest_memory_of_an_accelerator_still_answers(tiny_model, store_path, device, host, schedule):
    model = tiny_model("llama")
    with prefix_from_disk(model, PREFIX, store_path, config=HALF) as cache:
        expected = forward(model, SUFFIX, cache)
    with accelerated(schedule), PrefixStore(store_path, host_bytes=host, device_bytes=device) as store:
        for _ in range(2):
            with ContiguousKVCache(model, PREFIX, store=store, config=HALF) as cache:
                assert_close(forward(model, SUFFIX, cache), expected)
            assert_idle(store.inner.memory)


# ---- where there are none ----


@pytest.mark.parametrize("changes", [{"budget": 1.0}, {"index_bits": 2}], ids=["the whole prefix", "2 bits"])
def test_elsewhere_chunks_alone_are_chosen(tiny_model, store_path, changes):
    model = tiny_model("llama")
    answers = []
    for name, config in (("with", HALF), ("without", WITHOUT)):
        config = dataclasses.replace(config, **changes)
        with prefix_from_disk(model, PREFIX, store_path / name, config=config) as cache:
            answers.append(forward(model, SUFFIX, cache))
            assert cache.single_tokens(0) is None
            assert cache.selected_chunks(0).shape == (1, chunks_kept(config.budget, 20))
    assert torch.equal(*answers)


@pytest.mark.parametrize(
    ("changes", "message"), [({"payload": "exact"}, "payload='packed'"), ({"reselect_every": 4}, "reselect_every")]
)
def test_what_cannot_work_together_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(HALF, **changes)
    dataclasses.replace(WITHOUT, **changes)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan"), True, "half", None])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ConfigError, match="single_tokens is a part of the budget"):
        IndexedKeys(single_tokens=share)
