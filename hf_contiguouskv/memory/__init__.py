"""What is kept in memory above the disk: tiers with hard limits, and which chunk goes first."""

from .entries import Buffer
from .policies import POLICIES, EvictionPolicy
from .tier import Tier
from .tiers import MemoryTiers, Usage

__all__ = ["POLICIES", "Buffer", "EvictionPolicy", "MemoryTiers", "Tier", "Usage"]
