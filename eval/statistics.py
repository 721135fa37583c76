"""95% intervals of figures, by bootstrap over requests.

Every function returns the figure and the ends of its interval. A single request has no interval: its ends are NaN.
Every call uses the same random numbers, so that the same rows always give the same report.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt

RESAMPLES = 2000

Values = npt.NDArray[np.float64]
# A figure, and the ends of its 95% interval.
Interval = tuple[float, float, float]


def resampled(count: int, chance: np.random.Generator | None = None) -> npt.NDArray[np.int64]:
    """Request numbers of each resample, drawn with replacement: int64 `(RESAMPLES, count)`."""
    return (chance or np.random.default_rng(0)).integers(0, count, (RESAMPLES, count))


def interval(value: float, figures: Values, count: int) -> Interval:
    """`value` with the middle 95% of `figures`, float64 `(RESAMPLES,)`, its values in resamples of `count` requests."""
    if count < 2:
        return value, float("nan"), float("nan")
    low, high = np.quantile(figures, [0.025, 0.975])
    return value, float(low), float(high)


def mean_interval(values: Values) -> Interval:
    """Mean of the requests' values, float64 `(n,)`.

    Raises:
        ValueError: there are no values.
    """
    _refuse_none(values)
    return interval(float(values.mean()), values[resampled(len(values))].mean(1), len(values))


def quantile_interval(values: Values, share: float) -> Interval:
    """Quantile `share` of the requests' values, float64 `(n,)`, linearly interpolated.

    Raises:
        ValueError: there are no values.
    """
    _refuse_none(values)
    figures = np.quantile(values[resampled(len(values))], share, axis=1)
    return interval(float(np.quantile(values, share)), figures, len(values))


def ratio_of_means(values: Values, others: Values) -> Interval:
    """Mean of `values` divided by the mean of `others`, both float64 `(n,)`, of the same requests in the same order.

    Raises:
        ValueError: there are no values, or the lengths differ.
    """
    _refuse_none(values)
    if len(values) != len(others):
        raise ValueError(f"pairs need as many values of both, got {len(values)} and {len(others)}")
    chosen = resampled(len(values))
    figures = values[chosen].mean(1) / others[chosen].mean(1)
    return interval(float(values.mean() / others.mean()), figures, len(values))


def geometric_mean(values: Values) -> Interval:
    """Geometric mean of the requests' values, float64 `(n,)`, all positive. For ratios, every request counts equally.

    Raises:
        ValueError: there are no values, or one is not positive.
    """
    if not (values > 0).all():
        raise ValueError(f"a geometric mean needs positive values, got {values.min()}")
    value, low, high = np.exp(mean_interval(np.log(values)))
    return float(value), float(low), float(high)


def mean_of_groups(values: Values, groups: Sequence[Hashable]) -> Interval:
    """Mean over groups (tasks) of each group's mean: every group counts equally, however many requests it has.

    Requests are drawn within their group, because the set of groups is fixed.

    Args:
        values: the requests' values, float64 `(n,)`.
        groups: the group of each request, `n` entries.

    Raises:
        ValueError: there are no values, or the lengths differ.
    """
    _refuse_none(values)
    members: dict[Hashable, list[float]] = {}
    for value, group in zip(values.tolist(), groups, strict=True):
        members.setdefault(group, []).append(value)
    # One generator for all groups, so that groups of the same size draw different numbers.
    chance = np.random.default_rng(0)
    means, figures = [], []
    for scores in members.values():
        own = np.array(scores)
        means.append(own.mean())
        figures.append(own[resampled(len(own), chance)].mean(1))
    # A group with one request would add no spread, so the interval would be too narrow.
    smallest = min(map(len, members.values()))
    return interval(float(np.mean(means)), np.mean(figures, axis=0), smallest)


def _refuse_none(values: Values) -> None:
    if len(values) == 0:
        raise ValueError("a figure needs at least one value, got none")
