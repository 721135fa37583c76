"""A request returns all the memory that it had, however it ends, and is written in the books once, after its answer."""

from __future__ import annotations

import copy
import dataclasses
import gc

import pytest
import torch

from hf_contiguouskv import ContiguousKVConfig, ReadOptions
from hf_contiguouskv.errors import StoreClosedError
from hf_contiguouskv.planning.read_plan import chunks_kept

from .memory_helpers import CHUNK_BYTES, LAYERS, POLICIES, ask, assert_nothing_in_use, assert_nothing_in_use_uncollected
from .models import token_ids
from .references import assert_close, forward, generate, prefilled
from .subject import ContiguousKVCache, PrefixStore, write_prefix

pytestmark = pytest.mark.needs_library

SUFFIX = token_ids(6, seed=901)
OTHER_SUFFIX = token_ids(6, seed=902)
EXACT = ContiguousKVConfig(budget=1.0)
PRUNED = ContiguousKVConfig(budget=0.3)


def document(tokens: int, seed: int = 903) -> torch.Tensor:
    return token_ids(tokens, seed=seed)


# ---- everything comes back ----


def copy_and_close_both(model, cache):
    twin = copy.deepcopy(cache)
    forward(model, SUFFIX, twin)
    cache.close()
    forward(model, SUFFIX, twin)
    twin.close()


def crop_into_the_prefix(model, cache):
    cache.crop(40 - cache.get_seq_length())
    forward(model, SUFFIX, cache)
    cache.close()


def crop_everything(model, cache):
    cache.crop(-cache.get_seq_length())
    cache.close()


def reset_and_ask_again(model, cache):
    cache.reset()
    forward(model, SUFFIX, cache)
    cache.reset()
    cache.close()


def fail_inside_a_layer(model, cache):
    def fail(module, args, output):
        raise RuntimeError("out of luck")

    handle = model.model.layers[2].mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        forward(model, SUFFIX, cache)
    handle.remove()
    cache.close()


def fail_before_a_layer(module, args):
    raise RuntimeError("out of luck")


ENDINGS = {
    "close": lambda model, cache: cache.close(),
    "close twice": lambda model, cache: (cache.close(), cache.close()),
    "dropped": lambda model, cache: None,
    "a copy": copy_and_close_both,
    "a dropped copy": lambda model, cache: (copy.deepcopy(cache), cache.close()),
    "crop into the prefix": crop_into_the_prefix,
    "crop everything": crop_everything,
    "reset": reset_and_ask_again,
    "a failure": fail_inside_a_layer,
}


