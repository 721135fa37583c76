"""The token ids that a cache holds after its prefix. They decide whether a prompt continues the cached tokens."""

from __future__ import annotations

from typing import Any

import torch

HIDDEN = -1
"""Replaces the id of a token that the attention mask hides (padding), because that id has no meaning."""


class CachedTokens:
    """The ids of the suffix, one row per batch row, updated by every operation on the cache.

    If they are unknown (embeddings were passed, or a forward was not seen), no prompt continues them.
    """

    def __init__(self) -> None:
        # int64 (rows, n); `None` if unknown; (0, 0) if nothing has been cached.
        self._ids: torch.Tensor | None = torch.zeros(0, 0, dtype=torch.long)

    def clear(self) -> None:
        """Make the suffix empty."""
        self._ids = torch.zeros(0, 0, dtype=torch.long)

    def forget(self) -> None:
        """Mark the ids as unknown."""
        self._ids = None

    def append_new(self, inputs: dict[str, Any]) -> None:
        """Append the tokens that a forward with these arguments (by name) is about to cache."""
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if not isinstance(ids, torch.Tensor) or ids.ndim != 2:
            self.forget()
            return
        new = ids.detach().cpu().to(torch.long)
        if isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape[1] >= new.shape[1]:
            new = new.masked_fill(mask[:, -new.shape[1] :].detach().cpu() == 0, HIDDEN)
        self._append(new)

    def _append(self, ids: torch.Tensor) -> None:
        if self._ids is None:
            return
        if self._ids.shape[1] == 0:
            self._ids = ids
        elif len(self._ids) == len(ids):
            self._ids = torch.cat([self._ids, ids], dim=1)
        else:
            self._ids = None

    def crop(self, length: int) -> None:
        """Keep only the first `length` columns."""
        if self._ids is not None:
            self._ids = self._ids[:, : max(0, length)]
        elif length <= 0:
            self.clear()

    def select(self, rows: torch.Tensor) -> None:
        """Keep only these rows (positions, or a bool mask), in this order."""
        if self._ids is not None and len(self._ids):
            self._ids = self._ids[rows.cpu()]

    def repeat(self, times: int) -> None:
        """Repeat each row `times` times."""
        if self._ids is not None:
            self._ids = self._ids.repeat_interleave(times, dim=0)

    def known(self, length: int) -> torch.Tensor | None:
        """The suffix, int64 `(rows, length)`; `None` if any of it is unknown."""
        return self._ids if self._ids is not None and self._ids.shape[1] == length else None

    def continued_by(
        self, prompt: torch.Tensor, hidden: torch.Tensor | None, prefix: torch.Tensor | None, length: int
    ) -> bool:
        """Whether each row of a prompt provably begins with prefix and suffix of the same row.

        Args:
            prompt: int64 `(rows, columns)`.
            hidden: bool of the same shape, true where the prompt's mask hides a token; `None` if it hides none.
            prefix: int64 `(n,)`, or `None`.
            length: columns cached after the prefix.

        Padding may precede the prefix in the prompt; the cache holds it between prefix and suffix.
        """
        suffix = self.known(length)
        before = torch.zeros(0, dtype=torch.long) if prefix is None else prefix
        cached = len(before) + length
        if suffix is None or len(prompt) != len(suffix) or prompt.shape[1] < cached:
            return False
        prompt = prompt[:, :cached].cpu()
        padding = torch.zeros_like(prompt, dtype=torch.bool) if hidden is None else hidden[:, :cached].cpu()
        for row, pad, own in zip(prompt, padding, suffix, strict=True):
            pads = int((own != HIDDEN).long().cumsum(0).eq(0).sum())
            layouts = [torch.cat([before, own])]
            if pads and len(before):
                layouts.append(torch.cat([own[:pads], before, own[pads:]]))
            shown = row.masked_fill(pad, HIDDEN)
            if not any(torch.equal(shown, layout) for layout in layouts):
                return False
        return True
