"""A packed prefix: keys in 8 bits from the index, values in 4 bits, whichever way they come to attention.

That attention then does what it should is the matter of `test_pruned.py`; here it is the same for all ways.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hf_contiguouskv import ContiguousKVConfig, IndexedKeys
from hf_contiguouskv.model.served_model import ServedModel
from hf_contiguouskv.planning import read_plan as needs
from hf_contiguouskv.store.reader import ExtentReader

from .models import full_attention_layers, token_ids
from .references import PrunedReference, assert_close, forward, visible_tokens
from .subject import ContiguousKVCache, PrefixStore, prefix_from_disk, write_prefix

pytestmark = pytest.mark.needs_library

PREFIX = token_ids(165, seed=701)
SUFFIX = token_ids(9, seed=702)
PACKED = ContiguousKVConfig(budget=0.3)
PER_LAYER = 3 * 2 * 16 * (16 // 2 + 4)
"""Bytes of the three of ten chunks that a layer uses: two heads of 16 tokens with 16 channels, one scale."""


def rounded_reference(model, cache, prefix: torch.Tensor = PREFIX) -> PrunedReference:
    layers = full_attention_layers(model)
    visible = {layer: visible_tokens(cache.selected_chunks(layer), prefix.shape[1]) for layer in layers}
    return PrunedReference(model, prefix, visible=visible, packed=True)


def chunks_alone(patch: pytest.MonkeyPatch) -> None:
    """No layer is read as a whole from now on."""
    patch.setattr(needs, "WORTH_READING_BYTES", 0)
    patch.setattr(needs, "WHOLE_LAYER_BYTES", 0)


def assert_as_rounded(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert_close(actual, expected, relative=0.01, absolute=3e-4)


def test_its_reads_are_counted(tiny_model, store_path):
    model, prefix = tiny_model("llama"), PREFIX[:, :160]
    with prefix_from_disk(model, prefix, store_path, config=PACKED) as cache:
        forward(model, SUFFIX, cache)
        assert cache.stats.bytes_used == 4 * PER_LAYER
        assert cache.stats.chunks_used == [3] * 4


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_chunks_read_alone_are_those_of_whole_layers(tiny_model, store_path, family, monkeypatch):
    model = tiny_model(family)
    with prefix_from_disk(model, PREFIX, store_path, config=PACKED) as cache:
        whole = forward(model, SUFFIX, cache)
        assert cache.stats.prefetch_hits > 0
        assert cache.stats.prefetch_wasted_bytes > 0
    chunks_alone(monkeypatch)
    with prefix_from_disk(model, PREFIX, store_path, config=PACKED) as cache:
        assert torch.equal(forward(model, SUFFIX, cache), whole)
        assert cache.stats.prefetch_hits == cache.stats.prefetch_wasted_bytes == 0


@pytest.mark.parametrize("bits", [8, 2])
def test_the_speed_of_the_disk_decides_and_answers_stay(tiny_model, store_path, bits):
    # (Of a layer that fits in some pages, nothing is spared.)
    model, prefix = tiny_model("llama"), token_ids(1205, seed=703)
    settings = ContiguousKVConfig(budget=0.1, index_bits=bits)
    write_prefix(model, prefix, store_path, config=settings)
    answers = []
    for speed, whole in ((None, True), (1e12, True), (1e5, False)):
        with PrefixStore(store_path) as store:
            store.inner.reader.totals.known = speed
            with ContiguousKVCache(model, prefix, store=store, config=settings) as cache:
                answers.append(forward(model, SUFFIX, cache))
                assert (cache.stats.prefetch_wasted_bytes > 0) == whole
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])


@pytest.mark.parametrize("whole", [True, False], ids=["whole layers", "chunks alone"])
@pytest.mark.parametrize("period", [2, 3])
def test_layers_that_share_a_selection_have_their_own_keys(tiny_model, store_path, period, whole, monkeypatch):
    if not whole:
        chunks_alone(monkeypatch)
    model = tiny_model("llama", layers=5)
    config = dataclasses.replace(PACKED, selection=IndexedKeys(period=period, subperiod=period - 1))
    with prefix_from_disk(model, PREFIX, store_path, config=config) as cache:
        logits = forward(model, SUFFIX, cache)
        assert torch.equal(cache.selected_chunks(0), cache.selected_chunks(1))
        assert_as_rounded(logits, rounded_reference(model, cache).forward(SUFFIX))


@pytest.mark.parametrize("settings", [PACKED, dataclasses.replace(PACKED, index_bits=2)], ids=["packed", "compact"])
def test_what_is_in_memory_gives_the_same_answer_and_is_not_read_again(tiny_model, store_path, settings):
    model = tiny_model("llama")
    write_prefix(model, PREFIX, store_path, config=settings)
    with PrefixStore(store_path) as store:
        answers, read = [], []
        for _ in range(3):
            with ContiguousKVCache(model, PREFIX, store=store, config=settings) as cache:
                answers.append(forward(model, SUFFIX, cache))
                read.append(cache.stats.bytes_read)
        assert torch.equal(answers[0], answers[1])
        assert torch.equal(answers[0], answers[2])
        assert read[0] > 0
        assert read[1:] == [0, 0]
        # Exact chunks are other bytes than those in few bits.
        exact = dataclasses.replace(settings, payload="exact")
        with ContiguousKVCache(model, PREFIX, store=store, config=exact) as cache:
            assert not torch.equal(forward(model, SUFFIX, cache), answers[0])
            assert cache.stats.bytes_read > 0


def test_what_nobody_selects_is_not_read_beside_what_is_in_memory(tiny_model, store_path, monkeypatch):
    """Memory that holds the selected chunks only: other chunks of their layers are not read because they are near."""
    model = tiny_model("llama")
    write_prefix(model, PREFIX, store_path)
    with PrefixStore(store_path) as store:
        with monkeypatch.context() as alone:
            chunks_alone(alone)
            with ContiguousKVCache(model, PREFIX, store=store, config=PACKED) as cache:
                first = forward(model, SUFFIX, cache)
                assert cache.stats.bytes_read > 0
        with ContiguousKVCache(model, PREFIX, store=store, config=PACKED) as cache:
            assert torch.equal(forward(model, SUFFIX, cache), first)
            assert cache.stats.bytes_read == 0


def test_small_layers_are_asked_for_together_and_give_the_same_answer(tiny_model, store_path, monkeypatch):
    """Ten layers: one ticket for their keys, and one for their values."""
    model, tickets = tiny_model("llama", layers=10), []
    write_prefix(model, PREFIX, store_path)
    submit = ExtentReader.submit
    monkeypatch.setattr(ExtentReader, "submit", lambda *args, **more: tickets.append(args[1]) or submit(*args, **more))
    with PrefixStore(store_path) as store, ContiguousKVCache(model, PREFIX, store=store, config=PACKED) as cache:
        together = forward(model, SUFFIX, cache)
        assert len(tickets) == 2
        assert cache.stats.bytes_read == store.inner.bytes_read
    tickets.clear()
    monkeypatch.setattr(needs, "TOGETHER_BYTES", 0)
    with PrefixStore(store_path) as store, ContiguousKVCache(model, PREFIX, store=store, config=PACKED) as cache:
        assert torch.equal(forward(model, SUFFIX, cache), together)
        assert len(tickets) == 2 * 10
        assert cache.stats.bytes_read == store.inner.bytes_read


def test_keys_that_a_shorter_prefix_has_read_serve_a_longer_one(tiny_model, store_path):
    """What is kept together follows from the segment, not from the prefix that is attached."""
    model = tiny_model("llama", layers=10)
    write_prefix(model, PREFIX[:, :80], store_path)
    write_prefix(model, PREFIX, store_path)
    with PrefixStore(store_path) as store:
        with ContiguousKVCache(model, PREFIX[:, :80], store=store, config=PACKED) as cache:
            forward(model, SUFFIX, cache)
            first = cache.stats.bytes_identified
            assert first > 0
        with ContiguousKVCache(model, PREFIX, store=store, config=PACKED) as cache:
            forward(model, SUFFIX, cache)
            assert 0 < cache.stats.bytes_identified < 1.5 * first, "only those of the second segment are read"


@pytest.mark.parametrize("rows", [1, 3])
def test_a_prefix_in_several_segments(tiny_model, store_path, rows):
    """Each segment has scales of its own, so it is compared with itself, through other ways, and with the exact one."""
    model, suffixes = tiny_model("llama"), token_ids(9, seed=703, rows=rows)
    write_prefix(model, PREFIX[:, :80], store_path)
    with PrefixStore(store_path) as store, ContiguousKVCache(model, PREFIX, store=store, config=PACKED) as cache:
        assert len(cache.stats.as_dict()["chunks_used"]) == 0
        together = forward(model, suffixes, cache)
        selected = cache.selected_chunks(0)
        for row in range(rows):
            with ContiguousKVCache(model, PREFIX, store=store, config=PACKED) as alone:
                assert_close(together[row : row + 1], forward(model, suffixes[row : row + 1], alone))
                assert torch.equal(alone.selected_chunks(0)[0], selected[row])
        assert set(selected.flatten().tolist()) & set(range(5))
        assert set(selected.flatten().tolist()) & set(range(5, 10))
    with prefix_from_disk(model, PREFIX, store_path.parent / "whole", config=PACKED) as cache:
        assert_close(together, forward(model, suffixes, cache), relative=0.3, absolute=0.05)


def test_the_beginning_of_a_stored_prefix(tiny_model, store_path):
    """Only its first chunks are used; its keys have the scale of all of it."""
    model = tiny_model("llama")
    write_prefix(model, PREFIX, store_path)
    with PrefixStore(store_path) as store:
        with ContiguousKVCache(model, PREFIX[:, :100], store=store, config=PACKED) as cache:
            logits = forward(model, SUFFIX, cache)
            assert cache.stats.tokens_prefilled == 0
            reference = rounded_reference(model, cache, PREFIX[:, :100])
        assert_close(logits, reference.forward(SUFFIX), relative=0.1, absolute=0.01)


def test_a_store_of_before_is_served_exactly(tiny_model, store_path, monkeypatch):
    """Segments without packed values: version 1 of the format."""
    model, of_now = tiny_model("llama"), ServedModel.geometry
    monkeypatch.setattr(ServedModel, "geometry", lambda *about: dataclasses.replace(of_now(*about), packed_layers=()))
    write_prefix(model, PREFIX, store_path)
    monkeypatch.undo()
    exact = dataclasses.replace(PACKED, payload="exact")
    with PrefixStore(store_path) as store:
        with ContiguousKVCache(model, PREFIX, store=store, config=PACKED) as cache:
            assert cache.stats.tokens_prefilled == 0
            logits = forward(model, SUFFIX, cache)
        with ContiguousKVCache(model, PREFIX, store=store, config=exact) as cache:
            assert torch.equal(forward(model, SUFFIX, cache), logits)


def test_the_whole_budget_is_exact(tiny_model, store_path):
    model = tiny_model("llama")
    with prefix_from_disk(model, PREFIX, store_path, config=ContiguousKVConfig(budget=1.0)) as cache:
        logits = forward(model, SUFFIX, cache)
    exact = PrunedReference(model, PREFIX, visible={})
    assert_close(logits, exact.forward(SUFFIX))


def test_an_exact_payload_of_a_packed_prefix_is_exact(tiny_model, store_path):
    model = tiny_model("llama")
    config = dataclasses.replace(PACKED, payload="exact")
    with prefix_from_disk(model, PREFIX, store_path, config=config) as cache:
        logits = forward(model, SUFFIX, cache)
        visible = {layer: visible_tokens(cache.selected_chunks(layer), 165) for layer in range(4)}
        assert_close(logits, PrunedReference(model, PREFIX, visible=visible).forward(SUFFIX))
