"""Which chunk goes first when memory is full: one small protocol, and the policies that follow it."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np

from ..errors import ConfigError
from .history import Floats, Uses


@runtime_checkable
class EvictionPolicy(Protocol):
    """Says what keeping an entry is worth.

    Attributes:
        name: in statistics and plots.
        arrivals_compete: whether what a request loaded is judged like everything else as soon as the request is over,
            so that it may be what goes (room is then made after requests, not within them). If not, an arrival stays
            until room is needed.
    """

    name: str
    arrivals_compete: bool

    def worth(self, uses: Uses) -> Floats:
        """float64 `(n,)`, higher = keep. Asked anew whenever an entry was loaded or used; never as time goes by."""
        ...


class LeastRecentlyUsed:
    """What was not used for the longest time goes first."""

    name = "lru"
    arrivals_compete = False

    def worth(self, uses: Uses) -> Floats:
        """Number of the last request that used it."""
        return uses.last


class LeastFrequentlyUsed:
    """What the fewest requests used goes first; of equals, what was not used for the longest time."""

    name = "lfu"
    arrivals_compete = False

    def worth(self, uses: Uses) -> Floats:
        """Requests that used it, ever."""
        # A float64 holds both exactly for the first two million uses of one chunk; then ties lose their order.
        return uses.requests + uses.last * 2.0**-32


class AttentionGuided:
    """The published policy (arXiv 2601.13631): `S_j = I_j * F_j`, the least goes first."""

    name = "published"
    arrivals_compete = False

    def worth(self, uses: Uses) -> Floats:
        """Attention mass summed over requests, times how often it was loaded."""
        return uses.importance * uses.loads


class ExpectedUse:
    """Ours: what is least likely to be used by the next request goes first.

    A chunk is used if its prefix is asked for, and then if the selection wants the chunk. The first is the prefix's
    share of recent requests; the second the share of its requests that used the chunk, pulled towards a prior while
    there are few of them. Uses fade with a half-life, bytes are worth what their entry is likely to save, and arrivals
    must prove better than what is there.

    Args:
        prior: the share that a chunk is believed to have before anything is known.
        weight: how many requests that belief counts for.
        ahead: what a byte of keys is worth beside one of chunks: keys are read in one piece and before they are needed,
            chunks here and there while attention waits for them.
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
    """A policy by its name, or itself.

    Raises:
        ConfigError: there is none of that name.
    """
    if not isinstance(policy, str):
        return policy
    if policy not in POLICIES:
        raise ConfigError(f"eviction must be one of {sorted(POLICIES)} or an EvictionPolicy, got {policy!r}")
    return POLICIES[policy]()
