"""Share of positions at which prediction and reference have the same most likely token."""

from __future__ import annotations

from eval.metrics import base, fidelity


class Agreement(base.MeanOfLogits):
    """Share of positions at which prediction and reference have the same most likely token."""

    of_positions = staticmethod(fidelity.agreement)
