"""`ServedModel`: a transformers model as this library sees it, unwrapped and described in one place."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from ..errors import InputError
from .attention import Installation
from .causal_lm import decoder_config, innermost_causal_lm, input_device, run_forward
from .fingerprint import model_fingerprint
from .kv_geometry import KVGeometry
from .layer_plan import LayerPlan
from .layer_windows import layer_windows
from .media_placeholders import placeholder_ids
from .transformers_internals import forget_shift, shifted_positions
from .trial_forward import KVShape, try_forward

# Exact keys are stored a second time for every eighth full-attention layer: the period of the published method.
LEADER_PERIOD = 8


def stored_geometry(shape: KVShape, chunk_size: int, index_bits: int = 8, layers_per_group: int = 1) -> KVGeometry:
    """The stored form of a model's KV: K and V exactly; a key index and chunks in few bits of every full-attention
    layer; exact keys of every eighth of these layers (the published leader layers).

    Args:
        shape: of the model's K and V.
        chunk_size: tokens per chunk.
        index_bits: of the key index, 8 or 2 (see `ContiguousKVConfig`); 8 if `head_dim` is odd.
        layers_per_group: consecutive layers whose exact chunks lie side by side; all layers if there are fewer.
    """
    full = shape.layers.full_layers
    exact = KVGeometry(
        num_layers=len(shape.layers.windows),
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        dtype=shape.dtype,
        chunk_size=chunk_size,
        layers_per_group=min(layers_per_group, len(shape.layers.windows)),
        leader_layers=tuple(full[::LEADER_PERIOD]),
    )
    return exact.with_index(tuple(full), index_bits)


@dataclass
class _Findings:
    """Findings about one model, shared by all caches on it.

    Attributes:
        state: dtype and devices of the model at its trial forward.
        shape: the result of the trial forward.
        measured: measurements that other modules keep here (speeds, for example), each under its own key.
    """

    state: object = None
    shape: KVShape | None = None
    measured: dict[Any, Any] = field(default_factory=dict)


_findings: weakref.WeakKeyDictionary[nn.Module, _Findings] = weakref.WeakKeyDictionary()


class ServedModel:
    """A transformers model as this library sees it. It holds the model weakly, because a copied cache must not copy it.
    It has many short methods, so that no other room reads a model's configuration or modules.

    Args:
        model: a decoder-only transformers model, possibly inside wrappers (PEFT, `torch.compile`, DDP).

    Attributes:
        windows: the sliding window of each layer, in tokens; `None` for full attention.

    Raises:
        UnsupportedModelError: the model's configuration or class rules it out; the message names the reason.
    """

    def __init__(self, model: nn.Module) -> None:
        lm = innermost_causal_lm(model)
        self.windows = layer_windows(lm)
        self._lm = weakref.ref(lm)

    def __deepcopy__(self, memo: dict[int, object]) -> ServedModel:
        return self

    @property
    def lm(self) -> Any:
        """The causal LM inside the wrappers.

        Raises:
            InputError: the model no longer exists.
        """
        lm = self._lm()
        if lm is None:
            raise InputError("the model of this cache is gone")
        return lm

    @property
    def text_config(self) -> Any:
        """The configuration that the attention layers share."""
        return decoder_config(self.lm)

    # -- the model's K/V ----------------------------------------------------------------------------------------------

    @property
    def shape(self) -> KVShape:
        """The shape of the model's K/V, from a trial forward. It runs once, and again if dtype or devices change.

        Raises:
            UnsupportedModelError: the model cannot be served correctly; the message names the reason.
        """
        lm, found = self.lm, self._found
        parameter = next(lm.parameters(), None)
        placed = None if parameter is None else (parameter.dtype, parameter.device)
        state = placed, str(getattr(lm, "hf_device_map", None))
        if found.shape is None or found.state != state:
            found.shape, found.state = try_forward(lm, self.windows), state
        return found.shape

    @property
    def layers(self) -> LayerPlan:
        """Windows and devices of the layers."""
        return self.shape.layers

    def geometry(self, chunk_size: int, index_bits: int = 8, layers_per_group: int = 1) -> KVGeometry:
        """The stored form of the model's KV (`stored_geometry`)."""
        return stored_geometry(self.shape, chunk_size, index_bits, layers_per_group)

    def fingerprint(self) -> str:
        """The model's fingerprint: changes with weights, adapters and configuration
        (`fingerprint.model_fingerprint`)."""
        return model_fingerprint(self.lm)

    @property
    def query_heads(self) -> int:
        """Query heads per layer, a multiple of the KV heads."""
        kv_heads = self.shape.kv_heads
        heads = int(getattr(self.text_config, "num_attention_heads", kv_heads))
        return max(1, heads // kv_heads) * kv_heads

    # -- running the model --------------------------------------------------------------------------------------------

    def installation(self) -> Installation:
        """A switch that puts this library's attention function into the model while a forward runs.

        Raises:
            UnsupportedModelError: the model uses an attention implementation that cannot be served.
        """
        return Installation(self.text_config)

    @property
    def input_device(self) -> torch.device:
        """The device of the model's inputs."""
        return input_device(self.lm)

    def run(self, ids: torch.Tensor, cache: Cache, start: int) -> Any:
        """Run `ids`, int64 `(rows, q)`, the first at position `start`, so that `cache` receives their K/V."""
        return run_forward(self.lm, ids, cache, start)

    @cached_property
    def is_multimodal(self) -> bool:
        """Whether the model takes media, such as images, beside text."""
        return bool(placeholder_ids(self.lm.config))

    @cached_property
    def _shifted(self) -> list[weakref.ref[nn.Module]]:
        return [weakref.ref(module) for module in shifted_positions(self.lm)]

    @property
    def shifts_positions(self) -> bool:
        """Whether the model shifts positions by an offset that it remembers from the images of an earlier call."""
        return bool(self._shifted)

    def forget_shift(self) -> None:
        """Clear the remembered offset, so that the next tokens get their plain positions."""
        forget_shift([module for module in (one() for one in self._shifted) if module is not None])

    @property
    def measured(self) -> dict[Any, Any]:
        """Measurements of this model that other modules keep, each under its own key."""
        return self._found.measured

    @property
    def _found(self) -> _Findings:
        return _findings.setdefault(self.lm, _Findings())
