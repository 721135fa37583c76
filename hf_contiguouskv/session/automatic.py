"""Automatic mode: the cache learns the prompt at the first forward, uses its stored beginning, and stores the rest."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ..config import ContiguousKVConfig
from ..hardware.accelerator import after_this
from ..model.peft_adapters import adapters_of_rows
from ..model.transformers_internals import GenerateCall, cut_before_blocks, is_assisted
from ..prefill.persisting import LayerStates, persist_rows
from ..store.attached_prefix import AttachedPrefix
from ..store.entries import StoredPrefix
from .cached_sequence import CachedSequence, NewPrompt
from .forward_inputs import Prompt, cut_cached, ordinary_prompt
from .prompt_start import FEWEST_VOTERS, voters_wanted
from .unserved import note_unserved

LONGEST_QUESTION = 256
"""The question is assumed to begin within this many tokens of the end of a prompt."""
QUESTION_PER_VOTER = 4
"""If nothing shows where the question begins, this many tokens stay uncached for each query that votes."""


class AutomaticPrefix:
    """Attaches the longest stored beginning that all rows share, and persists exactly computed K/V.

    It attaches only if the caller cannot notice: not if the caller wants logits, hidden states, attentions or a loss of
    the cached tokens.

    Args:
        held: the tokens that the cache holds.
    """

    def __init__(self, held: CachedSequence) -> None:
        self._held = held
        self._slot = held.slot
        self._source = held.slot.source
        self._config = held.slot.source.config
        # Whether the prompt of the coming forward, a block of it, was looked up as a whole.
        self._looked_up = False

    def before_blocks(self, call: GenerateCall) -> None:
        """Attach the stored beginning of a prompt that `generate` is about to compute in blocks, to an empty cache.

        What is left is computed in blocks after the exact prefix; or at once after a pruned one, if it is one block.
        """
        ids, block = call.whole_prompt, call.block
        if ids is None or not block or _not_ordinary(self._source.model.lm):
            return  # (The forward says why.)
        inputs = {**call.arguments, "input_ids": ids}
        prompt = ordinary_prompt(inputs, self._source.model.is_multimodal)
        asked = call.config
        shown = getattr(asked, "output_hidden_states", None) or getattr(asked, "output_attentions", None)
        if isinstance(prompt, str) or any(prompt.pads) or shown or _shows_inside(self._source.model.lm, inputs):
            return
        began = time.perf_counter()
        self._source.refresh()
        self._looked_up = True
        limit = prompt.ids.shape[1] - 1
        if limit >= self._config.chunk_size:
            self._attach(inputs, prompt, limit, block)
        attached = self._slot.attached
        if attached is None:
            return
        cut_before_blocks(call)
        if attached.request.keeps_all:
            beginning = Prompt(prompt.ids[:, : self._slot.tokens], prompt.pads)
            self._held.new_prompt = NewPrompt(beginning, block, began)

    def before_forward(self, inputs: dict[str, Any], from_generate: bool, block: int | None) -> None:
        """Look up the prompt of an empty cache; attach its stored beginning and cut that from `inputs`.

        Args:
            inputs: the forward's arguments by name, changed in place.
            from_generate: whether this is the first forward of a `generate` call.
            block: tokens per forward, if that call computes its prompt in blocks.
        """
        self._record(False)
        looked_up, self._looked_up = self._looked_up, False
        if self._held.length > 0:
            self._continue(inputs)
            return
        began = time.perf_counter()
        self._held.new_prompt = None
        prompt = _not_ordinary(self._source.model.lm) or ordinary_prompt(inputs, self._source.model.is_multimodal)
        if isinstance(prompt, str):
            note_unserved(self._slot, prompt)
            return
        # Weights, adapters or dtype may have changed since the last prompt, and stored K/V must match them.
        self._source.refresh()
        rows = 1
        if from_generate and not block and _all_alike(prompt) and not _shows_inside(self._source.model.lm, inputs):
            rows = len(prompt.ids)
            prompt = _one_row(inputs, prompt)
        limit = min(prompt.ids.shape[1] - pads for pads in prompt.pads) - _uncached_needed(inputs)
        # Sliding windows count columns, so padding after the prefix would push tokens out of them.
        in_order = not any(prompt.pads) or not any(self._source.model.windows)
        noticed = self._noticed(inputs, from_generate)
        if noticed or not in_order:
            note_unserved(self._slot, noticed or "left padding on a model with sliding windows", stored=True)
        elif limit >= self._config.chunk_size and not looked_up:
            self._attach(inputs, prompt, limit, block)
        attached = self._slot.attached
        # K/V computed after a pruned prefix are never stored.
        stores = attached is None or attached.request.keeps_all
        if stores or rows > 1:
            self._held.new_prompt = NewPrompt(prompt, block, began, rows, stores)
        if stores:
            self._record(True)

    def _attach(self, inputs: dict[str, Any], prompt: Prompt, limit: int, block: int | None) -> None:
        shared = _shared_beginning([prompt.row(row) for row in range(prompt.ids.shape[0])])
        stored = self._source.look_up(shared[:limit])
        if stored is None or stored.tokens < self._config.chunk_size:
            return
        shortest = min(prompt.ids.shape[1] - pads for pads in prompt.pads)
        config = self._config
        tokens = min(stored.tokens, limit, _leaves_voters(stored, shortest, config))
        # Later blocks of a chunked prefill must not be computed after a pruned prefix: their KV would stay wrong.
        if block and (not self._looked_up or shortest - tokens > block):
            config, tokens = replace(config, budget=1.0), min(stored.tokens, limit)
        if tokens < self._config.chunk_size:
            return
        prefix = AttachedPrefix.of(stored, tokens)
        if self._source.faster_to_compute(prefix, config):
            return
        self._slot.ids = torch.from_numpy(shared[:tokens].copy())
        self._slot.attach(prefix, config)
        self._held.suffix.clear()
        cut_cached(inputs, tokens)

    def _continue(self, inputs: dict[str, Any]) -> None:
        new, ids = self._held.new_prompt, inputs.get("input_ids")
        if new is None or not new.block or not isinstance(ids, torch.Tensor) or ids.shape[1] == 1:
            self._held.new_prompt = None
            return
        new.prompt = Prompt(torch.cat([new.prompt.ids, ids], dim=1), new.prompt.pads)
        self._record(True)

    def _record(self, recording: bool) -> None:
        for layer in self._held.layers:
            layer.record(recording)

    def after_forward(self, output: Any) -> Any:
        """Persist the prompt in the background, if its KV is exact. A result other than `None` replaces the output."""
        new = self._held.new_prompt
        if new is None:
            return None
        if new.stores:
            self._persist(new)
        rows, new.rows = new.rows, 1
        if not (new.block and new.stores):
            self._held.new_prompt = None
        if rows == 1:
            return None
        self._held.repeat_rows(rows)
        for name, value in output.items():
            if isinstance(value, torch.Tensor) and value.ndim > 1:
                output[name] = value.repeat_interleave(rows, dim=0)
        return output

    def _persist(self, new: NewPrompt) -> None:
        prompt = new.prompt
        rows: list[tuple[np.ndarray, list[LayerStates]]] = []
        seen: set[bytes] = set()
        for row in range(prompt.ids.shape[0]):
            numbers = prompt.row(row).cpu().numpy().astype(np.int64)
            if numbers.tobytes() not in seen:
                seen.add(numbers.tobytes())
                pads, tokens = prompt.pads[row], len(numbers)
                rows.append((numbers, [layer.row_states(row, pads, tokens) for layer in self._held.layers]))
        self._record(False)
        self._source.store.inner.submit_background(
            self._persisting(rows, time.perf_counter() - new.began), [r for r, _ in rows]
        )

    def _persisting(self, rows: list[tuple[np.ndarray, list[LayerStates]]], seconds: float) -> Callable[[], None]:
        """The function with which the background thread stores `rows`. It keeps neither cache nor session alive."""
        store, fingerprint, geometry = self._source.store, self._source.fingerprint, self._source.geometry
        follow = after_this(states for _, layers in rows for keys, values, _ in layers for states in (keys, values))

        def persist() -> None:
            with follow():
                persist_rows(rows, store.inner, fingerprint, geometry, seconds)

        return persist

    def _noticed(self, inputs: dict[str, Any], from_generate: bool) -> str | None:
        """Why leaving cached tokens out of the forward would change what the caller gets, or `None`."""
        lm = self._source.model.lm
        if inputs.get("labels") is not None:
            return "a loss over all tokens"
        if not from_generate and torch.is_grad_enabled() and any(p.requires_grad for p in lm.parameters()):
            return "gradients are wanted (use torch.no_grad() or torch.inference_mode())"  # Stored KV has none.
        if _shows_inside(lm, inputs):
            return "hidden states or attentions of all tokens are wanted"
        wanted = inputs.get("logits_to_keep")
        if isinstance(wanted, int) and not isinstance(wanted, bool) and wanted >= 1:
            return None
        if wanted is None and from_generate:
            # Assisted decoding needs the logits of all its drafts; without `logits_to_keep` their number is unknown.
            assisted = is_assisted(self._held.layers)
            return "assisted decoding of a model without logits_to_keep" if assisted else None
        return "logits of all tokens are wanted (pass logits_to_keep=1 for the last one)"


def _leaves_voters(stored: StoredPrefix, tokens: int, config: ContiguousKVConfig) -> int:
    """The longest pruned prefix that leaves enough of a prompt of `tokens` tokens to choose its chunks, in tokens.

    If all but a few tokens are stored, this very prompt was asked before, and its question is stored too. The question
    begins where an earlier prompt diverged, or else somewhere in the last tokens. (This does not apply to a short
    question after a whole stored document.)
    """
    voters, last = voters_wanted(config), stored.spans[-1].segment
    whole = stored.tokens == last.first_chunk * config.chunk_size + last.num_tokens
    if config.budget == 1.0 or tokens - stored.tokens >= (min(voters, FEWEST_VOTERS) if whole else voters):
        return tokens
    starts = [span.first_chunk * config.chunk_size for span in stored.spans]
    turns = [start for start in starts if tokens - LONGEST_QUESTION <= start <= tokens - voters]
    return max(turns, default=tokens - QUESTION_PER_VOTER * voters)


def _all_alike(prompt: Prompt) -> bool:
    """Whether all rows of a batch are the same prompt, as with beams or several samples."""
    ids = prompt.ids
    return len(ids) > 1 and not any(prompt.pads) and bool((ids[1:] == ids[0]).all())


def _one_row(inputs: dict[str, Any], prompt: Prompt) -> Prompt:
    """Reduce a batch of equal rows in `inputs` to one row; returns its prompt."""
    batch = len(prompt.ids)
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[-2] == batch:
            inputs[name] = value[..., :1, :]
    return Prompt(prompt.ids[:1], prompt.pads[:1])


def _not_ordinary(lm: Any) -> str | None:
    """Why the model's K/V now depend on more than its weights and tokens, or `None`."""
    if lm.training:
        return "the model is in training mode"
    if torch.is_autocast_enabled(next(lm.parameters()).device.type):
        return "autocast"
    return adapters_of_rows(lm)


def _uncached_needed(inputs: dict[str, Any]) -> int:
    wanted = inputs.get("logits_to_keep")
    return max(1, wanted) if isinstance(wanted, int) else 1


def _shows_inside(lm: Any, inputs: dict[str, Any]) -> bool:
    """Whether the caller requests hidden states or attentions of all tokens."""
    config = getattr(lm, "config", None)
    for name in ("output_hidden_states", "output_attentions"):
        asked = inputs.get(name)
        if asked or (asked is None and getattr(config, name, False)):
            return True
    return False


def _shared_beginning(rows: list[torch.Tensor]) -> np.ndarray:
    first = rows[0].cpu().numpy().astype(np.int64)
    length = len(first)
    for row in rows[1:]:
        other = row.cpu().numpy()
        length = min(length, len(other))
        differs = np.nonzero(first[:length] != other[:length])[0]
        length = int(differs[0]) if len(differs) else length
    return first[:length]
