"""Mean Kullback-Leibler divergence of the predictions' distributions from the references', in nats."""

from __future__ import annotations

try:
    from contiguouskv_eval.metrics import base, fidelity
except ModuleNotFoundError:  # (A checkout: the package is the folder `eval`.)
    from eval.metrics import base, fidelity


class KL(base.MeanOfLogits):
    """Mean Kullback-Leibler divergence of the predictions' distributions from the references', in nats."""

    of_positions = staticmethod(fidelity.divergence)
