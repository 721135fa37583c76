"""Which models can be served, found out once per model: from the config, then by watching a few tokens go through."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from ..errors import UnsupportedModelError
from .attention import Installation, tagged
from .forward_hooks import ForwardHook, HookedCache
from .layer_plan import LayerPlan
from .refusals import NOT_CAUSAL, TRIAL_IDS, looks_ahead, reason_after_trial, reason_for_refusal
from .transformers_internals import cache_argument

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# These change their frequencies when a sequence grows past a length: stored keys would not fit later queries.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True)
class ModelSupport:
    """What the library needs to know about a model.

    Attributes:
        plan: windows and devices of its layers.
        kv_heads, head_dim: shape of a token's K (and V) in one layer.
        dtype: of K and V.
    """

    plan: LayerPlan
    kv_heads: int
    head_dim: int
    dtype: torch.dtype


def innermost_causal_lm(model: nn.Module) -> nn.Module:
    """The module whose forward takes `input_ids` and the cache, below wrappers (PEFT, `torch.compile`, DDP)."""
    inner: Any = model
    while True:
        if hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif type(inner).__name__ in ("DataParallel", "DistributedDataParallel"):
            inner = inner.module
        elif hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        else:
            return inner  # type: ignore[no-any-return]


def decoder_config(model: nn.Module) -> Any:
    """The config that the model's attention layers share."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise UnsupportedModelError(f"{type(model).__name__} is not a transformers model: it has no config")
    return config.get_text_config(decoder=True)


def layer_windows(model: nn.Module) -> tuple[int | None, ...]:
    """The sliding window of each layer (`None`: full attention); refuses what the config already rules out."""
    name = type(model).__name__
    reason = reason_for_refusal(model)
    if reason is not None:
        raise UnsupportedModelError(f"{name} {reason}")
    text = decoder_config(model)
    kinds = _rope_kinds(getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None))
    for kind in LENGTH_DEPENDENT_ROPE:
        if kind in kinds:
            raise UnsupportedModelError(
                f"{name} uses {kind!r} RoPE, which changes with the length of the sequence: stored keys would be wrong"
            )
    try:
        layers = DynamicCache(config=model.config).layers
    except Exception as error:
        raise UnsupportedModelError(f"transformers cannot make a DynamicCache for {name}: {error}") from error
    types = getattr(text, "layer_types", None) or [None] * len(layers)
    windows: list[int | None] = []
    for position, (layer, kind) in enumerate(zip(layers, types, strict=False)):
        if type(layer) is DynamicLayer:
            windows.append(None)
        elif type(layer) is DynamicSlidingWindowLayer and kind in (None, "sliding_attention"):
            if layer.sliding_window < 2:
                raise UnsupportedModelError(f"{name}: layer {position} has a sliding window below 2 tokens")
            windows.append(layer.sliding_window)
        else:
            raise UnsupportedModelError(
                f"{name}: layer {position} is {kind or type(layer).__name__!r}; only full and sliding-window attention "
                "with their own KV cache are supported (no linear attention, hybrid state, chunked or shared KV)"
            )
    if not windows:
        raise UnsupportedModelError(f"{name} has no attention layers with a KV cache")
    return tuple(windows)


def _rope_kinds(parameters: Any) -> set[str]:
    if not isinstance(parameters, Mapping):
        return set()
    kinds = {str(parameters.get("rope_type", parameters.get("type", "default")))}
    for value in parameters.values():
        kinds |= _rope_kinds(value)
    return kinds


_known: weakref.WeakKeyDictionary[nn.Module, tuple[Any, ModelSupport]] = weakref.WeakKeyDictionary()


def require_support(model: nn.Module) -> ModelSupport:
    """What is needed to serve `model`, or an `UnsupportedModelError` that names the reason. Remembered per model."""
    parameter = next(model.parameters(), None)
    state = (
        None if parameter is None else (parameter.dtype, parameter.device),
        str(getattr(model, "hf_device_map", None)),
    )
    known = _known.get(model)
    if known is not None and known[0] == state:
        return known[1]
    support = _probe(model)
    _known[model] = (state, support)
    return support


