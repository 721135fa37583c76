"""The forward hooks of one cache on its model: they act on forwards with this very cache, and on nothing else."""

from __future__ import annotations

import inspect
import sys
import weakref
from dataclasses import dataclass
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
        owner = weakref.ref(cache)
        handles = [
            model.register_forward_pre_hook(_Before(owner, inspect.signature(model.forward)), with_kwargs=True),
            model.register_forward_hook(_After(owner), with_kwargs=True),
        ]
        # The base model may be called by itself. Its inputs are not changed, but the cache learns who calls.
        find: Any = getattr(model, "get_decoder", None)
        decoder = find() if callable(find) else None
        if isinstance(decoder, nn.Module) and decoder is not model:
            handles.append(decoder.register_forward_pre_hook(_Announce(owner, True), with_kwargs=True))
            handles.append(decoder.register_forward_hook(_Announce(owner, False), with_kwargs=True))
        self._finalizer = weakref.finalize(cache, _remove, handles)

    def remove(self) -> None:
        """Take the hooks off the model (at the latest when the cache is collected). Idempotent."""
        self._finalizer()


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


def _nothing(*args: Any) -> None:
    """What a hook becomes in a copy of the model, which this cache does not serve."""


def _left_behind() -> Any:
    return _nothing


class _Hook:
    """A hook that is left behind when the model is copied or pickled."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _nothing

    def __reduce__(self) -> Any:
        return _left_behind, ()


class _Before(_Hook):
    def __init__(self, owner: weakref.ref[ContiguousKVCache], signature: inspect.Signature) -> None:
        self._owner = owner
        self._signature = signature

    # `kwargs` may be missing: torch looks up the hooks and their kind separately, and another thread may take a cache
    # (not the one of this forward) off the model in between.
    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        cache = self._owner()
        if cache is None or kwargs is None or not _mentions(cache, args, kwargs):
            return None
        inputs = dict(self._signature.bind_partial(*args, **kwargs).arguments)
        # Arguments that the signature gathers in **kwargs come back flat.
        for name, parameter in self._signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                inputs.update(inputs.pop(name, {}))
        cache.before_forward(inputs)
        return (), inputs


class _After(_Hook):
    def __init__(self, owner: weakref.ref[ContiguousKVCache]) -> None:
        self._owner = owner

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any, *output: Any) -> None:
        cache = self._owner()
        if cache is not None and isinstance(kwargs, dict) and _mentions(cache, args, kwargs):
            cache.after_forward()


class _Announce(_Hook):
    def __init__(self, owner: weakref.ref[ContiguousKVCache], running: bool) -> None:
        self._owner = owner
        self._running = running

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any = None, *output: Any) -> None:
        cache = self._owner()
        if cache is not None and isinstance(kwargs, dict) and _mentions(cache, args, kwargs):
            cache.announce(self._running)


def _mentions(cache: ContiguousKVCache, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return kwargs.get("past_key_values") is cache or any(argument is cache for argument in args)


@dataclass(frozen=True)
class GenerateCall:
    """A running call of `generate`.

    Attributes:
        config: its generation config.
        prompt: int64 `(rows, n)`, what it was given (after expansion to beams), if it is tokens.
        attention_mask: 2D or `None`.
    """

    config: Any
    prompt: torch.Tensor | None
    attention_mask: torch.Tensor | None

    @property
    def whole_prompt(self) -> torch.Tensor | None:
        """`prompt`, unless it holds only tokens that come after those of the cache (the mask covers both)."""
        if self.prompt is None:
            return None
        length = self.prompt.shape[1]
        # generate drops a mask of ones, but notes its length.
        mask = self.attention_mask
        covered = getattr(self.config, "_mask_length", length) if mask is None else mask.shape[-1]
        return self.prompt if covered == length else None

    @property
    def block(self) -> int | None:
        """Tokens per forward of a chunked prefill, or `None`."""
        return getattr(self.config, "prefill_chunk_size", None)


def running_generate() -> GenerateCall | None:
    """The innermost `generate` that is running on this thread, or `None`.

    A forward cannot tell whether its tokens are a whole prompt or the first block of several (`prefill_chunk_size`),
    nor whether a cache is about to be used for another prompt; the frame of `generate` can.
    """
    frame: Any = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "generate" and str(frame.f_globals.get("__name__", "")).startswith("transformers."):
            known = frame.f_locals
            arguments = known.get("model_kwargs") or {}
            prompt, mask = known.get("input_ids"), arguments.get("attention_mask")
            return GenerateCall(
                known.get("generation_config"),
                prompt if isinstance(prompt, torch.Tensor) and prompt.ndim == 2 else None,
                mask if isinstance(mask, torch.Tensor) else None,
            )
        frame = frame.f_back
    return None
