"""A trial forward: a few tokens run through a model show the shape of its K/V and whether it can be served."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers.cache_utils import CacheLayerMixin

from ..errors import UnsupportedModelError
from .attention import Installation, tagged
from .causal_lm import decoder_config, input_device, run_forward
from .forward_hooks import ForwardHook, ListeningCache
from .layer_plan import LayerPlan
from .refusals import NOT_CAUSAL, TRIAL_IDS, looks_ahead, reason_after_trial
from .transformers_internals import GenerateCall

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class KVShape:
    """Shape of a model's K and V, from a trial forward.

    Attributes:
        layers: windows and devices of the layers.
        kv_heads, head_dim: shape of a token's K (and V) in one layer.
        dtype: dtype of K and V.
    """

    layers: LayerPlan
    kv_heads: int
    head_dim: int
    dtype: torch.dtype


class _TrialLayer(CacheLayerMixin):
    """Passes its K/V to attention and records what happens to them."""

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


class _Witness:
    """Receives the calls of a trial forward in place of a `ContiguousKVCache`'s session."""

    def __init__(self, installation: Installation) -> None:
        self._installation = installation
        self.seen: list[str] = []

    def generate_begins(self, call: GenerateCall | None) -> None:
        pass

    def before_forward(self, inputs: dict[str, Any]) -> None:
        self.seen.append("before")
        self._installation.activate()

    def forward_runs(self, running: bool) -> None:
        pass

    def after_forward(self, output: Any) -> Any:
        self.seen.append("after")


class _TrialCache(ListeningCache):
    """Passes through the model like a `ContiguousKVCache`, with hooks and attention function."""

    session: _Witness

    def __init__(self, layers: int, session: _Witness) -> None:
        super().__init__(layers=[_TrialLayer() for _ in range(layers)])
        self.session = session


def try_forward(model: nn.Module, windows: tuple[int | None, ...], device: torch.device | None = None) -> KVShape:
    """Run a few tokens through `model`, whose layers have these `windows`.

    Args:
        model: the causal LM.
        windows: the sliding window of each layer in tokens; `None` for full attention.
        device: of the tokens; `None`: the device of the model's inputs. On `meta`, a model without weights runs: shapes
            and calls are checked, but not whether attention is causal, which only numbers show.

    Raises:
        UnsupportedModelError: the model cannot be served correctly; the message names the reason.
    """
    name = type(model).__name__
    device = input_device(model) if device is None else device
    ids = torch.tensor(TRIAL_IDS, device=device)
    installation = Installation(decoder_config(model))
    witness = _Witness(installation)
    cache = _TrialCache(len(windows), witness)
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
    if witness.seen != ["before", "after"]:
        raise UnsupportedModelError(
            f"{name}: its forward hooks did not see the cache of a trial forward (seen: {witness.seen}); this version "
            f"of transformers ({transformers.__version__}) may pass the cache in a way that is not supported yet"
        )
    for position, layer in enumerate(layers):
        reason = reason_after_trial(model, position, layer.updates, layer.reached)
        if reason is not None:
            raise UnsupportedModelError(f"{name} {reason}")
        if layer.problem:
            raise UnsupportedModelError(f"{name}: layer {position} {layer.problem}, which is not supported")
    has_numbers = device.type != "meta"
    if has_numbers and any(looks_ahead(states) for layer in layers for states in (layer.keys, layer.values)):
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
    return KVShape(plan, keys[0].shape[1], keys[0].shape[3], dtypes.pop())