@pytest.mark.parametrize("host_bytes", [0, 24 * CHUNK_BYTES, 2**30], ids=["none", "little", "plenty"])
@pytest.mark.parametrize("settings", [EXACT, PRUNED, ContiguousKVConfig.paper(0.3)], ids=["exact", "pruned", "paper"])
@pytest.mark.parametrize("begun", [False, True], ids=["reads under way", "in mid-answer"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_everything_is_given_back_however_a_cache_ends(tiny_model, store_path, ending, begun, settings, host_bytes):
    model, prefix = tiny_model("llama"), document(165)
    write_prefix(model, prefix, store_path)
    with PrefixStore(store_path, host_bytes=host_bytes) as store:
        cache = ContiguousKVCache(model, prefix, store=store, config=settings)
        if begun:
            forward(model, SUFFIX, cache)
        ENDINGS[ending](model, cache)
        del cache
        gc.collect()
        assert_nothing_in_use(store)
        assert store.inner.memory.host.held_bytes <= host_bytes
        after = ask(model, prefix, SUFFIX, store, EXACT)
        expected = generate(model, torch.cat([prefix, SUFFIX], dim=1), prefilled(model, prefix), tokens=3)
        for ours, theirs in zip(after.logits, expected.logits, strict=True):
            assert_close(ours, theirs)
        assert_nothing_in_use(store)


@pytest.mark.parametrize("settings", [EXACT, PRUNED, ContiguousKVConfig.paper(0.3)], ids=["exact", "pruned", "paper"])
@pytest.mark.parametrize("begun", [False, True], ids=["reads under way", "in mid-answer"])
def test_a_dropped_cache_does_not_wait_for_the_garbage_collector(tiny_model, store_path, begun, settings):
    """Reads wait in the queue meanwhile, and know what they are for."""
    model, prefix = tiny_model("llama"), document(165)
    write_prefix(model, prefix, store_path)
    config = dataclasses.replace(settings, reading=ReadOptions(lookahead_bytes=1))
    with PrefixStore(store_path) as store:
        cache = ContiguousKVCache(model, prefix, store=store, config=config)
        if begun:
            handle = model.model.layers[1].register_forward_pre_hook(fail_before_a_layer)
            with pytest.raises(RuntimeError, match="out of luck"):
                forward(model, SUFFIX, cache)
            handle.remove()
        gc.collect()
        gc.disable()
        try:
            del cache
            assert_nothing_in_use_uncollected(store)
        finally:
            gc.enable()


@pytest.mark.parametrize("settings", [EXACT, PRUNED, ContiguousKVConfig.paper(0.3)], ids=["exact", "pruned", "paper"])
@pytest.mark.parametrize("what", ["close", "drop", "reset"])
def test_a_store_may_be_closed_before_a_cache_that_has_reads_under_way(tiny_model, store_path, what, settings):
    model, prefix = tiny_model("llama", seed=7), document(165)
    write_prefix(model, prefix, store_path)
    store = PrefixStore(store_path)
    cache = ContiguousKVCache(model, prefix, store=store, config=settings)
    store.close()
    if what == "reset":
        with pytest.raises(StoreClosedError):
            cache.reset()
    elif what == "close":
        cache.close()
    del cache
    assert_nothing_in_use(store)
    assert store.inner.memory.host.held_bytes == 0


# ---- the books ----


def history(store) -> list[tuple]:
    return [
        (table.uses, table.prefix_heat, table.importance.tobytes(), table.requests.tobytes(), table.heat.tobytes())
        for table in store.inner.memory._tables.values()
    ]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("settings", [EXACT, PRUNED, ContiguousKVConfig.paper(0.3)], ids=["exact", "pruned", "paper"])
def test_scores_are_settled_only_after_the_first_token(tiny_model, store_path, settings, policy):
    model, prefix = tiny_model("llama"), document(165)
    write_prefix(model, prefix, store_path)
    with PrefixStore(store_path, eviction=policy) as store:
        ask(model, prefix, OTHER_SUFFIX, store, settings)  # So that there is a history to change.
        cache = ContiguousKVCache(model, prefix, store=store, config=settings)
        before = history(store)
        seen = []
        handle = model.lm_head.register_forward_hook(lambda *_: seen.append(history(store)))
        try:
            forward(model, SUFFIX, cache)
            assert history(store) == before
            forward(model, token_ids(1, seed=950), cache)
        finally:
            handle.remove()
        assert seen[0] == before
        after = history(store)
        assert after != before
        assert after[0][0] == before[0][0] + 1
        for number in range(3):
            forward(model, token_ids(1, seed=951 + number), cache)
        assert history(store) == after, "later tokens count nothing"
        cache.reset()
        cache.close()
        assert history(store) == after, "a request counts once"


@pytest.mark.parametrize("ending", ["close", "reset", "dropped"])
def test_a_request_of_one_token_is_settled_when_it_ends(tiny_model, store_path, ending):
    model, prefix = tiny_model("llama"), document(165)
    write_prefix(model, prefix, store_path)
    with PrefixStore(store_path) as store:
        cache = ContiguousKVCache(model, prefix, store=store, config=PRUNED)
        forward(model, SUFFIX, cache)
        table = next(iter(store.inner.memory._tables.values()))
        assert (table.uses, float(table.importance.sum())) == (0, 0.0)
        if ending == "dropped":
            del cache
            gc.collect()
            store.inner.memory.catch_up()
        else:
            getattr(cache, ending)()
        assert table.uses == 1
        assert float(table.importance.sum()) > 0
        grid = table.requests.reshape(LAYERS, 11)
        assert (grid.sum(1) == chunks_kept(PRUNED.budget, 10) + 1).all()


def test_a_cache_that_was_never_asked_counts_nothing(tiny_model, store_path):
    model, prefix = tiny_model("llama"), document(165)
    write_prefix(model, prefix, store_path)
    with PrefixStore(store_path) as store:
        cache = ContiguousKVCache(model, prefix, store=store, config=EXACT)
        cache.reset()
        cache.close()
        assert [table.uses for table in store.inner.memory._tables.values()] == [0]


@pytest.mark.parametrize("family", ["llama", "gpt-neox"])
@pytest.mark.parametrize("padding", ["before", "between"])
def test_importance_stays_finite_where_rows_are_padded(tiny_model, store_path, family, padding):
    model, prefix = tiny_model(family), document(165)
    write_prefix(model, prefix, store_path)
    pads = torch.zeros(1, 5, dtype=torch.long)
    short = token_ids(1, seed=960)
    second = [pads, prefix, short] if padding == "before" else [prefix, pads, short]
    ids = torch.cat([torch.cat([prefix, SUFFIX], dim=1), torch.cat(second, dim=1)])
    with PrefixStore(store_path) as store:
        for settings in (PRUNED, ContiguousKVConfig.paper(0.3)):
            with ContiguousKVCache(model, prefix, store=store, config=settings) as cache:
                generate(model, ids, cache, tokens=2, attention_mask=(ids != 0).long())
        for table in store.inner.memory._tables.values():
            assert torch.isfinite(torch.from_numpy(table.importance)).all()
            assert (table.importance >= 0).all()
        assert_nothing_in_use(store)


@pytest.mark.parametrize(
    "config", [EXACT, PRUNED, ContiguousKVConfig.paper(0.3)], ids=["exact", "default", "published"]
)
def test_requests_take_turns_in_the_same_memory_and_see_nothing_of_each_other(tiny_model, tmp_path, config):
    model, prefixes = tiny_model("llama"), [document(300, seed=951), document(310, seed=952)]
    alone = []
    for number, prefix in enumerate(prefixes):
        write_prefix(model, prefix, tmp_path / "kv-store")
        with PrefixStore(tmp_path / "kv-store", host_bytes=0) as store:  # Fresh memory for everyone.
            alone.append(ask(model, prefix, SUFFIX, store, config))
            assert store.inner.memory.host._workspace.held_bytes == 0, number
    with PrefixStore(tmp_path / "kv-store") as store:
        held = set()
        for _ in range(3):
            for prefix, expected in zip(prefixes, alone, strict=True):
                assert ask(model, prefix, SUFFIX, store, config).is_bit_for_bit(expected)
                gc.collect()
                workspace = store.inner.memory.host._workspace
                assert workspace.held_bytes == workspace.free_bytes > 0
                held.add(workspace.held_bytes)
        assert len(held) <= 2, "memory of later requests came on top"


# ---- memory for attention is lent for several layers at once ----


def test_layers_that_ask_for_two_kinds_of_room_share_two_pieces(tiny_model, store_path):
    """As they do where a batch shares one copy of the prefix: a suffix for each row, and the prefix."""
    model, prefix = tiny_model("llama", layers=10), document(64)
    with PrefixStore(store_path) as store, ContiguousKVCache(model, prefix, store=store, config=EXACT) as cache:
        request, like = cache.session.request, torch.zeros(1, 2, 1, 16)
        rooms = [request.room(like, 1, 10 + 10 * (number % 2)) for number in range(2 * 10)]
        assert [room.shape[3] for room in rooms] == [10, 20] * 10
        assert len({room.untyped_storage().data_ptr() for room in rooms}) == 2
        assert len({room.data_ptr() for room in rooms}) == 20
        assert request.room(like, 1, 10).untyped_storage().data_ptr() != rooms[0].untyped_storage().data_ptr()
