"""Intervals hold what they promise: prefixes are drawn, then requests within them, and tasks count equally."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest

from eval.statistics import (
    RESAMPLES,
    Estimate,
    crossing,
    drawn,
    enough_beyond,
    geometric_mean,
    mean,
    quantile,
)

Cluster = tuple[str, list[float]]


def slow(tasks: Sequence[Sequence[list[float]]], resamples: int = 10_000, seed: int = 1) -> list[float]:
    """The stratified bootstrap of clusters in plain Python: means of sorted resamples."""
    chance = random.Random(seed)
    found = []
    for _ in range(resamples):
        means = []
        for prefixes in tasks:
            sample = [
                value
                for prefix in chance.choices(prefixes, k=len(prefixes))
                for value in chance.choices(prefix, k=len(prefix))
            ]
            means.append(sum(sample) / len(sample))
        found.append(sum(means) / len(means))
    return sorted(found)


def flat(tasks: Sequence[Sequence[list[float]]]) -> tuple[np.ndarray, list[int], list[int]]:
    """Values, prefixes and tasks as the statistics take them."""
    rows = [
        (value, prefix, task)
        for task, prefixes in enumerate(tasks)
        for prefix, values in enumerate(prefixes)
        for value in values
    ]
    values, clusters, strata = zip(*rows, strict=True)
    return np.array(values), [f"{t}-{c}" for c, t in zip(clusters, strata, strict=True)], list(strata)  # type: ignore[misc]


def random_tasks(seed: int, sizes: Sequence[Sequence[int]]) -> list[list[list[float]]]:
    """Tasks of prefixes that differ more than the requests of one prefix do."""
    chance = np.random.default_rng(seed)
    return [[(chance.normal(0, 1) + chance.normal(0, 0.5, size)).tolist() for size in prefixes] for prefixes in sizes]


@pytest.mark.parametrize(
    "sizes",
    [[[4] * 8], [[1, 7, 3, 2, 9, 5]], [[6] * 5, [1, 2, 3, 4]], [[10]], [[1] * 12, [12]]],
    ids=["equal prefixes", "unequal prefixes", "two tasks", "one prefix", "one request each and one prefix"],
)
def test_the_bootstrap_of_clusters_agrees_with_a_slow_one(sizes: list[list[int]]) -> None:
    tasks = random_tasks(7, sizes)
    found = mean(*flat(tasks))
    reference = slow(tasks)
    spread = float(np.std(reference))
    assert found.value == pytest.approx(np.mean([np.mean([v for p in task for v in p]) for task in tasks]))
    # The standard error of these quantiles of 2,000 and 10,000 resamples is 0.065 of the spread.
    assert found.low == pytest.approx(np.quantile(reference, 0.025), abs=0.2 * spread)
    assert found.high == pytest.approx(np.quantile(reference, 0.975), abs=0.2 * spread)
    assert found.requests == sum(sum(prefixes) for prefixes in sizes)
    assert found.prefixes == sum(len(prefixes) for prefixes in sizes)
    assert found.fewest == min(len(prefixes) for prefixes in sizes)


def test_a_resample_draws_prefixes_and_then_requests_within_them() -> None:
    sizes = (2, 1, 3)
    prefix_of = np.array([0, 0, 1, 2, 2, 2])
    chosen = drawn(sizes)
    assert chosen.shape == (RESAMPLES, 9)
    for resample in chosen[:50].reshape(50, 3, 3):
        for block in resample:
            there = block[block >= 0]
            (prefix,) = set(prefix_of[there])
            assert len(there) == sizes[prefix]
    counts = np.bincount(chosen[chosen >= 0], minlength=6)
    # Every prefix is drawn as often as every other, so every request is drawn as often, too.
    assert counts == pytest.approx([RESAMPLES] * 6, rel=0.12)
    assert (drawn(sizes, 1) != chosen).any()


def test_requests_of_one_prefix_are_no_independent_samples() -> None:
    """Eight prefixes whose requests are all alike say as much as eight requests."""
    values = np.repeat(np.random.default_rng(3).normal(0, 1, 8), 25)
    found = mean(values, np.repeat(np.arange(8), 25).tolist())
    alone = mean(values[::25], list(range(8)))
    assert found.high - found.low == pytest.approx(alone.high - alone.low, rel=0.05)
    careless = mean(values, list(range(200)))
    assert careless.high - careless.low < 0.4 * (found.high - found.low)


def test_intervals_of_a_mean_cover_the_truth_as_often_as_they_say() -> None:
    chance = np.random.default_rng(3)
    covered = 0
    for _ in range(300):
        prefixes = chance.normal(5.0, 1.0, 30)
        values = (prefixes[:, None] + chance.normal(0, 1.0, (30, 4))).ravel()
        found = mean(values, np.repeat(np.arange(30), 4).tolist())
        covered += found.low <= 5.0 <= found.high
    # Two stages of drawing make intervals somewhat wider than necessary.
    assert 0.92 < covered / 300 <= 1.0


def test_tasks_count_the_same_however_large_they_are() -> None:
    values = np.array([1.0, 1.0, 1.0, 0.0, 0.0, 0.5])
    # Means 0.75 and 0.25.
    found = mean(values, list(range(6)), list("aaaabb"))
    assert found.value == pytest.approx(0.5)
    assert (found.requests, found.prefixes, found.fewest) == (6, 6, 2)


def test_requests_are_drawn_within_their_task() -> None:
    values = np.array([0.0] * 5 + [1.0] * 5)
    # Tasks differ, requests within a task do not: nothing is uncertain.
    assert mean(values, list(range(10)), ["easy"] * 5 + ["hard"] * 5)[:3] == (0.5, 0.5, 0.5)
    _, low, high, *_ = mean(values, list(range(10)))
    assert low < 0.4
    assert high > 0.6


def test_tasks_of_one_shape_are_drawn_apart() -> None:
    values = np.random.default_rng(6).normal(0.0, 1.0, 100)
    places = list(range(200))
    both = mean(np.concatenate([values, values]), places, ["a"] * 100 + ["b"] * 100)
    alone = mean(values, places[:100])
    # Two independent tasks: narrower by the square root of two.
    assert (both.high - both.low) * math.sqrt(2) == pytest.approx(alone.high - alone.low, rel=0.1)


def test_a_geometric_mean_is_of_each_task_and_then_of_the_tasks() -> None:
    found = geometric_mean(np.array([2.0, 0.5, 4.0, 0.25]), list(range(4)))
    assert found.value == pytest.approx(1.0)
    assert 0.25 <= found.low < 1.0 < found.high <= 4.0
    # Geometric means 2 (of three) and 8 (of one): 4, not 2.83 as over all requests.
    tasks = geometric_mean(np.array([1.0, 2.0, 4.0, 8.0]), list(range(4)), list("aaab"))
    assert tasks.value == pytest.approx(4.0)
    assert not tasks.has_interval


def test_quantiles_are_interpolated_and_draw_prefixes() -> None:
    values = np.arange(1.0, 101.0)
    found = quantile(values, list(range(100)), 0.95)
    assert found.value == pytest.approx(95.05)
    assert found.low < found.value < found.high <= 100
    assert quantile(values, list(range(100)), 0.5).value == pytest.approx(50.5)
    chance = random.Random(2)
    prefixes = [[chance.gauss(place, 0.2) for _ in range(2 + place % 3)] for place in range(9)]
    flattened = np.array([value for prefix in prefixes for value in prefix])
    clusters = [place for place, prefix in enumerate(prefixes) for _ in prefix]
    medians = sorted(
        float(np.median([v for p in chance.choices(prefixes, k=9) for v in chance.choices(p, k=len(p))]))
        for _ in range(4000)
    )
    found = quantile(flattened, clusters, 0.5)
    assert found.value == pytest.approx(np.median(flattened))
    assert found.low == pytest.approx(medians[100], abs=0.3)
    assert found.high == pytest.approx(medians[3899], abs=0.3)


@pytest.mark.parametrize(("count", "share", "enough"), [(19, 0.95, False), (20, 0.95, True), (99, 0.99, False)])
def test_a_percentile_needs_a_request_beyond_it(count: int, share: float, enough: bool) -> None:
    assert enough_beyond(count, share) is enough
    assert enough_beyond(100, 0.99)


def test_an_interval_of_few_prefixes_says_so() -> None:
    values, clusters = np.arange(8.0), [0, 0, 1, 1, 2, 2, 3, 3]
    assert mean(values, clusters).few_prefixes
    assert not mean(values, list(range(8))).few_prefixes
    # The task with the fewest decides.
    assert mean(np.arange(16.0), [*range(8), *clusters], ["a"] * 8 + ["b"] * 8).few_prefixes
    # Without an interval there is nothing to say.
    assert not mean(np.array([1.0]), [0]).few_prefixes


def test_one_request_has_no_interval() -> None:
    for found in (
        mean(np.array([3.0]), [0]),
        quantile(np.array([3.0]), [0], 0.5),
        geometric_mean(np.array([3.0]), [0]),
    ):
        assert found.value == pytest.approx(3.0)
        assert math.isnan(found.low)
        assert math.isnan(found.high)
    value, low, *_ = mean(np.array([0.0, 1.0, 1.0]), [0, 1, 2], ["a", "a", "b"])
    assert value == pytest.approx(0.75)
    assert math.isnan(low)


def test_a_negative_scale_exchanges_the_ends() -> None:
    assert Estimate(1.0, 0.5, 2.0, 3, 3, 3).scaled(-10)[:3] == (-10.0, -20.0, -5.0)


def test_a_crossing_is_interpolated_in_logarithms() -> None:
    # The ratio falls from 4 to 1/4 between 1 and 16 GB/s: it is 1 at 4 GB/s.
    (found,) = crossing([1.0, 16.0], [math.log(4), math.log(0.25)])
    assert found == pytest.approx((1.0, 4.0, 16.0))
    # From 2 to 1/4 it is 1 after a third of the way.
    (found,) = crossing([0.5, 1.0, 8.0], [math.log(3), math.log(2), math.log(0.25)])
    assert found == pytest.approx((1.0, 2.0, 8.0))


def test_crossings_are_changes_of_sign() -> None:
    assert crossing([1, 2, 3], [0.1, 0.2, 0.3]) == []
    assert [(low, high) for low, _, high in crossing([1, 2, 4, 8], [0.1, -0.1, -0.2, 0.3])] == [(1, 2), (4, 8)]
    # A ratio of 1 at a measured speed: a crossing there, if the sign changes.
    assert crossing([1, 2, 4], [0.1, 0.0, -0.1]) == [(1, 2, 4)]
    assert crossing([1, 2, 4], [0.1, 0.0, 0.1]) == []
    assert crossing([], []) == []


def test_what_cannot_be_computed_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        mean(np.array([]), [])
    with pytest.raises(ValueError, match="positive"):
        geometric_mean(np.array([1.0, 0.0]), [0, 1])
    with pytest.raises(ValueError, match="zip"):
        mean(np.ones(3), [0, 1])
