"""The systems that are measured, one file each, one protocol.

Those that read parts of a prefix do so with the library's reader, layout and threads.
"""

from .attentionstore import AttentionStore
from .base import NotStoredError, System
from .contiguouskv import ContiguousKV
from .in_memory import InMemory
from .recompute import Recompute
from .reload import Reload

__all__ = ["AttentionStore", "ContiguousKV", "InMemory", "NotStoredError", "Recompute", "Reload", "System"]
