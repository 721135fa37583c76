"""The configuration refuses what makes no sense; a budget is counted as published."""

import dataclasses
import math

import pytest

from hf_contiguouskv import AttentionMass, ContiguousKVConfig, IndexedKeys, ReadOptions
from hf_contiguouskv.config import Selection
from hf_contiguouskv.errors import ConfigError
from hf_contiguouskv.planning.read_plan import chunks_kept


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("budget", 0),
        ("budget", -0.1),
        ("budget", 1.5),
        ("budget", math.nan),
        ("budget", "0.1"),
        ("budget", True),
        ("least_budget", 0),
        ("least_budget", 1.01),
        ("least_budget", math.nan),
        ("least_budget", "auto"),
        ("least_budget", True),
        ("chunk_size", 0),
        ("chunk_size", 12),
        ("chunk_size", 16.0),
        ("payload", "int3"),
        ("selection", "indexed_keys"),
        ("selection", IndexedKeys),
        ("reading", {"verify": False}),
        ("prefill_block", 8),
        ("reselect_every", 0),
        ("reselect_every", 1.5),
        ("reselect_every", True),
        ("reselect_every", "auto"),
    ],
)
def test_a_value_out_of_range_is_named(field, value):
    with pytest.raises(ConfigError, match=field):
        ContiguousKVConfig(**{field: value})


@pytest.mark.parametrize("kind", [IndexedKeys, AttentionMass])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("period", 0),
        ("period", True),
        ("queries", 0),
        ("recent", -1),
        ("concentration", 0.0),
        ("concentration", math.inf),
        ("concentration", "2"),
        ("keep_first", -1),
        ("keep_last", 0.5),
    ],
)
def test_a_selection_out_of_range_is_named(kind, field, value):
    with pytest.raises(ConfigError, match=field):
        kind(**{field: value})


@pytest.mark.parametrize(("field", "value"), [("lookahead_bytes", 0), ("lookahead_bytes", 1.5), ("verify", 1)])
def test_read_options_out_of_range_are_named(field, value):
    with pytest.raises(ConfigError, match=field):
        ReadOptions(**{field: value})


def test_a_subperiod_longer_than_the_period_is_refused():
    with pytest.raises(ConfigError, match="subperiod"):
        AttentionMass(period=4, subperiod=5)


def test_the_base_class_is_no_way_to_select():
    with pytest.raises(ConfigError, match="IndexedKeys"):
        Selection()


def test_packed_values_need_the_index_that_holds_their_keys():
    with pytest.raises(ConfigError, match="payload='exact'"):
        ContiguousKVConfig(selection=AttentionMass())
    assert ContiguousKVConfig(payload="exact", selection=AttentionMass()).payload == "exact"


def test_the_published_configuration():
    paper = ContiguousKVConfig.paper()
    assert (paper.budget, paper.chunk_size, paper.payload) == (0.05, 16, "exact")
    rule = paper.selection
    assert isinstance(rule, AttentionMass)
    assert (rule.period, rule.subperiod, rule.queries, rule.concentration) == (8, 4, None, 1.0)
    assert (rule.keep_first, rule.keep_last) == (0, 0)
    assert ContiguousKVConfig.paper(0.25, selection=AttentionMass(period=2, subperiod=1)).selection.period == 2


def test_reads_for_the_next_period_start_in_the_middle_of_this_one():
    assert [AttentionMass(period=period).subperiod for period in (1, 2, 3, 8)] == [1, 1, 2, 4]
    assert AttentionMass(period=4, subperiod=4).subperiod == 4
    assert IndexedKeys().subperiod == 1


def test_an_option_of_the_selection_is_not_one_of_the_published_configuration():
    with pytest.raises(ConfigError, match=r"period.*AttentionMass"):
        ContiguousKVConfig.paper(period=4)


@pytest.mark.parametrize("config", [ContiguousKVConfig(), IndexedKeys(), AttentionMass(), ReadOptions()])
def test_it_is_frozen(config):
    name = dataclasses.fields(config)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, name, 0.5)


@pytest.mark.parametrize(
    ("budget", "chunks", "kept"),
    [(0.05, 512, 26), (0.1, 30, 3), (0.1, 31, 4), (1.0, 7, 7), (0.01, 5, 1), (0.3, 0, 0), (0.5, 3, 2)],
)
def test_the_budget_is_rounded_up_to_whole_chunks(budget, chunks, kept):
    assert chunks_kept(budget, chunks) == kept


def test_a_budget_that_is_not_decided_counts_nothing():
    with pytest.raises(ConfigError, match="auto"):
        chunks_kept("auto", 10)
