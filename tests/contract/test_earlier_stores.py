"""A store of an earlier release answers as it did: prefixes of format 2 are found, exact and pruned."""

from __future__ import annotations

import logging

import pytest
import torch
from unit.earlier_releases import as_earlier_store, versions

from hf_contiguouskv import ContiguousKVConfig

from .models import token_ids
from .references import forward
from .subject import ContiguousKVCache, PrefixStore, write_prefix

pytestmark = pytest.mark.needs_library

PREFIX = token_ids(165, seed=4101)
LONGER = torch.cat((PREFIX, token_ids(40, seed=4102)), dim=1)
SUFFIX = token_ids(9, seed=4103)


@pytest.mark.parametrize(
    "config",
    [ContiguousKVConfig(budget=1.0), ContiguousKVConfig(budget=0.3), ContiguousKVConfig.paper(0.3)],
    ids=["exact", "default", "published"],
)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_answers_are_those_of_a_store_of_today(tiny_model, store_path, family, config, caplog):
    model = tiny_model(family)
    for ids in (PREFIX, LONGER):  # (Two segments: the second continues the first.)
        write_prefix(model, ids, store_path)
    with PrefixStore(store_path) as store, ContiguousKVCache(model, LONGER, store=store, config=config) as cache:
        expected = forward(model, SUFFIX, cache)
    as_earlier_store(store_path)
    assert versions(store_path) == ["2", "2"]
    with PrefixStore(store_path) as store:
        assert store.match(model, LONGER) == LONGER.shape[1]
        with ContiguousKVCache(model, LONGER, store=store, config=config) as cache:
            assert cache.stats.tokens_prefilled == 0
            logits = forward(model, SUFFIX, cache)
        assert store.verify(deep=True) == []
    assert torch.equal(logits, expected)
    assert versions(store_path) == ["3", "3"]
    assert [record.levelno for record in caplog.records].count(logging.WARNING) == 1


def test_an_automatic_request_finds_its_beginning_there(tiny_model, store_path):
    model = tiny_model("llama")
    write_prefix(model, PREFIX, store_path)
    as_earlier_store(store_path)
    with PrefixStore(store_path) as store, ContiguousKVCache(model, store=store) as cache:
        forward(model, torch.cat((PREFIX, SUFFIX), dim=1), cache)
        assert cache.stats.tokens_prefilled < PREFIX.shape[1]
