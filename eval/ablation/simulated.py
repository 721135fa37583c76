"""A model whose attention sees only those chunks of a computed prefix that a variant would have selected."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

from hf_contiguouskv.model.transformers_internals import cache_argument
from hf_contiguouskv.selection import (
    AttentionMassScorer,
    IndexedKeysScorer,
    SelectionInput,
    choose_chunks,
    voting_queries,
)
from hf_contiguouskv.store.key_index import build_key_index

from .rounding import round_keys, round_values
from .variants import Variant

CHUNK = 16
_NAME = "contiguouskv_ablation"


class Simulation:
    """Answers with one prefix, in any variant. A context manager that replaces the model's attention.

    Args:
        model: a decoder with full attention in all layers.
        prefix_ids: int64 `(n,)`; its K/V are computed at once.
    """

    def __init__(self, model: Any, prefix_ids: torch.Tensor) -> None:
        self._model = model
        self._before = model.config._attn_implementation
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=prefix_ids[None], logits_to_keep=1, **{cache_argument(model): cache})
        # `(kv_heads, tokens, head_dim)` per layer, in the model's dtype, because that dtype is stored.
        self._kv = [(layer.keys[0], layer.values[0]) for layer in cache.layers]
        self._tokens = len(prefix_ids)
        self._scorers: dict[tuple[str, float, int, int], Any] = {}
        self._rounded: dict[tuple[int, int, int, int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._variant = Variant("none")
        self._suffix = 0
        # Positions `(kept,)` of the tokens that the running period sees.
        self._kept = torch.zeros(0, dtype=torch.int64)

    def logits(self, variant: Variant, suffix: torch.Tensor, continuations: torch.Tensor) -> torch.Tensor:
        """Logits after every token of the suffix and of each continuation.

        Args:
            variant: decides what attention sees.
            suffix: int64 `(q,)`; its last tokens choose the chunks.
            continuations: int64 `(rows, a)`, each after the suffix (`a` may be 0).

        Returns:
            float32 `(rows, q + a, vocabulary)`.
        """
        self._variant, self._suffix = variant, len(suffix)
        ids = torch.cat([suffix.expand(len(continuations), -1), continuations], dim=1)
        positions = torch.arange(self._tokens, self._tokens + ids.shape[1])[None].expand_as(ids)
        with torch.no_grad():
            found = self._model(input_ids=ids, position_ids=positions, use_cache=False)
        logits: torch.Tensor = found.logits.float()
        return logits

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> Any:
        """The attention of one layer, over the selected part of the prefix and the passed K/V."""
        if layer % self._variant.period == 0:
            self._kept = self._select(layer, query[:1, :, : self._suffix], key[:1, :, : self._suffix], scaling)
        keys, values = (states[None, :, self._kept] for states in self._stored(layer))
        rows, _, length, _ = query.shape
        seen = torch.ones(length, len(self._kept) + length, dtype=torch.bool).tril(len(self._kept))
        output = nn.functional.scaled_dot_product_attention(
            query,
            torch.cat([keys.expand(rows, -1, -1, -1), key], dim=2),
            torch.cat([values.expand(rows, -1, -1, -1), value], dim=2),
            attn_mask=seen,
            scale=scaling,
            enable_gqa=True,
        )
        return output.transpose(1, 2).contiguous()

    def _select(self, layer: int, queries: torch.Tensor, suffix_keys: torch.Tensor, scaling: float) -> torch.Tensor:
        whole = self._tokens // CHUNK
        keep = min(whole, -(-round(1000 * whole * self._variant.share) // 1000))
        tail = torch.arange(whole * CHUNK, self._tokens)
        if keep == whole:
            return torch.arange(self._tokens)
        length = queries.shape[2]
        visible = torch.ones(1, length, dtype=torch.bool)
        voters = voting_queries(visible[0], self._variant.voters, self._variant.recent)
        scores = self._scorer(layer)(SelectionInput(queries, suffix_keys, [voters], visible, scaling))
        chosen = choose_chunks(scores.importance, keep, self._variant.ends, self._variant.ends)[0]
        return torch.cat([(chosen[:, None] * CHUNK + torch.arange(CHUNK)).flatten(), tail])

    def _scorer(self, layer: int) -> Any:
        variant = self._variant
        known = (variant.rule, variant.power, variant.index_bits, layer)
        if known not in self._scorers:
            keys = self._kv[layer][0]
            if variant.index_bits < 8:
                keys = round_keys(keys, variant.index_bits, variant.key_group)
            if variant.rule == "mass":
                self._scorers[known] = AttentionMassScorer(
                    round_keys(keys, variant.index_bits, 64) if variant.index_bits == 8 else keys, CHUNK, variant.power
                )
            else:
                parts = [build_key_index(keys, CHUNK)]
                self._scorers[known] = IndexedKeysScorer(parts, self._tokens // CHUNK, variant.power)
        return self._scorers[known]

    def _stored(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        v = self._variant
        known = (layer, v.key_bits, v.key_group, v.value_bits, v.value_group)
        if known not in self._rounded:
            keys, values = self._kv[layer]
            self._rounded[known] = (
                round_keys(keys, v.key_bits, v.key_group),
                round_values(values, v.value_bits, v.value_group),
            )
        return self._rounded[known]

    def __enter__(self) -> Self:
        self._model.config._attn_implementation_internal = _NAME
        _running.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _running.pop()
        self._model.config._attn_implementation_internal = self._before


_running: list[Simulation] = []


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    return _running[-1].attend(int(module.layer_idx), query, key, value, scaling), None  # type: ignore[arg-type]


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, lambda *arguments, **options: None)
