"""A request is answered whatever its storage does: damage is computed again, what cannot be written stays in memory."""

from __future__ import annotations

import copy
import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from hf_contiguouskv import ContiguousKVConfig, ReadOptions
from hf_contiguouskv.errors import SegmentCorruptError, StoreClosedError
from hf_contiguouskv.model.fingerprint import model_fingerprint
from hf_contiguouskv.prefill.segment_feed import SegmentFeed
from hf_contiguouskv.store import KVGeometry
from hf_contiguouskv.store.local_disk import FileBlob, FileBlobWriter
from hf_contiguouskv.store.memory_backend import MemoryBlob
from hf_contiguouskv.store.segment import Segment

from .models import token_ids
from .references import assert_close, assert_same_generation, forward, generate, prefilled
from .subject import ContiguousKVCache, PrefixStore, prefix_from_disk, write_prefix

pytestmark = pytest.mark.needs_library

PREFIX = token_ids(83, seed=811)
LONGER = torch.cat([PREFIX, token_ids(60, seed=812)], dim=1)
SUFFIX = token_ids(6, seed=813)


def asked(prefix: torch.Tensor) -> torch.Tensor:
    return torch.cat([prefix, SUFFIX], dim=1)


def answer(model, ids, cache, **options):
    return generate(model, ids, cache, tokens=4, **options)


def exact(model, ids, **options):
    return answer(model, ids, DynamicCache(config=model.config), **options)


def damage(path: Path, tensor: str, at: int = 3) -> None:
    with closing(Segment(FileBlob(path))) as segment:
        offset, _ = segment.tensor_extent(tensor)
    with path.open("r+b") as raw:
        raw.seek(offset + at)
        byte = raw.read(1)[0]
        raw.seek(offset + at)
        raw.write(bytes([byte ^ 0x40]))


def files(store_path: Path) -> dict[int, Path]:
    """First chunk of each stored segment, and its file."""
    found = {}
    for path in store_path.glob("segments/*/*.safetensors"):
        with closing(Segment(FileBlob(path))) as segment:
            found[segment.first_chunk] = path
    return found


@pytest.fixture
def chain(tiny_model, store_path: Path) -> Callable[[str], object]:
    """A model whose prefix lies in three segments: chunks 0 to 5, 5 to 9 and 8 on."""

    def stored(family: str = "llama"):
        model = tiny_model(family)
        with PrefixStore(store_path) as store:
            for length in (83, 110, 143):
                ContiguousKVCache(model, LONGER[:, :length], store=store).close()
            assert sorted(files(store_path)) == [0, 5, 6]
        return model

    return stored


# ---- damage ----


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("broken", [(0,), (5,), (6,), (0, 5), (0, 5, 6)])
def test_damage_anywhere_in_a_chain_of_segments_is_repaired_there(chain, store_path, family, broken):
    model = chain(family)
    for first in broken:
        damage(files(store_path)[first], "payload.1")
    with PrefixStore(store_path) as store:
        for _ in range(2):
            with ContiguousKVCache(model, LONGER, store=store, budget=1.0) as cache:
                assert_same_generation(answer(model, asked(LONGER), cache), exact(model, asked(LONGER)))
        assert store.stats.quarantined == len(broken)
        assert store.verify() == []
        # Only what was lost is written again (neighbours in one piece): the others are used again.
        assert store.stats.published <= len(broken)
        assert sum(entry.chunks for entry in store.entries()) <= 6 + 2 + 3
        assert cache.stats.tokens_from_store == 143


@pytest.mark.parametrize("mode", ["explicit", "automatic"])
def test_every_layer_may_be_the_one_that_shows_the_damage(tiny_model, tmp_path, mode):
    model = tiny_model("llama", layers=4)
    for layer in range(4):
        path = tmp_path / str(layer)
        write_prefix(model, PREFIX, path)
        (file,) = path.rglob("*.safetensors")
        damage(file, f"payload.{layer}", at=4 * 4096 + 3)
        with PrefixStore(path) as store:
            ids = PREFIX if mode == "explicit" else None
            cache = ContiguousKVCache(model, ids, store=store, budget=1.0)
            assert_same_generation(answer(model, asked(PREFIX), cache), exact(model, asked(PREFIX)))
            assert store.stats.recovered == 1


