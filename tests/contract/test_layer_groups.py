"""Layers whose chunks lie side by side in the file: the same answers, in fewer reads."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from unit.fake_device import EARLY, LATE, SCHEDULES, accelerated

from hf_contiguouskv import AttentionMass, ContiguousKVConfig
from hf_contiguouskv.errors import ConfigError
from hf_contiguouskv.store.local_disk import FileBlob

from .device_helpers import MEBIBYTE, assert_idle, opened
from .models import token_ids
from .references import assert_close, assert_same_generation, forward, generate
from .subject import ContiguousKVCache, PrefixStore, prefix_from_disk, write_prefix
from .test_recovery import damage, files

pytestmark = pytest.mark.needs_library

PREFIX = token_ids(325, seed=3101)
SUFFIX = token_ids(9, seed=3102)
LAYERS = 5
# Of the tiny models' K and V, one chunk of one layer: 2 heads of 16 channels in float32.
EXTENT = 2 * 2 * 16 * 16 * 4


def published(period: int, group: int, budget: float = 0.3, subperiod: int = 0) -> ContiguousKVConfig:
    rule = AttentionMass(period=period, subperiod=subperiod)
    return ContiguousKVConfig.paper(budget, selection=rule, layers_per_group=group)


def apart(config: ContiguousKVConfig) -> ContiguousKVConfig:
    return dataclasses.replace(config, layers_per_group=1)


class Reads:
    """Reads of the one segment file of a store that is opened from now on, each as the places in the file that it
    brings."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.offsets: list[list[int]] = []
        read_into = FileBlob.read_into

        def noting(blob: FileBlob, extents: Sequence[tuple[int, memoryview]]) -> int:
            self.offsets.append([offset for offset, _ in extents])
            return read_into(blob, extents)

        monkeypatch.setattr(FileBlob, "read_into", noting)

    def of_chunks(self, cache: Any) -> list[list[str]]:
        """The exact chunks that each read of chunks brought, in words."""
        (span,) = cache.session.request.prefix.spans
        words = ([span.segment.describe(offset) for offset in offsets] for offsets in self.offsets)
        return [names for names in words if all(name.startswith("layer ") for name in names)]


@pytest.mark.parametrize("budget", [0.3, 1.0])
@pytest.mark.parametrize(("period", "group"), [(2, 2), (3, 2), (2, 3), (5, 5), (3, 64)])
def test_answers_are_those_of_layers_that_lie_apart(tiny_model, store_path, period, group, budget):
    model, config = tiny_model("llama", layers=LAYERS), published(period, group, budget)
    with prefix_from_disk(model, PREFIX, store_path / "apart", config=apart(config)) as cache:
        expected = forward(model, SUFFIX, cache)
        bytes_used = cache.stats.bytes_used
    with prefix_from_disk(model, PREFIX, store_path / "groups", config=config) as cache:
        assert cache.session.request.prefix.geometry.layers_per_group == min(group, LAYERS)
        assert torch.equal(forward(model, SUFFIX, cache), expected)
        assert cache.stats.bytes_used == bytes_used
        assert cache.stats.hits["disk"] > 0


@pytest.mark.parametrize("family", ["gemma3", "gpt-neox", "qwen3"])
@pytest.mark.parametrize("config", [published(2, 2), published(2, 4, 1.0), ContiguousKVConfig(layers_per_group=3)])
def test_other_models_and_forms_generate_alike(tiny_model, store_path, family, config):
    model, ids = tiny_model(family), torch.cat([PREFIX, SUFFIX], dim=1)
    with prefix_from_disk(model, PREFIX, store_path / "apart", config=apart(config)) as cache:
        expected = generate(model, ids, cache)
    with prefix_from_disk(model, PREFIX, store_path / "groups", config=config) as cache:
        assert_same_generation(generate(model, ids, cache), expected)
    write_prefix(model, PREFIX, store_path / "written", config=config)
    with (
        PrefixStore(store_path / "written") as store,
        ContiguousKVCache(model, PREFIX, store=store, config=config) as cache,
    ):
        assert cache.stats.tokens_prefilled == 0
        assert_same_generation(generate(model, ids, cache), expected)


def test_one_read_brings_a_chunk_for_its_whole_period(tiny_model, store_path, monkeypatch):
    # (Nothing is read ahead of the choice in a period of all layers.)
    model, config = tiny_model("llama", layers=4), published(4, 4, budget=0.2)
    reads = Reads(monkeypatch)
    with prefix_from_disk(model, PREFIX, store_path, config=config) as cache:
        reads.offsets.clear()  # (Of the cache that wrote it.)
        forward(model, SUFFIX, cache)
        chunks = [*cache.selected_chunks(0)[0].tolist(), 20]
        found = reads.of_chunks(cache)
    assert sum(map(len, found)) == 4 * len(chunks)
    # Each chunk with all four of its layers in one read; neighbours with each other.
    runs = 1 + sum(after - before != 1 for before, after in itertools.pairwise(chunks))
    assert len(found) == runs < len(chunks) * 4
    for names in found:
        assert len(names) % 4 == 0
    for offsets in reads.offsets:
        assert offsets == sorted(offsets)


