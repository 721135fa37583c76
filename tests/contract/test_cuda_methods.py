"""The methods on a real accelerator: the chunks that float64 chooses, the answers of a masked model, no hidden wait.

`CUDA_METHODS_DEVICE=cpu` runs the same tests on the recording stand-in for a device.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from unit.fake_device import FakeDevice, accelerated

from hf_contiguouskv import ContiguousKVConfig
from hf_contiguouskv.hardware.accelerator import Accelerator
from hf_contiguouskv.memory import blocks
from hf_contiguouskv.model.fingerprint import model_fingerprint
from hf_contiguouskv.model.served_model import ServedModel
from hf_contiguouskv.prefill.persisting import persist_rows
from hf_contiguouskv.selection import (
    AttentionMassScorer,
    IndexedKeysScorer,
    KeyIndex,
    SelectionInput,
    choose_chunks,
    voting_queries,
)

from .device_helpers import CONFIGS, MEBIBYTE, PREFIX, PRUNED, SUFFIX, ask, assert_idle, opened
from .models import PAD, build, token_ids
from .references import PrunedReference, assert_close, forward, generate, prefilled, visible_tokens
from .subject import ContiguousKVCache, PrefixStore, write_prefix

DEVICE = torch.device(os.environ.get("CUDA_METHODS_DEVICE", "cuda"))
ON_CUDA = DEVICE.type == "cuda"
pytestmark = [
    pytest.mark.needs_library,
    pytest.mark.skipif(
        ON_CUDA and not torch.cuda.is_available(), reason="needs CUDA: torch.cuda.is_available() is false"
    ),
]
ONLY_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA: there are no waits to count on a CPU")
LAYERS = 4
# How often the host waits for the device between the first layer and the last: for the scores of each leader layer,
# because the next reads depend on them, and for nothing else.
WAITS = {"exact": 0, "paper": 1, "index": LAYERS, "whole layers": 2}
# Norm of the difference over the norm of the answer: what rounding to bfloat16 explains, and rounding to 4 bits of
# numbers that bfloat16 has moved; and from where on it is another answer.
ROUNDING, PACKED_ROUNDING, ANOTHER_ANSWER = 0.06, 0.25, 0.5


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    with contextlib.nullcontext() if ON_CUDA else accelerated():
        yield


def on_device(family: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return build(family, **options).to(DEVICE, dtype)


def distance(answer: torch.Tensor, reference: torch.Tensor) -> float:
    answer, reference = (one.float().cpu() - one.float().cpu().mean(-1, keepdim=True) for one in (answer, reference))
    return float((answer - reference).norm() / reference.norm())


# ---- which chunks ----


def selection_input(heads: int, kv_heads: int, queries: int, head_dim: int, voters: int, seed: int) -> SelectionInput:
    chance = torch.Generator().manual_seed(seed)
    asking = torch.randn(1, heads, queries, head_dim, generator=chance).mul_(1.5).bfloat16()
    suffix = torch.randn(1, kv_heads, queries, head_dim, generator=chance).bfloat16()
    visible = torch.ones(1, queries, dtype=torch.bool)
    chosen = voting_queries(visible[0], voters, 4)
    return SelectionInput(asking, suffix, [chosen], visible, head_dim**-0.5)


def moved(inputs: SelectionInput) -> SelectionInput:
    return SelectionInput(
        inputs.queries.to(DEVICE),
        inputs.suffix_keys.to(DEVICE),
        [one.to(DEVICE) for one in inputs.voters],
        inputs.visible.to(DEVICE),
        inputs.scaling,
    )


def some_keys(kv_heads: int, tokens: int, head_dim: int) -> torch.Tensor:
    """Keys with channels of very different size, as models have them."""
    chance = torch.Generator().manual_seed(tokens)
    sizes = torch.rand(head_dim, generator=chance).mul_(3).exp_().div_(4)
    return (torch.randn(kv_heads, tokens, head_dim, generator=chance) * sizes).bfloat16()


def indexed_in_float64(inputs: SelectionInput, parts: list[Any], whole: int, power: float) -> torch.Tensor:
    """The scores of `IndexedKeysScorer`, from the rounded keys and queries on in float64."""
    kv_heads = parts[0][0].shape[0]
    queries = inputs.queries[0][:, inputs.voters[0]].float().reshape(kv_heads, -1, inputs.queries.shape[-1])
    peaks = []
    for index, scale in parts:
        scaled = queries * scale[:, None]
        step = scaled.abs().amax(-1, keepdim=True) / 127
        rounded = (scaled / step).round().double()
        products = torch.einsum("hcnd,hqd->hqcn", index.double(), rounded)
        peaks.append(products.amax(2) * step.double() * inputs.scaling)
    share = torch.cat(peaks, -1)[..., :whole].softmax(-1)
    return share.pow(power).sum((0, 1))


def mass_in_float64(inputs: SelectionInput, keys: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """The published scores in float64: a softmax over prefix and suffix, summed per chunk."""
    kv_heads, tokens, head_dim = keys.shape
    count = inputs.queries.shape[2]
    queries = inputs.queries[0].double().reshape(kv_heads, -1, count, head_dim)
    everything = torch.cat([keys, inputs.suffix_keys[0]], 1).double()
    logits = torch.einsum("hgqd,htd->hgqt", queries, everything) * inputs.scaling
    logits[..., tokens:].masked_fill_(torch.ones(count, count, dtype=torch.bool).triu(1), float("-inf"))
    mass = logits.softmax(-1)[:, :, inputs.voters[0], :tokens].sum((0, 1, 2))
    return mass[: tokens // chunk_size * chunk_size].view(-1, chunk_size).sum(1)


def assert_same_choice(found: torch.Tensor, reference: torch.Tensor, keep: int) -> None:
    """The same chunks, except where the reference itself can hardly tell two of them apart."""
    chosen = set(choose_chunks(found, keep, 0, 0)[0].tolist())
    wanted = set(choose_chunks(reference[None], keep, 0, 0)[0].tolist())
    last = reference.sort(descending=True).values[keep - 1]
    for chunk in chosen ^ wanted:
        assert abs(float(reference[chunk] / last) - 1) < 1e-5, f"chunk {chunk} of {keep}"


@pytest.mark.parametrize(("tokens", "segments"), [(4096, (4096,)), (4101, (4101,)), (4101, (1600, 2501))])
@pytest.mark.parametrize(("queries", "voters"), [(32, 16), (1, 16), (300, 300)])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(28, 4, 128), (4, 4, 64)])
def test_an_index_on_the_device_chooses_as_on_a_cpu_and_in_float64(
    tokens, segments, queries, voters, heads, kv_heads, head_dim
):
    inputs, keys = selection_input(heads, kv_heads, queries, head_dim, voters, 1), some_keys(kv_heads, tokens, head_dim)
    parts = [KeyIndex.of(part, 16) for part in keys.split(segments, 1)]
    there = [KeyIndex(index.to(DEVICE), scale.to(DEVICE)) for index, scale in parts]
    for power in (1.0, 2.0):
        exact = indexed_in_float64(inputs, parts, tokens // 16, power)
        on_cpu, _ = IndexedKeysScorer(parts, tokens // 16, power, on_device=False)(inputs)
        found, _ = IndexedKeysScorer(there, tokens // 16, power, on_device=True)(moved(inputs))
        for keep in (4, 13, 64):
            assert_same_choice(found.cpu(), exact, keep)
            assert_same_choice(on_cpu, exact, keep)


@pytest.mark.parametrize("tokens", [2048, 2053])
@pytest.mark.parametrize("queries", [1, 32])
def test_the_published_scores_choose_as_in_float64(tokens, queries):
    inputs, keys = selection_input(28, 4, queries, 128, queries, 2), some_keys(4, tokens, 128)
    exact = mass_in_float64(inputs, keys, 16)
    found, _ = AttentionMassScorer(keys.to(DEVICE), 16, 1.0)(moved(inputs))
    for keep in (7, 26, 64):
        assert_same_choice(found.cpu(), exact, keep)


# ---- answers in bfloat16 ----


def visible_by_layer(cache: Any, tokens: int, turned: bool = False) -> dict[int, torch.Tensor]:
    """The tokens that each layer saw; `turned`: as many others."""
    found = {}
    for layer in range(LAYERS):
        chunks = cache.selected_chunks(layer).cpu()
        found[layer] = visible_tokens(tokens // 16 - 1 - chunks if turned else chunks, tokens)
    return found


@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("tokens", [160, 165])
@pytest.mark.parametrize("config", ["paper", "index"])
def test_a_pruned_prefix_in_bfloat16_answers_as_a_masked_one(store_path, config, tokens, segments):
    model, on_cpu = on_device(dtype=torch.bfloat16), build("llama").to(torch.bfloat16)
    prefix = token_ids(tokens, seed=1203)
    for end in (96, tokens)[-segments:]:
        write_prefix(model, prefix[:, :end], store_path)
    packed = CONFIGS[config].payload == "packed"
    limit = PACKED_ROUNDING if packed else ROUNDING
    with opened(store_path) as store:
        assert store.stats.segments == segments
        for _ in ("cold", "warm"):
            with ContiguousKVCache(model, prefix, store=store, config=CONFIGS[config]) as cache:
                logits = forward(model, SUFFIX.to(DEVICE), cache)
                right, wrong = (
                    PrunedReference(on_cpu, prefix, visible=visible_by_layer(cache, tokens, turned), packed=packed)
                    for turned in (False, True)
                )
                assert distance(logits, right.forward(SUFFIX)) < limit
                assert distance(logits, wrong.forward(SUFFIX)) > ANOTHER_ANSWER
                one = token_ids(1, seed=1204)
                assert distance(forward(model, one.to(DEVICE), cache), right.forward(one)) < limit
        assert_idle(store.inner.memory)


@pytest.mark.parametrize("config", PRUNED)
def test_chunks_that_are_chosen_again_answer_as_a_masked_prefix(store_path, config):
    model, on_cpu = on_device(), build("llama")
    write_prefix(model, PREFIX, store_path)
    settings = replace(CONFIGS[config], budget=0.5, reselect_every=2)
    tokens, packed = PREFIX.shape[1], settings.payload == "packed"
    with opened(store_path) as store:
        for _ in ("cold", "warm"):
            with ContiguousKVCache(model, PREFIX, store=store, config=settings) as cache:
                forward(model, SUFFIX.to(DEVICE), cache)
                visible = visible_by_layer(cache, tokens, False)
                reference = PrunedReference(on_cpu, PREFIX, visible=visible, packed=packed)
                reference.forward(SUFFIX)
                for number in range(4):
                    one = token_ids(1, seed=1250 + number)
                    found = forward(model, one.to(DEVICE), cache)
                    reference.visible = visible_by_layer(cache, tokens, False)
                    # (Of a packed prefix, noise may move a number to the next step.)
                    assert distance(found, reference.forward(one)) < (0.02 if packed else 1e-3)
                assert cache.stats.reselections == 2
            assert_idle(store.inner.memory)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("queries", [1, 9, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_whole_prefix_answers_as_a_dynamic_cache_for_any_suffix(store_path, family, dtype, queries):
    model = on_device(family, dtype)
    write_prefix(model, PREFIX, store_path)
    suffix = token_ids(queries, seed=queries).to(DEVICE)
    plain = prefilled(model, PREFIX.to(DEVICE))
    expected = forward(model, suffix, plain)
    with opened(store_path) as store:
        for _ in ("cold", "warm"):
            with ContiguousKVCache(model, PREFIX, store=store, config=CONFIGS["exact"]) as cache:
                found = forward(model, suffix, cache)
                assert distance(found, expected) < (1e-4 if dtype is torch.float32 else ROUNDING)


@pytest.mark.parametrize("padded", [False, True])
def test_rows_of_a_batch_answer_as_in_a_dynamic_cache(store_path, padded):
    model = on_device()
    write_prefix(model, PREFIX, store_path)
    suffixes = torch.cat([token_ids(9, seed=1205), token_ids(9, seed=1206)])
    if padded:
        suffixes[1, :4] = PAD
    ids = torch.cat([PREFIX.expand(2, -1), suffixes], dim=1).to(DEVICE)
    mask = (ids != PAD).long()
    expected = generate(model, ids, prefilled(model, PREFIX.to(DEVICE), rows=2), attention_mask=mask)
    with opened(store_path) as store, ContiguousKVCache(model, PREFIX, store=store, budget=1.0) as cache:
        found = generate(model, ids, cache, attention_mask=mask)
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        assert_close(ours, theirs)
    assert found.sequences.tolist() == expected.sequences.tolist()


@pytest.mark.parametrize("config", PRUNED)
def test_a_warm_request_in_bfloat16_answers_as_the_cold_one(store_path, config):
    model = on_device(dtype=torch.bfloat16)
    write_prefix(model, PREFIX, store_path)
    with opened(store_path) as store:
        cold, _ = ask(model, store, CONFIGS[config], SUFFIX.to(DEVICE))
        warm, stats = ask(model, store, CONFIGS[config], SUFFIX.to(DEVICE))
    assert stats.bytes_read == 0
    assert distance(warm, cold) < 0.01


# ---- memory ----


@pytest.mark.parametrize("config", CONFIGS)
def test_slots_in_many_blocks_hold_what_was_put_there(monkeypatch, store_path, config):
    monkeypatch.setattr(blocks, "_SMALLEST_PIECE", 8192)
    model = on_device()
    write_prefix(model, PREFIX, store_path)
    others = [token_ids(9, seed=1300 + number).to(DEVICE) for number in range(3)]
    with opened(store_path, device=150_000) as store:
        first = [ask(model, store, CONFIGS[config], suffix)[0] for suffix in others]
        again = [ask(model, store, CONFIGS[config], suffix) for suffix in others]
        for (logits, _), expected in zip(again, first, strict=True):
            assert_close(logits, expected)
        (tier,) = store.inner.memory.devices.values()
        assert max(arena.held_blocks for arena in tier._arenas.values()) > 1
        assert sum(stats.hits["device"] for _, stats in again) > 0
        assert_idle(store.inner.memory)


@pytest.mark.parametrize("budget", [0.95, 1.0])
def test_more_indices_than_a_pageable_copy_takes_at_once(store_path, budget):
    """Chunks of one token, 9,000 of them: 72 KB of indices for each layer, where a driver copies 64 KB at once."""
    config = ContiguousKVConfig.paper(budget, chunk_size=1)
    tokens = 9000
    prefix = token_ids(tokens, seed=1207)
    model, on_cpu = on_device(layers=2), build("llama", layers=2)
    geometry = ServedModel(on_cpu).geometry(1)
    chance = torch.Generator().manual_seed(1208)
    shape = (2, geometry.num_layers, geometry.kv_heads, tokens, geometry.head_dim)
    keys, values = torch.randn(shape, generator=chance) * 2
    rows = [(prefix[0].numpy(), [(k, v, 0) for k, v in zip(keys, values, strict=True)])]
    with PrefixStore(store_path) as store:
        persist_rows(rows, store.inner, model_fingerprint(on_cpu), geometry)
    with opened(store_path, 64 * MEBIBYTE, 64 * MEBIBYTE) as store:
        for tier in ("disk", "device"):
            with ContiguousKVCache(model, prefix, store=store, config=config) as cache:
                logits = forward(model, SUFFIX.to(DEVICE), cache)
                chosen = [cache.selected_chunks(layer) for layer in range(2)]
            assert cache.stats.tokens_prefilled == 0
            assert cache.stats.hits[tier] > 0
            assert_close(logits.cpu(), masked(on_cpu, keys, values, chosen), relative=1e-3, absolute=1e-4)


def masked(model: Any, keys: torch.Tensor, values: torch.Tensor, chosen: list[torch.Tensor | None]) -> torch.Tensor:
    """Logits behind given K and V `(layers, kv_heads, n, head_dim)`, of which only chosen tokens are there."""
    cache = DynamicCache(config=model.config)
    for layer, kept in enumerate(chosen):
        some = slice(None) if kept is None else kept[0].cpu()
        cache.update(keys[layer][None, :, some], values[layer][None, :, some], layer)
    tokens, queries = keys.shape[2], SUFFIX.shape[1]
    return forward(model, SUFFIX, cache, position_ids=torch.arange(tokens, tokens + queries)[None])


# ---- waits ----


@contextlib.contextmanager
def waits_counted(model: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[str]]]:
    """Between a model's first layer and its last: how often scores are fetched, and what else waits for the device."""
    found: dict[str, list[str]] = {"fetched": [], "hidden": []}
    kind = Accelerator if ON_CUDA else FakeDevice
    fetch = kind.fetch
    inside = False

    def counted(self: Any, values: torch.Tensor) -> torch.Tensor:
        if inside:
            found["fetched"].append(str(tuple(values.shape)))
        return fetch(self, values)

    def switch(on: bool) -> None:
        nonlocal inside
        inside = on
        if ON_CUDA:
            torch.cuda.set_sync_debug_mode("warn" if on else "default")

    monkeypatch.setattr(kind, "fetch", counted)
    layers = model.model.layers
    hooks = [
        layers[0].register_forward_pre_hook(lambda *_: switch(True)),
        layers[-1].register_forward_hook(lambda *_: switch(False)),
    ]
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield found
    finally:
        switch(False)
        for hook in hooks:
            hook.remove()
    found["hidden"] = [f"{one.filename}:{one.lineno}" for one in caught if "called a synchronizing" in str(one.message)]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_the_host_waits_for_the_scores_of_leaders_and_for_nothing_else(
    monkeypatch, record_property, store_path, config, warm
):
    model = on_device(dtype=torch.bfloat16)
    write_prefix(model, PREFIX, store_path)
    with opened(store_path) as store:
        ask(model, store, CONFIGS["exact"], SUFFIX.to(DEVICE))  # The first mask of each model is looked at.
    with opened(store_path) as store:
        for _ in range(warm):
            ask(model, store, CONFIGS[config], SUFFIX.to(DEVICE))
        with waits_counted(model, monkeypatch) as found:
            ask(model, store, CONFIGS[config], SUFFIX.to(DEVICE))
    record_property("waits", f"{len(found['fetched'])} of {WAITS[config]}, hidden: {len(found['hidden'])}")
    assert len(found["fetched"]) == WAITS[config]
    assert found["hidden"] == []


@ONLY_CUDA
def test_a_hidden_wait_would_be_seen(monkeypatch):
    model = on_device(dtype=torch.bfloat16)
    hook = model.model.layers[1].register_forward_hook(lambda *_: torch.ones(1, device=DEVICE).item())
    try:
        with waits_counted(model, monkeypatch) as found:
            forward(model, SUFFIX.to(DEVICE), DynamicCache())
    finally:
        hook.remove()
    assert len(found["hidden"]) == 1
