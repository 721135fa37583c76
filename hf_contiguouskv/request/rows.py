"""The rows of a batch that a request serves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..selection import voting_queries


@dataclass(frozen=True)
class Rows:
    """The rows of a batch, with equal rows (beams of one prompt) taken once.

    Attributes:
        representatives: int64 `(unique,)`: a batch row for each distinct one.
        of_batch: int64 `(batch,)`: which distinct row each batch row is.
        voting: bool `(unique, q)`: queries that count in a selection.
        visible: bool `(unique, q)`: suffix tokens that are not padding.
    """

    representatives: torch.Tensor
    of_batch: torch.Tensor
    voting: torch.Tensor
    visible: torch.Tensor

    def voters(self, limit: int | None, recent: int | None) -> list[torch.Tensor]:
        """Per distinct row, the positions of the queries that vote (see `voting_queries`)."""
        return [voting_queries(voting, limit, recent) for voting in self.voting]

    @property
    def in_order(self) -> bool:
        """Whether the distinct rows are the batch's rows."""
        return len(self.representatives) == len(self.of_batch)

    @classmethod
    def distinct(cls, batch: int, q_length: int) -> Rows:
        """Every row for itself, every token real and voting."""
        real = torch.ones(batch, q_length, dtype=torch.bool)
        return cls(torch.arange(batch), torch.arange(batch), real, real)


class AskingRows(NamedTuple):
    """The distinct rows on one device.

    Attributes:
        representatives: int64 `(unique,)`, a batch row for each; `None`: they are the batch's rows.
        voters: per row the positions of the queries that count, int64 `(n,)`.
        visible: bool `(unique, q)`, the suffix tokens that are no padding.
    """

    representatives: torch.Tensor | None
    voters: list[torch.Tensor]
    visible: torch.Tensor