class _ProbeLayer(CacheLayerMixin):
    """Hands its K/V to attention and remembers what happened to them."""

    plain = False

    def __init__(self) -> None:
        super().__init__()
        self.updates = 0
        self.reached = 0
        self.problem: str | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.updates += 1
        self.keys, self.values = key_states, value_states
        return tagged(key_states, self), value_states

    def visible_kv(
        self, query: torch.Tensor, attention_mask: torch.Tensor | None, options: Mapping[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.reached += 1
        if options.get("position_bias") is not None:
            self.problem = "adds a position bias that depends on columns"
        if attention_mask is not None and attention_mask.dtype != torch.bool:
            lowest = torch.finfo(attention_mask.dtype).min
            if not ((attention_mask == 0) | (attention_mask <= lowest)).all():
                self.problem = "adds a bias to its attention mask"
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


def input_device(model: nn.Module) -> torch.device:
    """Where the model's inputs go; with all weights offloaded, where its hooks bring them to be used."""
    device: torch.device = getattr(model, "device", torch.device("cpu"))
    if device.type != "meta":
        return device
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):
            used = getattr(one, "execution_device", None)
            if used is not None:
                return torch.device(used)
    return torch.device("cpu")


def run_forward(model: nn.Module, ids: torch.Tensor, cache: Cache, start: int) -> Any:
    """Run tokens through a model for the sake of their K/V.

    The model runs eagerly, compiled or not (dynamo would trace what a cache does with its K/V), computes no more logits
    than it must, and is told the positions: some would shift them by what they remember of an earlier image.

    Args:
        model: the causal LM.
        ids: int64 `(rows, q)`, on the model's device.
        cache: receives the K/V.
        start: position of the first token.

    Returns:
        what the model returns.
    """
    accepted = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {cache_argument(model): cache, "use_cache": True}
    if "logits_to_keep" in accepted:
        options["logits_to_keep"] = 1
    if "position_ids" in accepted:
        options["position_ids"] = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
    with torch.compiler.set_stance("force_eager"):
        return model(input_ids=ids, **options)


class _ProbeCache(HookedCache):
    """Goes through the model as a `ContiguousKVCache` would, hook and attention function included."""

    def __init__(self, windows: int, installation: Installation) -> None:
        super().__init__(layers=[_ProbeLayer() for _ in range(windows)])
        self._installation = installation
        self.seen: list[str] = []

    def before_forward(self, inputs: dict[str, Any]) -> None:
        self.seen.append("before")
        self._installation.activate()

    def after_forward(self, output: Any) -> Any:
        self.seen.append("after")


def _probe(model: nn.Module) -> ModelSupport:
    windows = layer_windows(model)
    name = type(model).__name__
    device = input_device(model)
    ids = torch.tensor(TRIAL_IDS, device=device)
    installation = Installation(decoder_config(model))
    cache = _ProbeCache(len(windows), installation)
    layers: list[Any] = cache.layers
    hook = ForwardHook(cache, model)
    try:
        with torch.no_grad():
            run_forward(model, ids, cache, 0)
    except Exception as error:
        raise UnsupportedModelError(
            f"{name} failed on a trial forward: {str(error) or type(error).__name__}"
        ) from error
    finally:
        installation.release()
        hook.remove()
    if cache.seen != ["before", "after"]:
        raise UnsupportedModelError(
            f"{name}: its forward hooks did not see the cache of a trial forward (seen: {cache.seen}); this version of "
            f"transformers ({transformers.__version__}) may pass it in a way that is not known here yet"
        )
    for position, layer in enumerate(layers):
        reason = reason_after_trial(model, position, layer.updates, layer.reached)
        if reason is not None:
            raise UnsupportedModelError(f"{name} {reason}")
        if layer.problem:
            raise UnsupportedModelError(f"{name}: layer {position} {layer.problem}, which is not supported")
    if any(looks_ahead(states) for layer in layers for states in (layer.keys, layer.values)):
        raise UnsupportedModelError(f"{name} {NOT_CAUSAL}")
    keys = [layer.keys for layer in layers]
    values = [layer.values for layer in layers]
    shapes = {(tuple(k.shape[1::2]), tuple(v.shape[1::2])) for k, v in zip(keys, values, strict=True)}
    if len(shapes) != 1 or keys[0].shape != values[0].shape:
        raise UnsupportedModelError(
            f"{name}: K and V must have one shape in all layers, got (kv_heads, head_dim) of K and V: {sorted(shapes)}"
        )
    dtypes = {k.dtype for k in keys} | {v.dtype for v in values}
    if len(dtypes) != 1 or not dtypes <= set(DTYPES):
        raise UnsupportedModelError(f"{name}: K and V must have one dtype of {DTYPES}, got {sorted(map(str, dtypes))}")
    plan = LayerPlan(windows, tuple(k.device for k in keys))
    return ModelSupport(plan, keys[0].shape[1], keys[0].shape[3], dtypes.pop())
