"""Prefix KV caches on disk, read back in chunks that attention needs: a drop-in transformers `Cache`."""

from .cache.contiguous_cache import ContiguousKVCache
from .config import ContiguousKVConfig
from .stats import RequestStats, StoreStats
from .store import PrefixInfo, PrefixStore

__version__ = "0.1.0"

__all__ = [
    "ContiguousKVCache",
    "ContiguousKVConfig",
    "PrefixInfo",
    "PrefixStore",
    "RequestStats",
    "StoreStats",
]
