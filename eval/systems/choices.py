"""Chosen tokens and the units that they lie in; and how an accelerator chooses.

On a CPU numpy chooses (`token_scores`), which takes a third of the time that tensor calls do. On an accelerator
everything stays there but one number for each unit, which names the reads: the host waits once for each choice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from .token_scores import Tokens


@dataclass(frozen=True)
class Chosen:
    """Chosen tokens of one layer.

    Attributes:
        places: where they are, int64 `(..., kept)`, ascending; on the device of attention.
        unit_of: which unit each is in, int64, of the same shape, on the same device.
        held: how many of them each unit holds, `(units,)`, on the same device.
        counts: the same on the host.
    """

    places: torch.Tensor
    unit_of: torch.Tensor
    held: torch.Tensor
    counts: npt.NDArray[np.integer]

    @classmethod
    def on_host(cls, places: Tokens, unit_of: Tokens, units: int) -> Chosen:
        """Tokens that a CPU has chosen, of so many units."""
        counts = np.bincount(unit_of.ravel(), minlength=units)
        return cls(torch.from_numpy(places), torch.from_numpy(unit_of), torch.from_numpy(counts), counts)

    @property
    def units(self) -> Tokens:
        """Units that hold a chosen token, int64 ascending."""
        return np.flatnonzero(self.counts)

    def ranks(self) -> torch.Tensor:
        """Which of `units` each token is in, int64 `(..., kept)`."""
        return ((self.held > 0).cumsum(0) - 1)[self.unit_of]


def held_by(unit_of: torch.Tensor, units: int) -> torch.Tensor:
    """How many tokens each of so many units holds, int32 `(units,)`; never waits, as `torch.bincount` does."""
    flat = unit_of.flatten()
    return flat.new_zeros(units, dtype=torch.int32).scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))


def best_on_device(mass: torch.Tensor, keep: int) -> torch.Tensor:
    """As `token_scores.best_tokens`, without the host; `mass` has no NaN."""
    return mass.sort(dim=-1, descending=True, stable=True).indices[..., :keep].sort(-1).values


def voted_on_device(chosen: torch.Tensor, mass: torch.Tensor, keep: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `token_scores.voted`, without the host; and how many tokens each two rows have in common.

    Args:
        chosen: int64 `(rows, keep)`.
        mass: float32 `(rows, n)`.
        keep: how many tokens.

    Returns:
        int64 `(keep,)`, ascending, and int32 `(rows, rows)`.
    """
    named = torch.zeros_like(mass).scatter_(1, chosen, 1.0)
    by_mass = mass.sum(0).sort(descending=True, stable=True).indices
    by_votes = named.sum(0)[by_mass].sort(descending=True, stable=True).indices
    # Counts of up to millions: exact in float32, in a TF32 product too.
    return by_mass[by_votes[:keep]].sort().values, (named @ named.T).int()
