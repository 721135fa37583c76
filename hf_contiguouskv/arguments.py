"""Checking and completing what a user passes to `ContiguousKVCache`."""

from __future__ import annotations

import tempfile
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .adapters import require_no_invocation
from .config import ContiguousKVConfig
from .errors import ConfigError, InputError
from .placeholders import placeholder_ids
from .store import PrefixStore


def checked_ids(ids: Any) -> torch.Tensor:
    """`ids` as int64 `(n,)` on the CPU; raises `InputError` for anything but `[n]` or `[1, n]` token ids, n >= 1."""
    if not isinstance(ids, torch.Tensor):
        try:
            ids = torch.as_tensor(ids)
        except Exception as error:
            raise InputError(f"token ids must be an int64 tensor [n] or [1, n], got {type(ids).__name__}") from error
    if ids.ndim == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.ndim != 1:
        raise InputError(f"token ids must have the shape [n] or [1, n], got {list(ids.shape)}")
    if ids.shape[0] == 0:
        raise InputError("the prefix is empty: at least one token is needed")
    if ids.dtype != torch.int64:
        raise InputError(f"token ids must be int64 (torch.long), got {ids.dtype}")
    return torch.Tensor.cpu(ids.detach())


def require_storable(model: Any, ids: torch.Tensor) -> None:
    """Raise `InputError` if what the model would compute now for `ids` (int64 `(n,)`) must not be stored."""
    if model.training:
        raise InputError("the model is in training mode; call model.eval() before its KV is stored")
    for name, token in placeholder_ids(model.config).items():
        if bool((ids == token).any()):
            raise InputError(
                f"the prefix holds placeholders of media ({name}={token}), whose K/V depend on more than the tokens; "
                "only text can be stored"
            )
    require_no_invocation(model, ids)


class TemporaryStore:
    """A store in a folder that goes when nobody holds this object any more (a cache and its copies)."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="contiguouskv-")
        self.store = PrefixStore(Path(self._folder.name) / "store")
        weakref.finalize(self, _close_temporary, self.store, self._folder)


def _close_temporary(store: PrefixStore, folder: tempfile.TemporaryDirectory[str]) -> None:
    store.close()
    folder.cleanup()


def configured(config: ContiguousKVConfig | None, overrides: dict[str, Any]) -> ContiguousKVConfig:
    if config is not None and not isinstance(config, ContiguousKVConfig):
        raise ConfigError(f"config must be a ContiguousKVConfig, got {type(config).__name__}")
    try:
        return replace(config or ContiguousKVConfig(), **overrides)
    except TypeError as error:
        known = ", ".join(ContiguousKVConfig.__dataclass_fields__)
        raise ConfigError(f"unknown option in {sorted(overrides)}; the options are {known}") from error
