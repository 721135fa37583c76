"""`copy.deepcopy` of a cache: its suffix is copied, everything that does not change is shared."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from ..prefill.recovery import Recovery
from .layers import AttachedState

if TYPE_CHECKING:
    from .contiguous_cache import ContiguousKVCache

_SHARED = ("_model", "_method", "store", "_support", "_temporary", "_whole_prefix", "_shifted", "prefix_ids")
_MADE_AGAIN = ("layers", "_attached", "_installation", "_hook", "_unserved")


def copy_of_cache(cache: ContiguousKVCache, memo: dict[int, Any]) -> ContiguousKVCache:
    """An independent cache in the same state. Model and store are shared, and so are loaded K/V of the prefix."""
    twin: ContiguousKVCache = object.__new__(type(cache))
    memo[id(cache)] = twin
    for name, value in vars(cache).items():
        if name not in _MADE_AGAIN:
            setattr(twin, name, value if name in _SHARED else copy.deepcopy(value, memo))
    twin._attached = twin._installation = twin._hook = None
    twin._unserved = cache._unserved.copy_for(twin._stats)
    if cache._installation is not None:
        twin._install(cache._living_model())
    if cache._attached is not None and twin._installation is not None:
        request = cache._attached.request.twin(twin._stats, Recovery(twin))
        twin._attached = AttachedState(request, twin._installation)
    twin.layers = [layer.copy_of(twin._attached, memo) for layer in cache.layers]
    return twin