def test_a_batch_beams_and_assisted_decoding_go_on_as_well(tiny_model, tmp_path):
    model, assistant = tiny_model("llama"), tiny_model("llama", layers=1)
    ids = asked(PREFIX)
    calls = {
        "beams": {"num_beams": 3},
        "assisted": {"assistant_model": assistant},
        "batch": {},
    }
    for name, options in calls.items():
        write_prefix(model, PREFIX, tmp_path / name)
        (file,) = (tmp_path / name).rglob("*.safetensors")
        damage(file, "payload.2")
        rows = torch.cat([ids, torch.cat([PREFIX, token_ids(6, seed=814)], dim=1)]) if name == "batch" else ids
        with PrefixStore(tmp_path / name) as store:
            cache = ContiguousKVCache(model, PREFIX, store=store, budget=1.0)
            out = answer(model, rows, cache, **options)
            assert store.stats.recovered == 1
        expected = answer(model, rows, DynamicCache(config=model.config), **options)
        assert out.sequences.tolist() == expected.sequences.tolist()


def test_pruned_requests_select_the_same_chunks_after_a_repair(tiny_model, tmp_path):
    model = tiny_model("llama", layers=10)
    packed = 2 * 16 * (16 // 2 + 4)
    for config, tensor, extent in (
        (ContiguousKVConfig(budget=0.4), "values4", packed),
        (ContiguousKVConfig.paper(0.4), "payload", 4096),
    ):
        write_prefix(model, PREFIX, tmp_path / str(config.selection.period))
        with PrefixStore(tmp_path / str(config.selection.period)) as store:
            sound = ContiguousKVCache(model, PREFIX, store=store, config=config)
            expected = forward(model, SUFFIX, sound)
            selected = [sound.selected_chunks(layer).tolist() for layer in range(10)]
        (file,) = (tmp_path / str(config.selection.period)).rglob("*.safetensors")
        for layer in (1, 4, 9):
            for chunk in range(5):
                damage(file, f"{tensor}.{layer}", at=chunk * extent + 3)
        with PrefixStore(tmp_path / str(config.selection.period)) as store:
            cache = ContiguousKVCache(model, PREFIX, store=store, config=config)
            assert_close(forward(model, SUFFIX, cache), expected)
            assert [cache.selected_chunks(layer).tolist() for layer in range(10)] == selected
            assert store.stats.recovered == 1


def test_damage_after_the_cache_was_made_is_met_by_each_of_its_copies(tiny_model, store_path):
    model = tiny_model("llama")
    write_prefix(model, PREFIX, store_path)
    with PrefixStore(store_path, host_bytes=0) as store:
        cache = ContiguousKVCache(model, PREFIX, store=store, budget=1.0)
        assert_same_generation(answer(model, asked(PREFIX), cache), exact(model, asked(PREFIX)))
        cache.reset()
        (file,) = files(store_path).values()
        damage(file, "payload.0")
        for one in (copy.deepcopy(cache), cache, copy.deepcopy(cache)):
            one.reset()
            assert_same_generation(answer(model, asked(PREFIX), one), exact(model, asked(PREFIX)))
        assert store.verify() == []


def test_the_last_resort_does_without_the_disk(tiny_model, store_path, monkeypatch):
    model = tiny_model("llama")
    write_prefix(model, PREFIX, store_path)
    real = FileBlob.read_into

    def fail(blob, extents):
        # Headers can be read, so that everything looks well until the payload is wanted.
        if any(offset >= 16384 for offset, _ in extents):
            raise OSError(errno.EIO, "Input/output error")
        return real(blob, extents)

    monkeypatch.setattr(FileBlob, "read_into", fail)
    for ids in (PREFIX, None):
        with PrefixStore(store_path) as store:
            cache = ContiguousKVCache(model, ids, store=store, budget=1.0)
            for _ in range(2):
                assert_same_generation(answer(model, asked(PREFIX), cache), exact(model, asked(PREFIX)))
                cache.reset()


def test_a_model_in_training_mode_cannot_repair_what_it_computed_without_dropout(tiny_model, store_path):
    model = copy.deepcopy(tiny_model("llama"))
    write_prefix(model, PREFIX, store_path)
    with PrefixStore(store_path, host_bytes=0) as store:
        cache = ContiguousKVCache(model, PREFIX, store=store, budget=1.0)
        (file,) = files(store_path).values()
        damage(file, "payload.3")
        cache.reset()
        model.train()
        with pytest.raises(SegmentCorruptError):
            forward(model, SUFFIX, cache)
        assert store.verify() == []  # Out of service all the same.
        model.eval()
        cache.reset()
        assert_close(forward(model, SUFFIX, cache), forward(model, SUFFIX, prefilled(model, PREFIX)))


def test_a_repair_under_autocast_stores_what_the_model_computes_without_it(tiny_model, store_path):
    model = tiny_model("llama")
    write_prefix(model, PREFIX, store_path)
    with PrefixStore(store_path, host_bytes=0) as store:
        cache = ContiguousKVCache(model, PREFIX, store=store, budget=1.0)
        (file,) = files(store_path).values()
        damage(file, "payload.1")
        cache.reset()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            forward(model, SUFFIX, cache)
        assert store.stats.recovered == 1
        cache.close()
        cache = ContiguousKVCache(model, PREFIX, store=store, budget=1.0)
        assert cache.stats.tokens_from_store == 83
        assert_close(forward(model, SUFFIX, cache), forward(model, SUFFIX, prefilled(model, PREFIX)))
        assert store.verify() == []


def test_threads_that_meet_the_same_damage_all_answer_rightly(tiny_model, store_path):
    model = tiny_model("llama")
    write_prefix(model, PREFIX, store_path)
    (file,) = files(store_path).values()
    damage(file, "payload.2")
    expected = forward(model, SUFFIX, prefilled(model, PREFIX))
    results: list[object] = []
    with PrefixStore(store_path) as store:
        caches = [ContiguousKVCache(model, PREFIX, store=store, budget=1.0) for _ in range(4)]

        def work(cache) -> None:
            try:
                results.append(forward(model, SUFFIX, cache))
            except BaseException as error:
                results.append(error)

        threads = [threading.Thread(target=work, args=(cache,)) for cache in caches]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for logits in results:
            assert isinstance(logits, torch.Tensor), logits
            assert_close(logits, expected)
        assert len(results) == 4
        assert store.verify() == []


# ---- writing fails ----


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def broken(*_: object, **__: object) -> None:
    raise OSError(errno.EIO, "Input/output error")


WRITE_FAILURES = {
    "no room to begin": lambda patch: patch.setattr(os, "posix_fallocate", full),
    "while chunks are written": lambda patch: patch.setattr(FileBlobWriter, "write", broken),
    "when it is made durable": lambda patch: patch.setattr(FileBlobWriter, "seal", broken),
    "when it is published": lambda patch: patch.setattr(FileBlobWriter, "publish", full),
}


@pytest.fixture(params=sorted(WRITE_FAILURES))
def failing_writes(request, monkeypatch) -> Iterator[None]:
    WRITE_FAILURES[request.param](monkeypatch)
    yield
    monkeypatch.undo()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_what_cannot_be_written_is_answered_from_memory(tiny_model, store_path, caplog, failing_writes, family):
    model = tiny_model(family)
    with PrefixStore(store_path) as store:
        cache = ContiguousKVCache(model, PREFIX, store=store, budget=1.0)
        for _ in range(2):
            assert_same_generation(answer(model, asked(PREFIX), cache), exact(model, asked(PREFIX)))
            cache.reset()
        assert isinstance(cache.session.held.slot.whole.spans[0].segment.blob, MemoryBlob)
        assert store.stats.write_failures == 1
        assert "could not be stored" in caplog.text
        assert store.entries() == []
        assert not list(store_path.glob("partial/*"))


def test_an_automatic_prompt_that_cannot_be_written_is_counted(tiny_model, store_path, caplog, failing_writes):
    model = tiny_model("llama")
    with PrefixStore(store_path) as store:
        for _ in range(2):
            cache = ContiguousKVCache(model, store=store)
            assert_same_generation(answer(model, asked(PREFIX), cache), exact(model, asked(PREFIX)))
            store.flush()
        assert store.stats.write_failures == 2
        assert store.inner.background_failures == 0
        assert store.entries() == []


def test_a_prefix_may_begin_on_disk_and_end_in_memory(tiny_model, store_path, monkeypatch):
    model = tiny_model("llama")
    write_prefix(model, PREFIX, store_path)
    monkeypatch.setattr(os, "posix_fallocate", full)
    for config in (ContiguousKVConfig(budget=1.0), ContiguousKVConfig(budget=0.5), ContiguousKVConfig.paper(0.5)):
        with PrefixStore(store_path) as store:
            with ContiguousKVCache(model, LONGER, store=store, config=config) as cache:
                found = forward(model, SUFFIX, cache)
                assert cache.stats.tokens_from_store == 83
                assert cache.stats.tokens_prefilled == 60
            monkeypatch.undo()
            with PrefixStore(store_path.with_name(f"sound-{config.selection.period}-{config.budget}")) as sound:
                with ContiguousKVCache(model, PREFIX, store=sound):
                    pass
                with ContiguousKVCache(model, LONGER, store=sound, config=config) as cache:
                    assert_close(found, forward(model, SUFFIX, cache))
            monkeypatch.setattr(os, "posix_fallocate", full)


def test_a_prefix_that_does_not_fit_in_the_bound_is_answered_from_memory(tiny_model, store_path):
    model = tiny_model("llama")
    with PrefixStore(store_path, max_disk_bytes=10_000) as store:
        with ContiguousKVCache(model, PREFIX, store=store, budget=1.0) as cache:
            assert_same_generation(answer(model, asked(PREFIX), cache), exact(model, asked(PREFIX)))
        assert store.stats.write_failures == 1
        assert store.stats.segment_bytes == 0


def test_a_parent_that_goes_while_its_child_is_computed_costs_only_the_storing(tiny_model, store_path, monkeypatch):
    model = tiny_model("llama")
    write_prefix(model, PREFIX, store_path)
    with PrefixStore(store_path) as store:
        real = store.inner.begin_segment

        def begin_and_delete(*arguments):
            writer = real(*arguments)
            store.delete(store.entries()[0].key)
            return writer

        monkeypatch.setattr(store.inner, "begin_segment", begin_and_delete)
        cache = ContiguousKVCache(model, LONGER, store=store, budget=1.0)
        assert_same_generation(answer(model, asked(LONGER), cache), exact(model, asked(LONGER)))
        assert store.stats.write_failures == 1
        assert cache.stats.tokens_from_store == 83


def test_a_closed_store_is_a_mistake_and_not_a_failure_of_storage(tiny_model, store_path):
    model = tiny_model("llama")
    store = PrefixStore(store_path)
    store.close()
    with pytest.raises(StoreClosedError):
        ContiguousKVCache(model, PREFIX, store=store)


# ---- conversations ----


def test_a_conversation_of_ten_turns_stores_each_token_once(tiny_model, store_path):
    model = tiny_model("llama")
    turns = [token_ids(17 + 5 * turn, seed=820 + turn) for turn in range(10)]
    with PrefixStore(store_path) as store:
        for turn in range(1, 11):
            said = torch.cat(turns[:turn], dim=1)
            with ContiguousKVCache(model, said, store=store, budget=1.0) as cache:
                assert_same_generation(answer(model, asked(said), cache), exact(model, asked(said)))
                assert cache.stats.tokens_from_store == said.shape[1] - turns[turn - 1].shape[1]
        entries = store.entries()
        assert len(entries) == 10
        # A turn that ends inside a chunk leaves that chunk to the next turn, which stores it whole: nothing else twice.
        total, begun = sum(turn.shape[1] for turn in turns), 0
        for turn, entry in zip(turns, entries, strict=True):
            end = begun + turn.shape[1]
            assert (entry.tokens, entry.chunks) == (end, -(-end // 16) - begun // 16)
            begun = end
        assert sum(entry.chunks for entry in entries) <= -(-total // 16) + 9
        leaf = entries[-1].key
        for entry in entries[:-1]:
            with pytest.raises(Exception, match=entry.key):
                store.delete(entry.key)
        assert store.delete(leaf) == [leaf]
        with ContiguousKVCache(model, torch.cat(turns, dim=1), store=store, budget=1.0) as cache:
            assert cache.stats.tokens_prefilled == turns[-1].shape[1]


def test_a_turn_that_fits_in_a_chunk_is_replaced_by_the_next_one_that_fills_it(tiny_model, store_path):
    model = tiny_model("llama")
    with PrefixStore(store_path) as store:
        for length in (83, 86, 90, 96, 97):
            ContiguousKVCache(model, LONGER[:, :length], store=store).close()
        # 83 holds chunks 0 to 5. Of 86, 90 and 96 only the last one is needed: it holds their only chunk whole.
        assert [entry.tokens for entry in store.entries()] == [83, 96, 97]
        for length in (83, 86, 90, 96, 97):
            assert store.match(model, LONGER[:, :length]) == length
        store.pin(store.entries()[2].key)
        ContiguousKVCache(model, LONGER[:, :100], store=store).close()
        assert [entry.tokens for entry in store.entries()] == [83, 96, 97, 100]


@pytest.mark.parametrize(
    "wrong",
    [{"num_layers": 1}, {"num_layers": 5}, {"kv_heads": 1}, {"head_dim": 8}, {"dtype": torch.bfloat16}],
    ids=lambda wrong: next(iter(wrong)),
)
@pytest.mark.parametrize("mode", ["explicit", "automatic"])
def test_a_segment_that_claims_to_be_this_models_but_has_another_shape_is_refused(tiny_model, store_path, mode, wrong):
    model = tiny_model("llama")
    fields = {"num_layers": 4, "kv_heads": 2, "head_dim": 16, "dtype": torch.float32, "chunk_size": 16}
    geometry = KVGeometry(**(fields | wrong))
    ids = PREFIX[0].numpy()
    with PrefixStore(store_path) as store:
        with store.inner.begin_segment(model_fingerprint(model), geometry, ids) as writer:
            shape = (6, 2, geometry.kv_heads, 16, geometry.head_dim)
            for layer in range(geometry.num_layers):
                writer.write_chunks(layer, 0, torch.zeros(shape, dtype=geometry.dtype))
            writer.commit()
        cache = ContiguousKVCache(model, PREFIX if mode == "explicit" else None, store=store, budget=1.0)
        assert_same_generation(answer(model, asked(PREFIX), cache), exact(model, asked(PREFIX)))
        assert store.stats.quarantined == 1
        store.flush()
        assert store.match(model, PREFIX) == 83


def test_a_chain_of_different_layouts_is_read_as_each_segment_lies(tiny_model, store_path):
    model = tiny_model("llama")
    with PrefixStore(store_path) as sound, ContiguousKVCache(model, LONGER, store=sound, budget=1.0) as cache:
        expected = forward(model, SUFFIX, cache)
    made = prefilled(model, LONGER)
    with PrefixStore(store_path.with_name("mixed")) as store:
        geometry = KVGeometry(4, 2, 16, torch.float32, 16)
        for first, end, group in ((0, 64, 1), (4, 143, 2)):
            ids, grouped = LONGER[0, :end].numpy(), replace(geometry, layers_per_group=group)
            with store.inner.begin_segment(model_fingerprint(model), grouped, ids, first) as writer:
                feed = SegmentFeed(writer, first, end)
                for layer, states in enumerate(made.layers):
                    feed.feed(layer, states.keys[0, :, :end], states.values[0, :, :end], 0)
                writer.commit()
        for verify in (True, False):
            with ContiguousKVCache(model, LONGER, store=store, budget=1.0, reading=ReadOptions(verify=verify)) as cache:
                assert cache.stats.tokens_from_store == 143
                assert_close(forward(model, SUFFIX, cache), expected)
        assert store.stats.quarantined == 0


def test_what_was_read_without_a_check_is_not_kept_for_those_who_check(tiny_model, store_path):
    model = tiny_model("llama")
    write_prefix(model, PREFIX, store_path)
    with prefix_from_disk(model, PREFIX, store_path.with_name("sound"), budget=0.3) as cache:
        expected = forward(model, SUFFIX, cache)
    (file,) = files(store_path).values()
    for at in range(0, 4096, 8):
        damage(file, "key_index.0", at=at)
    with PrefixStore(store_path) as store:
        with ContiguousKVCache(model, PREFIX, store=store, budget=0.3, reading=ReadOptions(verify=False)) as cache:
            forward(model, SUFFIX, cache)
        with ContiguousKVCache(model, PREFIX, store=store, budget=0.3) as cache:
            assert_close(forward(model, SUFFIX, cache), expected)
        assert store.stats.quarantined == 1
