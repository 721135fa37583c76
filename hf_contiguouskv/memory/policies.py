"""Which chunk to evict first when memory is full: one small protocol, and the policies that follow it."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np

from ..errors import ConfigError
from .history import Floats, Uses


@runtime_checkable
class EvictionPolicy(Protocol):
    """Computes the worth of keeping an entry.

    Attributes:
        name: shown in statistics and plots.
        arrivals_compete: whether a chunk just loaded competes with all others as soon as its request is over and may
            itself be evicted. Room is then made after requests, not during them. If false, an arrival stays until room
            is needed.
    """

    name: str
    arrivals_compete: bool

    def worth(self, uses: Uses) -> Floats:
        """float64 `(n,)`, higher = keep. Called after an entry was loaded or used, never because time has passed."""
        ...


class LeastRecentlyUsed:
    """Evicts the entry that has been unused for the longest time."""

    name = "lru"
    arrivals_compete = False

    def worth(self, uses: Uses) -> Floats:
        """Number of the last request that used the entry."""
        return uses.last


class LeastFrequentlyUsed:
    """Evicts the entry that the fewest requests used; of equals, the one unused for the longest time."""

    name = "lfu"
    arrivals_compete = False

    def worth(self, uses: Uses) -> Floats:
        """Number of requests that ever used the entry."""
        # A float64 holds both numbers exactly for the first two million uses of a chunk; after that, ties lose their
        # order.
        return uses.requests + uses.last * 2.0**-32


class AttentionGuided:
    """The published policy (arXiv 2601.13631): evicts the entry with the lowest `S_j = I_j * F_j`."""

    name = "published"
    arrivals_compete = False

    def worth(self, uses: Uses) -> Floats:
        """Attention mass summed over requests, times the number of loads."""
        return uses.importance * uses.loads


class ExpectedUse:
    """Our policy: evicts the entry that the next request is least likely to use.

    A request uses a chunk if it asks for the chunk's prefix and its selection chooses the chunk. The first probability
    is the prefix's share of recent requests. The second is the share of the prefix's requests that used the chunk,
    pulled towards a prior while there are few requests. Uses fade with a half-life. An arrival must be worth more than
    the entries already in memory.

    Args:
        prior: the assumed share of requests that use a chunk, before any is known.
        weight: the number of requests that the prior counts for.
        ahead: worth of a byte of keys relative to a byte of chunks. Keys are read in one piece before they are needed;
            chunks are scattered and read while attention waits.
    """

    name = "expected-use"
    arrivals_compete = True

    def __init__(self, prior: float = 0.2, weight: float = 5.0, ahead: float = 0.5) -> None:
        self.prior = prior
        self.weight = weight
        self.ahead = ahead

    def worth(self, uses: Uses) -> Floats:
        """Expected uses per request, up to a factor common to all entries."""
        if uses.ahead:  # Every request to the prefix uses its keys.
            return np.full(len(uses.requests), uses.prefix_heat * self.ahead)
        believed = self.weight * self.prior
        # Both counts of the ratio would fade alike, so it uses counts that do not fade. Only the prefix's heat fades.
        share = (uses.requests + believed) / (uses.prefix_requests + self.weight)
        return uses.prefix_heat * np.minimum(share, 1.0)


POLICIES = {policy.name: policy for policy in (LeastRecentlyUsed, LeastFrequentlyUsed, AttentionGuided, ExpectedUse)}


def policy_named(policy: str | EvictionPolicy) -> EvictionPolicy:
    """The policy of this name, or `policy` itself if it is an object.

    Raises:
        ConfigError: no policy has this name.
    """
    if not isinstance(policy, str):
        return policy
    if policy not in POLICIES:
        raise ConfigError(f"eviction must be one of {sorted(POLICIES)} or an EvictionPolicy, got {policy!r}")
    return POLICIES[policy]()
