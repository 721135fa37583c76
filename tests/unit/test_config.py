"""The configuration refuses what makes no sense and counts chunks as published."""

import dataclasses
import math

import pytest

from hf_contiguouskv import ContiguousKVConfig
from hf_contiguouskv.errors import ConfigError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("budget", 0),
        ("budget", -0.1),
        ("budget", 1.5),
        ("budget", math.nan),
        ("budget", "0.1"),
        ("budget", True),
        ("chunk_size", 0),
        ("chunk_size", 12),
        ("chunk_size", 16.0),
        ("payload", "int3"),
        ("selection", "random"),
        ("period", 0),
        ("suffix_queries", 0),
        ("recent_queries", -1),
        ("concentration", 0.0),
        ("concentration", math.inf),
        ("keep_first", -1),
        ("prefill_block", 8),
        ("lookahead_bytes", 0),
    ],
)
def test_a_value_out_of_range_is_named(field, value):
    with pytest.raises(ConfigError, match=field):
        ContiguousKVConfig(**{field: value})


def test_a_subperiod_longer_than_the_period_is_refused():
    with pytest.raises(ConfigError, match="subperiod"):
        ContiguousKVConfig(period=4, subperiod=5)


def test_the_published_configuration():
    paper = ContiguousKVConfig.paper()
    assert (paper.budget, paper.chunk_size, paper.period, paper.subperiod) == (0.05, 16, 8, 4)
    assert (paper.selection, paper.suffix_queries, paper.concentration) == ("attention_mass", None, 1.0)
    assert (paper.keep_first, paper.keep_last) == (0, 0)
    assert ContiguousKVConfig.paper(0.25, period=2, subperiod=1).period == 2


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ContiguousKVConfig().budget = 0.5


@pytest.mark.parametrize(
    ("budget", "chunks", "kept"),
    [(0.05, 512, 26), (0.1, 30, 3), (0.1, 31, 4), (1.0, 7, 7), (0.01, 5, 1), (0.3, 0, 0), (0.5, 3, 2)],
)
def test_the_budget_is_rounded_up_to_whole_chunks(budget, chunks, kept):
    assert ContiguousKVConfig(budget=budget).chunks_kept(chunks) == kept