def test_a_whole_prefix_is_read_group_by_group(tiny_model, store_path, monkeypatch):
    model, config = tiny_model("llama", layers=LAYERS), published(2, 2, budget=1.0)
    write_prefix(model, PREFIX, store_path, config=config)
    with PrefixStore(store_path) as store:
        reads = Reads(monkeypatch)
        with ContiguousKVCache(model, PREFIX, store=store, config=config) as cache:
            forward(model, SUFFIX, cache)
            assert cache.stats.hits["disk"] == LAYERS * 21
            found = reads.of_chunks(cache)
    # 21 chunks of two layers are less than 1 MiB: a group is one read.
    assert len(found) == 3


def test_what_was_read_ahead_for_the_next_period_is_not_read_again(tiny_model, store_path, monkeypatch):
    model, config = tiny_model("llama", layers=4), published(2, 2, budget=0.3, subperiod=1)
    reads = Reads(monkeypatch)
    with prefix_from_disk(model, PREFIX, store_path, config=config) as cache:
        reads.offsets.clear()  # (Of the cache that wrote it.)
        forward(model, SUFFIX, cache)
        assert cache.stats.prefetch_hits > 0
        assert not torch.equal(cache.selected_chunks(0), cache.selected_chunks(2)), (
            "another choice, so some are missing"
        )
        read = [name for names in reads.of_chunks(cache) for name in names]
        assert len(read) == len(set(read)), "none twice"
        used = {
            f"layer {layer}, chunk {chunk}"
            for layer in range(4)
            for chunk in [*cache.selected_chunks(layer)[0].tolist(), 20]
        }
        assert used < set(read), "what was read ahead and not chosen, too"


def test_a_chain_may_have_segments_of_both_layouts(tiny_model, store_path):
    model, config = tiny_model("llama", layers=LAYERS), published(2, 2)
    with PrefixStore(store_path / "both") as store:
        for end, group in ((100, 1), (213, 2), (325, 3)):
            part = dataclasses.replace(config, layers_per_group=group)
            ContiguousKVCache(model, PREFIX[:, :end], store=store, config=part).close()
        for budget in (0.3, 1.0):
            config = dataclasses.replace(config, budget=budget)
            with ContiguousKVCache(model, PREFIX, store=store, config=config) as cache:
                spans = cache.session.request.prefix.spans
                assert [span.segment.geometry.layers_per_group for span in spans] == [1, 2, 3]
                logits = forward(model, SUFFIX, cache)
            with prefix_from_disk(model, PREFIX, store_path / f"{budget}", config=apart(config)) as cache:
                assert_close(logits, forward(model, SUFFIX, cache))


@pytest.mark.parametrize("budget", [0.3, 1.0])
@pytest.mark.parametrize("limit", [0, 3 * EXTENT, 40 * EXTENT])
def test_little_memory_changes_no_answer(tiny_model, store_path, limit, budget):
    model, config = tiny_model("llama", layers=LAYERS), published(2, 2, budget)
    write_prefix(model, PREFIX, store_path, config=config)
    found = []
    for host_bytes in (4 * MEBIBYTE, limit):
        with PrefixStore(store_path, host_bytes=host_bytes) as store:
            for _ in range(3):
                with ContiguousKVCache(model, PREFIX, store=store, config=config) as cache:
                    found.append(forward(model, SUFFIX, cache))
    assert all(torch.equal(found[0], one) for one in found)


@pytest.mark.parametrize("budget", [0.3, 1.0])
@pytest.mark.parametrize("layer", [2, 3])
def test_damage_in_mid_request_is_computed_again(tiny_model, store_path, budget, layer):
    model, config = tiny_model("llama", layers=LAYERS), published(2, 2, budget)
    with prefix_from_disk(model, PREFIX, store_path, config=config) as cache:
        expected = forward(model, SUFFIX, cache)
        selected = cache.selected_chunks(layer)
    chunk = 7 if selected is None else int(selected[0, 1])
    (path,) = files(store_path).values()
    damage(path, "payload.1", (2 * chunk + layer - 2) * EXTENT + 5)
    with PrefixStore(store_path) as store:
        with ContiguousKVCache(model, PREFIX, store=store, config=config) as cache:
            assert_close(forward(model, SUFFIX, cache), expected)
        assert store.stats.recovered == 1
        with ContiguousKVCache(model, PREFIX, store=store, config=config) as cache:
            assert cache.session.request.prefix.geometry.layers_per_group == 2, "it is stored as it was asked for"
            assert_close(forward(model, SUFFIX, cache), expected)
        assert store.stats.recovered == 1


