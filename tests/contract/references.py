"""Slow, independent answers to compare with. Nothing here imports the library.

`prefilled` is the yardstick of the exact cache. `PrunedReference` is that of the pruned one: a copy of the model in
which every prefix key is present and the pruned ones are masked out, layer by layer and row by row; it can also choose
the chunks itself by the published rule, with loops, in float64.
"""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import eager_mask

from .models import CACHE, full_attention_layers

RELATIVE, ABSOLUTE = 1e-4, 1e-5


def prefilled(model: Any, prefix_ids: torch.Tensor, rows: int = 1) -> DynamicCache:
    """A `DynamicCache` in which each of `rows` rows already holds the prefix (`[1, n]`)."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(prefix_ids.reshape(1, -1).expand(rows, -1), **{CACHE: cache})
    return cache


def generate(model: Any, ids: torch.Tensor, cache: Any, *, tokens: int = 8, **options: Any) -> Any:
    """`model.generate` with the scores that the model itself gave to every next token."""
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": tokens} | options
    return model.generate(ids, **{CACHE: cache}, return_dict_in_generate=True, output_logits=True, **settings)


def forward(model: Any, ids: torch.Tensor, cache: Any, **options: Any) -> torch.Tensor:
    """Logits `[rows, tokens, vocabulary]` of a raw forward."""
    with torch.no_grad():
        return model(ids, **{CACHE: cache}, **options).logits


def assert_close(
    actual: torch.Tensor, expected: torch.Tensor, *, relative: float = RELATIVE, absolute: float = ABSOLUTE
) -> None:
    """Equal within float32 noise: `absolute` is measured against the largest expected value."""
    scale = max(1.0, expected.float().abs().max().item())
    torch.testing.assert_close(actual.float(), expected.float(), rtol=relative, atol=absolute * scale)


def assert_same_generation(actual: Any, expected: Any, *, rows: slice = slice(None)) -> None:
    """The same tokens, and the same scores at every step."""
    assert len(actual.logits) == len(expected.logits)
    for step_actual, step_expected in zip(actual.logits, expected.logits, strict=True):
        assert_close(step_actual[rows], step_expected)
    assert actual.sequences[rows].tolist() == expected.sequences.tolist()


def assert_same_rows(actual: Any, singles: list[Any]) -> None:
    """Row `r` of a batch got the tokens and scores that `singles[r]` (a batch of one) got."""
    steps = len(actual.logits)
    for row, single in enumerate(singles):
        for step in range(steps):
            assert_close(actual.logits[step][row], single.logits[step][0])
        assert actual.sequences[row, -steps:].tolist() == single.sequences[0, -steps:].tolist()


# ---- the pruned prefix ----

_NAME = "contract_reference"
_ACTIVE: list[PrunedReference] = []


class PrunedReference:
    """A model of its own whose full-attention layers see only chosen prefix tokens.

    Args:
        model: copied; its attention is replaced by plain float64 arithmetic.
        prefix_ids: `[1, n]`.
        rows: batch rows that share the prefix.
        visible: layer -> bool `[rows, n]`, the prefix tokens that the layer may see.
            `None` lets the published rule choose at the first forward.
        budget, period, chunk_size: of the published rule.
        packed: full-attention layers see the prefix as it is after rounding: keys in 8 bits, values in 4.
        scale_per_chunk: the keys of each chunk have scales of their own.
    """

    def __init__(
        self,
        model: Any,
        prefix_ids: torch.Tensor,
        *,
        rows: int = 1,
        visible: dict[int, torch.Tensor] | None = None,
        budget: float = 1.0,
        period: int = 8,
        chunk_size: int = 16,
        packed: bool = False,
        scale_per_chunk: bool = False,
    ) -> None:
        AttentionInterface.register(_NAME, _reference_attention)
        AttentionMaskInterface.register(_NAME, eager_mask)
        self.model = _twin(model)
        self.layers = full_attention_layers(model)
        self.prefix_tokens = prefix_ids.shape[-1]
        self.rows, self.budget, self.period, self.chunk_size = rows, budget, period, chunk_size
        self.visible: dict[int, torch.Tensor] = {}
        self.choose = False
        self.importance: dict[int, torch.Tensor] = {}
        """Leader layer -> `A_j`, float64 `[rows, whole chunks]`."""
        self.voters: torch.Tensor | None = None
        _ACTIVE.append(self)
        try:
            self.cache = prefilled(self.model, prefix_ids, rows)
        finally:
            _ACTIVE.pop()
        if packed:
            # From the model's own arithmetic, as what is stored: the last bit of a number may decide about its step.
            stored = prefilled(model, prefix_ids, rows)
            for layer in self.layers:
                states = self.cache.layers[layer]
                keys = stored.layers[layer].keys
                states.keys = chunk_keys_in_8_bits(keys, chunk_size) if scale_per_chunk else keys_in_8_bits(keys)
                states.values = values_in_4_bits(stored.layers[layer].values)
        self.choose = visible is None
        self.visible = dict(visible or {})

    def forward(self, ids: torch.Tensor, *, voters: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
        """Logits of the next tokens `ids` `[rows, q]`; `voters` (bool `[rows, q]`) are queries that choose."""
        self.voters = torch.ones_like(ids, dtype=torch.bool) if voters is None else voters
        _ACTIVE.append(self)
        try:
            return forward(self.model, ids, self.cache, **options)
        finally:
            _ACTIVE.pop()

    def greedy(self, ids: torch.Tensor, tokens: int) -> tuple[list[int], list[torch.Tensor]]:
        """Tokens and per-step scores of greedy decoding after the suffix `ids` `[1, q]`."""
        chosen: list[int] = []
        scores: list[torch.Tensor] = []
        logits = self.forward(ids)
        for _ in range(tokens):
            scores.append(logits[:, -1])
            chosen.append(int(logits[0, -1].argmax()))
            logits = self.forward(torch.tensor([[chosen[-1]]]))
        return chosen, scores

    @property
    def whole_chunks(self) -> int:
        return self.prefix_tokens // self.chunk_size

    def kept(self) -> int:
        if self.whole_chunks == 0:
            return 0
        return min(self.whole_chunks, max(1, math.ceil(self.whole_chunks * self.budget - 1e-9)))

    def chunks(self, layer: int) -> list[list[int]]:
        """Whole chunks that `layer` sees, ascending, per row."""
        size = self.chunk_size
        return [
            [j for j in range(self.whole_chunks) if bool(self.visible[layer][row, j * size : (j + 1) * size].all())]
            for row in range(self.visible[layer].shape[0])
        ]

    def margin(self) -> float:
        """The smallest relative gap between the last kept and the first dropped chunk, over leaders and rows."""
        gaps = [math.inf]
        for importance in self.importance.values():
            for row in importance:
                ranked = sorted(row.tolist(), reverse=True)
                if self.kept() < len(ranked):
                    last_kept, first_dropped = ranked[self.kept() - 1], ranked[self.kept()]
                    gaps.append((last_kept - first_dropped) / last_kept)
        return min(gaps)

    def _identify(self, layer: int, probabilities: torch.Tensor) -> None:
        """Section 5 of the design: sum over suffix queries, mean over heads, sum per chunk; keep the best."""
        assert self.voters is not None
        size, heads = self.chunk_size, probabilities.shape[1]
        importance = torch.zeros(self.rows, self.whole_chunks, dtype=torch.float64)
        for row in range(self.rows):
            for query in range(probabilities.shape[2]):
                if not self.voters[row, query]:
                    continue
                for chunk in range(self.whole_chunks):
                    mass = probabilities[row, :, query, chunk * size : (chunk + 1) * size].sum()
                    importance[row, chunk] += mass / heads
        self.importance[layer] = importance
        visible = torch.zeros(self.rows, self.prefix_tokens, dtype=torch.bool)
        visible[:, self.whole_chunks * size :] = True
        for row in range(self.rows):
            ranked = sorted(range(self.whole_chunks), key=lambda chunk: -importance[row, chunk].item())
            for chunk in ranked[: self.kept()]:
                visible[row, chunk * size : (chunk + 1) * size] = True
        start = self.layers.index(layer)
        for member in self.layers[start : start + self.period]:
            self.visible[member] = visible

    def _attend(self, module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float) -> Any:
        groups = query.shape[1] // key.shape[1]
        key = key.repeat_interleave(groups, dim=1).double()
        value = value.repeat_interleave(groups, dim=1).double()
        logits = query.double() @ key.transpose(2, 3) * scaling
        if mask is not None:
            logits = logits + mask[..., : key.shape[2]].double()
        layer = module.layer_idx
        if layer in self.layers:
            if self.choose and layer not in self.visible:
                self._identify(layer, logits.softmax(-1))
            if layer in self.visible:
                hidden = ~self.visible[layer]
                logits[..., : self.prefix_tokens].masked_fill_(hidden[:, None, None, :], -math.inf)
        weights = logits.softmax(-1)
        return (weights @ value).to(query.dtype).transpose(1, 2).contiguous(), weights.to(query.dtype)


def _twin(model: Any) -> Any:
    """The same weights under the reference attention, free of whatever a live cache has hooked into `model`."""
    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"
    twin = type(model)(config).eval()
    twin.load_state_dict(model.state_dict())
    twin.set_attn_implementation(_NAME)
    return twin


def _reference_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _ACTIVE[-1]._attend(module, query, key, value, attention_mask, scaling)


def keys_in_8_bits(keys: torch.Tensor) -> torch.Tensor:
    """`[rows, heads, tokens, d]`: each channel of each head in 127 steps up and down, over all tokens."""
    out = torch.empty_like(keys)
    for row, head, channel in itertools.product(range(keys.shape[0]), range(keys.shape[1]), range(keys.shape[3])):
        column = keys[row, head, :, channel]
        step = max(abs(column.min()), abs(column.max())) / 127
        out[row, head, :, channel] = (column / step).round() * step
    return out


def chunk_keys_in_8_bits(keys: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """`[rows, heads, tokens, d]`: each channel of each head and chunk in 127 steps up and down, which are bfloat16."""
    out = torch.empty_like(keys)
    for begin in range(0, keys.shape[2], chunk_size):
        chunk = keys[:, :, begin : begin + chunk_size]
        for row, head, channel in itertools.product(range(keys.shape[0]), range(keys.shape[1]), range(keys.shape[3])):
            column = chunk[row, head, :, channel]
            step = (max(abs(column.min()), abs(column.max())) / 127).bfloat16().float()
            out[row, head, begin : begin + chunk_size, channel] = (column / step).round().clamp(-127, 127) * step
    return out


def values_in_4_bits(values: torch.Tensor) -> torch.Tensor:
    """`[rows, heads, tokens, d]`, `d <= 64`: each token of each head in 16 steps, lowest and step in bfloat16."""
    assert values.shape[3] <= 64
    out = torch.empty_like(values)
    for row, head, token in itertools.product(*map(range, values.shape[:3])):
        numbers = values[row, head, token]
        lowest = numbers.min().bfloat16().float()
        step = ((numbers.max() - lowest) / 15).bfloat16().float()
        out[row, head, token] = lowest + ((numbers - lowest) / step).round().clamp(0, 15) * step
    return out


def visible_tokens(selected_chunks: torch.Tensor, prefix_tokens: int, chunk_size: int = 16) -> torch.Tensor:
    """Bool `[rows, n]` for whole chunks `[rows, k]`; the partial last chunk is always visible."""
    rows = selected_chunks.shape[0]
    visible = torch.zeros(rows, prefix_tokens, dtype=torch.bool)
    visible[:, prefix_tokens // chunk_size * chunk_size :] = True
    for row in range(rows):
        for chunk in selected_chunks[row].tolist():
            visible[row, chunk * chunk_size : (chunk + 1) * chunk_size] = True
    return visible
