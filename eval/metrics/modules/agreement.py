"""Share of positions at which prediction and reference have the same most likely token."""

from __future__ import annotations

try:
    from contiguouskv_eval.metrics import base, fidelity
except ModuleNotFoundError:  # (A checkout: the package is the folder `eval`.)
    from eval.metrics import base, fidelity


class Agreement(base.MeanOfLogits):
    """Share of positions at which prediction and reference have the same most likely token."""

    of_positions = staticmethod(fidelity.agreement)
