"""From the extents of a slab to the rows of K and V that attention reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Slots:
    """Which slots of a slab a row uses.

    Attributes:
        chunks: what the slab holds (kept so that its identity stays its own).
        take: the slots as an index, or `None` where they are the first `count`.
        count: how many.
    """

    chunks: list[int]
    take: torch.Tensor | None
    count: int

    @classmethod
    def of(cls, chunks: list[int], selected: list[int] | None, keep: int, device: torch.device) -> Slots:
        """Slots of `chunks` for a row that uses `selected` (`None`: the first `keep` chunks)."""
        wanted = set(range(keep) if selected is None else selected)
        slots = [slot for slot, chunk in enumerate(chunks) if chunk in wanted]
        if not slots or slots[-1] == len(slots) - 1:
            return cls(chunks, None, len(slots))
        return cls(chunks, torch.tensor(slots, dtype=torch.long, device=device), len(slots))

    def copy(self, source: torch.Tensor, destination: torch.Tensor, start: int) -> None:
        """From `(n, 2, kv_heads, c, head_dim)` to `(2, kv_heads, kept, c, head_dim)`, from position `start` on."""
        if self.count:
            used = source[: self.count] if self.take is None else source.index_select(0, self.take)
            destination.narrow(2, start, self.count).copy_(used.permute(1, 2, 0, 3, 4))
