"""Automatic mode: the cache learns the prompt at the first forward, uses what is stored of it, and stores the rest."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..cache.layers import ContiguousLayer, ContiguousSlidingLayer
from ..config import ContiguousKVConfig
from ..hardware.accelerator import after_this
from ..model.peft_adapters import adapters_of_rows
from ..model.support import ModelSupport
from ..prefill.exact_prefill import geometry_of, persist_rows
from ..store import PrefixStore
from ..store.attached_prefix import AttachedPrefix
from ..store.entries import StoredPrefix
from .fitting import FEWEST_VOTERS, voters_wanted
from .forward_inputs import Prompt, cut_cached, ordinary_prompt

if TYPE_CHECKING:
    from ..cache.contiguous_cache import ContiguousKVCache

LayerStates = tuple[torch.Tensor, torch.Tensor, int]

LONGEST_QUESTION = 256
"""Tokens at the end of a prompt in which its question is looked for."""
QUESTION_PER_VOTER = 4
"""Where nothing shows where the question begins, so many tokens stay uncached for each query that votes."""


class AutomaticPrefix:
    """Attaches the longest stored beginning that all rows share, and persists what was computed exactly.

    It attaches only where the caller cannot notice: not if logits, hidden states, attentions or a loss of the cached
    tokens are wanted.
    """

    def __init__(self, store: PrefixStore, support: ModelSupport, config: ContiguousKVConfig) -> None:
        self._store = store
        self._support = support
        self._config = config
        self._prompt: Prompt | None = None
        # The blocks of a chunked prefill continue the prompt for as long as they are this long.
        self._block: int | None = None
        self._began = 0.0
        # How many equal rows the one row stands for that a forward computes.
        self._rows = 1

    def __deepcopy__(self, memo: dict[int, Any]) -> AutomaticPrefix:
        twin = AutomaticPrefix(self._store, self._support, self._config)
        twin._prompt, twin._block = self._prompt, self._block
        return twin

    def reset(self) -> None:
        """The next forward brings a new prompt."""
        self._prompt = self._block = None

    def before_forward(
        self, cache: ContiguousKVCache, inputs: dict[str, Any], from_generate: bool, block: int | None
    ) -> None:
        """Look up the prompt of an empty cache; attach what is stored and cut it from `inputs`."""
        self._record(cache, False)
        if cache.get_seq_length() > 0:
            self._continue(cache, inputs)
            return
        self._block = block
        self._rows = 1
        self._began = time.perf_counter()
        self._prompt = None
        reason = _not_ordinary(cache)
        prompt = reason or ordinary_prompt(inputs, cache._multimodal)
        if isinstance(prompt, str):
            cache._unserved.note(prompt)
            return
        self._prompt = prompt
        # Weights, adapters and dtype may have changed since the last prompt: they decide what fits.
        cache.refresh_model()
        self._support = cache._support
        if from_generate and not block and _all_alike(prompt) and not _shows_inside(cache, inputs):
            self._rows = len(prompt.ids)
            self._prompt = prompt = _one_row(inputs, prompt)
        limit = min(prompt.ids.shape[1] - pads for pads in prompt.pads) - _uncached_needed(inputs)
        # Sliding windows count columns: padding behind the prefix would push tokens out of them.
        in_order = not any(prompt.pads) or not any(self._support.plan.windows)
        noticed = _caller_would_notice(cache, inputs, from_generate)
        if noticed or not in_order:
            cache._unserved.note(noticed or "left padding on a model with sliding windows", served_only=True)
        elif limit >= self._config.chunk_size:
            self._attach(cache, inputs, prompt, limit)
        if self._stays_exact(cache):
            self._record(cache, True)
        else:
            self._prompt = None  # What is computed behind a pruned prefix is never stored.

    def _attach(self, cache: ContiguousKVCache, inputs: dict[str, Any], prompt: Prompt, limit: int) -> None:
        shared = _shared_beginning([prompt.row(row) for row in range(prompt.ids.shape[0])])
        stored = cache._look_up(shared[:limit])
        if stored is None or stored.tokens < self._config.chunk_size:
            return
        # Later blocks of a chunked prefill must not be computed behind a pruned prefix: their KV would stay wrong.
        config = replace(self._config, budget=1.0) if self._block else self._config
        shortest = min(prompt.ids.shape[1] - pads for pads in prompt.pads)
        tokens = min(stored.tokens, limit, _leaves_voters(stored, shortest, config))
        if tokens < self._config.chunk_size:
            return
        prefix = AttachedPrefix.of(stored, tokens)
        if cache._computes_again(prefix, config):
            return
        cache._attach(prefix, config)
        cache.prefix_ids = torch.from_numpy(shared[:tokens].copy())
        cut_cached(inputs, tokens)

    def _continue(self, cache: ContiguousKVCache, inputs: dict[str, Any]) -> None:
        ids = inputs.get("input_ids")
        if self._prompt is None or not self._block or not isinstance(ids, torch.Tensor) or ids.shape[1] == 1:
            self._prompt = None
            return
        self._prompt = Prompt(torch.cat([self._prompt.ids, ids], dim=1), self._prompt.pads)
        self._record(cache, True)

    @staticmethod
    def _record(cache: ContiguousKVCache, recording: bool) -> None:
        for layer in cache.layers:
            if isinstance(layer, ContiguousSlidingLayer):
                layer.recording = recording
                layer.recorded = None

    def _stays_exact(self, cache: ContiguousKVCache) -> bool:
        return cache._attached is None or cache._attached.request.keeps_all

    def after_forward(self, cache: ContiguousKVCache, output: Any) -> Any:
        """Persist the prompt in the background, if its KV is exact. What is returned replaces the forward's output."""
        self._persist(cache)
        rows, self._rows = self._rows, 1
        if rows == 1:
            return None
        cache.batch_repeat_interleave(rows)
        for name, value in output.items():
            if isinstance(value, torch.Tensor) and value.ndim > 1:
                output[name] = value.repeat_interleave(rows, dim=0)
        return output

    def _persist(self, cache: ContiguousKVCache) -> None:
        prompt = self._prompt
        if prompt is None:
            return
        if not self._block:
            self._prompt = None
        rows: list[tuple[np.ndarray, list[LayerStates]]] = []
        seen: set[bytes] = set()
        for row in range(prompt.ids.shape[0]):
            numbers = prompt.row(row).cpu().numpy().astype(np.int64)
            if numbers.tobytes() not in seen:
                seen.add(numbers.tobytes())
                states = [_row_states(layer, row, prompt, len(numbers)) for layer in cache.layers]
                rows.append((numbers, states))
        self._record(cache, False)
        geometry = geometry_of(self._support, self._config.chunk_size)
        store, fingerprint = self._store, cache._fingerprint
        seconds = time.perf_counter() - self._began
        prompts = [ids for ids, _ in rows]
        follow = after_this(states for _, layers in rows for keys, values, _ in layers for states in (keys, values))

        def persist() -> None:
            with follow():
                persist_rows(rows, store, fingerprint, geometry, seconds)

        store.submit_background(persist, prompts)


