"""A model whose attention sees only those chunks of a computed prefix that a variant would have selected."""

from __future__ import annotations

from dataclasses import replace
from types import TracebackType
from typing import Any, Self, cast

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

from hf_contiguouskv.model.transformers_internals import cache_argument
from hf_contiguouskv.selection import (
    AttentionMassScorer,
    CoarseIndex,
    IndexedKeysScorer,
    KeyIndex,
    SelectionInput,
    choose_chunks,
    voting_queries,
)

from .rounding import round_by_spread, round_keys, round_values
from .summaries import SummaryScorer
from .variants import Variant

CHUNK = 16
# Last tokens of a prefix whose attention says which of its tokens are hot.
OBSERVERS = 64
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
        # `(heads, observers, head_dim)` per layer.
        self._observers: list[torch.Tensor] = []
        observed = max(1, len(prefix_ids) - OBSERVERS)
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=prefix_ids[None, :observed], logits_to_keep=1, **{cache_argument(model): cache})
            with self:
                model(input_ids=prefix_ids[None, observed:], logits_to_keep=1, **{cache_argument(model): cache})
        # `(kv_heads, tokens, head_dim)` per layer, in the model's dtype, because that dtype is stored.
        self._kv = [(layer.keys[0], layer.values[0]) for layer in cache.layers]
        self._tokens = len(prefix_ids)
        self._scorers: dict[tuple[object, ...], Any] = {}
        self._rounded: dict[tuple[int, int, int, int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._heat: dict[int, torch.Tensor] = {}
        self._variant = Variant("none")
        self._suffix = 0
        # Which tokens the running period sees, bool `(kv_heads or 1, tokens)`.
        self._seen = torch.zeros(1, 0, dtype=torch.bool)

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
        """The attention of one layer, over the selected part of the prefix and the passed K/V.

        While the prefix is computed, `key` and `value` hold all of it, and the queries are noted.
        """
        rows, heads, length, _ = query.shape
        causal = torch.ones(length, key.shape[2], dtype=torch.bool).tril(key.shape[2] - length)
        if len(self._observers) < self._model.config.num_hidden_layers:
            self._observers.append(query[0])
            seen = causal
        else:
            if layer % self._variant.period == 0:
                self._seen = self._select(layer, query[:1, :, : self._suffix], key[:1, :, : self._suffix], scaling)
            keys, values = self._stored(layer)
            used = self._seen.any(0)
            key = torch.cat([keys[None, :, used].expand(rows, -1, -1, -1), key], dim=2)
            value = torch.cat([values[None, :, used].expand(rows, -1, -1, -1), value], dim=2)
            own = self._seen[:, used].repeat_interleave(heads // len(self._seen), 0)
            seen = torch.cat([own[:, None].expand(-1, length, -1), causal.expand(heads, -1, -1)], dim=2)
        output = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, scale=scaling, enable_gqa=True
        )
        return output.transpose(1, 2).contiguous()

    def _select(self, layer: int, queries: torch.Tensor, suffix_keys: torch.Tensor, scaling: float) -> torch.Tensor:
        """Which tokens attention sees, bool `(kv_heads, tokens)`, or `(1, tokens)` for all heads."""
        v = self._variant
        whole = self._tokens // CHUNK
        keep = min(whole, -(-round(1000 * whole * v.share) // 1000))
        if keep == whole:
            return torch.ones(1, self._tokens, dtype=torch.bool)
        length = queries.shape[2]
        visible = torch.ones(1, length, dtype=torch.bool)
        voters = voting_queries(visible[0], v.voters, v.recent)
        kv_heads = suffix_keys.shape[1]
        groups = [slice(head, head + 1) for head in range(kv_heads)] if v.per_head else [slice(0, kv_heads)]
        seen = torch.zeros(len(groups), self._tokens, dtype=torch.bool)
        seen[:, whole * CHUNK :] = True
        if v.hot:
            seen = seen | self._hot(layer, round(keep * v.hot) * CHUNK, scaling)
        singles = 0 if v.unit == "token" else round(keep * (1 - v.hot) * v.singles)
        singles = max(0, min(singles, round(keep * (1 - v.hot)) - v.least_chunks))
        chunks = round(keep * (1 - v.hot)) - singles
        few = replace(v, voters=v.single_voters, power=v.single_power)
        few_voters = voting_queries(visible[0], few.voters, min(v.recent, few.voters or v.recent))
        for own, heads in zip(seen, groups * (len(seen) // len(groups)), strict=True):
            own_queries = queries.unflatten(1, (kv_heads, -1))[:, heads]
            own_queries = own_queries.mean(2) if v.grouped else own_queries.flatten(1, 2)
            inputs = SelectionInput(own_queries, suffix_keys[:, heads], [voters], visible, scaling)
            size = 1 if v.unit == "token" else CHUNK
            importance = self._importance(layer, size, heads, inputs, max(1, chunks * CHUNK // size))
            if chunks:
                ends = v.ends * CHUNK // size
                _see(own, choose_chunks(importance, chunks * CHUNK // size, ends, ends)[0], size)
            if singles:
                # Chunks first: small pieces are then chosen among the others.
                count, inputs = singles * CHUNK // v.piece_tokens, replace(inputs, voters=[few_voters])
                nominees = min(whole, max(keep, round(keep * v.nominees))) if v.nominees else whole
                places = choose_chunks(importance, nominees, v.ends, v.ends)[0]
                pieces = (places[:, None] * (CHUNK // v.piece_tokens) + torch.arange(CHUNK // v.piece_tokens)).flatten()
                if v.beside_chunks:
                    scorer = self._scorer(layer, CHUNK, heads)
                    scorer(inputs)
                    of_tokens, order = scorer.of_tokens(0, places.numpy())
                    found = of_tokens[torch.from_numpy(order.argsort())][None]
                else:
                    found = self._of_pieces(layer, heads, pieces, few)(inputs).importance
                found = found.masked_fill(own[pieces * v.piece_tokens], float("-inf"))
                # (Both ends are kept once.)
                ends = 0 if chunks else v.ends * CHUNK // v.piece_tokens
                _see(own, pieces[choose_chunks(found, count, ends, ends)[0]], v.piece_tokens)
        return seen

    def _importance(self, layer: int, size: int, heads: slice, inputs: SelectionInput, count: int) -> torch.Tensor:
        """Of each chunk, or of each token of the whole chunks, float32 `(1, n)`."""
        v, whole = self._variant, self._tokens // CHUNK * CHUNK // size
        if not v.summary:
            return cast(torch.Tensor, self._scorer(layer, size, heads)(inputs).importance[:, :whole])
        known = ("summary", v.summary, v.power, layer, size, heads.start, heads.stop)
        if known not in self._scorers:
            self._scorers[known] = SummaryScorer(self._kv[layer][0][heads], size, v.power, v.summary)
        found = cast(torch.Tensor, self._scorers[known](inputs).importance[:, :whole])
        if v.nominated >= 1.0:
            return found
        nominees = found[0].topk(max(count, round(v.nominated * found.shape[1]))).indices
        exact = self._scorer(layer, size, heads)(inputs).importance[:, :whole]
        return torch.full_like(found, -1.0).scatter_(1, nominees[None], exact[:, nominees])

    def _of_pieces(self, layer: int, heads: slice, pieces: torch.Tensor, v: Variant) -> IndexedKeysScorer:
        """Scores only these pieces of `v.piece_tokens` tokens, int64 `(n,)`, from the same index as whole chunks."""
        known = ("pieces", v.index_coarse, layer, heads.start, heads.stop)
        if known not in self._scorers:
            part = (CoarseIndex if v.index_coarse else KeyIndex).of(self._kv[layer][0][heads], CHUNK)
            ((_, numbers),) = part.pieces(None)
            # `(kv_heads, tokens, head_dim)`, in the order of the text.
            self._scorers[known] = part.scored(numbers, 2).transpose(1, 2).flatten(1, 2), part.scale
        numbers, scale = self._scorers[known]
        tokens = (pieces[:, None] * v.piece_tokens + torch.arange(v.piece_tokens)).flatten()
        some = numbers[:, tokens].unflatten(1, (-1, v.piece_tokens)).transpose(1, 2).contiguous()
        return IndexedKeysScorer([KeyIndex(some, scale)], len(pieces), v.power)

    def _hot(self, layer: int, count: int, scaling: float) -> torch.Tensor:
        """The tokens of each KV head to which the prefix's own last ones attend most, bool `(kv_heads, tokens)`."""
        if layer not in self._heat:
            keys = self._kv[layer][0].float()
            queries = self._observers[layer].float().unflatten(0, (len(keys), -1))
            logits = torch.einsum("hgqd,htd->hgqt", queries, keys) * scaling
            length = queries.shape[2]
            causal = torch.ones(length, self._tokens, dtype=torch.bool).tril(self._tokens - length)
            self._heat[layer] = logits.masked_fill(~causal, float("-inf")).softmax(-1).sum((1, 2))
        heat = self._heat[layer]
        return torch.zeros_like(heat, dtype=torch.bool).scatter_(1, heat.topk(count, dim=1).indices, True)

    def _scorer(self, layer: int, size: int, heads: slice) -> Any:
        v = self._variant
        index = (v.index_bits, v.index_spread, v.index_coarse, v.key_group, v.beside_chunks)
        known = (v.rule, v.power, *index, layer, size, heads.start, heads.stop)
        if known not in self._scorers:
            keys = self._kv[layer][0][heads]
            if v.index_bits < 8 and v.index_spread:
                keys = round_by_spread(keys, v.index_bits)
            elif v.index_bits < 8:
                keys = round_keys(keys, v.index_bits, v.key_group)
            if v.rule == "mass":
                self._scorers[known] = AttentionMassScorer(
                    round_keys(keys, v.index_bits, 64) if v.index_bits == 8 else keys, size, v.power
                )
            elif v.index_bits == 16:
                self._scorers[known] = SummaryScorer(keys, size, v.power, "every")
            else:
                parts = [(CoarseIndex if v.index_coarse else KeyIndex).of(keys, size)]
                self._scorers[known] = IndexedKeysScorer(
                    parts, self._tokens // size, v.power, keeps_queries=v.beside_chunks
                )
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


def _see(seen: torch.Tensor, chosen: torch.Tensor, size: int) -> None:
    """Attention sees these pieces of `size` tokens, int64 `(n,)`."""
    seen[(chosen[:, None] * size + torch.arange(size)).flatten()] = True


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
