"""A forward that fails in the middle leaves a cache that says so, and that a crop or a reset makes whole again."""

from __future__ import annotations

import gc

import pytest
import torch

from .models import build, token_ids
from .references import forward
from .subject import ContiguousKVCache, PrefixStore, write_prefix

PREFIX = token_ids(160, seed=931)
FIRST, SECOND, THIRD = (token_ids(5, seed=seed) for seed in (932, 933, 934))


class InterruptedForwardError(Exception):
    pass


def interrupt(model, ids, cache):
    """A forward that fails in the attention of the last layer."""

    def fail(*_):
        raise InterruptedForwardError

    handle = model.model.layers[-1].register_forward_pre_hook(fail)
    try:
        with pytest.raises(InterruptedForwardError):
            forward(model, ids, cache)
    finally:
        handle.remove()


@pytest.mark.parametrize("budget", [1.0, 0.3])
@pytest.mark.parametrize("tokens_left", [160, 150])
def test_a_crop_to_the_prefix_repairs_what_an_interrupted_forward_has_left(store_path, budget, tokens_left):
    model = build("llama")
    write_prefix(model, PREFIX, store_path)
    with PrefixStore(store_path) as store:
        with ContiguousKVCache(model, PREFIX[:, :tokens_left], store=store, budget=budget) as cache:
            expected = forward(model, THIRD, cache)
        with ContiguousKVCache(model, PREFIX, store=store, budget=budget) as cache:
            forward(model, FIRST, cache)
            interrupt(model, SECOND, cache)
            cache.crop(tokens_left - cache.get_seq_length())
            assert cache.get_seq_length() == tokens_left
            assert torch.equal(forward(model, THIRD, cache), expected)


def test_a_later_forward_that_was_interrupted_is_not_glossed_over(store_path):
    model = build("llama")
    with PrefixStore(store_path) as store, ContiguousKVCache(model, PREFIX, store=store, budget=1.0) as cache:
        forward(model, FIRST, cache)
        interrupt(model, SECOND, cache)
        with pytest.raises(ValueError, match="interrupted"):
            forward(model, THIRD, cache)
        cache.reset()
        forward(model, THIRD, cache)


def test_the_first_forward_is_begun_again_after_an_interruption(store_path):
    model = build("llama")
    with PrefixStore(store_path) as store, ContiguousKVCache(model, PREFIX, store=store, budget=0.3) as cache:
        expected = forward(model, FIRST, cache)
        cache.reset()
        interrupt(model, FIRST, cache)
        assert torch.equal(forward(model, FIRST, cache), expected)


def test_reset_and_crop_need_neither_the_model_nor_a_forward_of_it(store_path):
    model = build("llama")
    with PrefixStore(store_path) as store, ContiguousKVCache(model, PREFIX, store=store, budget=1.0) as cache:
        expected = forward(model, FIRST, cache)
        ran = []
        hook = model.register_forward_pre_hook(lambda *_: ran.append(1))
        model.to(torch.float64)
        cache.reset()
        cache.crop(-8)
        model.to(torch.float32)
        cache.reset()
        assert not ran
        hook.remove()
        assert torch.equal(forward(model, FIRST, cache), expected)
        del model
        gc.collect()
        cache.reset()
        cache.crop(-8)
        assert cache.get_seq_length() == 152
