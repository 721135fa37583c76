"""A model known by its configuration alone: the shape of its K and V, and the sizes of its weights.

The model is made on torch's `meta` device: it has every layer and no number, so nothing is loaded and no memory is
taken. The checks of a real model run on it, except the one that needs numbers (`trial_forward.try_forward`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import InputError, UnsupportedModelError
from ..wording import quoted, shown
from .causal_lm import decoder_config, innermost_causal_lm
from .kv_geometry import KVGeometry
from .layer_windows import layer_windows
from .served_model import stored_geometry
from .trial_forward import DTYPES, KVShape, try_forward


@dataclass(frozen=True)
class ConfiguredModel:
    """What a request costs in a model, as far as the configuration says.

    Attributes:
        name: of the configuration.
        shape: of K and V.
        query_heads: attention heads per layer.
        layer_weights: numbers in the matrices of all decoder layers, experts included. A matrix is used once per token.
        active_weights: of these, the numbers that one token uses: all, except in a mixture of experts.
        output_weights: numbers in the output matrix, which only the last token of a prompt uses.
        max_tokens: tokens that the model can place; `None`: the configuration names no limit.
    """

    name: str
    shape: KVShape
    query_heads: int
    layer_weights: int
    active_weights: float
    output_weights: int
    max_tokens: int | None = None

    @property
    def layers(self) -> int:
        """Layers with a KV cache."""
        return len(self.shape.layers.windows)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of the exact K and V of one token in all layers."""
        return 2 * self.layers * self.shape.kv_heads * self.shape.head_dim * self.shape.dtype.itemsize

    def geometry(self, chunk_size: int, index_bits: int = 8) -> KVGeometry:
        """How this library stores the model's KV in chunks of `chunk_size` tokens."""
        return stored_geometry(self.shape, chunk_size, index_bits)

    def weights_read(self, tokens: int) -> float:
        """Numbers of the layers' matrices that a forward of `tokens` tokens reads: of experts, those that are chosen at
        all, if every token chooses others."""
        return min(float(self.layer_weights), self.active_weights * max(1, tokens))


def model_from_configuration(name: str, dtype: torch.dtype | None = None) -> ConfiguredModel:
    """The model with this Hub name, or in this folder. Only its configuration is read.

    Args:
        name: of a causal LM.
        dtype: of weights and KV; `None`: as the configuration says, else float32.

    Raises:
        InputError: there is no configuration, or transformers cannot read it.
        UnsupportedModelError: the library cannot serve such a model; the message names the reason.
    """
    from transformers import AutoConfig  # (Slow to import; other users of this room do without.)

    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"cannot read the configuration of the model {quoted(name)}: {shown(reason)}; give a folder with its "
            "config.json, or a Hub name that is reachable or already downloaded"
        ) from error
    return configured_model(config, dtype, name)


def configured_model(config: Any, dtype: torch.dtype | None = None, name: str = "") -> ConfiguredModel:
    """The model of a transformers configuration.

    Args:
        config: of a causal LM. It is not changed.
        dtype: of weights and KV; `None`: as the configuration says, else float32.
        name: for tables; "": the class of the model.

    Raises:
        UnsupportedModelError: no causal LM belongs to the configuration, or the library cannot serve it.
    """
    dtype = dtype or _own_dtype(config)
    model = _without_weights(config, dtype)
    lm = innermost_causal_lm(model)
    shape = try_forward(lm, layer_windows(lm), torch.device("meta"))
    text = decoder_config(lm)
    heads = int(getattr(text, "num_attention_heads", shape.kv_heads))
    weights, experts = _matrices(lm)
    share = _expert_share(text) if experts else 1.0
    limit = getattr(text, "max_position_embeddings", None)
    return ConfiguredModel(
        name=name or type(lm).__name__,
        shape=shape,
        query_heads=max(1, heads // shape.kv_heads) * shape.kv_heads,
        layer_weights=weights,
        active_weights=weights - experts * (1 - share),
        output_weights=_output_weights(lm),
        max_tokens=limit if isinstance(limit, int) and limit > 0 else None,
    )


def _own_dtype(config: Any) -> torch.dtype:
    found = getattr(config, "dtype", None)
    if isinstance(found, str):
        found = getattr(torch, found, None)
    if not isinstance(found, torch.dtype):
        return torch.float32
    if found not in DTYPES:
        raise UnsupportedModelError(f"its configuration says {found}; K and V must have one dtype of {DTYPES}")
    return found


def _without_weights(config: Any, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    refused: Exception | None = None
    for maker in (AutoModelForCausalLM, AutoModelForImageTextToText):
        try:
            with torch.device("meta"):
                # (Products of batches: those of groups want 16 bits, and a loop over experts wants numbers.)
                model: nn.Module = maker.from_config(config, dtype=dtype, experts_implementation="batched_mm")
            return model.eval()
        except Exception as error:  # (Whatever a configuration can make a model's constructor say.)
            refused = refused or error
    reason = " ".join(str(refused).split()) or type(refused).__name__
    raise UnsupportedModelError(
        f"transformers makes no causal LM of the configuration {type(config).__name__}: {shown(reason)}"
    ) from refused


def _matrices(lm: Any) -> tuple[int, int]:
    """Numbers in the matrices of the decoder, and how many of them belong to experts of a mixture.

    Embeddings are looked up, not multiplied with, and the output matrix is counted by itself.
    """
    decoder = lm.get_decoder() if callable(getattr(lm, "get_decoder", None)) else lm
    looked_up = {id(one.weight) for one in decoder.modules() if isinstance(one, nn.Embedding)}
    output = _output_matrix(lm)
    skipped = looked_up | ({id(output)} if output is not None else set())
    weights = experts = 0
    for name, parameter in decoder.named_parameters():
        if parameter.dim() >= 2 and id(parameter) not in skipped:
            weights += parameter.numel()
            experts += parameter.numel() if "experts" in name.split(".") else 0
    return weights, experts


def _output_matrix(lm: Any) -> torch.Tensor | None:
    layer = lm.get_output_embeddings() if callable(getattr(lm, "get_output_embeddings", None)) else None
    return getattr(layer, "weight", None)


def _output_weights(lm: Any) -> int:
    matrix = _output_matrix(lm)
    return 0 if matrix is None else matrix.numel()


def _expert_share(text: Any) -> float:
    """Share of the experts that one token uses.

    Raises:
        UnsupportedModelError: the configuration does not say.
    """
    chosen = getattr(text, "num_experts_per_tok", None)
    for field in ("num_experts", "num_local_experts", "n_routed_experts"):
        count = getattr(text, field, None)
        if isinstance(count, int) and isinstance(chosen, int) and 0 < chosen <= count:
            return chosen / count
    raise UnsupportedModelError(
        "the model has experts, and its configuration does not say how many of them a token uses "
        "(num_experts_per_tok of num_experts)"
    )