def test_a_period_of_several_groups_reads_each_group_together(tiny_model, store_path, monkeypatch):
    model, config = tiny_model("llama", layers=4), published(4, 2, budget=0.2)
    reads = Reads(monkeypatch)
    with prefix_from_disk(model, PREFIX, store_path, config=config) as cache:
        reads.offsets.clear()
        forward(model, SUFFIX, cache)
        found = reads.of_chunks(cache)
    layers = {frozenset(name.split(",")[0] for name in names) for names in found}
    assert layers == {frozenset({"layer 0", "layer 1"}), frozenset({"layer 2", "layer 3"})}


def test_rows_resets_and_copies_answer_as_with_layers_apart(tiny_model, store_path):
    model, suffixes = tiny_model("llama", layers=LAYERS), token_ids(9, seed=3103, rows=3)
    more = token_ids(2, seed=3104, rows=3)
    answers = []
    for config in (published(2, 2), apart(published(2, 2))):
        place = store_path / str(config.layers_per_group)
        with prefix_from_disk(model, PREFIX, place, config=config) as cache:
            found = [forward(model, suffixes, cache)]
            with copy.deepcopy(cache) as twin:
                found.append(forward(model, more, twin))
            found.append(forward(model, more, cache))
            cache.reset()
            found.append(forward(model, SUFFIX, cache))
            answers.append(found)
    assert all(torch.equal(one, other) for one, other in zip(*answers, strict=True))


def test_choosing_again_answers_as_with_layers_apart(tiny_model, store_path):
    model, ids = tiny_model("llama", layers=LAYERS), torch.cat([PREFIX, SUFFIX], dim=1)
    config = dataclasses.replace(published(2, 2), reselect_every=3)
    with prefix_from_disk(model, PREFIX, store_path / "apart", config=apart(config)) as cache:
        expected = generate(model, ids, cache)
    with prefix_from_disk(model, PREFIX, store_path / "groups", config=config) as cache:
        assert_same_generation(generate(model, ids, cache), expected)
        assert cache.stats.reselections > 0


@pytest.mark.parametrize("budget", [0.3, 1.0])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_an_accelerator_answers_alike(tiny_model, store_path, schedule, budget, monkeypatch):
    model, config = tiny_model("llama", layers=LAYERS), published(2, 2, budget, subperiod=1)
    with prefix_from_disk(model, PREFIX, store_path, config=config) as cache:
        expected = forward(model, SUFFIX, cache)
    reads = Reads(monkeypatch)
    with accelerated(schedule), opened(store_path, device=16 * MEBIBYTE) as store:
        for number in range(2):
            with ContiguousKVCache(model, PREFIX, store=store, config=config) as cache:
                assert torch.equal(forward(model, SUFFIX, cache), expected)
                found = reads.of_chunks(cache)
            assert_idle(store.inner.memory)
            if number == 0:
                layers = [{name.split(",")[0] for name in names} for names in found]
                assert any(len(some) == 2 for some in layers), "layers are read together"
                assert budget < 1.0 or len(found) == 3
            else:
                assert not found, "all of it is in memory"
            reads.offsets.clear()


@pytest.mark.parametrize("schedule", [LATE, EARLY, 4], ids=str)
@pytest.mark.parametrize(("device", "host"), [(0, 0), (5000, 100_000), (60_000, 5000), (10 * EXTENT, 30 * EXTENT)])
@pytest.mark.parametrize("budget", [0.3, 1.0])
def test_the_smallest_memory_of_an_accelerator_still_answers(tiny_model, store_path, device, host, schedule, budget):
    model, config = tiny_model("llama", layers=LAYERS), published(2, 2, budget)
    with prefix_from_disk(model, PREFIX, store_path, config=config) as cache:
        expected = forward(model, SUFFIX, cache)
    with accelerated(schedule), PrefixStore(store_path, host_bytes=host, device_bytes=device) as store:
        for _ in range(2):
            with ContiguousKVCache(model, PREFIX, store=store, config=config) as cache:
                assert_close(forward(model, SUFFIX, cache), expected)
            assert_idle(store.inner.memory)


def test_a_prefix_is_found_whichever_layout_is_asked_for(tiny_model, store_path):
    model: Any = tiny_model("llama", layers=LAYERS)
    write_prefix(model, PREFIX, store_path, config=published(2, 2))
    with PrefixStore(store_path) as store:
        for group in (1, 4):
            with ContiguousKVCache(model, PREFIX, store=store, config=published(2, group)) as cache:
                assert cache.stats.tokens_prefilled == 0
                assert cache.session.request.prefix.geometry.layers_per_group == 2


@pytest.mark.parametrize("group", [0, -1, 4097, 2.0, True, "all"])
def test_a_group_of_impossible_size_is_refused(group):
    with pytest.raises(ConfigError, match="layers_per_group must be a whole number"):
        ContiguousKVConfig(layers_per_group=group)