def _row_states(layer: Any, row: int, prompt: Prompt, tokens: int) -> LayerStates:
    """K and V of one row, `(kv_heads, tokens - start, head_dim)`, and the token `start` that they begin with."""
    pads = prompt.pads[row]
    attached = layer.attached
    prefix = 0 if attached is None else attached.request.prefix.tokens
    if not isinstance(layer, ContiguousLayer):
        # What the layer saw ends with the prompt. (With padding nothing is attached before a sliding window.)
        keys, values = (states[row] for states in layer.recorded)
        known = min(keys.shape[1] - (pads if prefix == 0 and keys.shape[1] == tokens + pads else 0), tokens)
        return keys[:, -known:], values[:, -known:], tokens - known
    if attached is None:
        return layer.keys[row, :, pads:], layer.values[row, :, pads:], 0
    return layer.row_states(row, pads)


def _leaves_voters(stored: StoredPrefix, tokens: int, config: ContiguousKVConfig) -> int:
    """Where a pruned prefix should end at the latest, so that enough of a prompt of `tokens` tokens chooses its chunks.

    Where all but a few tokens are stored, this very prompt was asked before, and its question is part of what is
    stored. The question begins where an earlier prompt went another way, or else somewhere in the last tokens. (A short
    question behind all of a stored document is none of that.)
    """
    voters, last = voters_wanted(config), stored.spans[-1].segment
    whole = stored.tokens == last.first_chunk * config.chunk_size + last.num_tokens
    if config.budget == 1.0 or tokens - stored.tokens >= (min(voters, FEWEST_VOTERS) if whole else voters):
        return tokens
    starts = [span.first_chunk * config.chunk_size for span in stored.spans]
    turns = [start for start in starts if tokens - LONGEST_QUESTION <= start <= tokens - voters]
    return max(turns, default=tokens - QUESTION_PER_VOTER * voters)


