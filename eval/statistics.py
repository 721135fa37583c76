"""Figures over requests, with 95% intervals by a bootstrap of clusters.

Requests of one prefix resemble each other, so they are no independent samples. A resample of a task therefore draws
prefixes with replacement, as many as the task has, and then draws the requests of each drawn prefix with replacement,
as many as that prefix has. Tasks are strata: the set of tasks is fixed, every task is resampled by itself, and every
task counts equally, however many requests it has.

Every call uses the same random numbers, so that the same rows always give the same report.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

RESAMPLES = 2000
# With fewer prefixes in a task, their spread is hardly known, and the interval is too narrow.
FEW_PREFIXES = 5

Values = npt.NDArray[np.float64]


class Estimate(NamedTuple):
    """A figure with its 95% interval.

    Attributes:
        value: the figure.
        low, high: the ends of its interval; NaN if a task has a single request.
        requests: number of requests (or pairs of requests) that the figure is made from.
        prefixes: number of prefixes of these requests, over all tasks.
        fewest: number of prefixes of the task that has the fewest.
    """

    value: float
    low: float
    high: float
    requests: int
    prefixes: int
    fewest: int

    @property
    def has_interval(self) -> bool:
        """Whether the ends of the interval are known."""
        return not np.isnan(self.low)

    @property
    def few_prefixes(self) -> bool:
        """Whether the interval is too narrow, because a task has fewer than `FEW_PREFIXES` prefixes."""
        return self.has_interval and self.fewest < FEW_PREFIXES

    def scaled(self, factor: float) -> Estimate:
        """Figure and interval times a factor; a negative one exchanges the ends."""
        low, high = sorted((self.low * factor, self.high * factor)) if self.has_interval else (self.low, self.high)
        return self._replace(value=self.value * factor, low=low, high=high)


def drawn(sizes: Sequence[int], seed: int = 0) -> npt.NDArray[np.int64]:
    """Requests of each resample of one task: int64 `(RESAMPLES, len(sizes) * max(sizes))`.

    Args:
        sizes: number of requests of each prefix. Request `i` of prefix `p` has number `sum(sizes[:p]) + i`.
        seed: another seed gives other draws.

    Returns:
        Numbers of requests; -1 stands for no request, because prefixes differ in their number of requests.
    """
    return _drawn(tuple(sizes), seed)


@lru_cache(maxsize=64)
def _drawn(sizes: tuple[int, ...], seed: int) -> npt.NDArray[np.int64]:
    chance = np.random.default_rng(seed)
    size = np.array(sizes, dtype=np.int64)
    first = np.cumsum(size) - size
    prefixes = chance.integers(0, len(size), (RESAMPLES, len(size)))
    within = (chance.random((RESAMPLES, len(size), int(size.max()))) * size[prefixes][..., None]).astype(np.int64)
    there = np.arange(int(size.max())) < size[prefixes][..., None]
    return np.where(there, first[prefixes][..., None] + within, -1).reshape(RESAMPLES, -1)


def mean(values: Values, clusters: Sequence[Hashable], strata: Sequence[Hashable] | None = None) -> Estimate:
    """Mean over tasks of each task's mean over its requests.

    Args:
        values: the requests' values, float64 `(n,)`.
        clusters: the prefix of each request, `n` entries.
        strata: the task of each request, `n` entries; `None` if there is one task.

    Raises:
        ValueError: there are no values, or the lengths differ.
    """
    _refuse_none(values)
    tasks = _tasks(values, clusters, strata)
    means, figures = [], []
    for seed, (own, sizes) in enumerate(tasks):
        means.append(own.mean())
        chosen = drawn(sizes, seed)
        # The number of requests of a resample varies where prefixes differ in theirs.
        there = chosen >= 0
        figures.append(np.where(there, own[chosen], 0.0).sum(1) / there.sum(1))
    return _estimate(float(np.mean(means)), np.mean(figures, axis=0), tasks)


def geometric_mean(values: Values, clusters: Sequence[Hashable], strata: Sequence[Hashable] | None = None) -> Estimate:
    """Geometric mean over tasks of each task's geometric mean over its requests, for times and ratios of times.

    The mean is taken of logarithms, so every request of a task counts equally, and every task does.

    Args:
        values: the requests' values, float64 `(n,)`, all positive.
        clusters, strata: see `mean`.

    Raises:
        ValueError: there are no values, one is not positive, or the lengths differ.
    """
    if not (values > 0).all():
        raise ValueError(f"a geometric mean needs positive values, got {values.min()}")
    found = mean(np.log(values), clusters, strata)
    value, low, high = (float(np.exp(one)) for one in found[:3])
    return found._replace(value=value, low=low, high=high)


def quantile(values: Values, clusters: Sequence[Hashable], share: float) -> Estimate:
    """Quantile of one task's requests, linearly interpolated.

    Args:
        values: the requests' values, float64 `(n,)`.
        clusters: the prefix of each request, `n` entries.
        share: between 0 and 1; 0.5 is the median.

    Raises:
        ValueError: there are no values, or the lengths differ.
    """
    _refuse_none(values)
    tasks = _tasks(values, clusters, None)
    ((own, sizes),) = tasks
    chosen = drawn(sizes)
    # Missing requests are sorted to the end.
    ordered = np.sort(np.where(chosen >= 0, own[chosen], np.inf), axis=1)
    place = (chosen >= 0).sum(1).astype(np.float64) - 1
    place *= share
    below = np.floor(place).astype(np.int64)
    above = np.ceil(place).astype(np.int64)
    lower, upper = (np.take_along_axis(ordered, one[:, None], 1)[:, 0] for one in (below, above))
    return _estimate(float(np.quantile(own, share)), lower + (upper - lower) * (place - below), tasks)


def enough_beyond(count: int, share: float) -> bool:
    """Whether at least one of `count` requests lies beyond the quantile `share`: of 20, for the 95th percentile."""
    return count * (1 - share) >= 1 - 1e-9


def crossing(x: Sequence[float], logs: Sequence[float]) -> list[tuple[float, float, float]]:
    """Where the logarithm of a ratio changes its sign along a logarithmic axis.

    Args:
        x: positive places, ascending, `n` entries.
        logs: logarithm of the ratio at each place, `n` entries.

    Returns:
        For each change of sign the place before it, the interpolated place of the ratio 1, and the place after it. The
        interpolation is linear in the logarithms of place and ratio. A ratio of exactly 1 is a crossing only where the
        signs on both sides of it differ.
    """
    found = []
    before, lower, level = 0.0, 0.0, None
    for place, one in zip(x, logs, strict=True):
        if one == 0:
            # Equal here: the sign may change at this place.
            level = place if level is None else level
            continue
        if lower * one < 0:
            part = lower / (lower - one)
            between = float(np.exp(np.log(before) + part * (np.log(place) - np.log(before))))
            found.append((before, between if level is None else level, place))
        before, lower, level = place, one, None
    return found


def _tasks(
    values: Values, clusters: Sequence[Hashable], strata: Sequence[Hashable] | None
) -> list[tuple[Values, list[int]]]:
    """The values of each task, those of a prefix side by side, and the number of requests of each prefix."""
    members: dict[Hashable, dict[Hashable, list[float]]] = {}
    tasks = [None] * len(values) if strata is None else strata
    for value, prefix, task in zip(values.tolist(), clusters, tasks, strict=True):
        members.setdefault(task, {}).setdefault(prefix, []).append(value)
    return [
        (np.array([value for own in prefixes.values() for value in own]), [len(own) for own in prefixes.values()])
        for prefixes in members.values()
    ]


def _estimate(value: float, figures: Values, tasks: Sequence[tuple[Values, list[int]]]) -> Estimate:
    """`value` with the middle 95% of `figures`, float64 `(RESAMPLES,)`."""
    low = high = float("nan")
    # A task with one request would add no spread, so the interval would be too narrow.
    if min(len(own) for own, _ in tasks) > 1:
        low, high = (float(one) for one in np.quantile(figures, [0.025, 0.975]))
    prefixes = [len(sizes) for _, sizes in tasks]
    return Estimate(value, low, high, sum(len(own) for own, _ in tasks), sum(prefixes), min(prefixes))


def _refuse_none(values: Values) -> None:
    if len(values) == 0:
        raise ValueError("a figure needs at least one value, got none")
