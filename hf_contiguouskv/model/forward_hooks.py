"""The forward hooks of one cache on its model: they act only on forwards with this very cache."""

from __future__ import annotations

import inspect
import weakref
from abc import ABC, abstractmethod
from typing import Any, Protocol

import torch
from torch import nn
from transformers.cache_utils import Cache

from .attention import NO_FULL_GRAPH
from .transformers_internals import GenerateListener, NotifiedByGenerate, bound_arguments


class ForwardListener(GenerateListener, Protocol):
    """Receives notice of the calls that a cache is passed to."""

    def before_forward(self, inputs: dict[str, Any]) -> None:
        """Called before the model's forward; `inputs` are its arguments by name and may be changed in place."""
        ...

    def forward_runs(self, running: bool) -> None:
        """Called when a forward of the model, or of its decoder alone, begins or ends, even if it failed."""
        ...

    def after_forward(self, output: Any) -> Any:
        """Called after the model's forward has returned `output`; a result other than `None` replaces it."""
        ...


class ListeningCache(NotifiedByGenerate, Cache):
    """A cache whose `session` is notified of every `generate` and forward that the cache is passed to."""

    session: ForwardListener | None


class ForwardHook:
    """Binds the arguments of the model's forward by name and passes them to the session of the cache.

    The model keeps the hooks alive, so they hold the cache weakly (a bound method would keep it alive). The cache holds
    the model weakly, because `copy.deepcopy` of a cache must not copy a model.
    """

    def __init__(self, cache: ListeningCache, model: nn.Module) -> None:
        owner = weakref.ref(cache)
        handles = [
            model.register_forward_pre_hook(_Before(owner, inspect.signature(model.forward)), with_kwargs=True),
            model.register_forward_hook(_After(owner), with_kwargs=True, always_call=True),
        ]
        # The base model may be called directly. Its inputs are not changed, but the session is notified.
        find: Any = getattr(model, "get_decoder", None)
        decoder = find() if callable(find) else None
        if isinstance(decoder, nn.Module) and decoder is not model:
            handles.append(decoder.register_forward_pre_hook(_DecoderBegins(owner), with_kwargs=True))
            handles.append(decoder.register_forward_hook(_DecoderEnds(owner), with_kwargs=True, always_call=True))
        self._finalizer = weakref.finalize(cache, _remove, handles)

    def remove(self) -> None:
        """Remove the hooks from the model; this also happens when the cache is collected. Idempotent."""
        self._finalizer()


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


def _nothing(*args: Any) -> None:
    """Replaces a hook in a copy of the model, which the cache does not serve."""


def _left_behind() -> Any:
    return _nothing


def _hooked(args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> bool:
    """Whether a listening cache was passed to a forward.

    Compiled forwards trace this function, and trace no further if it returns `False`.
    """
    if kwargs is None:
        return False
    for value in kwargs.values():
        if isinstance(value, ListeningCache):
            return True
    return any(isinstance(value, ListeningCache) for value in args)


_disabled = torch.compiler.disable(reason=NO_FULL_GRAPH)


class _Hook(ABC):
    """A hook that is not copied or pickled with the model.

    `kwargs` may be missing: torch looks up the hooks and their kind separately, and in between another thread may
    remove the hooks of its own cache.
    """

    def __init__(self, owner: weakref.ref[ListeningCache]) -> None:
        self._owner = owner

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any = None, *output: Any) -> Any:
        if not isinstance(kwargs, dict) or not _hooked(args, kwargs):
            return None
        return self._handle(args, kwargs, *output)

    @_disabled
    def _handle(self, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> Any:
        cache = self._owner()
        session = None if cache is None else cache.session
        if session is None or not any(value is cache for value in (*kwargs.values(), *args)):
            return None
        return self.act(session, args, kwargs, *output)

    @abstractmethod
    def act(self, session: ForwardListener, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> Any:
        """Notify the session of the hook's cache."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _nothing

    def __reduce__(self) -> Any:
        return _left_behind, ()


class _Before(_Hook):
    def __init__(self, owner: weakref.ref[ListeningCache], signature: inspect.Signature) -> None:
        super().__init__(owner)
        self._signature = signature

    def act(self, session: ForwardListener, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> Any:
        inputs = bound_arguments(self._signature, args, kwargs)
        session.before_forward(inputs)
        return (), inputs


class _After(_Hook):
    def act(self, session: ForwardListener, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> Any:
        session.forward_runs(False)
        # A failed forward has no output, and its layers hold only part of a forward's K/V.
        return None if not output or output[0] is None else session.after_forward(output[0])


class _DecoderBegins(_Hook):
    def act(self, session: ForwardListener, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> Any:
        session.forward_runs(True)


class _DecoderEnds(_Hook):
    def act(self, session: ForwardListener, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> Any:
        session.forward_runs(False)
