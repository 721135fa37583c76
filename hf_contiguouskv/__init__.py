"""Prefix KV caches on disk, read back in chunks that attention needs: a drop-in transformers `Cache`."""

from .cache.contiguous_cache import ContiguousKVCache
from .config import AttentionMass, ContiguousKVConfig, IndexedKeys, ReadOptions
from .stats import RequestStats, StoreStats
from .store import PrefixInfo, PrefixStore

__version__ = "0.1.0"

__all__ = [
    "AttentionMass",
    "ContiguousKVCache",
    "ContiguousKVConfig",
    "IndexedKeys",
    "PrefixInfo",
    "PrefixStore",
    "ReadOptions",
    "RequestStats",
    "StoreStats",
]
