"""Which chunk goes first when memory is full: one small protocol, and the policies that follow it."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np

from ..errors import ConfigError
from .history import Floats, Uses


@runtime_checkable
class EvictionPolicy(Protocol):
    """Computes what keeping an entry in memory is worth.

    Attributes:
        name: name in statistics and plots.
        arrivals_compete: whether the chunks that a request loaded are judged with all others when the request is over,
            and may be evicted then. If false, they stay until room is needed.
    """

    name: str
    arrivals_compete: bool

    def worth(self, uses: Uses) -> Floats:
        """float64 `(n,)`, higher = keep. Called whenever an entry was loaded or used; time alone changes nothing."""
        ...


class LeastRecentlyUsed:
    """Evict what was unused for the longest time."""

    name = "lru"
    arrivals_compete = False

    def worth(self, uses: Uses) -> Floats:
        """Number of the last request that used the entry."""
        return uses.last


class LeastFrequentlyUsed:
    """Evict what the fewest requests used; break ties by the longest time without use."""

    name = "lfu"
    arrivals_compete = False

    def worth(self, uses: Uses) -> Floats:
        """Number of requests that used the entry."""
        # A float64 holds both exactly for the first two million uses of one chunk; then ties lose their order.
        return uses.requests + uses.last * 2.0**-32


class AttentionGuided:
    """The published policy (arXiv 2601.13631): evict the least `S_j = I_j * F_j`."""

    name = "published"
    arrivals_compete = False

    def worth(self, uses: Uses) -> Floats:
        """Attention mass summed over requests, times the number of loads."""
        return uses.importance * uses.loads


class ExpectedUse:
    """The default: evict what the next request is least likely to use.

    The likelihood is the prefix's share of recent requests (fading with a half-life) times the share of these requests
    that selected the chunk (pulled towards a prior while there are few of them). What a request loaded must prove
    better than what is in memory already.

    Args:
        prior: share of requests that is assumed to select a chunk before anything is known.
        weight: number of requests that this assumption counts for.
        ahead: worth of a byte of keys relative to a byte of chunks. Keys are read in one piece before they are needed;
            chunks are read in many pieces while attention waits.
    """

    name = "expected-use"
    arrivals_compete = True

    def __init__(self, prior: float = 0.2, weight: float = 5.0, ahead: float = 0.5) -> None:
        self.prior = prior
        self.weight = weight
        self.ahead = ahead

    def worth(self, uses: Uses) -> Floats:
        """Expected uses per request, up to a factor that all entries share."""
        if uses.ahead:  # Every request to the prefix uses its keys.
            return np.full(len(uses.requests), uses.prefix_heat * self.ahead)
        believed = self.weight * self.prior
        # Both counts of the ratio fade alike, so it is taken of counts that do not; what fades is the prefix's heat.
        share = (uses.requests + believed) / (uses.prefix_requests + self.weight)
        return uses.prefix_heat * np.minimum(share, 1.0)


POLICIES = {policy.name: policy for policy in (LeastRecentlyUsed, LeastFrequentlyUsed, AttentionGuided, ExpectedUse)}


def policy_named(policy: str | EvictionPolicy) -> EvictionPolicy:
    """The policy with this name, or the policy itself.

    Raises:
        ConfigError: no policy has this name.
    """
    if not isinstance(policy, str):
        return policy
    if policy not in POLICIES:
        raise ConfigError(f"eviction must be one of {sorted(POLICIES)} or an EvictionPolicy, got {policy!r}")
    return POLICIES[policy]()
