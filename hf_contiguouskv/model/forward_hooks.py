"""The forward hooks of one cache on its model: they act on forwards with this very cache, and on nothing else."""

from __future__ import annotations

import inspect
import weakref
from typing import Any, Protocol

import torch
from torch import nn
from transformers.cache_utils import Cache

from .attention import NO_FULL_GRAPH
from .transformers_internals import GenerateListener, NotifiedByGenerate, bound_arguments


class ForwardListener(GenerateListener, Protocol):
    """What a cache tells of the calls that it is given to."""

    def before_forward(self, inputs: dict[str, Any]) -> None:
        """The model's forward begins; `inputs` are its arguments by name and may be changed in place."""
        ...

    def forward_runs(self, running: bool) -> None:
        """A forward of the model, or of its decoder alone, begins or is over, whether it failed or not."""
        ...

    def after_forward(self, output: Any) -> Any:
        """The model's forward has returned `output`; what is returned instead of `None` replaces it."""
        ...


class ListeningCache(NotifiedByGenerate, Cache):
    """A cache whose `session` hears of every `generate` and forward that the cache is given to."""

    session: ForwardListener | None


class ForwardHook:
    """Binds the arguments of the model's forward by name and hands them to the session of the cache.

    The model keeps the hooks, so they hold the cache weakly (a bound method would keep it alive), and the cache holds
    the model weakly (`copy.deepcopy` of a cache must not copy a model).
    """

    def __init__(self, cache: ListeningCache, model: nn.Module) -> None:
        owner = weakref.ref(cache)
        handles = [
            model.register_forward_pre_hook(_Before(owner, inspect.signature(model.forward)), with_kwargs=True),
            model.register_forward_hook(_After(owner), with_kwargs=True, always_call=True),
        ]
        # The base model may be called by itself. Its inputs are not changed, but the cache learns who calls.
        find: Any = getattr(model, "get_decoder", None)
        decoder = find() if callable(find) else None
        if isinstance(decoder, nn.Module) and decoder is not model:
            handles.append(decoder.register_forward_pre_hook(_DecoderBegins(owner), with_kwargs=True))
            handles.append(decoder.register_forward_hook(_DecoderEnds(owner), with_kwargs=True, always_call=True))
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


def _hooked(args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> bool:
    """Whether a forward was given any cache that listens.

    Compiled forwards trace this, and nothing behind it where the answer is no.
    """
    if kwargs is None:
        return False
    for value in kwargs.values():
        if isinstance(value, ListeningCache):
            return True
    return any(isinstance(value, ListeningCache) for value in args)


_disabled = torch.compiler.disable(reason=NO_FULL_GRAPH)


class _Hook:
    """A hook that is left behind when the model is copied or pickled.

    `kwargs` may be missing: torch looks up the hooks and their kind separately, and another thread may take a cache
    (not the one of this forward) off the model in between.
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

    def act(self, session: ForwardListener, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> Any:
        """What this hook tells the session of its cache."""
        raise NotImplementedError

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
        # A forward that failed has no output: what it left in the layers is not a whole forward's.
        return None if not output or output[0] is None else session.after_forward(output[0])


class _DecoderBegins(_Hook):
    def act(self, session: ForwardListener, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> Any:
        session.forward_runs(True)


class _DecoderEnds(_Hook):
    def act(self, session: ForwardListener, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> Any:
        session.forward_runs(False)