def _all_alike(prompt: Prompt) -> bool:
    """Whether all rows of a batch are the same prompt, as those of beams and of several samples are."""
    ids = prompt.ids
    return len(ids) > 1 and not any(prompt.pads) and bool((ids[1:] == ids[0]).all())


def _one_row(inputs: dict[str, Any], prompt: Prompt) -> Prompt:
    """Leave one row of a batch of equal rows in `inputs`; the prompt that is left."""
    batch = len(prompt.ids)
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[-2] == batch:
            inputs[name] = value[..., :1, :]
    return Prompt(prompt.ids[:1], prompt.pads[:1])


def _not_ordinary(cache: ContiguousKVCache) -> str | None:
    """Why the model computes now something else than what its weights and tokens alone determine, or `None`."""
    model = cache._living_model()
    if model.training:
        return "the model is in training mode"
    if torch.is_autocast_enabled(next(model.parameters()).device.type):
        return "autocast"
    return adapters_of_rows(model)


def _uncached_needed(inputs: dict[str, Any]) -> int:
    wanted = inputs.get("logits_to_keep")
    return max(1, wanted) if isinstance(wanted, int) else 1


def _shows_inside(cache: ContiguousKVCache, inputs: dict[str, Any]) -> bool:
    """Whether the caller gets hidden states or attentions of all tokens."""
    config = getattr(cache._living_model(), "config", None)
    for name in ("output_hidden_states", "output_attentions"):
        asked = inputs.get(name)
        if asked or (asked is None and getattr(config, name, False)):
            return True
    return False


def _caller_would_notice(cache: ContiguousKVCache, inputs: dict[str, Any], from_generate: bool) -> str | None:
    """Why the caller would get something else if cached tokens were left out of the forward, or `None`."""
    if inputs.get("labels") is not None:
        return "a loss over all tokens"
    model = cache._living_model()
    if not from_generate and torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters()):
        return "gradients are wanted"  # Stored KV has none.
    if _shows_inside(cache, inputs):
        return "hidden states or attentions of all tokens are wanted"
    wanted = inputs.get("logits_to_keep")
    if isinstance(wanted, int) and not isinstance(wanted, bool) and wanted >= 1:
        return None
    if wanted is None and from_generate:
        # Assisted decoding wants as many logits as it has drafts; without `logits_to_keep` nothing says how many.
        assisted = any(getattr(layer, "record_past", False) for layer in cache.layers)
        return "assisted decoding of a model without logits_to_keep" if assisted else None
    return "logits of all tokens are wanted (pass logits_to_keep=1 for the last one)"


def _shared_beginning(rows: list[torch.Tensor]) -> np.ndarray:
    first = rows[0].cpu().numpy().astype(np.int64)
    length = len(first)
    for row in rows[1:]:
        other = row.cpu().numpy()
        length = min(length, len(other))
        differs = np.nonzero(first[:length] != other[:length])[0]
        length = int(differs[0]) if len(differs) else length
    return first[:length]
