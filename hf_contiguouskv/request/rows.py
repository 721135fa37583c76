"""The rows of a batch that a request serves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..hardware.accelerator import send
from ..selection import voting_queries


@dataclass(frozen=True)
class Rows:
    """The rows of a batch. Equal rows (beams of one prompt) count as one distinct row.

    Attributes:
        representatives: int64 `(unique,)`: a batch row for each distinct row.
        of_batch: int64 `(batch,)`: per batch row, its distinct row.
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
        """Rows that are all distinct, with only real and voting tokens."""
        real = torch.ones(batch, q_length, dtype=torch.bool)
        return cls(torch.arange(batch), torch.arange(batch), real, real)


class AskingRows(NamedTuple):
    """The distinct rows, as a leader layer needs them, on its device.

    Attributes:
        representatives: int64 `(unique,)`, a batch row for each distinct row; `None`: all batch rows are distinct.
        voters: per distinct row, the positions of the queries that count, int64 `(n,)`.
        visible: bool `(unique, q)`, the suffix tokens that are not padding.
        positions: see `SelectionInput.positions`.
    """

    representatives: torch.Tensor | None
    voters: list[torch.Tensor]
    visible: torch.Tensor
    positions: torch.Tensor | None = None


@dataclass(frozen=True)
class NextTokens:
    """The tokens of a forward after that of the first suffix tokens.

    Attributes:
        batch: rows.
        cached: columns of the suffix before this forward.
        new: columns that it passes.
        drafts: how many of them, at the end, are drafts of assisted decoding, which never vote.
        mask: 2D attention mask over prefix, suffix and new tokens, or `None`.
    """

    batch: int
    cached: int
    new: int
    drafts: int
    mask: torch.Tensor | None

    def visible(self, prefix_tokens: int) -> torch.Tensor:
        """Which suffix tokens are not padding, bool `(batch, cached + new)` on the CPU."""
        length = self.cached + self.new
        if self.mask is None or self.mask.shape[1] != prefix_tokens + length:
            return torch.ones(self.batch, length, dtype=torch.bool)
        return self.mask[:, prefix_tokens:].to(torch.bool).cpu()


class SuffixRows:
    """The rows of the first suffix tokens, copied to each device once.

    Args:
        rows: of the batch.
        queries, recent: how many queries of each row vote (see `config.Selection`).

    Attributes:
        rows: as passed.
        voters: per distinct row, the positions of the queries that vote.
    """

    def __init__(self, rows: Rows, queries: int | None, recent: int) -> None:
        self.rows = rows
        self.voters = rows.voters(queries, recent)
        self._row_of: dict[torch.device, torch.Tensor] = {}
        self._asking: dict[torch.device, AskingRows] = {}

    def row_of(self, device: torch.device) -> torch.Tensor:
        """Per batch row, its distinct row: int64 `(batch,)` on `device`. The host does not wait for the copy."""
        found = self._row_of.get(device)
        if found is None:
            found = self._row_of[device] = send(self.rows.of_batch, device)
        return found

    def asking_on(self, device: torch.device) -> AskingRows:
        """The distinct rows, for a leader layer on `device`."""
        found = self._asking.get(device)
        if found is None:
            voters = send(torch.cat(self.voters), device).split([len(one) for one in self.voters])
            some = None if self.rows.in_order else send(self.rows.representatives, device)
            found = self._asking[device] = AskingRows(some, list(voters), send(self.rows.visible, device))
        return found
