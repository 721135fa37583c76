"""The classes under test: the library's, or the stand-in's when `CONTRACT_STAND_IN` is set."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hf_contiguouskv import ContiguousKVConfig

if os.environ.get("CONTRACT_STAND_IN"):
    from .stand_in import StandInCache as ContiguousKVCache
    from .stand_in import StandInStore as PrefixStore
else:
    from hf_contiguouskv import ContiguousKVCache, PrefixStore

__all__ = ["ContiguousKVCache", "PrefixStore", "prefix_from_disk", "write_prefix", "written_for"]


def written_for(config: ContiguousKVConfig) -> ContiguousKVConfig:
    """The default, in the form in which `config` stores a prefix."""
    return ContiguousKVConfig(index_bits=config.index_bits, layers_per_group=config.layers_per_group)


def write_prefix(model: Any, prefix_ids: torch.Tensor, path: Path, **options: Any) -> None:
    """Compute the prefix, publish it in the store at `path`, and close everything."""
    with PrefixStore(path) as store:
        ContiguousKVCache(model, prefix_ids, store=store, **options).close()


@contextmanager
def prefix_from_disk(model: Any, prefix_ids: torch.Tensor, path: Path, **options: Any):
    """A cache whose prefix was written by another cache object and store, and is read back by a new one."""
    config = options.get("config")
    write_prefix(model, prefix_ids, path, **({} if config is None else {"config": written_for(config)}))
    with PrefixStore(path) as store:
        cache = ContiguousKVCache(model, prefix_ids, store=store, **options)
        try:
            yield cache
        finally:
            cache.close()
