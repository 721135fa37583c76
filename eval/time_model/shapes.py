"""Models by their shape: as large as the real ones, without memory for their weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from hf_contiguouskv.model.kv_geometry import KVGeometry

from . import pretend
from .machines import Machine

_CONFIGS = {"qwen2": Qwen2Config, "llama": LlamaConfig}


@dataclass(frozen=True)
class Shape:
    """A model, as far as time depends on it.

    Attributes:
        name: for tables.
        architecture: `qwen2` or `llama`.
        layers, hidden, intermediate, heads, kv_heads, head_dim, vocabulary: of the configuration.
        dtype: of weights, K and V.
        tied: whether the output layer is the embedding.
        flash: whether it is meant for GPUs with flash attention.
    """

    name: str
    architecture: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    dtype: torch.dtype
    tied: bool = False
    flash: bool = True

    def geometry(self, chunk_size: int = 16) -> KVGeometry:
        """How the library stores the KV of such a model (`ServedModel.geometry`)."""
        from hf_contiguouskv.model.served_model import LEADER_PERIOD

        every = tuple(range(self.layers))
        return KVGeometry(
            num_layers=self.layers,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            chunk_size=chunk_size,
            leader_layers=every[::LEADER_PERIOD],
            indexed_layers=every,
            packed_layers=every,
        )

    @property
    def kv_bytes_per_token(self) -> int:
        """K and V of one token in all layers."""
        g = self.geometry()
        return g.num_layers * g.extent_bytes // g.chunk_size

    def config(self) -> Any:
        """Its configuration for transformers."""
        return _CONFIGS[self.architecture](
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=131_072 + 64,
            tie_word_embeddings=self.tied,
            bos_token_id=None,
            eos_token_id=None,
        )

    def model(self, device: torch.device) -> Any:
        """Such a model, on the pretended device or on the CPU. Its weights take up no memory; it answers nonsense."""
        config = self.config()
        with _disable_current_modes():
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, dtype=self.dtype, attn_implementation="sdpa")
            model.model.rotary_emb = type(model.model.rotary_emb)(config)

        def place(inner: torch.Tensor) -> torch.Tensor:
            return inner if device.type == "cpu" else pretend.on_device(inner)

        for module in model.modules():
            for name, weight in module._parameters.items():
                if weight is not None:
                    made = place(pretend.without_memory(weight.shape, weight.dtype))
                    module._parameters[name] = torch.nn.Parameter(made, requires_grad=False)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = place(buffer)
        model.tie_weights()
        return model.eval()


QWEN_7B = Shape("Qwen2.5-7B", "qwen2", 28, 3584, 18944, 28, 4, 128, 152_064, torch.bfloat16)
QWEN_HALF = Shape("Qwen2.5-0.5B", "qwen2", 24, 896, 4864, 14, 2, 64, 151_936, torch.float16, tied=True, flash=False)
SMOLLM2 = Shape("SmolLM2-135M", "llama", 30, 576, 1536, 9, 3, 64, 49_152, torch.bfloat16, tied=True)
SHAPES = {shape.name: shape for shape in (QWEN_7B, QWEN_HALF, SMOLLM2)}


def shape_of(machine: Machine) -> Shape:
    """Which model runs on a machine."""
    return SMOLLM2 if machine.gpu is None else QWEN_HALF if machine.gpu.name == "T4" else QWEN_7B
