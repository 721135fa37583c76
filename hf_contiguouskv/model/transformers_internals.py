"""Everything in this library that depends on the internals of transformers.

transformers guarantees none of this, and releases come every two to three weeks. `tests/contract/test_internals.py` has
a canary for every function here, and `make compat` runs them on the oldest and the newest supported release.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, GenerationMixin
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import UnsupportedModelError
from .modules import modules_of

# -- the name of the cache argument -----------------------------------------------------------------------------------

CACHE_NAMES = ("cache", "past_key_values")
"""Names of the argument of `generate` and every forward that holds the cache; 5.24 renamed the second to the first."""

_DEFAULT_NAME = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)


def cache_argument(model: Any = None) -> str:
    """The name of the cache argument of `model`'s forward (a module or a function); without a model, of `generate`."""
    if model is not None:
        parameters = inspect.signature(getattr(model, "forward", model)).parameters
        for name in CACHE_NAMES:
            if name in parameters:
                return name
    return _DEFAULT_NAME


def bound_arguments(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward by name, including those gathered in `**kwargs`.

    A cache under a deprecated name keeps that name, so that the caller sees the deprecation warning.
    """
    old = next((name for name in CACHE_NAMES if name in kwargs and name not in signature.parameters), None)
    set_aside = {} if old is None else {old: kwargs[old]}
    others = {name: value for name, value in kwargs.items() if name not in set_aside}
    inputs = dict(signature.bind_partial(*args, **others).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            inputs.update(inputs.pop(name, {}))
    return inputs | set_aside


# -- running `generate` calls -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GenerateCall:
    """A running call of `generate`.

    Attributes:
        config: the call's generation config.
        prompt: the given prompt (after expansion to beams), int64 `(rows, n)`; `None` if it is not tokens.
        attention_mask: 2D or `None`.
        embeddings: the whole prompt, `(rows, n, hidden)`, if it was given as embeddings.
        arguments: all that goes on to the model's forward, by name, but the tokens.
    """

    config: Any
    prompt: torch.Tensor | None
    attention_mask: torch.Tensor | None
    embeddings: torch.Tensor | None
    arguments: Mapping[str, Any]

    @property
    def whole_prompt(self) -> torch.Tensor | None:
        """`prompt`, or `None` if it holds only the tokens after those of the cache (the mask covers both)."""
        if self.prompt is None or self.prompt.shape[1] == 0:
            return None
        length = self.prompt.shape[1]
        # generate drops a mask of ones, but keeps its length.
        mask = self.attention_mask
        covered = getattr(self.config, "_mask_length", length) if mask is None else mask.shape[-1]
        return self.prompt if covered == length else None

    @property
    def block(self) -> int | None:
        """Tokens per forward of a chunked prefill, or `None`."""
        return getattr(self.config, "prefill_chunk_size", None)


def _is_generate(frame: Any) -> bool:
    return frame.f_code.co_name == "generate" and str(frame.f_globals.get("__name__", "")).startswith("transformers.")


def running_generate() -> GenerateCall | None:
    """The innermost `generate` that is running on this thread, or `None`.

    A forward cannot tell whether its tokens are a whole prompt or the first of several blocks (`prefill_chunk_size`),
    nor whether the cache is about to serve another prompt. The frame of `generate` can.
    """
    frame: Any = sys._getframe(1)
    while frame is not None:
        if _is_generate(frame):
            known = frame.f_locals
            arguments = known.get("model_kwargs") or {}
            prompt, mask = known.get("input_ids"), arguments.get("attention_mask")
            return GenerateCall(
                known.get("generation_config"),
                prompt if isinstance(prompt, torch.Tensor) and prompt.ndim == 2 else None,
                mask if isinstance(mask, torch.Tensor) else None,
                arguments.get("inputs_embeds"),
                arguments,
            )
        frame = frame.f_back
    return None


# (Where a release has no such method, or another one, a call prefills in one block.)
_PREFILL = getattr(getattr(GenerationMixin, "_prefill", None), "__code__", None)
_BLOCKS_LEAVE_OUT_CACHED = _PREFILL is not None and "prefill_ids" in _PREFILL.co_varnames


def cut_before_blocks(call: GenerateCall) -> None:
    """Make a `generate` with `prefill_chunk_size` remove cached tokens from its prompt before it splits it into blocks.

    Until 5.22, `generate` removes them only without blocks, so there this call prefills in one block. (Each call has
    its own copy of the config.)
    """
    if not _BLOCKS_LEAVE_OUT_CACHED:
        call.config.prefill_chunk_size = None


def in_use_on_thread(cache: Any, thread: int) -> bool:
    """Whether the thread with this identifier is running a `generate` or a forward that was given `cache`."""
    frame: Any = sys._current_frames().get(thread)
    while frame is not None:
        given: Any = ()
        if _is_generate(frame):
            given = (frame.f_locals.get("model_kwargs") or {}).values()
        elif frame.f_code.co_name == "_call_impl":  # `nn.Module._call_impl` runs a forward and its hooks.
            given = (*(frame.f_locals.get("kwargs") or {}).values(), *(frame.f_locals.get("args") or ()))
        if any(value is cache for value in given):
            return True
        frame = frame.f_back
    return False


class GenerateListener(Protocol):
    """Is notified of calls of `generate`."""

    def generate_begins(self, call: GenerateCall | None) -> None:
        """Called when `generate` receives the cache; `call` is `None` if its frame was not found."""
        ...


class NotifiedByGenerate:
    """A mixin for caches: `generate` sets `_is_user_defined` on a cache that it is given, before its first forward."""

    session: GenerateListener | None
    _given_to_generate = False

    @property
    def _is_user_defined(self) -> bool:
        return self._given_to_generate

    @_is_user_defined.setter
    def _is_user_defined(self, value: bool) -> None:
        self._given_to_generate = bool(value)
        if value and self.session is not None:
            self.session.generate_begins(running_generate())


# -- attention --------------------------------------------------------------------------------------------------------


def register_attention(name: str, function: Callable[..., Any], like: str) -> None:
    """Register the attention implementation `name` with the mask of `like`; without a mask, masks would be `None`."""
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[like])


def attention_function(base: str, module: nn.Module) -> Callable[..., Any]:
    """The function behind the implementation `base`, for an attention module of a model."""
    if base != "eager":
        return ALL_ATTENTION_FUNCTIONS[base]  # type: ignore[no-any-return]
    # `eager` is not in the registry: it is a function in the module that defines the attention class.
    for cls in type(module).__mro__:
        function = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if function is not None:
            return function  # type: ignore[no-any-return]
    raise UnsupportedModelError(f"{type(module).__name__} has no eager_attention_forward in the module that defines it")


def attention_implementation(config: Any) -> Any:
    """The name of the attention implementation that layers with this config use now."""
    # Called several times per layer, so bypass the config's own attribute access, which is slow.
    return object.__getattribute__(config, "_attn_implementation_internal")


def set_attention_implementation(config: Any, name: str) -> None:
    """Make layers with this config use another implementation, without the checks of `set_attn_implementation`."""
    config._attn_implementation_internal = name


def is_assisted(layers: Iterable[Any]) -> bool:
    """Whether assisted decoding uses the cache of these layers: it makes them keep tokens that it may remove again."""
    return any(getattr(layer, "record_past", False) for layer in layers)


# -- positions --------------------------------------------------------------------------------------------------------


def shifted_positions(model: nn.Module) -> list[nn.Module]:
    """Modules that remember a position offset from the images of an earlier call (`rope_deltas` of Qwen-VL)."""
    return [module for module in modules_of(model) if "rope_deltas" in module.__dict__]


def forget_shift(modules: list[nn.Module]) -> None:
    """Clear the remembered offset of these modules."""
    for module in modules:
        setattr(module, "rope_deltas", None)  # noqa: B010 (mypy knows of no such attribute)
