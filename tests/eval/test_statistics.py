"""Intervals hold what they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest

from eval.statistics import geometric_mean, mean_interval, mean_of_groups, quantile_interval, ratio_of_means


def test_intervals_of_a_mean_cover_the_truth_as_often_as_they_say() -> None:
    chance = np.random.default_rng(3)
    covered = 0
    for _ in range(300):
        _, low, high = mean_interval(chance.normal(5.0, 2.0, 60))
        covered += low <= 5.0 <= high
    assert 0.90 < covered / 300 < 0.98


def test_an_interval_is_as_wide_as_the_standard_error_says() -> None:
    values = np.random.default_rng(4).normal(0.0, 1.0, 400)
    value, low, high = mean_interval(values)
    error = values.std() / math.sqrt(400)
    assert value == pytest.approx(values.mean())
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_quantiles_are_interpolated() -> None:
    values = np.arange(1.0, 101.0)
    assert quantile_interval(values, 0.5)[0] == pytest.approx(50.5)
    value, low, high = quantile_interval(values, 0.95)
    assert value == pytest.approx(95.05)
    assert low < value < high <= 100


def test_ratios_are_of_the_same_requests() -> None:
    others = np.random.default_rng(5).uniform(0.1, 1.0, 50)
    assert ratio_of_means(others * 3, others) == pytest.approx((3.0, 3.0, 3.0))
    assert ratio_of_means(np.array([1.0, 3.0]), np.array([2.0, 2.0]))[0] == 1.0


def test_a_geometric_mean_counts_twice_and_half_as_one() -> None:
    value, low, high = geometric_mean(np.array([2.0, 0.5, 4.0, 0.25]))
    assert value == pytest.approx(1.0)
    assert 0.25 <= low < 1.0 < high <= 4.0


def test_groups_count_the_same_however_large_they_are() -> None:
    values = np.array([1.0, 1.0, 1.0, 0.0, 0.0, 0.5])
    # Means 0.75 and 0.25.
    assert mean_of_groups(values, list("aaaabb"))[0] == pytest.approx(0.5)


def test_requests_are_drawn_within_their_group() -> None:
    values = np.array([0.0] * 5 + [1.0] * 5)
    # Groups differ, requests within a group do not: nothing is uncertain.
    assert mean_of_groups(values, ["easy"] * 5 + ["hard"] * 5) == (0.5, 0.5, 0.5)
    _, low, high = mean_interval(values)
    assert low < 0.4
    assert high > 0.6


def test_groups_of_one_size_are_drawn_apart() -> None:
    values = np.random.default_rng(6).normal(0.0, 1.0, 100)
    _, low, high = mean_of_groups(np.concatenate([values, values]), ["a"] * 100 + ["b"] * 100)
    _, alone_low, alone_high = mean_interval(values)
    # Two independent groups: narrower by the square root of two.
    assert (high - low) * math.sqrt(2) == pytest.approx(alone_high - alone_low, rel=0.1)


def test_one_request_has_no_interval() -> None:
    for value, low, high in (
        mean_interval(np.array([3.0])),
        quantile_interval(np.array([3.0]), 0.5),
        ratio_of_means(np.array([6.0]), np.array([2.0])),
        geometric_mean(np.array([3.0])),
        mean_of_groups(np.array([3.0]), ["a"]),
    ):
        assert value == pytest.approx(3.0)
        assert math.isnan(low)
        assert math.isnan(high)


def test_a_group_of_one_request_leaves_no_interval() -> None:
    value, low, _ = mean_of_groups(np.array([0.0, 1.0, 1.0]), ["a", "a", "b"])
    assert value == pytest.approx(0.75)
    assert math.isnan(low)


def test_what_cannot_be_computed_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        mean_interval(np.array([]))
    with pytest.raises(ValueError, match="positive"):
        geometric_mean(np.array([1.0, 0.0]))
    with pytest.raises(ValueError, match="3 and 2"):
        ratio_of_means(np.ones(3), np.ones(2))
