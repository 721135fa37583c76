"""Prefixes on disk: `PrefixStore` and the records that it returns."""

from .entries import GcReport, PrefixInfo, SegmentSpan, StoredPrefix, StoreProblem
from .format import KVGeometry
from .prefix_store import PrefixStore

__all__ = ["GcReport", "KVGeometry", "PrefixInfo", "PrefixStore", "SegmentSpan", "StoreProblem", "StoredPrefix"]
