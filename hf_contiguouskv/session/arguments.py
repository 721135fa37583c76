"""Checks and completes the arguments of `ContiguousKVCache`."""

from __future__ import annotations

import logging
import tempfile
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..config import ContiguousKVConfig
from ..errors import ConfigError, InputError
from ..model.media_placeholders import placeholder_ids
from ..model.peft_adapters import require_no_invocation
from ..store import PrefixStore

logger = logging.getLogger("hf_contiguouskv")


def checked_ids(ids: Any) -> torch.Tensor:
    """`ids` as int64 `(n,)` on the CPU.

    Raises:
        InputError: `ids` are not int64 token ids of shape `[n]` or `[1, n]` with n >= 1.
    """
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
    """Raise `InputError` if K/V that the model computes now for `ids`, int64 `(n,)`, must not be stored."""
    if model.training:
        raise InputError("the model is in training mode; call model.eval() before its KV is stored")
    vocabulary = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if isinstance(vocabulary, int) and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise InputError(
            f"the prefix has token ids from {int(ids.min())} to {int(ids.max())}, but {type(model).__name__} has "
            f"{vocabulary} embeddings; was it made by another tokenizer?"
        )
    for name, token in placeholder_ids(model.config).items():
        if bool((ids == token).any()):
            raise InputError(
                f"the prefix holds placeholders of media ({name}={token}), whose K/V depend on more than the tokens; "
                "only text can be stored"
            )
    require_no_invocation(model, ids)
    _require_positions(model, len(ids))


def _require_positions(model: Any, tokens: int) -> None:
    text = model.config.get_text_config(decoder=True)
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int) or not 0 < limit < tokens:
        return
    message = (
        f"the prefix has {tokens} tokens, more than the {limit} (max_position_embeddings) of {type(model).__name__}"
    )
    learned = any(
        isinstance(module, torch.nn.Embedding) and ("pos" in path or "wpe" in path)
        for path, module in model.named_modules()
    )
    if learned:
        raise InputError(f"{message}, which has no embeddings for the positions behind; shorten the prefix")
    logger.warning("%s: answers may be poor", message)


class TemporaryStore:
    """A store in a temporary folder, deleted when the last cache that holds this object is gone."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="contiguouskv-")
        self.store = PrefixStore(Path(self._folder.name) / "store")
        weakref.finalize(self, _close_temporary, self.store, self._folder)


def _close_temporary(store: PrefixStore, folder: tempfile.TemporaryDirectory[str]) -> None:
    store.close()
    folder.cleanup()


def opened_store(
    store: PrefixStore | str | Path | None, needed: bool, verify: bool
) -> tuple[PrefixStore | None, TemporaryStore | None]:
    """The store to use, and its `TemporaryStore` if it is temporary (`None` was passed and a store is needed).

    Raises:
        InputError: `store` is neither a store nor a path.
        ConfigError: the store has a key, or is shared, but reads are not to be verified.
    """
    if isinstance(store, str | Path):
        store = PrefixStore.shared(store)
    if isinstance(store, PrefixStore):
        if store.has_key and not verify:
            raise ConfigError(
                "reading=ReadOptions(verify=False) leaves out what the key of a store is for: let the cache verify"
            )
        if store.url is not None and not verify:
            raise ConfigError("reading=ReadOptions(verify=False): what crosses a network is always verified")
        return store, None
    if store is not None:
        raise InputError(f"store must be a PrefixStore or a path, got {type(store).__name__}")
    temporary = TemporaryStore() if needed else None
    return (temporary.store if temporary is not None else None), temporary


def configured(config: ContiguousKVConfig | None, overrides: dict[str, Any]) -> ContiguousKVConfig:
    """`config` (or the default) with `overrides`.

    Raises:
        ConfigError: `config` is of another type, or an option does not exist.
    """
    if config is not None and not isinstance(config, ContiguousKVConfig):
        raise ConfigError(f"config must be a ContiguousKVConfig, got {type(config).__name__}")
    try:
        return replace(config or ContiguousKVConfig(), **overrides)
    except TypeError as error:
        known = ", ".join(ContiguousKVConfig.__dataclass_fields__)
        raise ConfigError(f"unknown option in {sorted(overrides)}; the options are {known}") from error
