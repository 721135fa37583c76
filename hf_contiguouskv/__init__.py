"""Prefix KV caches on disk, read back in chunks that attention needs: a drop-in transformers `Cache`."""

from . import errors
from .cache.contiguous_cache import ContiguousKVCache
from .config import AttentionMass, ContiguousKVConfig, IndexedKeys, ReadOptions
from .memory import EvictionPolicy
from .planning.auto_budget import BudgetChoice
from .stats import RequestStats, StoreStats
from .store import PrefixInfo, PrefixStore
from .store.backend import SegmentBackend
from .timeline import Timeline

__version__ = "0.1.0"

__all__ = [
    "AttentionMass",
    "BudgetChoice",
    "ContiguousKVCache",
    "ContiguousKVConfig",
    "EvictionPolicy",
    "IndexedKeys",
    "PrefixInfo",
    "PrefixStore",
    "ReadOptions",
    "RequestStats",
    "SegmentBackend",
    "StoreStats",
    "Timeline",
    "errors",
]
