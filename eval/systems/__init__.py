"""The systems that are measured, one file each, one protocol.

Those that read parts of a prefix do so with the library's reader, layout and threads.
"""

from .attentionstore import AttentionStore
from .attentionstore_h2o import AttentionStoreH2O
from .base import NotStoredError, System, SystemUnavailableError
from .contiguouskv import ContiguousKV
from .flexgen import FlexGen
from .impress import Impress
from .in_memory import InMemory
from .kept_tokens import KeptTokens
from .no_prefix import NoPrefix
from .recompute import Recompute
from .registry import DEFAULT_SYSTEMS, SYSTEMS, OptionKind, SystemKind, system_named
from .reload import Reload
from .setting import Setting
from .states import State, StateError, departure

__all__ = [
    "DEFAULT_SYSTEMS",
    "SYSTEMS",
    "AttentionStore",
    "AttentionStoreH2O",
    "ContiguousKV",
    "FlexGen",
    "Impress",
    "InMemory",
    "KeptTokens",
    "NoPrefix",
    "NotStoredError",
    "OptionKind",
    "Recompute",
    "Reload",
    "Setting",
    "State",
    "StateError",
    "System",
    "SystemKind",
    "SystemUnavailableError",
    "departure",
    "system_named",
]
