"""The forward hooks of one cache on its model: they act on forwards with this very cache, and on nothing else."""

from __future__ import annotations

import inspect
import sys
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from .cache import ContiguousKVCache


class ForwardHook:
    """Binds the arguments of the model's forward by name and hands them to the cache.

    The model keeps the hooks, so they hold the cache weakly (a bound method would keep it alive), and the cache holds
    the model weakly (`copy.deepcopy` of a cache must not copy a model).
    """

    def __init__(self, cache: ContiguousKVCache, model: nn.Module) -> None:
        self._signature = inspect.signature(model.forward)
        owner = weakref.ref(cache)
        handles = [
            model.register_forward_pre_hook(_before(owner, self._signature), with_kwargs=True),
            model.register_forward_hook(_after(owner), with_kwargs=True),
        ]
        self._finalizer = weakref.finalize(cache, _remove, handles)

    def remove(self) -> None:
        """Take the hooks off the model (at the latest when the cache is collected). Idempotent."""
        self._finalizer()


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


def _before(owner: weakref.ref[ContiguousKVCache], signature: inspect.Signature) -> Any:
    @torch.compiler.disable
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cache = owner()
        if cache is None or not _mentions(cache, args, kwargs):
            return None
        inputs = dict(signature.bind_partial(*args, **kwargs).arguments)
        # Arguments that the signature gathers in **kwargs come back flat.
        for name, parameter in signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                inputs.update(inputs.pop(name, {}))
        cache.before_forward(inputs)
        return (), inputs

    return before


def _after(owner: weakref.ref[ContiguousKVCache]) -> Any:
    @torch.compiler.disable
    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        cache = owner()
        if cache is not None and _mentions(cache, args, kwargs):
            cache.after_forward()

    return after


def _mentions(cache: ContiguousKVCache, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return kwargs.get("past_key_values") is cache or any(argument is cache for argument in args)


def caller_generation_config() -> Any:
    """The `generation_config` of the `generate` call that is setting an attribute of a cache right now, or `None`.

    A forward cannot tell whether its prompt is the whole one or the first block of several (`prefill_chunk_size`);
    the frame in which `generate` prepares its cache can.
    """
    frame = sys._getframe(2)
    for _ in range(3):
        if frame is None:
            return None
        config = frame.f_locals.get("generation_config")
        if config is not None:
            return config
        frame = frame.f_back  # type: ignore[assignment]
    return None
