"""The memory tiers above the disk: their hard limits, and which chunk each evicts first."""

from .entries import Buffer
from .policies import POLICIES, EvictionPolicy
from .tier import Tier
from .tiers import MemoryTiers, Usage

__all__ = ["POLICIES", "Buffer", "EvictionPolicy", "MemoryTiers", "Tier", "Usage"]
