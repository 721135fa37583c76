"""How close the distributions of next tokens are to those of the full cache."""

from __future__ import annotations

import torch


def divergence(reference: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """`KL(reference || logits)` at each position, in nats.

    Args:
        reference, logits: `(positions, vocabulary)`, any float dtype.

    Returns:
        float32 `(positions,)`, never negative except by rounding.
    """
    theirs, ours = reference.float().log_softmax(-1), logits.float().log_softmax(-1)
    return (theirs.exp() * (theirs - ours)).sum(-1)


def agreement(reference: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """1 at each position where both have the same most likely token, else 0: float32 `(positions,)`."""
    return (reference.argmax(-1) == logits.argmax(-1)).float()
